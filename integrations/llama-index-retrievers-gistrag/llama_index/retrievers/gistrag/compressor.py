"""A step of an `IngestionPipeline` that makes the gists of nodes and keeps them in an index folder.

It changes no node. `GistSynthesizer` finds the gists by what the nodes say, wherever the pipeline puts them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent

from gistrag import Engine, GistRAG
from gistrag.answering.answering import is_compressible
from gistrag.compression.compress import compress
from gistrag.compression.fidelity import compress_to
from gistrag.errors import IncompleteIndexError
from gistrag.index.builder import BATCH_CHUNKS, BATCH_TOKENS
from gistrag.index.store import Store
from gistrag.model.gist_model import GistModel
from gistrag.progress import Silence
from gistrag.settings import IndexSettings, require_same
from gistrag.storage import files


class GistCompressor(TransformComponent):
    """Makes the gists of nodes, those an index folder does not hold yet, and returns the nodes as they are.

    A node is compressed as an LLM would be shown it (`MetadataMode.LLM`). Give the pipeline an index folder of its own:
    a build of documents into the same one removes the gists that are of no document.

    Args:
        index: folder of the index; made at the first node where it is missing.
        settings: of a new index, fields of `gistrag.IndexSettings`.
        engine: models that are loaded already; by default those of the index, loaded at the first node.

    Raises:
        UsageError: a setting out of range.
    """

    index: str = Field(default="index", description="Folder of the index that keeps the gists.")
    settings: dict[str, Any] = Field(default_factory=dict, description="Settings of a new index.")
    _engine: Engine | None = PrivateAttr(default=None)

    def __init__(
        self, index: str | Path = "index", *, settings: dict[str, Any] | None = None, engine: Engine | None = None
    ) -> None:
        super().__init__(index=str(index), settings=settings or {})  # type: ignore[call-arg]  # fields of pydantic
        IndexSettings(**self._given)
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        """Return the name a pipeline knows it by."""
        return "GistCompressor"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Return *nodes*; their gists are on disk then.

        Raises:
            FingerprintMismatchError: the index was made with other models or settings.
            IndexLockedError: another builder is at work.
        """
        engine = self._engine = self._ready()
        with Store.build(self.index, command="GistCompressor") as store:
            _require_same_gists(store, engine)
            for batch in _batches(_Passage(engine.model, node) for node in nodes):
                _keep(store, engine.model, batch)
                store.commit()
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Return the same to a coroutine; the work is done in a thread."""
        return await asyncio.to_thread(self, nodes, **kwargs)

    def _ready(self) -> Engine:
        """Return the models of the index; it is there then, and was made with the settings given."""
        try:
            rag = GistRAG.open(self.index, engine=self._engine)
        except IncompleteIndexError:
            rag = _new_index(Path(self.index), self._engine, self.settings)
        with rag:
            asked = {name: str(value) for name, value in self._given.items()}
            stored = {name: str(getattr(rag.store.settings, name)) for name in asked}
            require_same(stored, asked, where=f"the index in {rag.folder}", remedy=_OTHER)
        return rag.engine

    @property
    def _given(self) -> dict[str, Any]:
        """The settings that say something, as for `GistRAG.from_folder`."""
        return {name: value for name, value in self.settings.items() if value not in (None, "auto")}


class _Passage:
    """A node as it would stand in the prompt; it gets gists where a build would make some."""

    def __init__(self, model: GistModel, node: BaseNode) -> None:
        self.ids = model.encode_passage(node.get_content(MetadataMode.LLM))
        self.text_tokens = len(model.encode(node.get_content(MetadataMode.NONE)))


def _keep(store: Store, model: GistModel, batch: Sequence[_Passage]) -> None:
    """Put the gists of passages that are not there yet; one that is not finite would poison an answer."""
    settings, rate = store.settings, store.settings.tokens_per_gist
    usable = [
        one.ids
        for one in batch
        if one.text_tokens >= max(2, rate) and is_compressible(model, one.ids, tokens_per_gist=rate)
    ]
    missing = {key: ids for ids in usable if not store.adopt(key := store.gist_key(ids))}
    ids = list(missing.values())
    if settings.min_quality:
        caches = compress_to(
            model,
            ids,
            placement=settings.placement,
            tokens_per_gist=rate,
            min_quality=settings.min_quality,
            kv_cache_dtype=settings.kv_cache_dtype,
        )
    else:
        caches = compress(model, ids, placement=settings.placement, tokens_per_gist=rate)
    for key, cache in zip(missing, caches, strict=True):
        if torch.isfinite(cache.kv).all():
            store.put_gist(key, cache)


def _batches(passages: Iterable[_Passage]) -> Iterator[list[_Passage]]:
    """Yield passages in the groups in which a build works them off, so that the gists are equal to the bit."""
    group: list[_Passage] = []
    for passage in passages:
        group.append(passage)
        if len(group) == BATCH_CHUNKS or sum(len(one.ids) for one in group) >= BATCH_TOKENS:
            yield group
            group = []
    if group:
        yield group


def _new_index(index: Path, engine: Engine | None, settings: dict[str, Any]) -> GistRAG:
    """Return a new index without documents. Its folder of documents is none, so that no sync ever empties it."""
    nothing = index / "no-documents"
    files.make_folder(nothing)
    try:
        return GistRAG.from_folder(nothing, index=index, engine=engine, progress=Silence(), **settings)
    finally:
        nothing.rmdir()


def _require_same_gists(store: Store, engine: Engine) -> None:
    """Return if the models make the gists of this index.

    Raises:
        FingerprintMismatchError: names what differs.
    """
    where = f"the index in {store.folder}"
    require_same(store.gist_fingerprint, engine.gist_fingerprint(store.settings), where=where, remedy=_OTHER)


_OTHER = "name another index folder"
