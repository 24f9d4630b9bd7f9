"""The chunks of a gistrag index as LangChain documents, and the retriever that finds them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from gistrag import GistRAG, StoredChunk
from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import Field


class GistRAGRetriever(BaseRetriever):
    """Retrieves chunks of an index, by meaning and by words.

    >>> retriever = GistRAGRetriever(rag=GistRAG.open("index/"), k=5)       # doctest: +SKIP
    >>> retriever.invoke("How many bytes does a slot take?", k=1)           # doctest: +SKIP

    Attributes:
        rag: an open index.
        k: documents to return; ``invoke`` takes another as an argument.
        filters: gistrag's own, such as ``{"path": "*.md", "kind": "pdf", "heading": "install"}``,
            or ``{"date": ">=2026-01-01", "from": "kim"}``.
        scope: path of the one document to look in.
    """

    rag: GistRAG
    k: int = Field(default=3, ge=1)
    filters: Mapping[str, str] | None = None
    scope: str | None = None

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun | None, k: int | None = None
    ) -> list[Document]:
        top_k = self.k if k is None else k
        hits = self.rag.retrieve(query, top_k=top_k, scope=self.scope, filters=self.filters)
        return [document(self.rag, hit.chunk, hit.score) for hit in hits]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        return await asyncio.to_thread(self._get_relevant_documents, query, run_manager=None, k=k)


def document(rag: GistRAG, chunk: StoredChunk, score: float) -> Document:
    """Return a chunk as a document; what does not apply to it is left out of its metadata."""
    known: dict[str, Any] = {
        **chunk.metadata,
        "source": chunk.path,
        "page": chunk.page,
        "heading": " > ".join(chunk.heading),
        "start_index": chunk.start,
        "score": score,
    }
    metadata = {name: value for name, value in known.items() if value not in (None, "")}
    return Document(id=f"gistrag-{rag.index_id}-{chunk.id}", page_content=chunk.text, metadata=metadata)


def passage(document: Document) -> str:
    """Return a document as it is compressed and shown to a model: its heading path on a line above its text."""
    return "\n".join(filter(None, (str(document.metadata.get("heading") or ""), document.page_content.strip())))
