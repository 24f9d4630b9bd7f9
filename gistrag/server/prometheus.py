"""Metrics of a server in the text format of Prometheus: numbers about answers, never a question.

The one door to prometheus_client.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gistrag.answering.answer import Answer

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """The metrics of one server."""

    MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        by_index = ["index"]
        self._answers = Counter("gistrag_answers", "Answers.", [*by_index, "finish_reason"], registry=registry)
        self._verdicts = Counter("gistrag_verdicts", "Answers by verdict.", [*by_index, "verdict"], registry=registry)
        self._first_token_s = Histogram(
            "gistrag_first_token_seconds", "Time to first token.", by_index, buckets=SECONDS, registry=registry
        )
        self._amounts = {
            name: Counter(f"gistrag_{name}", f"Total of {name.replace('_', ' ')}.", by_index, registry=registry)
            for name in (
                "answer_tokens",
                "gist_slots",
                "source_tokens",
                "text_tokens",
                "text_fallbacks",
                "text_pending",
                "readings",
            )
        }
        self._waiting = Gauge("gistrag_waiting", "Requests that wait in the queue.", registry=registry)
        self._waited_s = Histogram("gistrag_waiting_seconds", "Time in the queue.", buckets=SECONDS, registry=registry)
        self._refusals = Counter("gistrag_refusals", "Requests answered with an error.", ["code"], registry=registry)
        self._restarts = Gauge("gistrag_worker_restarts", "Failures of the worker thread.", registry=registry)

    def count(self, index: str, answer: Answer, finish_reason: str) -> None:
        """Count an answer."""
        self._answers.labels(index, finish_reason).inc()
        self._verdicts.labels(index, answer.verdict or "none").inc()
        self._first_token_s.labels(index).observe(answer.timings.ttft_s)
        for name, counter in self._amounts.items():
            counter.labels(index).inc(getattr(answer.usage, name))

    def waited(self, seconds: float) -> None:
        """Count how long a request waited for its turn."""
        self._waited_s.observe(seconds)

    def refused(self, code: str) -> None:
        """Count a request that was answered with an error."""
        self._refusals.labels(code).inc()

    def page(self, *, waiting: int, restarts: int) -> bytes:
        """Return all metrics in the text format."""
        self._waiting.set(waiting)
        self._restarts.set(restarts)
        return generate_latest(self._registry)
