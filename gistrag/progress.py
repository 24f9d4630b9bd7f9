"""Progress of long work on standard error: a bar with rate and remaining time on a terminal, plain lines elsewhere.

The library never prints by itself; the caller passes a `Progress` or leaves it out. The commands show synthesis and
evaluation with the same class.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

T = TypeVar("T")


class Progress(Protocol):
    """Receives the progress of a build: first the whole, then each step."""

    def plan(self, *, chunks: int, tokens: int, gist_bytes: int) -> None:
        """Receive how much work is ahead, and how much disk its gists need at most."""

    def advance(self, *, chunks: int, tokens: int) -> None:
        """Receive how much more is done."""


@runtime_checkable
class ReadingProgress(Progress, Protocol):
    """A progress that receives the first stage of a build as well."""

    def read(self, *, documents: int, of: int) -> None:
        """Receive how many of the new and changed documents can be found and answered from by now."""


@dataclass(frozen=True, kw_only=True)
class GistProgress:
    """How far the gists of an index are.

    Attributes:
        done: chunks that are read as gists; chunks: those that will be.
        is_working: whether a worker of this process makes gists in the background.
        error: why it does not, in one line; empty where it does, or where none is needed.
    """

    done: int
    chunks: int
    is_working: bool = False
    error: str = ""


class NoProgress:
    """A progress that shows nothing."""

    def plan(self, *, chunks: int, tokens: int, gist_bytes: int) -> None:
        """Show nothing."""

    def advance(self, *, chunks: int, tokens: int) -> None:
        """Show nothing."""


class TerminalProgress:
    """A progress on standard error: a bar on a terminal, elsewhere a plain line every *interval_s* seconds.

    As a context manager it removes the bar at its end.

    Args:
        doing: verb before the bar.
        unit: what is counted; work without tokens, such as answers, is measured in it alone.
        interval_s: seconds between two plain lines.
    """

    def __init__(self, doing: str = "compressing", unit: str = "chunks", *, interval_s: float = 10.0) -> None:
        self._doing, self._unit, self._interval_s = doing, unit, interval_s
        self._bar: Bar | None = None
        self._done_chunks = self._done_tokens = self._chunks = self._tokens = 0
        self._started_s = self._printed_s = time.monotonic()

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_bar()

    def read(self, *, documents: int, of: int) -> None:
        """Print how many documents are to be read, then show how many are in the index by now."""
        if not documents:
            _print(f"reading {of:,} documents")
            self._start_bar("reading", of)
        elif self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=documents)
        elif time.monotonic() - self._printed_s >= self._interval_s:
            self._printed_s = time.monotonic()
            _print(f"{documents:,} of {of:,} documents")

    def plan(self, *, chunks: int, tokens: int, gist_bytes: int) -> None:
        """Print what is ahead, with the disk it needs, and show the bar."""
        self._stop_bar()
        self._chunks, self._tokens = chunks, tokens
        self._started_s = self._printed_s = time.monotonic()
        if not chunks:
            return
        size = f", {tokens:,} tokens" if tokens else ""
        disk = f"; the gists need up to {megabytes(gist_bytes)} of disk" if gist_bytes else ""
        _print(f"{self._doing} {chunks:,} {self._unit}{size}{disk}")
        self._start_bar(self._doing, self._tokens or self._chunks)

    def advance(self, *, chunks: int, tokens: int) -> None:
        """Move the bar, or print a line if one is due."""
        self._done_chunks += chunks
        self._done_tokens += tokens
        if self._bar is not None:
            done = self._done_tokens if self._tokens else self._done_chunks
            self._bar.update(self._bar.task_ids[0], completed=done, note=self._note())
        elif time.monotonic() - self._printed_s >= self._interval_s:
            self._printed_s = time.monotonic()
            _print(f"{self._done_chunks:,} of {self._chunks:,} {self._unit}, {self._note()}")

    def _note(self) -> str:
        """Return rate and remaining time, the latter from tokens where they are known."""
        elapsed_s = max(time.monotonic() - self._started_s, 1e-9)
        done, total = (self._done_tokens, self._tokens) if self._tokens else (self._done_chunks, self._chunks)
        rates = [f"{self._done_chunks / elapsed_s:,.1f} {self._unit}/s"]
        rates += [f"{self._done_tokens / elapsed_s:,.0f} tokens/s"] if self._tokens else []
        left = [f"{duration(elapsed_s / done * (total - done))} left"] if done else []
        return ", ".join([*rates, *left])

    def _start_bar(self, doing: str, total: int) -> None:
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn(doing), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
        self._bar = Bar(*columns, console=Console(stderr=True))
        self._bar.add_task("", total=total, note="")
        self._bar.start()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def shown(items: Iterable[T], progress: Progress, *, total: int) -> Iterator[T]:
    """Yield *items*, and report each to *progress* as one chunk done."""
    progress.plan(chunks=total, tokens=0, gist_bytes=0)
    for item in items:
        yield item
        progress.advance(chunks=1, tokens=0)


def shown_or(progress: Progress | None) -> AbstractContextManager[Progress]:
    """Return what receives the progress of a build: a bar of our own ends with it, the caller's stays."""
    if progress:
        return nullcontext(progress)
    return TerminalProgress() if sys.stderr.isatty() else nullcontext(NoProgress())


def megabytes(count: int) -> str:
    """Return a number of bytes for people.

    >>> megabytes(1_500_000), megabytes(7_200_000_000)
    ('1.5 MB', '7.2 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Return a duration for people.

    >>> duration(90), duration(600), duration(9000)
    ('90 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _print(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
