"""A gist cache, and how several become one memory.

A `GistCache` holds the keys and values that stand for one chunk. Its keys are *un-rotated*: they carry no position
yet, so the same file can stand anywhere in a prompt. `concatenate` gives every cache its place, rotates all
keys once in float32, and returns the `Memory` a model answers from::

    spread   prefix 0…P   first chunk P…P+n₁   second chunk P+n₁…P+n₁+n₂   question
    packed   prefix 0…P   first gists P…P+g₁   second gists P+g₁…P+g₁+g₂   question

*Spread* keeps the distances of the text (EPL, arXiv 2409.14364); *packed* lets many chunks fit a short window.
This module knows no model, no file and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gistrag.quantisation import BITS, dequantise, quantise
from gistrag.rope import Rope
from gistrag.settings import KvCacheDtype

Layout = Literal["spread", "packed"]


@dataclass(frozen=True, eq=False)
class GistCache:
    """Keys and values that stand for one chunk of text.

    Attributes:
        kv: ``(layers, 2, kv_heads, gists, head_dim)``; un-rotated keys at 0, values at 1.
        positions: position of each gist inside its chunk, ``(gists,)``, or ``(layers, kv_heads, gists)`` where
            every head kept its own tokens; int64, each in ``[0, source_tokens)``.
        source_tokens: tokens of text the cache stands for; the span it takes in a spread prompt.
        fidelity: how much of the chunk it keeps, 0 to 1, see `gistrag.fidelity`; None where nobody measured.
    """

    kv: Tensor
    positions: Tensor
    source_tokens: int
    fidelity: float | None = None

    @property
    def gists(self) -> int:
        """Slots the cache takes."""
        return self.kv.shape[3]

    def to(self, device: torch.device) -> GistCache:
        """Return the cache on *device*."""
        return replace(self, kv=self.kv.to(device), positions=self.positions.to(device))

    def span(self, layout: Layout) -> int:
        """Return the positions the cache takes in a prompt."""
        return self.source_tokens if layout == "spread" else self.gists


@dataclass(frozen=True, eq=False)
class Memory:
    """What a model answers from: rotated keys and values, ready to be attended to.

    Attributes:
        kv: ``(layers, 2, kv_heads, slots, head_dim)``; rotated keys at 0, values at 1.
        next_position: position of the first token read after the memory.
    """

    kv: Tensor
    next_position: int

    @property
    def slots(self) -> int:
        """Cache slots the memory takes."""
        return self.kv.shape[3]


def as_stored(cache: GistCache, kv_cache_dtype: KvCacheDtype) -> GistCache:
    """Return a cache as it comes back from its file."""
    bits = BITS.get(kv_cache_dtype)
    return replace(cache, kv=dequantise(quantise(cache.kv, bits), cache.kv.dtype)) if bits else cache


def relocate(cache: GistCache, offset: int, *, rope: Rope, layout: Layout = "spread") -> Tensor:
    """Return the keys and values of *cache* with its keys rotated to stand from position *offset* on.

    Rotation is in float32 and rounded once to the dtype of the cache. Shape as `GistCache.kv`.
    """
    local = cache.positions if layout == "spread" else torch.arange(cache.gists, device=cache.kv.device)
    keys = rope.rotate(cache.kv[:, 0], local + offset)  # (layers, kv_heads, gists, head_dim)
    return torch.stack((keys.to(cache.kv.dtype), cache.kv[:, 1]), dim=1)


def concatenate(caches: Sequence[GistCache], rope: Rope, *, layout: Layout = "spread", start: int = 0) -> Memory:
    """Return the caches side by side, in the order given, as one memory.

    Each cache stands alone: any order and any subset is valid, and one cache concatenated is that cache relocated
    to position *start*.

    Args:
        start: position of the first cache; it may be negative, since only the distance to what is read later counts.

    Raises:
        ValueError: no cache, or caches of different models.
    """
    if not caches or len({cache.kv.shape[:3] + cache.kv.shape[4:] for cache in caches}) != 1:
        raise ValueError(f"expected caches of one model, got shapes {[tuple(cache.kv.shape) for cache in caches]}")
    placed, offset = [], start
    for cache in caches:
        placed.append(relocate(cache, offset, rope=rope, layout=layout))
        offset += cache.span(layout)
    return Memory(kv=torch.cat(placed, dim=3), next_position=offset)


def side_by_side(memories: Sequence[Memory]) -> tuple[Tensor, Tensor]:
    """Return memories as one batch, padded on the left: keys and values, and which slots are real.

    Shapes ``(layers, 2, batch, kv_heads, slots, head_dim)`` and ``(batch, slots)`` bool.
    """
    slots = max(memory.slots for memory in memories)
    padded = [torch.nn.functional.pad(memory.kv, (0, 0, slots - memory.slots, 0)) for memory in memories]
    empty = torch.tensor([slots - memory.slots for memory in memories])
    return torch.stack(padded, dim=2), torch.arange(slots) >= empty[:, None]
