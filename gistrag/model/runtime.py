"""The one seam below every answer: a runtime reads token ids behind a memory and says which token comes next.

Two runtimes exist, and nothing above them knows which one it has::

    torch   `gistrag.model.gist_model.GistModel`   any device, training, compression; the reference
    cpu     `gistrag.model.cpu_runtime.CpuRuntime` 8-bit weights on a CPU, without torch in the process

A memory belongs to the runtime that made it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from gistrag.kv.packed import Gists
from gistrag.model.prompt import Prompt, passage_text
from gistrag.model.tokenizer import plain_tokenizer
from gistrag.settings import Layout

Floats = npt.NDArray[np.float32]

TEMPERATURE_MIN = 1e-4
"""Below it the likeliest token is taken, as dividing by it would leave no other a chance, or overflow."""


class AnyMemory(Protocol):
    """What a runtime answers from: keys and values of passages, in their places."""

    @property
    def next_position(self) -> int:
        """Position of the first token read behind it."""


M = TypeVar("M", bound=AnyMemory)


@dataclass
class Trace:
    """What the model did while it answered, a record for each token; that of the one that ends the answer included.

    Attributes:
        layers: whose attention is recorded.
        logprobs: log-probability of each token.
        opening: log-probability of every token of the vocabulary at the first step, ``(vocabulary,)``.
        attention: for each of `layers`, for each of its heads, what the token before attended to in the memory,
            ``(slots,)`` as in `Runtime.attention`.
    """

    layers: Sequence[int] = ()
    logprobs: list[float] = field(default_factory=list)
    opening: Floats | None = None
    attention: list[Mapping[int, list[Floats]]] = field(default_factory=list)

    def record(self, logits: Floats, token: int, attention: Mapping[int, list[Floats]]) -> None:
        """Add a step: the logits, ``(vocabulary,)``, the token that was taken, and the attention behind it."""
        shifted = logits - logits.max()
        total = np.log(np.exp(shifted).sum())
        self.logprobs.append(float(shifted[token] - total))
        if self.opening is None:
            self.opening = shifted - total
        self.attention.append(attention)


class Runtime(ABC, Generic[M]):
    """A language model that reads prompts behind a memory.

    Attributes:
        window: positions of its context window.
        layers, kv_heads, head_dim: of its cache.
        local_window: how far back those of its layers look that do not look at everything; None where all do.
        prompt: the words its chat template puts around passages and question.
        text_tokenizer: reads text as plain text.
        stop_ids: token ids that end an answer; end_id: the one that ends a turn of the chat template.
        line_ends: those of them with which no answer begins.
        model_folder: files of the base model as safetensors, None for a model that came from no folder.
        piece_tokens: so many tokens are read between two steps, at which a caller may stop.
        name: of the runtime; out_of_memory: what it raises when memory runs out.
    """

    name: str
    piece_tokens: int = 64
    window: int
    layers: int
    kv_heads: int
    head_dim: int
    local_window: int | None = None
    stop_ids: frozenset[int]
    line_ends: frozenset[int] = frozenset()
    end_id: int
    model_folder: Path | None = None
    out_of_memory: type[Exception] = MemoryError

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt) -> None:
        self.prompt = prompt
        self.text_tokenizer = plain_tokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._template_ids: dict[str, list[int]] = {}

    @property
    def reach(self) -> int:
        """Positions that every layer looks back over; gists that would stand further apart are packed."""
        return min(self.window, self.local_window or self.window)

    # Text to token ids, and back

    def encode(self, text: str) -> list[int]:
        """Return the token ids of *text* read as plain text: what looks like a special token is not one."""
        ids: list[int] = self.text_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_template(self, text: str) -> list[int]:
        """Return the token ids of our own template text, special tokens included."""
        if text not in self._template_ids:
            self._template_ids[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return list(self._template_ids[text])

    def encode_question(self, question: str) -> list[int]:
        """Return the token ids of a question in its frame, up to where the answer begins."""
        prompt = self.prompt
        plain = self.encode(f" {question.strip()}")
        return [*self.encode_template(prompt.before_question), *plain, *self.encode_template(prompt.after_question)]

    def encode_passage(self, text: str, heading: Sequence[str] = ()) -> list[int]:
        """Return the token ids of a chunk as it stands in the prompt; which `compress` takes."""
        return self.encode(passage_text(text, heading))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of *ids* without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def save_tokenizer(self, path: Path) -> None:
        """Write the tokenizer, special tokens included, as one file of the tokenizers library."""
        self._tokenizer.save(str(path))

    # Memories, and what comes behind them

    @property
    @abstractmethod
    def fingerprint(self) -> dict[str, str]:
        """What a gist depends on: weights, adapter and tokenizer, RoPE geometry, dtype and prompt prefix."""

    @property
    @abstractmethod
    def device_name(self) -> str:
        """Where it computes, such as ``cpu`` or ``cuda:0``."""

    @property
    @abstractmethod
    def context_bytes_per_slot(self) -> int:
        """Bytes of keys and values that one slot takes while it is read."""

    @property
    @abstractmethod
    def prefix_slots(self) -> int:
        """Slots, and positions, of the shared prefix that begins every memory."""

    @abstractmethod
    def concatenate(self, caches: Sequence[Gists], *, layout: Layout = "spread", start: int = 0) -> M:
        """Return the shared prefix and gist caches side by side, each in its place; see `gistrag.kv.cache`.

        Args:
            start: position of the prefix; only distances count, so it may be negative.
        """

    @abstractmethod
    def read_text_steps(self, memory: M, ids: Sequence[int]) -> Generator[None, None, M]:
        """Return a memory with *ids* read as text behind it, without the adapter; there is room for them.

        Yields after each piece.
        """

    def read_text(self, memory: M, ids: Sequence[int]) -> M:
        """Return what `read_text_steps` does, without a stop on the way."""
        return finished(self.read_text_steps(memory, ids))

    def pieces(self, ids: Sequence[int]) -> list[Sequence[int]]:
        """Return token ids in pieces of `piece_tokens`; the last may be shorter."""
        return [ids[start : start + self.piece_tokens] for start in range(0, len(ids), self.piece_tokens)]

    @abstractmethod
    def decode_steps(
        self,
        memories: Sequence[M],
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        trace: Trace | None = None,
    ) -> Iterator[dict[int, int]]:
        """Yield the next token of every unfinished row, by row number, one decode step after the other.

        Row *n* is prompt *n*, read behind memory *n*. A row is finished by one of `stop_ids`, which is not yielded. No
        token is yielded between two pieces of a long prompt: an empty mapping.

        Args:
            temperature: below `TEMPERATURE_MIN` the most likely token is taken; above, tokens are sampled with *seed*.
            trace: records every step; only of a single row.
        """

    @abstractmethod
    def attention(self, memory: M, ids: Sequence[int], *, layers: Sequence[int]) -> dict[int, list[Floats]]:
        """Return how much each of *ids*, read behind *memory*, attends to the memory.

        Returns:
            for each of *layers* and each of its heads, ``(n, slots)``: the slots that its key-value head fills, in
            their order.
        """


AnyRuntime = Runtime[Any]
T = TypeVar("T")


def finished(steps: Generator[Any, None, T]) -> T:
    """Return what a generator returns once all its steps are made."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


def require_single(memories: Sequence[object], trace: Trace | None) -> None:
    """Check that a trace, which is of one answer, is asked for with one memory."""
    if trace is not None and len(memories) != 1:
        raise ValueError(f"a trace is of one answer, got {len(memories)} memories")
