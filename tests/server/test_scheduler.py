"""A thread that takes turns among generators, as a reader in an event loop sees it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Generator
from queue import Full
from typing import Any

import pytest

from gistrag.server.scheduler import Turns


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test in an event loop, and no longer than it should take."""
    asyncio.run(asyncio.wait_for(work, timeout=60))


def test_items_come_in_order_and_from_one_thread() -> None:
    """Three pieces of work give all their items to whom they belong, made in turn by a single thread."""
    made: list[str] = []
    threads = set()

    def work(name: str) -> Generator[str]:
        for number in range(3):
            made.append(name)
            threads.add(threading.current_thread().name)
            yield f"{name}{number}"

    async def talk() -> None:
        turns = Turns(together=3, waiting=0)
        begun = [turns.submit(work(name)) for name in "abc"]

        assert [["a0", "a1", "a2"], ["b0", "b1", "b2"], ["c0", "c1", "c2"]] == [
            [item async for item in turn] for turn in begun
        ]
        assert {"gistrag-turns"} == threads
        assert 9 == len(made)
        turns.close()

    run(talk())


def test_an_error_reaches_its_reader_alone() -> None:
    """Work that fails raises where it is awaited; work beside it goes on."""

    def fail() -> Generator[int]:
        yield 1
        raise ValueError("broken")

    async def talk() -> None:
        turns = Turns(together=2, waiting=0)
        failing, sound = turns.submit(fail()), turns.submit(iter_of(3))

        assert 1 == await anext(failing)
        with pytest.raises(ValueError, match="broken"):
            await anext(failing)
        assert [0, 1, 2] == [item async for item in sound]
        turns.close()

    run(talk())


def iter_of(count: int) -> Generator[int]:
    """Yield numbers."""
    yield from range(count)


def test_a_full_line_is_refused_and_a_left_place_is_free() -> None:
    """Beyond those at work and in line nobody is taken; one who goes makes room at once."""
    gate = threading.Event()

    def blocked() -> Generator[int]:
        gate.wait(5)
        yield 1

    async def talk() -> None:
        turns = Turns(together=1, waiting=2)
        first, second, _ = [turns.submit(blocked()) for _ in range(3)]
        assert 2 == turns.waiting
        with pytest.raises(Full):
            turns.submit(blocked())

        second.cancel()
        last = turns.submit(blocked())

        gate.set()
        assert [[1], [], [1]] == [[item async for item in turn] for turn in (first, second, last)]
        await asyncio.to_thread(turns.close)

    run(talk())


def test_work_that_is_not_wanted_is_closed() -> None:
    """After `cancel` the reader is free at once, and the generator is closed before its next item."""
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
        turns = Turns(together=1, waiting=0)
        turn = turns.submit(endless())
        await anext(turn)

        turn.cancel()

        assert await asyncio.to_thread(closed.wait, 30)
        count = len(made)
        await asyncio.sleep(0.02)
        assert count == len(made)
        turns.close()

    run(talk())


def test_closing_ends_all_work() -> None:
    """Readers of work that was under way or in line see its end."""
    gate = threading.Event()

    def blocked() -> Generator[int]:
        gate.wait(5)
        yield 1

    async def talk() -> None:
        turns = Turns(together=1, waiting=3)
        begun = [turns.submit(blocked()) for _ in range(3)]
        closing = asyncio.create_task(asyncio.to_thread(turns.close))
        gate.set()
        await closing

        for turn in begun:
            assert [item async for item in turn] in ([], [1])

    run(talk())
