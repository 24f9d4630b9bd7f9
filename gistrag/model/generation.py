"""From a memory and a prompt to an answer, token by token.

`generate` is a plain generator: the first ``next`` takes the time to first token, and closing it ends the work. What
is named *steps* also stops between pieces of a long text, so that its caller may end the work there or do some other.
The runtime decodes (`gistrag.model.runtime`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from gistrag.errors import ContextOverflowError
from gistrag.model.runtime import AnyRuntime, M, Runtime, Trace, finished


def generate(runtime: Runtime[M], memory: M, ids: Sequence[int], **options: Any) -> Iterator[int]:
    """Yield the token ids of the answer to the prompt *ids*, read behind *memory*; for *options* see `generate_steps`.

    Raises:
        ContextOverflowError: memory and prompt leave no position for an answer.
    """
    return (token for token in generate_steps(runtime, memory, ids, **options) if token is not None)


def generate_steps(
    runtime: Runtime[M],
    memory: M,
    ids: Sequence[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    trace: Trace | None = None,
) -> Iterator[int | None]:
    """Yield the token ids of the answer to the prompt *ids*, read behind *memory*, and None between pieces of it.

    Args:
        max_new_tokens: an answer that does not end by itself is cut here.
        temperature: 0 takes the most likely token; above 0, tokens are sampled with *seed*.
        trace: records every step.

    Raises:
        ContextOverflowError: memory and prompt leave no position for an answer.
    """
    room = min(max_new_tokens, require_room(runtime, memory.next_position + len(ids)))
    for tokens in runtime.decode_steps(
        [memory], [ids], max_new_tokens=room, temperature=temperature, seed=seed, trace=trace
    ):
        yield tokens.get(0)


def generate_batch(
    runtime: Runtime[M], memories: Sequence[M], prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 256
) -> list[list[int]]:
    """Return what `generate` yields at temperature 0 for each memory and prompt, computed as one batch."""
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in runtime.decode_steps(memories, prompts, max_new_tokens=max_new_tokens):
        for row, token in tokens.items():
            answers[row].append(token)
    return answers


def read_text(runtime: Runtime[M], memory: M, ids: Sequence[int]) -> M:
    """Return what `read_text_steps` does, without a stop on the way."""
    return finished(read_text_steps(runtime, memory, ids))


def read_text_steps(runtime: Runtime[M], memory: M, ids: Sequence[int]) -> Generator[None, None, M]:
    """Return *memory* with passages read as text behind it, without the adapter; yields between pieces of them.

    Raises:
        ContextOverflowError: they leave no position for a question.
    """
    if not ids:
        return memory
    require_room(runtime, memory.next_position + len(ids))
    return (yield from runtime.read_text_steps(memory, ids))


def require_room(runtime: AnyRuntime, used: int) -> int:
    """Return how many positions remain for an answer behind *used* ones.

    Raises:
        ContextOverflowError: none.
    """
    if used >= runtime.window:
        raise ContextOverflowError(
            f"passages and question take {used} positions, the model's context window has {runtime.window}; "
            "ask a shorter question or for fewer chunks"
        )
    return runtime.window - used


HALF_LETTER = "\ufffd"
"""What a decoder writes for bytes that are no whole letter; a letter of Korean often takes several tokens."""


def decode_stream(runtime: AnyRuntime, tokens: Iterable[int | None]) -> Iterator[str]:
    """Yield the text that each token adds, "" where that is none.

    A letter whose bytes are incomplete waits for the next token; bytes that stay incomplete are left out.
    """
    stream = DecodeStream(skip_special_tokens=True)
    for token in tokens:
        text = None if token is None else stream.step(runtime.text_tokenizer, token)
        yield (text or "").replace(HALF_LETTER, "")
