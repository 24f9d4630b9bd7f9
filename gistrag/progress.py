"""How far a build is: a bar with rate and remaining time on a terminal, plain lines elsewhere.

The library never prints by itself; whoever starts a build passes a `Progress` or leaves it out.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class Progress(Protocol):
    """What a build tells: first the whole, then each step."""

    def plan(self, *, chunks: int, tokens: int, gist_bytes: int) -> None:
        """Say how much work there is before it starts."""

    def advance(self, *, chunks: int, tokens: int) -> None:
        """Say that this much more is done."""


class NoProgress:
    """A progress that nobody watches."""

    def plan(self, *, chunks: int, tokens: int, gist_bytes: int) -> None:
        """Say nothing."""

    def advance(self, *, chunks: int, tokens: int) -> None:
        """Say nothing."""


class TerminalProgress:
    """A progress on standard error: a bar where it is a terminal, else one plain line every *interval_s* seconds."""

    def __init__(self, *, interval_s: float = 10.0) -> None:
        self._interval_s = interval_s
        self._bar: Bar | None = None
        self._done_chunks = self._done_tokens = self._chunks = self._tokens = 0
        self._started_s = self._spoke_s = time.monotonic()

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def plan(self, *, chunks: int, tokens: int, gist_bytes: int) -> None:
        """Print what is ahead, with the disk it needs."""
        self._chunks, self._tokens = chunks, tokens
        self._started_s = self._spoke_s = time.monotonic()
        _say(f"{chunks:,} chunks, {tokens:,} tokens to compress; the gists need up to {megabytes(gist_bytes)} of disk")
        if chunks and sys.stderr.isatty():
            self._start_bar()

    def advance(self, *, chunks: int, tokens: int) -> None:
        """Move the bar, or print a line when it is time for one."""
        self._done_chunks += chunks
        self._done_tokens += tokens
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done_tokens, note=self._note())
        elif time.monotonic() - self._spoke_s >= self._interval_s:
            self._spoke_s = time.monotonic()
            _say(f"{self._done_chunks:,} of {self._chunks:,} chunks, {self._note()}")

    def _note(self) -> str:
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        rate = self._done_tokens / elapsed_s
        left_s = (self._tokens - self._done_tokens) / rate if rate else 0
        return f"{self._done_chunks / elapsed_s:.1f} chunks/s, {rate:,.0f} tokens/s, {left_s:,.0f} s left"

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("compressing"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
        self._bar = Bar(*columns, console=Console(stderr=True))
        self._bar.add_task("", total=self._tokens, note="")
        self._bar.start()


def megabytes(count: int) -> str:
    """Return a number of bytes for people.

    >>> megabytes(1_500_000), megabytes(7_200_000_000)
    ('1.5 MB', '7.2 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
