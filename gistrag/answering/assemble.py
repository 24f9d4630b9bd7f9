"""From passages to one memory: gist caches side by side, then what came as text, read behind them.

The product, its evaluation, its benchmarks and `gistrag export` all build their memories here, so a figure measured
on one of them holds for the others.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import chain

from gistrag.kv.packed import Gists
from gistrag.model.generation import read_text_steps
from gistrag.model.runtime import M, Runtime, finished
from gistrag.settings import Layout

Content = Gists | Sequence[int]
"""A passage as it enters a memory: its gists, or the token ids of its text."""


def span(content: Content, layout: Layout) -> int:
    """Return the positions that a passage takes in a prompt."""
    return content.span(layout) if isinstance(content, Gists) else len(content)


def fitting_layout(passages: Sequence[Content], room: int) -> Layout:
    """Return ``spread`` if the passages fit into *room* positions that way, ``packed`` otherwise."""
    return "spread" if sum(span(passage, "spread") for passage in passages) <= room else "packed"


def assemble(runtime: Runtime[M], passages: Sequence[Content], *, layout: Layout = "spread", start: int = 0) -> M:
    """Return what `assemble_steps` does, without a stop on the way."""
    return finished(assemble_steps(runtime, passages, layout=layout, start=start))


def assemble_steps(
    runtime: Runtime[M], passages: Sequence[Content], *, layout: Layout = "spread", start: int = 0
) -> Generator[None, None, M]:
    """Return the shared prefix and the passages as one memory: all gist caches in their order, then all texts.

    Yields between pieces of the texts.

    Args:
        layout: of the gists, see `gistrag.kv.cache.concatenate`.
        start: position of the prefix; only distances count, so it may be negative.

    Raises:
        ContextOverflowError: the passages read as text leave no position for a question.
    """
    caches = [passage for passage in passages if isinstance(passage, Gists)]
    texts = [passage for passage in passages if not isinstance(passage, Gists)]
    memory = runtime.concatenate(caches, layout=layout, start=start)
    return (yield from read_text_steps(runtime, memory, list(chain.from_iterable(texts))))
