"""A scheduler that interleaves jobs in one worker thread, for readers in an event loop.

Only one thread may use a language model at a time. So each job that needs a model or an index is a generator; the
worker thread takes one item after the other, and whoever submitted the job awaits its items::

    event loop    submit ──────────────▶ queued ──▶ active: a b c a b c a c …   worker thread
                  async for item in job ◀─────────────────────┘

Each turn goes to the client who has had the least of the thread's time, and among the jobs of that client to the one
that has. So an item that takes long is paid for by the job it belongs to. A cancelled job is closed before its next
item. This module knows neither models nor HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from queue import Full
from typing import Any, Generic, TypeVar

logger = logging.getLogger("gistrag")

T = TypeVar("T")

CLOSE_S = 5.0
"""How long closing waits for an item that is being computed."""


class WorkerError(Exception):
    """A job ended by what is no ordinary error, such as a panic in a library."""


@dataclass(frozen=True)
class _End:
    """Ends the items of a job, with the error that ended it."""

    error: Exception | None = None


class Job(AsyncIterator[T], Generic[T]):
    """A submitted generator: iterate over its items in the event loop that submitted it; its error is raised there.

    Attributes:
        client: who submitted it; spent_s: seconds of the worker that count for it.
        submitted_s: when it was submitted, by the monotonic clock.
        is_wanted: it is not cancelled.
    """

    def __init__(self, work: Generator[T], client: str) -> None:
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[T | _End] = asyncio.Queue()
        self.client, self.spent_s = client, 0.0
        self.submitted_s = time.monotonic()
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
        """Compute one item, in the worker thread, and return whether more may follow; never raises."""
        try:
            if self.is_wanted:
                self._deliver(next(self._work))
                return True
            self._work.close()
        except StopIteration:
            self._deliver(_End())
        except Exception as error:
            self._deliver(_End(error))
        except BaseException as error:  # a panic of a library in Rust is no Exception
            logger.critical("a request ended by %s", type(error).__name__, exc_info=error)
            self._deliver(_End(WorkerError(type(error).__name__)))
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
    """A worker thread that interleaves up to *active_max* jobs while up to *queue_max* more wait.

    Args:
        clients: returns how many share it; each may hold that part of both.
        waited: called with the seconds that a job has waited, when it becomes active.

    Attributes:
        restarts: how often the worker failed and went on without the jobs that were active.
    """

    def __init__(
        self,
        *,
        active_max: int,
        queue_max: int,
        clients: Callable[[], int] = lambda: 1,
        waited: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._active_max, self._queue_max, self._clients, self._waited = active_max, queue_max, clients, waited
        self._changed = threading.Condition()
        self._queue: list[Job[Any]] = []
        self._active: list[Job[Any]] = []
        self._spent_s: dict[str, float] = {}  # of each client with an active job
        self._turn_began_s: float | None = None
        self._is_closed = False
        self.restarts = 0
        self._thread = threading.Thread(target=self._work, name="gistrag-scheduler", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of jobs that wait because others are active."""
        counts = Counter(job.client for job in (*self._queue, *self._active))
        return max(counts.total() - self._active_max, sum(max(0, count - self._share) for count in counts.values()))

    @property
    def _share(self) -> int:
        """Places that one client may hold."""
        return max(1, self._active_max // self._clients())

    @property
    def busy_s(self) -> float:
        """Seconds that the worker has been computing one item, 0 if it is idle."""
        began_s = self._turn_began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    @property
    def is_alive(self) -> bool:
        """Whether the worker runs."""
        return self._thread.is_alive()

    def submit(self, work: Generator[T], *, client: str = "") -> Job[T]:
        """Queue *work* of a client and return its job; call this in an event loop.

        Raises:
            queue.Full: *queue_max* jobs are waiting already, or the client's part of them.
        """
        job = Job(work, client)
        with self._changed:
            self._queue = [queued for queued in self._queue if queued.is_wanted]
            held = [other.client for other in (*self._queue, *self._active)]
            is_full = len(held) >= self._active_max + self._queue_max
            if is_full or held.count(client) >= self._share + self._queue_max // self._clients():
                raise Full
            self._queue.append(job)
            self._changed.notify()
        return job

    def close(self) -> None:
        """End all jobs, and return when the worker thread has ended, or does not within `CLOSE_S`."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(CLOSE_S)

    def _work(self) -> None:
        while not self._is_closed:
            try:
                while self._admit():
                    self._turn()
            except BaseException:
                logger.critical("the worker failed; the requests under way are lost", exc_info=True)
                self.restarts += 1
            for job in (*self._active, *(self._queue if self._is_closed else ())):
                job.abandon()
            self._active, self._spent_s, self._turn_began_s = [], {}, None

    def _turn(self) -> None:
        """Compute one item of the job whose turn it is."""
        job = min(self._active, key=lambda one: (one.is_wanted, self._spent_s[one.client], one.spent_s))
        self._turn_began_s = time.monotonic()
        goes_on = job.advance()
        took_s, self._turn_began_s = self.busy_s, None
        job.spent_s += took_s
        self._spent_s[job.client] += took_s
        if not goes_on:
            with self._changed:
                self._active.remove(job)
            if all(one.client != job.client for one in self._active):
                del self._spent_s[job.client]

    def _admit(self) -> bool:
        """Make queued jobs active, waiting while there are none at all; return False when the scheduler closes."""
        with self._changed:
            while not (self._active or self._queue or self._is_closed):
                self._changed.wait()
            while (job := self._next_queued()) and not self._is_closed:
                self._queue.remove(job)
                fellows_s = [one.spent_s for one in self._active if one.client == job.client]
                job.spent_s = min(fellows_s, default=0.0)  # it has no claim to the time before it came
                if not fellows_s:
                    self._spent_s[job.client] = min(self._spent_s.values(), default=0.0)
                self._active.append(job)
                self._waited(time.monotonic() - job.submitted_s)
            return not self._is_closed

    def _next_queued(self) -> Job[Any] | None:
        """Return the job that becomes active next: the first in line of a client who holds the fewest places."""
        if len(self._active) >= self._active_max:
            return None
        held = Counter(job.client for job in self._active)
        waiting = (job for job in self._queue if held[job.client] < self._share)
        return min(waiting, key=lambda job: held[job.client], default=None)
