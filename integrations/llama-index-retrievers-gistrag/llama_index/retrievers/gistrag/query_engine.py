"""A question answered over an index: `GistRetriever` and `GistSynthesizer` together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.response.schema import RESPONSE_TYPE, Response
from llama_index.core.callbacks import CallbackManager
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.vector_stores import MetadataFilters

from gistrag import GistRAG
from llama_index.retrievers.gistrag.base import GistRetriever
from llama_index.retrievers.gistrag.synthesizer import GistSynthesizer, belief


class GistQueryEngine(RetrieverQueryEngine):
    """Answers questions over an index from gist caches. `from_rag` makes one; the constructor takes any parts.

    What `GistRAG.ready` answers, greetings and questions about whole documents, it answers without its parts.
    """

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

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        return self._ready(query_bundle) or super()._query(query_bundle)

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        ready = await asyncio.to_thread(self._ready, query_bundle)
        return ready or await super()._aquery(query_bundle)

    def _ready(self, query: QueryBundle) -> Response | None:
        """Return the answer for which no model is asked, None elsewhere, or where the retriever is another one."""
        retriever = self._retriever
        if not isinstance(retriever, GistRetriever) or retriever.filters:
            return None
        answer = retriever.rag.ready(query.query_str, scope=retriever.scope)
        if answer is None:
            return None
        nodes = retriever._nodes(retriever.rag.chunks([source.chunk_id for source in answer.sources]))
        found = [NodeWithScore(node=node, score=1.0) for node in nodes]
        return Response(answer.text, source_nodes=found, metadata={"gistrag": belief(answer)})
