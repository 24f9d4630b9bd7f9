"""The time limit of an answer."""

from __future__ import annotations

from gistrag.server.deadline import Timed


def test_an_answer_is_cut_at_its_time_limit() -> None:
    """The piece in which time is up is the last, and `is_cut` reports it."""
    timed = Timed(iter("ab"), 0.0)

    assert list(timed) == ["a"]
    assert timed.is_cut


def test_an_answer_within_its_time_limit_is_whole() -> None:
    """All pieces come, and `is_cut` stays false."""
    timed = Timed(iter("ab"), 60.0)

    assert list(timed) == ["a", "b"]
    assert not timed.is_cut
