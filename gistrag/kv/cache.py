"""A gist cache, and how several become one memory.

A `GistCache` holds the keys and values that stand for one chunk. Its keys are *un-rotated*: they carry no position
yet, so the same file can stand anywhere in a prompt. `concatenate` gives every cache its place, rotates all
keys once in float32, and returns the `Memory` a model answers from::

    spread   prefix 0…P   first chunk P…P+n₁   second chunk P+n₁…P+n₁+n₂   question
    packed   prefix 0…P   first gists P…P+g₁   second gists P+g₁…P+g₁+g₂   question

*Spread* keeps the distances of the text (EPL, arXiv 2409.14364); *packed* lets many chunks fit a short window. Heads
may keep different numbers of tokens; the slots that a head does not fill are padding, which nothing attends to.
This module knows no model, no file and no tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from gistrag.kv.quantization import BITS, dequantize, quantize
from gistrag.kv.rope import Rope
from gistrag.settings import KvCacheDtype

Layout = Literal["spread", "packed"]


@dataclass(frozen=True, eq=False)
class GistCache:
    """Keys and values that stand for one chunk of text.

    Attributes:
        kv: ``(layers, 2, kv_heads, slots, head_dim)``; un-rotated keys at 0, values at 1.
        positions: position of each gist inside its chunk, ``(gists,)``, or ``(layers, kv_heads, slots)`` where
            every head kept its own tokens; int64, each in ``[0, source_tokens)``, or -1 for a padding slot.
        source_tokens: tokens of text the cache stands for; the span it takes in a spread prompt.
    """

    kv: Tensor
    positions: Tensor
    source_tokens: int

    @property
    def gists(self) -> int:
        """Tokens that a head keeps, in the mean over heads."""
        if self.positions.ndim == 1:
            return self.kv.shape[3]
        return int((self.positions >= 0).sum()) // (self.kv.shape[0] * self.kv.shape[2])

    @property
    def is_ragged(self) -> bool:
        """Whether heads keep different numbers of tokens."""
        return self.positions.ndim == 3 and bool((self.positions < 0).any())

    @property
    def visible(self) -> Tensor:
        """Slots that hold a gist token, ``(layers, kv_heads, slots)`` bool."""
        return (self.positions >= 0).expand(self.kv.shape[0], *self.kv.shape[2:4])

    @property
    def is_finite(self) -> bool:
        """Whether the cache can be used; one number that is not finite poisons every answer."""
        return bool(torch.isfinite(self.kv).all())

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
        visible: slots that hold a gist token, ``(layers, kv_heads, slots)`` bool; None where all do.
    """

    kv: Tensor
    next_position: int
    visible: Tensor | None = None

    @property
    def slots(self) -> int:
        """Cache slots the memory takes."""
        return self.kv.shape[3]

    @property
    def carried_slots(self) -> float:
        """Slots that an answer carries, in the mean over layers: all but those that a layer left empty."""
        return self.slots if self.visible is None else int(self.visible.any(dim=1).sum()) / len(self.visible)


def as_stored(cache: GistCache, kv_cache_dtype: KvCacheDtype) -> GistCache:
    """Return a cache as it comes back from its file."""
    bits = BITS.get(kv_cache_dtype)
    return replace(cache, kv=dequantize(quantize(cache.kv, bits), cache.kv.dtype)) if bits else cache


def relocate(cache: GistCache, offset: int, *, rope: Rope, layout: Layout = "spread") -> Tensor:
    """Return the keys and values of *cache* with its keys rotated to stand from position *offset* on.

    Rotation is in float32 and rounded once to the dtype of the cache. Shape as `GistCache.kv`. Packed gists stand one
    behind the other; those of ragged heads at the positions of the text, scaled to the shorter span.
    """
    local = cache.positions
    if layout == "packed" and cache.is_ragged:
        local = local * cache.gists // cache.source_tokens
    elif layout == "packed":
        local = torch.arange(cache.gists, device=cache.kv.device)
    moved = cache.kv.clone()
    keys = moved[:, 0]  # (layers, kv_heads, gists, head_dim)
    if keys.device.type == "cpu" and cache.is_ragged:  # padding needs no rotation, but finding it makes a GPU wait
        held = cache.visible
        keys[held] = rope.rotate(keys[held], local[held] + offset).to(keys.dtype)
    else:
        keys.copy_(rope.rotate(keys, local + offset))
    return moved


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
    is_ragged = any(cache.is_ragged for cache in caches)
    visible = torch.cat([cache.visible for cache in caches], dim=2) if is_ragged else None
    return Memory(torch.cat(placed, dim=3), offset, visible)


@dataclass(frozen=True, eq=False)
class Memories:
    """Memories as one batch, padded on the left.

    Attributes:
        kv: ``(layers, 2, batch, kv_heads, slots, head_dim)``.
        real: ``(batch, slots)`` bool, slots that are no padding.
        visible: ``(layers, batch, kv_heads, slots)`` bool, slots that hold a gist token; None where all do.
    """

    kv: Tensor
    real: Tensor
    visible: Tensor | None = None

    @property
    def slots(self) -> int:
        """Cache slots of the longest memory."""
        return self.kv.shape[4]


def side_by_side(memories: Sequence[Memory]) -> Memories:
    """Return memories as one batch; a batch of one copies nothing."""
    if len(memories) == 1:
        (memory,) = memories
        visible = None if memory.visible is None else memory.visible[:, None]
        return Memories(memory.kv[:, :, None], torch.ones(1, memory.slots, dtype=torch.bool), visible)
    slots = max(memory.slots for memory in memories)
    pads = [slots - memory.slots for memory in memories]
    kv = [functional.pad(memory.kv, (0, 0, pad, 0)) for memory, pad in zip(memories, pads, strict=True)]
    real = torch.arange(slots) >= torch.tensor(pads)[:, None]
    visible = None
    if any(memory.visible is not None for memory in memories):
        seen = [memory.kv.new_ones(memory.kv[:, 0, ..., 0].shape, dtype=torch.bool) if memory.visible is None
                else memory.visible for memory in memories]  # fmt: skip
        visible = torch.stack([functional.pad(one, (pad, 0)) for one, pad in zip(seen, pads, strict=True)], dim=1)
    return Memories(torch.stack(kv, dim=2), real, visible)
