"""The scheduler, as a reader in an event loop sees it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Generator
from queue import Full
from typing import Any

import pytest

from gistrag.server.scheduler import Scheduler


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test in an event loop, for a minute at most."""
    asyncio.run(asyncio.wait_for(work, timeout=60))


def test_items_come_in_order_and_interleaved() -> None:
    """Each of three jobs delivers all its items to its own reader; one thread computes them, interleaved."""
    made: list[str] = []
    threads = set()
    gate = threading.Event()

    def work(name: str) -> Generator[str]:
        gate.wait(5)
        for number in range(3):
            made.append(name)
            threads.add(threading.current_thread().name)
            yield f"{name}{number}"

    async def talk() -> None:
        scheduler = Scheduler(active_max=3, queue_max=0)
        begun = [scheduler.submit(work(name)) for name in "abc"]
        gate.set()

        items = [[item async for item in job] for job in begun]

        assert items == [["a0", "a1", "a2"], ["b0", "b1", "b2"], ["c0", "c1", "c2"]]
        assert threads == {"gistrag-scheduler"}
        assert "abcab" in "".join(made)
        scheduler.close()

    run(talk())


def test_an_error_reaches_its_reader_alone() -> None:
    """A job that fails raises where it is awaited; the other jobs go on."""

    def fail() -> Generator[int]:
        yield 1
        raise ValueError("broken")

    async def talk() -> None:
        scheduler = Scheduler(active_max=2, queue_max=0)
        failing, sound = scheduler.submit(fail()), scheduler.submit(iter_of(3))

        assert await anext(failing) == 1
        with pytest.raises(ValueError, match="broken"):
            await anext(failing)
        assert [item async for item in sound] == [0, 1, 2]
        scheduler.close()

    run(talk())


def iter_of(count: int) -> Generator[int]:
    """Yield numbers."""
    yield from range(count)


def test_a_full_queue_is_refused_and_a_cancelled_job_makes_room() -> None:
    """Beyond the active and the queued jobs none is taken; a cancelled one makes room at once."""
    gate = threading.Event()

    def blocked() -> Generator[int]:
        gate.wait(5)
        yield 1

    async def talk() -> None:
        scheduler = Scheduler(active_max=1, queue_max=2)
        first, second, _ = [scheduler.submit(blocked()) for _ in range(3)]
        assert scheduler.waiting == 2
        with pytest.raises(Full):
            scheduler.submit(blocked())

        second.cancel()
        last = scheduler.submit(blocked())

        gate.set()
        assert [[item async for item in job] for job in (first, second, last)] == [[1], [], [1]]
        await asyncio.to_thread(scheduler.close)

    run(talk())


def test_a_cancelled_job_is_closed() -> None:
    """`cancel` ends the iteration at once, and closes the generator before its next item."""
    closed = threading.Event()
    made: list[int] = []

    def endless() -> Generator[int]:
        try:
            while True:
                made.append(1)
                yield 1
        finally:
            closed.set()

    async def talk() -> None:
        scheduler = Scheduler(active_max=1, queue_max=0)
        job = scheduler.submit(endless())
        await anext(job)

        job.cancel()

        assert await asyncio.to_thread(closed.wait, 30)
        count = len(made)
        await asyncio.sleep(0.02)
        assert len(made) == count
        scheduler.close()

    run(talk())


def test_closing_ends_all_jobs() -> None:
    """Closing ends the iteration over active and queued jobs."""
    gate = threading.Event()

    def blocked() -> Generator[int]:
        gate.wait(5)
        yield 1

    async def talk() -> None:
        scheduler = Scheduler(active_max=1, queue_max=3)
        begun = [scheduler.submit(blocked()) for _ in range(3)]
        closing = asyncio.create_task(asyncio.to_thread(scheduler.close))
        gate.set()
        await closing

        for job in begun:
            assert [item async for item in job] in ([], [1])

    run(talk())
