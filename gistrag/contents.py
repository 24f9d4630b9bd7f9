"""What an index holds, to look at and to search; no language model is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gistrag.answering.answer import Answer, require_history
from gistrag.answering.finding import Finder
from gistrag.index import document_file
from gistrag.index.retriever import Hit, Retriever
from gistrag.index.schema import DocumentRow, StoredChunk
from gistrag.index.store import Store


class Contents:
    """The documents and chunks of an index.

    Attributes:
        folder: of the index.
    """

    def __init__(self, store: Store, retriever: Retriever, finder: Finder) -> None:
        self.store = store
        self.folder = store.folder
        self._retriever, self._finder = retriever, finder

    @property
    def index_id(self) -> str:
        """Twelve hex digits that tell this index from every other one."""
        return hashlib.sha256(self.store.config.salt.encode()).hexdigest()[:12]

    def snapshot(self) -> AbstractContextManager[None]:
        """Let everything read inside be of one commit, whatever a builder does meanwhile; other threads wait."""
        return self.store.snapshot()

    def documents(self) -> list[DocumentRow]:
        """Return all documents of the index, by path."""
        return self.store.documents()

    def chunks(self, ids: Sequence[int] | None = None, *, document: str | None = None) -> list[StoredChunk]:
        """Return chunks of the index: those with these *ids*, those of one *document* in its order, or all.

        Chunks that are gone are left out.
        """
        if ids is not None:
            return self.store.chunks(ids)
        paths = [row.path for row in self.store.documents()] if document is None else [document]
        return [chunk for path in paths for chunk in self.store.chunks_of(path)]

    def export_documents(self, paths: Sequence[str], file: str | Path) -> None:
        """Write documents with their text and gists into one new file, which `GistRAG.import_documents` takes in.

        Raises:
            UsageError: no such document, or something is at *file* already.
            ResourceError: the disk is full.
        """
        document_file.export(self.store, paths, Path(file))

    def retrieve(
        self,
        question: str,
        *,
        top_k: int = 3,
        scope: str | None = None,
        filters: Mapping[str, str] | None = None,
        vector: npt.NDArray[np.float32] | None = None,
        history: Sequence[str] = (),
    ) -> list[Hit]:
        """Return the chunks that fit a question best, best first, without generating anything.

        Before them comes the summary of a document, if the question asks about the document as a whole.

        Args:
            question: in words.
            top_k: how many chunks.
            scope: path of a document to stay in.
            filters: all must hold: ``path`` a pattern (``*`` crosses folders), ``kind``, ``heading`` part of one,
                ``date`` such as ``>=2026-01-01``, and ``from``, ``to``, ``subject``, ``title``, ``author`` or
                ``encoding`` part of one.
            vector: ``(dim,)`` embedding to search by in place of the question's own; of the index's embedder.
            history: earlier questions, see `searched`.

        Raises:
            UsageError: an empty question, ``top_k`` below 1, an unknown filter or document, or an impossible date.
        """
        with self.store.snapshot():
            searched = self.searched(question, history, scope=scope, filters=filters)
            hits = self._retriever.search(searched, top_k=top_k, scope=scope, filters=filters, vector=vector)
            summary = self._finder.summary(question, history, scope=scope, filters=filters) if vector is None else None
        return [summary, *hits][:top_k] if summary else hits

    def searched(
        self,
        question: str,
        history: Sequence[str] = (),
        *,
        scope: str | None = None,
        filters: Mapping[str, str] | None = None,
    ) -> str:
        """Return what is searched for a question of a conversation.

        Args:
            history: earlier questions, oldest first. One that the question leans on comes before it: "What is paid for
                a hotel?" before "And in Zurich?".

        Raises:
            UsageError: *history* is no list of texts.
        """
        require_history(history)
        with self.store.snapshot():
            return self._finder.searched(question, history, scope=scope, filters=filters)

    def ready(self, question: str, history: Sequence[str] = (), *, scope: str | None = None) -> Answer | None:
        """Return the answer where no model is asked, None elsewhere; `query` gives the same.

        That is one sentence for a greeting and for a question about the assistant, and the summary of a document for a
        question about the whole of it.
        """
        require_history(history)
        found = self._finder.ready(question, history, scope=scope)
        if found is None or found.answer is None:
            return None
        return Answer(found.answer, tuple(passage.source for passage in found.passages), searched=found.searched)
