"""How fast this machine would decode with a reader, from one product of a matrix and a vector."""

from __future__ import annotations

import time
from functools import cache

import numpy as np

SIDE = 4096
"""Rows and columns of the matrix: 64 MB, more than the caches of most processors hold."""
TRIALS = 8
SHARE = 0.4
"""Share of a decode step that goes to reading weights: 2.5 of 6.1 ms with SmolLM2-135M, see notebooks/LOG.md."""


def weight_bytes(parameters: int) -> int:
    """Return the bytes of weights in 8 bits, with a scale of 32 bits for every 32 of them.

    >>> weight_bytes(1000)
    1125
    """
    return parameters * 36 // 32


def decode_rate(read_bytes: int) -> float:
    """Return the tokens a second that a reader of so many bytes of weights would decode on this machine, roughly."""
    return SHARE * _bytes_per_s() / read_bytes


@cache
def _bytes_per_s() -> float:
    """Return how fast a matrix of this machine is read in a product, the fastest of some trials."""
    matrix, vector = np.ones((SIDE, SIDE), np.float32), np.ones(SIDE, np.float32)
    seconds = []
    for _ in range(TRIALS):
        began = time.perf_counter()
        matrix @ vector
        seconds.append(time.perf_counter() - began)
    return matrix.nbytes / min(seconds)
