"""The chunks of a gistrag index as LlamaIndex nodes, and the retriever that finds them.

What a node shows to an LLM is the heading path on a line above the text: the very passage gistrag compressed. That is
how `GistSynthesizer` finds its gists again, whatever stands between the two.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_index.core.callbacks import CallbackManager
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import (
    NodeRelationship,
    NodeWithScore,
    ObjectType,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

from gistrag import GistRAG, Hit, Options, StoredChunk
from gistrag.errors import UsageError

KNOWN = ("date", "from", "to", "subject", "title", "author", "encoding")
"""Metadata that a document may have."""
FOR_PEOPLE = ("file_path", "file_name", "page_label", *KNOWN)
"""Metadata of a node that no model is shown; its ``heading`` is shown."""

NUMERIC = (
    FilterOperator.EQ, FilterOperator.NE, FilterOperator.GT, FilterOperator.GTE, FilterOperator.LT, FilterOperator.LTE,
    FilterOperator.IN, FilterOperator.NIN,
)  # fmt: skip


class GistRetriever(BaseRetriever):
    """Retrieves chunks of an index, by meaning and by words.

    A query is searched for by its text, or by its ``custom_embedding_strs``, which ``HyDEQueryTransform`` sets. The
    vector it may bring is left alone unless that is wanted: other retrievers leave theirs there.

    Args:
        rag: an open index.
        similarity_top_k: nodes to return.
        filters: `MetadataFilters` over ``file_path``, ``file_name``, ``page_label``, ``heading``, ``date``, ``from``
            and the other metadata of documents, or gistrag's own filters as a mapping, such as
            ``{"path": "*.md", "kind": "pdf", "heading": "install", "date": ">=2026-01-01"}``.
        scope: path of the one document to look in.
        use_query_embedding: search by the ``embedding`` of a query where it has one, which must be of the index's own
            embedder.

    Raises:
        UsageError: no open index, a filter over what no node has, an impossible date, or a number below 1.
    """

    def __init__(
        self,
        rag: GistRAG,
        *,
        similarity_top_k: int = 3,
        filters: MetadataFilters | Mapping[str, str] | None = None,
        scope: str | None = None,
        use_query_embedding: bool = False,
        callback_manager: CallbackManager | None = None,
        verbose: bool = False,
    ) -> None:
        require_index(rag)
        if similarity_top_k < 1:
            raise UsageError(f"similarity_top_k must be at least 1, got {similarity_top_k}")
        if isinstance(filters, MetadataFilters):
            _require_known(filters)
        super().__init__(callback_manager=callback_manager, verbose=verbose)
        self.rag = rag
        self.similarity_top_k = similarity_top_k
        self.filters = filters
        self.scope = scope
        self.use_query_embedding = use_query_embedding

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, index: str | Path = "index", similarity_top_k: int = 3, **settings: Any
    ) -> GistRetriever:
        """Return a retriever over the documents of *folder*: the index is built on first use, synced afterwards.

        Args:
            settings: see `gistrag.GistRAG.from_folder`.
        """
        return cls(GistRAG.from_folder(folder, index=index, **settings), similarity_top_k=similarity_top_k)

    @classmethod
    def from_persist_dir(
        cls, path: str | Path = "index", *, similarity_top_k: int = 3, **options: Any
    ) -> GistRetriever:
        """Return a retriever over an index that is there already; nothing is ever written.

        Args:
            options: see `gistrag.GistRAG.open`.
        """
        return cls(GistRAG.open(path, **options), similarity_top_k=similarity_top_k)

    def nodes(self) -> list[TextNode]:
        """Return all chunks of the index: for a docstore, or for another retriever to search."""
        with self.rag.snapshot():
            return [node for row in self.rag.documents() for node in self._nodes(self.rag.chunks(document=row.path))]

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        with self.rag.snapshot():
            hits = self._passing(query_bundle.query_str, self._search(query_bundle))
            nodes = self._nodes([hit.chunk for hit in hits])
        return [NodeWithScore(node=node, score=hit.score) for node, hit in zip(nodes, hits, strict=True)]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)

    def _search(self, query: QueryBundle) -> Callable[..., list[Hit]]:
        """Return the search of the index, by the vector of a query if it has one of its own."""
        return partial(self.rag.retrieve, vector=self._vector_of(query))

    def _vector_of(self, query: QueryBundle) -> npt.NDArray[np.float32] | None:
        """Return the normalized vector of a query, the mean of several; None where its text is to be embedded."""
        if self.use_query_embedding and query.embedding is not None:
            return _normalized(np.asarray(query.embedding, np.float32))
        if query.custom_embedding_strs is not None:
            vectors = [self.rag.engine.embedder.embed_query(text) for text in query.embedding_strs]
            return _normalized(np.mean(vectors, axis=0))
        return None

    def _passing(self, question: str, search: Callable[..., list[Hit]]) -> list[Hit]:
        """Return the best hits that pass the filters; with `MetadataFilters`, look deeper until enough of them do."""
        if not isinstance(self.filters, MetadataFilters):
            return search(question, top_k=self.similarity_top_k, scope=self.scope, filters=self.filters)
        reach = self.similarity_top_k
        while True:
            hits = search(question, top_k=reach, scope=self.scope)
            passing = [hit for hit in hits if _passes(self.filters, _metadata(hit.chunk))]
            if len(passing) >= self.similarity_top_k or len(hits) < reach:
                return passing[: self.similarity_top_k]
            reach *= 4

    def _nodes(self, chunks: Sequence[StoredChunk]) -> list[TextNode]:
        ids = {chunk.id + step for chunk in chunks for step in (-1, 1)}
        near = {row.id: row for row in self.rag.chunks(sorted(ids))}
        return [self._node(chunk, near) for chunk in chunks]

    def _node(self, chunk: StoredChunk, near: Mapping[int, StoredChunk]) -> TextNode:
        text = chunk.text.lstrip()  # as it stands in the prompt, also below a heading
        return TextNode(
            id_=self._node_id(chunk.id),
            text=text,
            start_char_idx=chunk.end - len(text),
            end_char_idx=chunk.end,
            metadata=_metadata(chunk),
            metadata_template="{value}",
            text_template="{metadata_str}\n{content}",
            excluded_llm_metadata_keys=list(FOR_PEOPLE),
            excluded_embed_metadata_keys=list(FOR_PEOPLE),
            relationships=self._relationships(chunk, near),
        )

    def _relationships(self, chunk: StoredChunk, near: Mapping[int, StoredChunk]) -> dict[NodeRelationship, Any]:
        """Return the document of a chunk and its neighbours there; chunks of a document have successive ids."""
        document = RelatedNodeInfo(
            node_id=self._node_id(f"document-{chunk.document_id}"),
            node_type=ObjectType.DOCUMENT,
            metadata={"file_path": chunk.path},
        )
        found: dict[NodeRelationship, Any] = {NodeRelationship.SOURCE: document}
        for step, relationship in ((-1, NodeRelationship.PREVIOUS), (1, NodeRelationship.NEXT)):
            other = near.get(chunk.id + step)
            if other and (other.document_id, other.ordinal) == (chunk.document_id, chunk.ordinal + step):
                found[relationship] = RelatedNodeInfo(node_id=self._node_id(other.id), node_type=ObjectType.TEXT)
        return found

    def _node_id(self, number: int | str) -> str:
        return f"gistrag-{self.rag.index_id}-{number}"


def require_index(rag: object) -> None:
    """Return if this is an open index.

    Raises:
        UsageError: says how to open one.
    """
    if not isinstance(rag, GistRAG):
        raise UsageError(f"expected an open index, found {rag!r}; GistRAG.open or GistRAG.from_folder gives one")


def _normalized(vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)


def _metadata(chunk: StoredChunk) -> dict[str, str]:
    """Return what is known of a chunk; what does not apply is left out."""
    known = {
        "file_path": chunk.path,
        "file_name": PurePosixPath(chunk.path).name,
        "page_label": str(chunk.page or ""),
        "heading": " > ".join(chunk.heading),
        **chunk.metadata,
    }
    return {name: value for name, value in known.items() if value}


def _passes(filters: MetadataFilters, metadata: Mapping[str, str]) -> bool:
    """Return whether a node passes; LlamaIndex has no judge of nested filters."""
    verdicts = [
        _passes(one, metadata) if isinstance(one, MetadataFilters) else _passes_one(*_comparable(one, metadata))
        for one in filters.filters
    ]
    if filters.condition == FilterCondition.OR:
        return any(verdicts) or not verdicts
    return not any(verdicts) if filters.condition == FilterCondition.NOT else all(verdicts)


def _passes_one(one: MetadataFilter, metadata: Mapping[str, str | int]) -> bool:
    """Return whether a node passes a single filter, as LlamaIndex judges it."""
    return build_metadata_filter_fn(lambda _: dict(metadata), MetadataFilters(filters=[one]))("")


def _comparable(one: MetadataFilter, metadata: Mapping[str, str]) -> tuple[MetadataFilter, dict[str, str | int]]:
    """Return a filter and the metadata it judges: pages as numbers, as 9 comes before 10, dates as far as it goes."""
    values = one.value if isinstance(one.value, list) else [one.value]
    if one.key == "date" and one.operator in NUMERIC and "date" in metadata:
        return one, {**metadata, "date": metadata["date"][: max(len(str(value)) for value in values)]}
    if one.key != "page_label" or one.operator not in NUMERIC or not all(str(value).isdigit() for value in values):
        return one, {**metadata}
    numbers = [int(str(value)) for value in values]
    page = {"page_label": int(metadata["page_label"])} if "page_label" in metadata else {}
    wanted = numbers if isinstance(one.value, list) else numbers[0]
    return one.model_copy(update={"value": wanted}), {**metadata, **page}


def _require_known(filters: MetadataFilters) -> None:
    """Return if every filter is over something that nodes have.

    Raises:
        UsageError: names one that is not.
    """
    known = (*FOR_PEOPLE, "heading")
    flat = list(_flat(filters))
    if unknown := sorted({one.key for one in flat} - set(known)):
        raise UsageError(f"nodes can be filtered by {', '.join(known)}, got {', '.join(unknown)}")
    for one in flat:
        values = one.value if isinstance(one.value, list) else [one.value]
        for value in values if one.key == "date" and one.operator in NUMERIC else ():
            Options(filters={"date": str(value)})  # refuses an impossible date


def _flat(filters: MetadataFilters) -> Iterable[MetadataFilter]:
    """Yield the single filters, at any depth."""
    for one in filters.filters:
        if isinstance(one, MetadataFilters):
            yield from _flat(one)
        else:
            yield one
