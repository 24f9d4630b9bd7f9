"""What an index holds, to look at: no model is asked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property

from gistrag.index.schema import DocumentRow, StoredChunk
from gistrag.index.store import Store


class Contents:
    """The documents and chunks of an index.

    Attributes:
        folder: of the index.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folder = store.folder

    @cached_property
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
