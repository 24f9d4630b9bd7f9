"""What to answer a question from: what it means, what is searched, and which passages of an index that gives.

`Finder` decides; `gistrag.answering.stream` reads what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from gistrag.answering.about import Kind, kind_of, reply
from gistrag.answering.answer import Options, Timings, Usage
from gistrag.answering.conversation import earlier, joined
from gistrag.answering.passages import Passage, search, select, source_of
from gistrag.answering.stream import Found
from gistrag.answering.whole import asks_about, document_named, may_ask_about, means, named_in
from gistrag.documents.text import nfc
from gistrag.index.retriever import Hit, Retriever
from gistrag.index.store import Store
from gistrag.model.runtime import AnyRuntime
from gistrag.qa.phrases import Phrase, language_of
from gistrag.settings import require_question


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
        """Return what to answer from: nothing but the answer for a greeting, a summary, or passages, best first.

        All of it is of one commit of the index.
        """
        with self._store.snapshot():
            with timings.measure("retrieve_s"):
                if ready := self.ready(question, options.history, scope=options.scope, filters=options.filters):
                    return ready
                searched = self.searched(question, options.history, scope=options.scope, filters=options.filters)
                hits = search(self._store, self._retriever, searched, options, usage)
            with timings.measure("load_s"):
                passages = select(hits, self._store, self._runtime, options, usage)
        if usage.text_pending:
            self._ask([passage.source.chunk_id for passage in passages if passage.source.as_text])
        return Found(passages, searched)

    def ready(
        self,
        question: str,
        history: Sequence[str] = (),
        *,
        scope: str | None = None,
        filters: Mapping[str, str] | None = None,
    ) -> Found | None:
        """Return the answer where no model is needed: to a greeting, or to a question about a whole document."""
        question = nfc(question)
        with self._store.snapshot():
            if kind := kind_of(question):
                return Found([], answer=self._introduced(kind, question))
            if hit := self.summary(question, history, scope=scope, filters=filters):
                passage = Passage(source_of(hit, as_text=True), [], hit.chunk.text, hit.chunk.ordinal)
                return Found([passage], question, answer=hit.chunk.text)
            if named_in(question) == "" and scope is None and not filters and len(self._store.summaries.titles()) > 1:
                return Found([], answer=self._introduced("documents", question))
        return None

    def _introduced(self, kind: Kind, question: str) -> str:
        return reply(kind, [row.path for row in self._store.documents()], language=language_of(question))

    def summary(
        self,
        question: str,
        history: Sequence[str] = (),
        *,
        scope: str | None = None,
        filters: Mapping[str, str] | None = None,
    ) -> Hit | None:
        """Return the summary of the document that a question asks about as a whole, None for any other question."""
        question = nfc(question)
        name = named_in(question)
        if filters or (name is None and (scope is None or not may_ask_about(question))):
            return None
        path = scope if scope is not None else self._path(question, name or "", history)
        chunk = self._store.summaries.of_path(path) if path else None
        if path is None or chunk is None:
            return None
        (title,) = chunk.heading
        is_meant = asks_about(question, path, title) if name is None else means(name, path, title)
        return Hit(chunk, 1.0, None, None) if is_meant else None

    def _path(self, question: str, name: str, history: Sequence[str]) -> str | None:
        """Return the document that is meant: by its name, as the only one, or as the one asked about before."""
        titles = self._store.summaries.titles()
        if name:
            return document_named(name, titles) or self._nearest(question)
        if len(titles) == 1:
            return next(iter(titles))
        if turns := earlier(history):
            hits = self._retriever.search(self.searched(turns[-1], turns[:-1]), top_k=1)
            return hits[0].chunk.path if hits else None
        return None

    def _nearest(self, question: str) -> str | None:
        """Return the document whose summary is nearer to a question than every chunk is, None where a chunk is."""
        found = self._retriever.nearest_summary(question)
        if found is None or found[1] < self._retriever.fit(question).dense:
            return None
        return next((chunk.path for chunk in self._store.chunks([found[0]])), None)

    def searched(
        self,
        question: str,
        history: Sequence[str] = (),
        *,
        scope: str | None = None,
        filters: Mapping[str, str] | None = None,
    ) -> str:
        """Return what is searched for a question: itself, or with those of the earlier questions that it leans on."""
        return joined(
            nfc(require_question(question)),
            list(map(nfc, history)),
            partial(self._retriever.fit, scope=scope, filters=filters),
        )

    def nothing(self) -> Phrase:
        """Return the name of the answer where no passage is found."""
        return "no passages" if self._store.count() else "no documents"
