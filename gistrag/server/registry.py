"""Several indexes side by side, one set of models for all, and what other programs are told of them.

What answers to programs from outside stands on this: `gistrag.server.app` and `gistrag.server.mcp`. An index is
known to them by its name; where its folder lies they never learn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gistrag.answering.answer import Source
from gistrag.errors import UsageError
from gistrag.index.retriever import Hit
from gistrag.index.schema import StoredChunk
from gistrag.rag import GistRAG

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Record = dict[str, Any]


def named(given: Sequence[str]) -> dict[str, Path]:
    """Return folders by the names they are served under, from ``name=path`` or ``path``.

    Raises:
        UsageError: a name that is none, or that is given twice.

    >>> named(["manual=docs-index", "notes/index"])
    {'manual': PosixPath('docs-index'), 'index': PosixPath('notes/index')}
    """
    found: dict[str, Path] = {}
    for one in given:
        before, equals, after = one.partition("=")
        path = Path(after if equals else one)
        name = before if equals else path.absolute().name
        if not NAME.fullmatch(name) or not str(path):
            raise UsageError(f"--index takes NAME=FOLDER, the name of letters, digits, '.', '_' and '-', got {one!r}")
        if name in found:
            raise UsageError(f"two indexes are named {name!r}; name one of them otherwise with --index NAME=FOLDER")
        found[name] = path
    return found


@contextmanager
def opened(
    folders: Mapping[str, Path], *, device: str | None = None, reranker: str | None = None
) -> Iterator[dict[str, GistRAG]]:
    """Hold indexes open by their names, all with the models of the first.

    Raises:
        FingerprintMismatchError: one is made with other models than the first.
    """
    with ExitStack() as stack:
        shelf: dict[str, GistRAG] = {}
        for name, folder in folders.items():
            engine = next(iter(shelf.values())).engine if shelf else None
            shelf[name] = stack.enter_context(GistRAG.open(folder, engine=engine, device=device, reranker=reranker))
        yield shelf


def source_record(source: Source) -> Record:
    """Return a source of an answer as plain values."""
    return {"place": source.place, **asdict(source)}


def hit_record(hit: Hit) -> Record:
    """Return a retrieved chunk as plain values, with its whole text."""
    return {**chunk_record(hit.chunk), "score": hit.score, "dense": hit.dense, "keyword": hit.keyword}


def chunk_record(chunk: StoredChunk) -> Record:
    """Return a chunk as plain values."""
    names = ("path", "page", "heading", "start", "end", "text", "tokens")
    return {"chunk_id": chunk.id, **{name: getattr(chunk, name) for name in names}}


def document_records(rag: GistRAG) -> list[Record]:
    """Return the documents of an index as plain values, by path."""
    names = ("path", "kind", "chunks", "tokens", "size", "stale")
    return [{name: getattr(row, name) for name in names} for row in rag.store.documents()]


def status_record(rag: GistRAG) -> Record:
    """Return totals of an index as plain values."""
    settings = rag.store.settings
    return {
        **asdict(rag.store.stats()),
        "tokens_per_gist": settings.tokens_per_gist,
        "placement": settings.placement,
        "chunk_tokens": settings.chunk_tokens,
    }
