"""Metrics in the text format of Prometheus."""

from __future__ import annotations

import pytest

from gistrag.answering.answer import Answer, Timings, Usage

pytest.importorskip("prometheus_client")

from gistrag.server.prometheus import Metrics


def test_answers_are_counted() -> None:
    """Tokens, slots and seconds add up for each index; queue, refusals and failures of the worker are told."""
    metrics = Metrics()
    usage = Usage(gist_slots=10, source_tokens=40, answer_tokens=5, text_fallbacks=1, readings=1)

    for _ in range(2):
        metrics.count("manual", Answer("a", timings=Timings(ttft_s=0.3), usage=usage), "stop")

    metrics.waited(0.3)
    metrics.refused("queue_full")

    page = metrics.page(waiting=3, restarts=1).decode()
    for line in (
        'gistrag_answers_total{finish_reason="stop",index="manual"} 2.0',
        'gistrag_answer_tokens_total{index="manual"} 10.0',
        'gistrag_source_tokens_total{index="manual"} 80.0',
        'gistrag_text_fallbacks_total{index="manual"} 2.0',
        'gistrag_first_token_seconds_bucket{index="manual",le="0.5"} 2.0',
        'gistrag_first_token_seconds_bucket{index="manual",le="0.2"} 0.0',
        'gistrag_verdicts_total{index="manual",verdict="none"} 2.0',
        'gistrag_readings_total{index="manual"} 2.0',
        "gistrag_waiting 3.0",
        'gistrag_waiting_seconds_bucket{le="0.5"} 1.0',
        'gistrag_refusals_total{code="queue_full"} 1.0',
        "gistrag_worker_restarts 1.0",
    ):
        assert line in page


def test_servers_do_not_share_counters() -> None:
    """Two servers in one process count separately."""
    first, second = Metrics(), Metrics()

    first.count("manual", Answer("a"), "stop")

    assert "manual" not in second.page(waiting=0, restarts=0).decode()
