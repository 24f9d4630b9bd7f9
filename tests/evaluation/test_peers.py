"""`notebooks/bench/peers.py`: answers of several programs become figures that can be compared."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
from support.pages import ROOT

SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "notebooks" / "bench" / "peers.py"))
timed, later = SCRIPT["timed"], SCRIPT["later"]


def test_seconds_to_an_answer_follow_from_the_time_of_a_token() -> None:
    """An answer of 40 tokens takes 39 steps behind the first token, one of 10 tokens nine."""
    figures = timed({"ttft_s": 1.0, "total_s": 4.9, "answer_tokens": 40, "context_slots": 534, "text": "…"})

    assert figures == pytest.approx(
        {"ttft_s": 1.0, "context_slots": 534, "answer_10_s": 1.9, "answer_40_s": 4.9, "decode_tokens_per_s": 10.0}
    )


def test_an_answer_that_ended_before_took_a_step_for_its_end() -> None:
    """Five tokens and the one that ends them are five steps behind the first token."""
    figures = timed({"ttft_s": 1.0, "total_s": 1.5, "answer_tokens": 5})

    assert figures == pytest.approx(
        {"ttft_s": 1.0, "answer_10_s": 1.9, "answer_40_s": 4.9, "decode_tokens_per_s": 10.0}
    )


def test_retrieval_and_loading_delay_every_token() -> None:
    """What comes before an answer moves its first and its last token, and not the rate of decoding."""
    delayed = later({"ttft_s": 1.0, "total_s": 4.9, "answer_tokens": 40}, 0.5)

    assert {"ttft_s": 1.5, "total_s": 5.4, "answer_tokens": 40} == delayed
