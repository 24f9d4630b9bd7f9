"""Searching an index without a language model: `searching`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gistrag.configure import require_embedder
from gistrag.index.embedder import Embedder, Reranker
from gistrag.index.retriever import Retriever
from gistrag.index.store import Store
from gistrag.model.hub import find


@contextmanager
def searching(index: str | Path, *, device: str | None = None, reranker: str | None = None) -> Iterator[Retriever]:
    """Hold an index open, and give what searches it.

    Args:
        device: where to load the embedder, such as ``cpu`` or ``cuda:0``.
        reranker: hub id or folder of a cross-encoder that sorts what is found.

    Raises:
        IncompleteIndexError: no index there.
        FingerprintMismatchError: it was made with another embedder than this machine has.
        ModelNotFoundError: with the command that brings the embedder.
    """
    with Store.open(index) as store:
        embedder = Embedder(find(store.settings.embedder).path, device=device)
        require_embedder(store, embedder)
        ranks = Reranker(find(reranker).path, device=device) if reranker else None
        yield Retriever(store, embedder, reranker=ranks)
