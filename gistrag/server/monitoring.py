"""What a server tells whoever looks after it: whether it runs, whether it can answer, what it refused and counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from gistrag import __version__
from gistrag.answering.answer import Answer
from gistrag.rag import GistRAG
from gistrag.server.protocol import APIError
from gistrag.server.registry import Record
from gistrag.server.scheduler import Scheduler
from gistrag.terminal import visible

logger = logging.getLogger("gistrag")

STUCK_S = 60.0
"""Seconds of work on a single token after which a server no longer counts as ready."""
PATH_CHARACTERS = 80


class Monitor:
    """Watches one server.

    Args:
        with_metrics: count for Prometheus, too.

    Attributes:
        scheduler: of the server, once it runs.
    """

    scheduler: Scheduler

    def __init__(self, registry: Mapping[str, GistRAG], *, with_metrics: bool) -> None:
        self._registry = registry
        self._metrics = None
        if with_metrics:
            from gistrag.server.prometheus import Metrics

            self._metrics = Metrics()

    def health(self) -> tuple[Record, int]:
        """Return whether the server runs, and how many requests wait; with status 503 it should be started again."""
        is_alive = self.scheduler.is_alive
        record = {"status": "ok" if is_alive else "stopped", "version": __version__, "waiting": self.scheduler.waiting}
        return record, 200 if is_alive else 503

    def ready(self) -> tuple[Record, int]:
        """Return whether the server can answer now; status 503 if its worker is stuck, or an index is gone."""
        if not self.scheduler.is_alive:
            status = "stopped"
        elif self.scheduler.busy_s > STUCK_S:
            status = "stuck"
        elif not all((rag.folder / "index.db").exists() for rag in list(self._registry.values())):
            status = "an index is missing"
        else:
            status = "ok"
        return {"status": status}, 200 if status == "ok" else 503

    def page(self) -> tuple[bytes, str] | None:
        """Return the metrics and their media type, None where nothing is counted."""
        if self._metrics is None:
            return None
        page = self._metrics.page(waiting=self.scheduler.waiting, restarts=self.scheduler.restarts)
        return page, self._metrics.MEDIA_TYPE

    def turned_away(self, client: str, scope: Mapping[str, Any], error: APIError) -> None:
        """Log and count a request that came no further than the guard; no key is written."""
        asked = visible(f"{scope['method']} {scope['path'][:PATH_CHARACTERS]}")
        logger.warning("refused %s from %s: %d %s", asked, client, error.status, error.code)
        self.refused(error)

    def refused(self, error: APIError) -> None:
        """Count a request that was answered with an error."""
        if self._metrics:
            self._metrics.refused(error.code)

    def waited(self, seconds: float) -> None:
        """Count how long a request waited for its turn."""
        if self._metrics:
            self._metrics.waited(seconds)

    def answered(self, name: str, answer: Answer, reason: str) -> None:
        """Log and count an answer of an index, and why it ended."""
        used, timings = answer.usage, answer.timings
        seconds = (timings.ttft_s, timings.total_s)
        logger.info("%s: %d tokens, first after %.2f s, last after %.2f s", name, used.answer_tokens, *seconds)
        if self._metrics and used.answer_tokens:
            self._metrics.count(name, answer, reason)
