"""The gist cache of a chunk as its file holds it: arrays of numpy, quantized or not.

Nothing here needs torch, so a process that only answers can do without it. The heads of a chunk stand one behind the
other in *rows*, layer by layer: a row is one key and one value of one head::

    layer 0, head 0: counts[0, 0] rows   layer 0, head 1: counts[0, 1] rows   …   layer 1, head 0: …
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from gistrag.settings import Layout

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

BITS = {"int8": 8, "int4": 4}
"""Bits of the numbers that a gist file may hold them in, by name."""
SCALE_OF_ONE = 144
"""The byte of a scale of 1: bytes reach from 2**-18 to 2**13.9, beyond what 16 bits hold in 4."""
_STEPS = np.arange(256) - SCALE_OF_ONE
SCALES: Floats = np.ldexp(1 + (_STEPS % 8) / 8, _STEPS // 8).astype(np.float32)
"""The scale that each byte stands for, see `gistrag.kv.quantization`."""


class Gists(ABC):
    """Keys and values that stand for one chunk of text.

    Attributes:
        source_tokens: tokens of text they stand for; the span they take in a spread prompt.
    """

    source_tokens: int

    @property
    @abstractmethod
    def gists(self) -> int:
        """Tokens that a head keeps, in the mean over heads."""

    def span(self, layout: Layout) -> int:
        """Return the positions they take in a prompt."""
        return self.source_tokens if layout == "spread" else self.gists


@dataclass(frozen=True, eq=False)
class Rows:
    """Dequantized rows of un-rotated keys and values.

    Attributes:
        keys, values: ``(kept, head_dim)`` float32.
        positions: of each row inside its chunk, ``(kept,)``.
        counts: rows of each head, ``(layers, kv_heads)``.
    """

    keys: Floats
    values: Floats
    positions: Integers
    counts: Integers


@dataclass(frozen=True, eq=False)
class PackedGists(Gists):
    """A gist cache as its file holds it.

    Attributes:
        arrays: ``kv`` ``(layers, 2, kv_heads, gists, head_dim)`` and ``positions`` ``(gists,)`` or ``(layers, kv_heads,
            gists)``; or, of ragged heads, ``kv`` ``(kept, 2, head_dim)``, ``positions`` ``(kept,)`` and ``counts``
            ``(layers, kv_heads)``. Of quantized ones also the scales, see `gistrag.kv.quantization.quantize`. Numbers
            of bfloat16 are kept as uint16.
        source_tokens: tokens of text the cache stands for.
        dtype: of the cache before it was quantized, such as ``bfloat16``.
    """

    arrays: Mapping[str, Array]
    source_tokens: int
    dtype: str

    def packed(self, _: str = "auto") -> PackedGists:
        """Return this, which is packed already."""
        return self

    @property
    def is_ragged(self) -> bool:
        """Whether heads keep different numbers of tokens."""
        return "counts" in self.arrays

    @property
    def is_quantized(self) -> bool:
        """Whether keys and values are whole numbers with scales."""
        return "key_scales" in self.arrays

    @cached_property
    def counts(self) -> Integers:
        """Tokens that each head keeps, ``(layers, kv_heads)``."""
        if self.is_ragged:
            return self.arrays["counts"].astype(np.int64)
        layers, _, kv_heads, gists, _ = self.arrays["kv"].shape
        return np.full((layers, kv_heads), gists, np.int64)

    @property
    def gists(self) -> int:
        """Tokens that a head keeps, in the mean over heads."""
        return int(self.counts.sum()) // self.counts.size

    @property
    def slots_and_width(self) -> tuple[int, int]:
        """Slots of the head that keeps most, and the head dimension."""
        keys = self.arrays["kv"]
        is_half = self.is_quantized and keys.dtype == np.uint8
        return int(self.counts.max()), keys.shape[-1] * (2 if is_half else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def rows(self) -> Rows:
        """Return the keys and values of all heads, dequantized, without padding slots."""
        return Rows(*self._dequantized(), self.positions, self.counts)

    @property
    def positions(self) -> Integers:
        """Position inside the chunk of each row of `rows`, ``(kept,)``."""
        positions = self.arrays["positions"].astype(np.int64)
        if self.is_ragged:
            return positions
        every: Integers = np.broadcast_to(positions, (*self.counts.shape, positions.shape[-1]))
        return every.reshape(-1)

    def _dequantized(self) -> tuple[Floats, Floats]:
        codes = self.arrays["kv"]
        if not self.is_ragged:
            codes = codes.transpose(0, 2, 3, 1, 4).reshape(-1, 2, codes.shape[-1])  # (kept, 2, head_dim)
        if not self.is_quantized:
            numbers = widened(codes, self.dtype)
            return numbers[:, 0], numbers[:, 1]
        if codes.dtype == np.uint8:  # two numbers a byte, the first half of them in the low halves
            codes = np.concatenate((codes & 15, codes >> 4), axis=-1).view(np.int8) - 8
        keys = codes[:, 0] * self._by_row(SCALES[self.arrays["key_scales"]])
        if "key_centres" in self.arrays:
            keys += self._by_row(widened(self.arrays["key_centres"], "bfloat16"))
        return keys, codes[:, 1] * SCALES[self.arrays["value_scales"]].reshape(-1, 1)

    def _by_row(self, of_head: Floats) -> Floats:
        """Return what each head has, ``(layers, kv_heads, head_dim)``, for each of its rows, ``(kept, head_dim)``."""
        return np.repeat(of_head.reshape(-1, of_head.shape[-1]), self.counts.ravel(), axis=0)


def widened(numbers: Array, dtype: str) -> Floats:
    """Return numbers of a 16-bit or wider type as float32; those of bfloat16 come as uint16.

    >>> widened(np.array([0x3F80], np.uint16), "bfloat16").tolist()
    [1.0]
    """
    if dtype == "bfloat16":
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32)


def stored_bytes(shape: Sequence[int], kv_cache_dtype: str, *, itemsize: int) -> int:
    """Return the bytes that keys and values take in a file.

    Args:
        shape: ``(layers, 2, kv_heads, gists, head_dim)``.
        kv_cache_dtype: ``int8``, ``int4``, or ``auto`` for numbers of *itemsize* bytes.

    >>> stored_bytes((30, 2, 3, 16, 64), "auto", itemsize=2), stored_bytes((30, 2, 3, 16, 64), "int8", itemsize=2)
    (368640, 191520)
    """
    if kv_cache_dtype not in BITS:
        return math.prod(shape) * itemsize
    layers, _, kv_heads, gists, head_dim = shape
    scales = layers * kv_heads * (head_dim + gists)
    centres = 2 * layers * kv_heads * head_dim if BITS[kv_cache_dtype] == 4 else 0
    return math.prod(shape) * BITS[kv_cache_dtype] // 8 + scales + centres
