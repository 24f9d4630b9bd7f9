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

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gistrag.kv.packed import BITS, Array, Gists, PackedGists
from gistrag.kv.quantization import dequantize, quantize
from gistrag.kv.rope import Rope
from gistrag.settings import KvCacheDtype, Layout


@dataclass(frozen=True, eq=False)
class GistCache(Gists):
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

    def packed(self, kv_cache_dtype: str = "auto") -> PackedGists:
        """Return the cache as its file holds it: no padding slots, positions in 16 bits where they fit.

        Args:
            kv_cache_dtype: ``auto`` for keys and values as they are, ``int8`` or ``int4``.
        """
        bits, kv = BITS.get(kv_cache_dtype), self.kv.detach().cpu()
        tensors = quantize(kv, bits) if bits and kv.ndim == 5 else {"kv": kv}
        small = torch.int16 if self.source_tokens <= torch.iinfo(torch.int16).max else torch.int32
        tensors["positions"] = self.positions.cpu().to(small)
        if self.is_ragged:
            tensors = _without_padding(tensors)
        arrays = {name: _as_array(tensor) for name, tensor in tensors.items()}
        return PackedGists(arrays, self.source_tokens, str(self.kv.dtype).removeprefix("torch."))

    @classmethod
    def unpacked(cls, gists: PackedGists, device: torch.device | str = "cpu") -> GistCache:
        """Return the cache that was packed, dequantized on *device*; a padding slot repeats the first of its head."""
        dtype: torch.dtype = getattr(torch, gists.dtype)
        tensors = {name: _as_tensor(array, device) for name, array in gists.arrays.items()}
        kv, positions = tensors["kv"], tensors["positions"].long()
        counts = tensors["counts"].long() if gists.is_ragged else None
        if gists.is_quantized:
            kv = dequantize(tensors, dtype, counts=counts)
        if counts is not None:  # only now, because padding slots would be most of the work
            kv, positions = _with_padding(kv, positions, counts)
        return cls(kv, positions, gists.source_tokens)


_BY_SLOT = ("positions", "value_scales")


def _without_padding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a cache with all that is kept in one row, ``(kept, …)``, and how much each head keeps."""
    kept = tensors["positions"] >= 0  # (layers, kv_heads, slots)
    rows = {name: tensors[name][kept] for name in _BY_SLOT if name in tensors}
    kv = tensors["kv"].permute(0, 2, 3, 1, 4)[kept]  # (kept, 2, head_dim)
    return {**tensors, **rows, "kv": kv, "counts": kept.sum(dim=-1).to(torch.int32)}


def _with_padding(kv: Tensor, positions: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `_without_padding` took; a padding slot repeats the first token of its head."""
    ends = counts.flatten().cumsum(0).view_as(counts)[..., None]  # (layers, kv_heads, 1)
    slots = torch.arange(int(counts.max()), device=counts.device)
    is_padding = slots >= counts[..., None]  # (layers, kv_heads, slots)
    index = ends - counts[..., None] + slots.masked_fill(is_padding, 0)
    return kv[index].permute(0, 3, 1, 2, 4), positions[index].masked_fill(is_padding, -1)


def _as_array(tensor: Tensor) -> Array:
    """Return a tensor as an array; numpy knows no bfloat16 and gets its bits."""
    bits = tensor.contiguous().view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor.contiguous()
    array: Array = bits.numpy()
    return array.view(np.uint16) if tensor.dtype == torch.bfloat16 else array


def _as_tensor(array: Array, device: torch.device | str) -> Tensor:
    """Return an array as a tensor on a device, copied there from page-locked memory."""
    tensor = torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)
    if array.dtype == np.uint16:
        tensor = tensor.view(torch.bfloat16)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class Memory:
    """What a model answers from: rotated keys and values, ready to be attended to.

    Attributes:
        kv: ``(layers, 2, kv_heads, slots, head_dim)``; rotated keys at 0, values at 1.
        next_position: position of the first token read after the memory.
        visible: slots that hold a gist token, ``(layers, kv_heads, slots)`` bool; None where all do.
        places: position of each slot, ``(layers, kv_heads, slots)``; None where they end, one by one, before
            `next_position`. Only layers with a window ask for them.
    """

    kv: Tensor
    next_position: int
    visible: Tensor | None = None
    places: Tensor | None = None

    @property
    def slots(self) -> int:
        """Cache slots the memory takes."""
        return self.kv.shape[3]

    @property
    def positions(self) -> Tensor:
        """Position of each slot, ``(layers, kv_heads, slots)``."""
        if self.places is not None:
            return self.places
        one_by_one = torch.arange(self.next_position - self.slots, self.next_position, device=self.kv.device)
        return one_by_one.expand(self.kv.shape[0], self.kv.shape[2], -1)

    @property
    def carried_slots(self) -> float:
        """Slots that an answer carries, in the mean over layers: all but those that a layer left empty."""
        return self.slots if self.visible is None else int(self.visible.any(dim=1).sum()) / len(self.visible)


def as_stored(cache: GistCache, kv_cache_dtype: KvCacheDtype) -> GistCache:
    """Return a cache as it comes back from its file."""
    bits = BITS.get(kv_cache_dtype)
    return replace(cache, kv=dequantize(quantize(cache.kv, bits), cache.kv.dtype)) if bits else cache


def placed(cache: GistCache, layout: Layout) -> Tensor:
    """Return the position of each gist in the span of its chunk, shape as `GistCache.positions`."""
    if layout == "spread":
        return cache.positions
    if cache.is_ragged:
        return cache.positions * cache.gists // cache.source_tokens
    return torch.arange(cache.gists, device=cache.kv.device)


def relocate(cache: GistCache, offset: int, *, rope: Rope, layout: Layout = "spread") -> Tensor:
    """Return the keys and values of *cache* with its keys rotated to stand from position *offset* on.

    Rotation is in float32 and rounded once to the dtype of the cache. Shape as `GistCache.kv`. Packed gists stand one
    behind the other; those of ragged heads at the positions of the text, scaled to the shorter span.
    """
    local = placed(cache, layout)
    moved = cache.kv.clone()
    keys = moved[:, 0]  # (layers, kv_heads, gists, head_dim)
    if keys.device.type == "cpu" and cache.is_ragged:  # padding needs no rotation, but finding it makes a GPU wait
        held = cache.visible
        layers = held.nonzero()[:, 0] if rope.is_by_layer else None
        keys[held] = rope.rotate(keys[held], local[held] + offset, layers).to(keys.dtype)
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
    moved, places, offset = [], [], start
    for cache in caches:
        moved.append(relocate(cache, offset, rope=rope, layout=layout))
        places.append((placed(cache, layout) + offset).expand(cache.kv.shape[0], *cache.kv.shape[2:4]))
        offset += cache.span(layout)
    is_ragged = any(cache.is_ragged for cache in caches)
    visible = torch.cat([cache.visible for cache in caches], dim=2) if is_ragged else None
    return Memory(torch.cat(moved, dim=3), offset, visible, torch.cat(places, dim=2))


@dataclass(frozen=True, eq=False)
class Memories:
    """Memories as one batch, padded on the left.

    Attributes:
        kv: ``(layers, 2, batch, kv_heads, slots, head_dim)``.
        real: ``(batch, slots)`` bool, slots that are no padding.
        positions: of each slot, ``(layers, batch, kv_heads, slots)``.
        visible: ``(layers, batch, kv_heads, slots)`` bool, slots that hold a gist token; None where all do.
    """

    kv: Tensor
    real: Tensor
    positions: Tensor
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
        real = torch.ones(1, memory.slots, dtype=torch.bool)
        return Memories(memory.kv[:, :, None], real, memory.positions[:, None], visible)
    slots = max(memory.slots for memory in memories)
    pads = [slots - memory.slots for memory in memories]
    kv = [functional.pad(memory.kv, (0, 0, pad, 0)) for memory, pad in zip(memories, pads, strict=True)]
    real = torch.arange(slots) >= torch.tensor(pads)[:, None]
    at = [functional.pad(memory.positions, (pad, 0)) for memory, pad in zip(memories, pads, strict=True)]
    visible = None
    if any(memory.visible is not None for memory in memories):
        seen = [memory.kv.new_ones(memory.kv[:, 0, ..., 0].shape, dtype=torch.bool) if memory.visible is None
                else memory.visible for memory in memories]  # fmt: skip
        visible = torch.stack([functional.pad(one, (pad, 0)) for one, pad in zip(seen, pads, strict=True)], dim=1)
    return Memories(torch.stack(kv, dim=2), real, torch.stack(at, dim=1), visible)
