"""The scheduler, as a reader in an event loop sees it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Generator
from queue import Full
from typing import Any

import pytest

from gistrag.server.scheduler import Scheduler, WorkerError


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
        assert {"a", "b", "c"} == set(made[:3])
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


def test_time_is_shared_not_turns() -> None:
    """A job of short items is not held up by each long item of another: it is done after one."""
    long_ones: list[int] = []

    def slow() -> Generator[int]:
        for number in range(20):
            time.sleep(0.05)
            long_ones.append(number)
            yield number

    async def talk() -> None:
        scheduler = Scheduler(active_max=2, queue_max=0)
        first = scheduler.submit(slow())
        await anext(first)
        before = len(long_ones)

        assert len([item async for item in scheduler.submit(iter_of(10))]) == 10

        assert len(long_ones) <= before + 3
        first.cancel()
        await asyncio.to_thread(scheduler.close)

    run(talk())


def test_clients_share_time_whatever_they_ask_for() -> None:
    """One job of a client gets as much time as all jobs of another client."""
    made: list[str] = []

    def work(name: str) -> Generator[str]:
        for _ in range(12):
            time.sleep(0.01)
            made.append(name)
            yield name

    async def talk() -> None:
        scheduler = Scheduler(active_max=8, queue_max=8, clients=lambda: 2)
        crowd = [scheduler.submit(work("a"), client="a") for _ in range(4)]
        await anext(crowd[0])

        alone = [item async for item in scheduler.submit(work("b"), client="b")]

        assert len(alone) == 12
        assert made.count("a") <= 24
        for job in crowd:
            job.cancel()
        await asyncio.to_thread(scheduler.close)

    run(talk())


def test_no_client_takes_the_places_of_another() -> None:
    """A client holds its part of the places and of the line; what is beyond is refused, and others are let in."""
    gate = threading.Event()

    def blocked() -> Generator[int]:
        gate.wait(5)
        yield 1

    async def talk() -> None:
        scheduler = Scheduler(active_max=2, queue_max=4, clients=lambda: 2)
        crowd = [scheduler.submit(blocked(), client="a") for _ in range(3)]
        with pytest.raises(Full):
            scheduler.submit(blocked(), client="a")
        assert scheduler.waiting == 2

        other = scheduler.submit(iter_of(1), client="b")
        gate.set()

        assert [item async for item in other] == [0]
        assert [[item async for item in job] for job in crowd] == [[1]] * 3
        await asyncio.to_thread(scheduler.close)

    run(talk())


class Panic(BaseException):
    """What a library in Rust raises: no Exception."""


@pytest.mark.parametrize("when", ["at work", "when closed"])
def test_a_panic_ends_one_job_only(when: str, caplog: pytest.LogCaptureFixture) -> None:
    """What is no Exception reaches the reader as one, is logged, and the worker serves the others."""

    def panics() -> Generator[int]:
        try:
            yield 1
            raise Panic("at work")
        finally:
            if when == "when closed":
                raise Panic(when)

    async def talk() -> None:
        scheduler = Scheduler(active_max=2, queue_max=0)
        job = scheduler.submit(panics())
        assert await anext(job) == 1
        with pytest.raises(WorkerError, match="Panic"):
            await anext(job)

        assert [item async for item in scheduler.submit(iter_of(2))] == [0, 1]
        assert (scheduler.restarts, scheduler.is_alive) == (0, True)
        scheduler.close()
        assert not scheduler.is_alive

    run(talk())
    assert "a request ended by Panic" in caplog.text


def test_a_worker_that_fails_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """An error in the scheduler itself loses the active jobs; the next ones are served, and the failure is counted."""
    failing = [Panic()]

    def waited(seconds: float) -> None:
        assert seconds >= 0
        if failing:
            raise failing.pop()

    async def talk() -> None:
        scheduler = Scheduler(active_max=2, queue_max=0, waited=waited)

        assert [item async for item in scheduler.submit(iter_of(2))] == []
        assert [item async for item in scheduler.submit(iter_of(2))] == [0, 1]
        assert scheduler.restarts == 1
        scheduler.close()

    run(talk())
    assert "the worker failed" in caplog.text


def test_a_turn_that_takes_long_is_known() -> None:
    """How long the worker has been at one item tells whether it is stuck."""
    begun, gate = threading.Event(), threading.Event()

    def blocked() -> Generator[int]:
        begun.set()
        gate.wait(5)
        yield 1

    async def talk() -> None:
        scheduler = Scheduler(active_max=1, queue_max=0)
        assert scheduler.busy_s == 0
        job = scheduler.submit(blocked())
        await asyncio.to_thread(begun.wait, 5)
        assert scheduler.busy_s > 0
        gate.set()
        assert [item async for item in job] == [1]
        scheduler.close()
        assert scheduler.busy_s == 0

    run(talk())
