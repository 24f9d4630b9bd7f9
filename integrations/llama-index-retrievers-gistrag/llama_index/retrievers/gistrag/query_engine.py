"""A question answered over an index: `GistRetriever` and `GistSynthesizer` together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.callbacks import CallbackManager
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.vector_stores import MetadataFilters

from gistrag import GistRAG
from llama_index.retrievers.gistrag.base import GistRetriever
from llama_index.retrievers.gistrag.synthesizer import GistSynthesizer


class GistQueryEngine(RetrieverQueryEngine):
    """Answers questions over an index from gist caches. `from_rag` makes one; the constructor takes any parts."""

    @classmethod
    def from_rag(
        cls,
        rag: GistRAG,
        *,
        similarity_top_k: int = 3,
        filters: MetadataFilters | Mapping[str, str] | None = None,
        scope: str | None = None,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
        **options: Any,
    ) -> GistQueryEngine:
        """Return a query engine over an open index.

        Args:
            similarity_top_k: nodes to retrieve; filters, scope: see `GistRetriever`.
            node_postprocessors: applied in turn between retrieval and answer, rerankers among them.
            streaming: whether responses come piece by piece.
            options: how to answer, see `GistSynthesizer`.
        """
        shared: dict[str, Any] = {"callback_manager": callback_manager or CallbackManager()}
        return cls(
            retriever=GistRetriever(rag, similarity_top_k=similarity_top_k, filters=filters, scope=scope, **shared),
            response_synthesizer=GistSynthesizer(rag, streaming=streaming, **shared, **options),
            node_postprocessors=list(node_postprocessors),
        )
