"""One thread in which pieces of work take turns, for readers in an event loop.

A language model is read by one thread at a time. So work that touches a model or an index is a generator; one thread
lets each of them make one item in turn, and who asked for it awaits the items::

    event loop    submit ──────────────▶ waiting ──▶ at work: a b c a b c a c …   one thread
                  async for item in turn ◀──────────────────────────┘

Work that nobody wants any more is closed before its next item. This module knows neither models nor HTTP.
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
    """The last of the items: there are no more, or what went wrong."""

    error: Exception | None = None


class Turn(AsyncIterator[T], Generic[T]):
    """Work on its way: iterate over its items in the event loop that submitted it. An error of the work is raised."""

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
        """Say that nobody wants more: the work ends before its next item, and the iteration at once."""
        self.is_wanted = False
        self._items.put_nowait(_End())

    def advance(self) -> bool:
        """Make one item, in the thread of the work, and return whether there may be more."""
        if not self.is_wanted:
            self._work.close()
            return False
        try:
            self._hand_over(next(self._work))
        except StopIteration:
            self._hand_over(_End())
        except Exception as error:
            self._hand_over(_End(error))
        else:
            return True
        return False

    def _hand_over(self, item: T | _End) -> None:
        with suppress(RuntimeError):  # the loop has ended, and its readers with it
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)


class Turns:
    """A thread that does the work of many, *together* of them in turn and *waiting* more in line."""

    def __init__(self, *, together: int, waiting: int) -> None:
        self._together, self._waiting_max = together, waiting
        self._changed = threading.Condition()
        self._line: deque[Turn[Any]] = deque()
        self._at_work = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="gistrag-turns", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many stand in line because all places are taken."""
        return max(0, len(self._line) + self._at_work - self._together)

    def submit(self, work: Generator[T]) -> Turn[T]:
        """Return *work* on its way; call it in an event loop.

        Raises:
            queue.Full: as many as may are waiting already.
        """
        turn = Turn(work)
        with self._changed:
            self._line = deque(one for one in self._line if one.is_wanted)
            if len(self._line) + self._at_work >= self._together + self._waiting_max:
                raise Full
            self._line.append(turn)
            self._changed.notify()
        return turn

    def close(self) -> None:
        """End all work; returns when the thread has ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        active: list[Turn[Any]] = []
        while self._admit(active):
            active = [turn for turn in active if turn.advance()]
        for turn in (*active, *self._line):
            turn.is_wanted = False
            turn.advance()
            turn._hand_over(_End())

    def _admit(self, active: list[Turn[Any]]) -> bool:
        """Add those from the line that there is a place for, waiting while there is nothing to do; False at the end."""
        with self._changed:
            self._at_work = len(active)
            while not (active or self._line or self._is_closed):
                self._changed.wait()
            while self._line and len(active) < self._together:
                active.append(self._line.popleft())
            self._at_work = len(active)
            return not self._is_closed
