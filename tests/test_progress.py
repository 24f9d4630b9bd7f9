"""Progress as a person sees it: lines where nobody watches, a bar on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from gistrag import progress
from gistrag.progress import NoProgress, TerminalProgress


class Terminal(io.StringIO):
    """A standard error that calls itself a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that shows what its only item says."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_build_is_shown_with_rate_and_remaining_time(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """The remaining time follows the tokens, because chunks differ in length."""
    with TerminalProgress() as shown:
        shown.plan(chunks=4, tokens=1000, gist_bytes=2_000_000)
        clock[0] = 10.0
        shown.advance(chunks=1, tokens=500)

    assert capsys.readouterr().err.splitlines() == [
        "compressing 4 chunks, 1,000 tokens; the gists need up to 2.0 MB of disk",
        "1 of 4 chunks, 0.1 chunks/s, 50 tokens/s, 10 s left",
    ]


def test_lines_come_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Steps within the interval print nothing."""
    with TerminalProgress("answering", "answers") as shown:
        for number in progress.shown(range(30), shown, total=30):
            clock[0] = float(number)

    assert capsys.readouterr().err.splitlines() == [
        "answering 30 answers",
        "11 of 30 answers, 1.1 answers/s, 17 s left",
        "21 of 30 answers, 1.1 answers/s, 9 s left",
    ]


def test_nothing_to_do_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A build that finds everything in place is silent."""
    with TerminalProgress() as shown:
        shown.plan(chunks=0, tokens=0, gist_bytes=0)

    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is complete at the end, and carries the rate."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "100")

    with TerminalProgress() as shown:
        shown.plan(chunks=2, tokens=100, gist_bytes=0)
        shown.advance(chunks=2, tokens=100)

    assert "100%" in terminal.getvalue()
    assert "tokens/s, 0 s left" in terminal.getvalue()


def test_no_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """`NoProgress` prints nothing, whatever happens."""
    silent = NoProgress()

    silent.plan(chunks=1, tokens=1, gist_bytes=1)
    silent.advance(chunks=1, tokens=1)

    assert capsys.readouterr().err == ""
