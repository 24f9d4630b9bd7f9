"""A step of an `IngestionPipeline` that makes the gists of nodes and keeps them in an index folder.

It changes no node. `GistSynthesizer` finds the gists by what the nodes say, wherever the pipeline puts them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent

from gistrag import Engine, GistRAG, IndexSettings


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
        with GistRAG.for_texts(self.index, engine=self._engine, **self.settings) as rag:
            self._engine = rag.engine
            rag.compress([node.get_content(MetadataMode.LLM) for node in nodes])
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Return the same to a coroutine; the work is done in a thread."""
        return await asyncio.to_thread(self, nodes, **kwargs)

    @property
    def _given(self) -> dict[str, Any]:
        """The settings that say something, as for `GistRAG.from_folder`."""
        return {name: value for name, value in self.settings.items() if value not in (None, "auto")}
