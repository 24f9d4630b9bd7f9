"""A time limit for an answer in the making."""

from __future__ import annotations

import time
from collections.abc import Iterator


class Timed:
    """The pieces of an answer until time is up, counted from when the first is asked for.

    Attributes:
        is_cut: time was up before the answer ended.
    """

    def __init__(self, pieces: Iterator[str], seconds: float) -> None:
        self._pieces, self._seconds = pieces, seconds
        self.is_cut = False

    def __iter__(self) -> Iterator[str]:
        deadline_s = time.monotonic() + self._seconds
        for piece in self._pieces:
            yield piece
            if time.monotonic() > deadline_s:
                self.is_cut = True
                return
