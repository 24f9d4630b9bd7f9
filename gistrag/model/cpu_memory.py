"""The memory of the CPU runtime: a buffer with room behind what it holds.

A memory is a buffer that keys and values of passages are put into, and every token that is read adds its own behind
those of each head::

    head 0   prefix  first chunk   second chunk  question answer …
    head 1   prefix  first   second chunk  question answer …            heads keep different numbers of tokens
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gistrag.kv.packed import Floats

STEP = 256
"""Slots are handed out in multiples of this, so that arrays fit more often."""


class Buffer:
    """Room for keys and values. When nobody refers to it any more, its array is used again.

    Fresh memory of this size takes the system milliseconds to hand out.

    Args:
        shape: ``(2, layers, kv_heads, slots, head_dim)``; there may be more slots than asked for.
        spare: arrays that may be used again.

    Attributes:
        array: float32, unfilled.
        places: position of each slot, ``(layers, kv_heads, slots)``, unfilled; for layers with a window.
    """

    def __init__(self, shape: tuple[int, ...], spare: list[Floats], *, has_places: bool = False) -> None:
        self._spare = spare
        slots = -(-shape[3] // STEP) * STEP
        self.array = self._taken(slots)
        if self.array is None:
            self.array = np.empty((*shape[:3], slots, shape[4]), np.float32)
        self.places = np.empty(self.array.shape[1:4], np.int32) if has_places else None

    def _taken(self, slots: int) -> Any:
        """Return a spare array that fits, None where there is none; one that does not fit is dropped."""
        with suppress(IndexError):  # another thread may take the last one
            if slots <= (array := self._spare.pop()).shape[3] <= 2 * slots:
                return array
        return None

    def __del__(self) -> None:
        self._spare.append(self.array)
        del self._spare[:-2]


@dataclass(eq=False)
class CpuMemory:
    """Keys and values of passages, with room behind them.

    Attributes:
        buffer: holds them; memories that go on from the same passages share it.
        ends: filled slots of each head, ``(layers, kv_heads)`` int32.
        next_position: position of the first token read behind it.
        is_taken: whether its room holds something else: a text read behind it, or an answer being generated.
    """

    buffer: Buffer
    ends: npt.NDArray[np.int32]
    next_position: int
    is_taken: bool = False

    @property
    def keys(self) -> Floats:
        """Rotated keys, ``(layers, kv_heads, capacity, head_dim)``."""
        keys: Floats = self.buffer.array[0]
        return keys

    @property
    def values(self) -> Floats:
        """Values, ``(layers, kv_heads, capacity, head_dim)``."""
        values: Floats = self.buffer.array[1]
        return values

    @property
    def slots(self) -> int:
        """Slots of the head that fills most."""
        return int(self.ends.max())

    def with_room(self, count: int, spare: list[Floats]) -> CpuMemory:
        """Return a memory with room for *count* tokens more: itself, unless it is full or taken."""
        if self.slots + count <= self.keys.shape[2] and not self.is_taken:
            return self
        held = self.buffer.array
        shape, places = (*held.shape[:3], max(self.slots + count, held.shape[3]), held.shape[4]), self.buffer.places
        larger = Buffer(shape, spare, has_places=places is not None)
        larger.array[:, :, :, : self.slots] = held[:, :, :, : self.slots]
        if larger.places is not None and places is not None:
            larger.places[:, :, : self.slots] = places[:, :, : self.slots]
        return replace(self, buffer=larger, is_taken=False)
