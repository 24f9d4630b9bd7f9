"""Searching an index without a language model: `searching`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gistrag.configure import placed, require_embedder
from gistrag.index.embedder import Embedder, Reranker
from gistrag.index.retriever import Retriever
from gistrag.index.store import Store
from gistrag.model.hub import find


@contextmanager
def searching(
    index: str | Path, *, device: str | None = None, reranker: str | None = None, embedder: str | None = None
) -> Iterator[Retriever]:
    """Hold an index open, and give what searches it.

    Args:
        device: where to load the embedder, such as ``cpu`` or ``cuda:0``.
        reranker: hub id or folder of a cross-encoder that sorts what is found.
        embedder: where the embedder is now, if not where the index says; it must be the same.

    Raises:
        IncompleteIndexError: no index there.
        FingerprintMismatchError: it was made with another embedder than this machine has.
        ModelNotFoundError: with the command that brings the embedder.
    """
    with Store.open(index) as store:
        place = placed({"embedder": embedder or store.settings.embedder})["embedder"]
        opened = Embedder(find(place).path, device=device)
        require_embedder(store, opened)
        ranks = Reranker(find(reranker).path, device=device) if reranker else None
        yield Retriever(store, opened, reranker=ranks)
