"""A scheduler that interleaves jobs in one worker thread, for readers in an event loop.

Only one thread may use a language model at a time. So each job that needs a model or an index is a generator; the
worker thread takes one item from each job in turn, and whoever submitted the job awaits its items::

    event loop    submit ──────────────▶ queued ──▶ active: a b c a b c a c …   worker thread
                  async for item in job ◀─────────────────────┘

A cancelled job is closed before its next item. This module knows neither models nor HTTP.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Generator
from contextlib import suppress
from dataclasses import dataclass
from queue import Full
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    """Ends the items of a job, with the error that ended it."""

    error: Exception | None = None


class Job(AsyncIterator[T], Generic[T]):
    """A submitted generator: iterate over its items in the event loop that submitted it; its error is raised there."""

    def __init__(self, work: Generator[T]) -> None:
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[T | _End] = asyncio.Queue()
        self.is_wanted = True

    async def __anext__(self) -> T:
        item = await self._items.get()
        if not isinstance(item, _End):
            return item
        self._items.put_nowait(item)
        if item.error is not None:
            raise item.error
        raise StopAsyncIteration

    def cancel(self) -> None:
        """End the iteration at once, and the generator before its next item."""
        self.is_wanted = False
        self._items.put_nowait(_End())

    def advance(self) -> bool:
        """Compute one item, in the worker thread, and return whether more may follow."""
        if not self.is_wanted:
            self._work.close()
            return False
        try:
            self._deliver(next(self._work))
        except StopIteration:
            self._deliver(_End())
        except Exception as error:
            self._deliver(_End(error))
        else:
            return True
        return False

    def abandon(self) -> None:
        """Close the generator, in the worker thread, and end the iteration."""
        self.is_wanted = False
        self.advance()
        self._deliver(_End())

    def _deliver(self, item: T | _End) -> None:
        with suppress(RuntimeError):  # the event loop has ended, and its readers with it
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)


class Scheduler:
    """A worker thread that interleaves up to *active_max* jobs while up to *queue_max* more wait."""

    def __init__(self, *, active_max: int, queue_max: int) -> None:
        self._active_max, self._queue_max = active_max, queue_max
        self._changed = threading.Condition()
        self._queue: deque[Job[Any]] = deque()
        self._active_count = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="gistrag-scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of jobs that wait because *active_max* others are active."""
        return max(0, len(self._queue) + self._active_count - self._active_max)

    def submit(self, work: Generator[T]) -> Job[T]:
        """Queue *work* and return its job; call this in an event loop.

        Raises:
            queue.Full: *queue_max* jobs are waiting already.
        """
        job = Job(work)
        with self._changed:
            self._queue = deque(queued for queued in self._queue if queued.is_wanted)
            if len(self._queue) + self._active_count >= self._active_max + self._queue_max:
                raise Full
            self._queue.append(job)
            self._changed.notify()
        return job

    def close(self) -> None:
        """End all jobs, and return when the worker thread has ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        active: list[Job[Any]] = []
        while self._admit(active):
            active = [job for job in active if job.advance()]
        for job in (*active, *self._queue):
            job.abandon()

    def _admit(self, active: list[Job[Any]]) -> bool:
        """Move queued jobs to *active*, waiting while there are none at all; return False when the scheduler closes."""
        with self._changed:
            self._active_count = len(active)
            while not (active or self._queue or self._is_closed):
                self._changed.wait()
            while self._queue and len(active) < self._active_max:
                active.append(self._queue.popleft())
            self._active_count = len(active)
            return not self._is_closed
