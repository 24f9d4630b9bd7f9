"""What to answer a question from: what it means, what is searched, and which passages of an index that gives.

`Finder` decides; `gistrag.answering.stream` reads what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from gistrag.answering.answer import Options, Timings, Usage
from gistrag.answering.conversation import joined
from gistrag.answering.passages import search, select
from gistrag.answering.stream import Found
from gistrag.index.retriever import Retriever
from gistrag.index.store import Store
from gistrag.model.runtime import AnyRuntime

NO_DOCUMENTS = "There are no documents in this index."
NO_PASSAGES = "No passage of this index passes the filters."


class Finder:
    """Finds the passages of an index that answer a question.

    Args:
        ask: called with the ids of the chunks that were read as text because their gists are still to be made.
    """

    def __init__(
        self, store: Store, retriever: Retriever, runtime: AnyRuntime, *, ask: Callable[[Sequence[int]], None]
    ) -> None:
        self._store, self._retriever, self._runtime, self._ask = store, retriever, runtime, ask

    def find(self, question: str, options: Options, usage: Usage, timings: Timings) -> Found:
        """Return the passages to answer from, best first, all of one commit of the index."""
        with self._store.snapshot():
            with timings.measure("retrieve_s"):
                searched = self.searched(question, options.history, scope=options.scope, filters=options.filters)
                hits = search(self._store, self._retriever, searched, options, usage)
            with timings.measure("load_s"):
                passages = select(hits, self._store, self._runtime, options, usage)
        if usage.text_pending:
            self._ask([passage.source.chunk_id for passage in passages if passage.source.as_text])
        return Found(passages, searched)

    def searched(
        self,
        question: str,
        history: Sequence[str] = (),
        *,
        scope: str | None = None,
        filters: Mapping[str, str] | None = None,
    ) -> str:
        """Return what is searched for a question: itself, or with those of the earlier questions that it leans on."""
        return joined(question, history, partial(self._retriever.fit, scope=scope, filters=filters))

    def nothing(self) -> str:
        """Return the answer where no passage is found."""
        return NO_PASSAGES if self._store.count() else NO_DOCUMENTS
