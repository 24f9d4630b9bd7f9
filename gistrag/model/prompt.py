r"""The words around the passages: one prefix, a frame for each passage, a question.

The prompt is built from pieces so that a passage has the same tokens wherever it stands, as text or as gists::

    prefix      <|im_start|>system … <|im_end|><|im_start|>user\nPassages:\n\n    compressed once, for all
    passage     Heading > Subheading\nText of the chunk.\n\n                       compressed once a chunk
    question    Question: How long is a gist?<|im_end|><|im_start|>assistant\n      read at query time

Only prefix and the frame of the question may hold special tokens; passages and questions are plain text always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gistrag.qa.phrases import REFUSAL as REFUSAL

INSTRUCTION = (
    "You are a helpful assistant. Answer the question with the information in the passages. "
    "Give a short, direct answer."
)
CONTINUE = 'Continue the passage that says "{}"'
_SPLIT = "\u241e"

Render = Callable[[list[dict[str, str]]], str]


@dataclass(frozen=True)
class Prompt:
    """The text pieces of a prompt for one model.

    Attributes:
        prefix: everything before the first passage.
        before_question, after_question: the frame of the question.
    """

    prefix: str
    before_question: str
    after_question: str


def passage_text(text: str, heading: Sequence[str] = ()) -> str:
    r"""Return a chunk as it stands in the prompt, its heading path on a line of its own.

    >>> passage_text("Run make.", ("Install", "Linux"))
    'Install > Linux\nRun make.\n\n'
    """
    path = " > ".join(heading)
    return f"{path}\n{text.strip()}\n\n" if path else f"{text.strip()}\n\n"


def chat_prompt(render: Render | None, *, begin: str = "") -> Prompt:
    """Return the prompt for a model whose chat template is *render*, or for a plain language model when None.

    *render* turns ``[{"role": …, "content": …}]`` into text that ends where the assistant begins. Without it, the
    prompt begins with the token *begin*.
    """
    if render is None:
        return Prompt(f"{begin}{INSTRUCTION}\n\nPassages:\n\n", "Question:", "\nAnswer:")
    before, after = _rendered(render).split(_SPLIT)
    return Prompt(f"{before}Passages:\n\n", "Question:", after)


def _rendered(render: Render) -> str:
    user = {"role": "user", "content": _SPLIT}
    try:
        return render([{"role": "system", "content": INSTRUCTION}, user])
    except Exception:  # templates without a system role raise whatever their author chose
        return render([{"role": "user", "content": f"{INSTRUCTION}\n\n{_SPLIT}"}])
