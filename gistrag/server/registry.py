"""The indexes that a server offers, by name, and the records that it returns about them.

The HTTP server (`gistrag.server.app`) and the MCP tools (`gistrag.server.mcp`) share this module. All indexes share one
set of loaded models. Clients see the name of an index, never the path of its folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gistrag.answering.answer import Source
from gistrag.configure import fresh
from gistrag.documents.chunking import PLAIN_KINDS
from gistrag.engine import Engine
from gistrag.errors import UsageError
from gistrag.index.gist_worker import When
from gistrag.index.retriever import Hit
from gistrag.index.schema import StoredChunk
from gistrag.rag import GistRAG
from gistrag.settings import RuntimeName

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

EXAMPLES, EXAMPLE_CHARACTERS = 3, 60

Record = dict[str, Any]
"""A JSON object."""


def named(given: Sequence[str]) -> dict[str, Path]:
    """Return the index folders by name, from arguments of the form ``name=path`` or ``path``.

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
            raise UsageError(f"--index expects NAME=FOLDER, the name of letters, digits, '.', '_' and '-', got {one!r}")
        if name in found:
            raise UsageError(f"two indexes are named {name!r}; rename one of them with --index NAME=FOLDER")
        found[name] = path
    return found


@contextmanager
def opened(
    folders: Mapping[str, Path],
    *,
    gists: When = "none",
    device: str | None = None,
    reranker: str | None = None,
    runtime: RuntimeName = "auto",
    model: str | None = None,
    adapter: str | None = None,
    embedder: str | None = None,
) -> Iterator[dict[str, GistRAG]]:
    """Open indexes for the length of the block, by name; all use the models of the first one.

    Args:
        gists: when missing ones are made, see `GistRAG.open`.
        model, adapter, embedder: where these are now, if not where the first index says.

    Raises:
        FingerprintMismatchError: an index was made with other models than the first one.
    """
    with ExitStack() as stack:
        registry: dict[str, GistRAG] = {}
        stack.callback(_close_all, registry)  # with those that are added meanwhile
        for name, folder in folders.items():
            engine = next(iter(registry.values())).engine if registry else None
            rag = GistRAG.open(
                folder,
                gists=gists,
                engine=engine,
                device=device,
                reranker=reranker,
                runtime=runtime,
                model=model,
                adapter=adapter,
                embedder=embedder,
            )
            registry[name] = rag
        yield registry


def _close_all(registry: Mapping[str, GistRAG]) -> None:
    for rag in registry.values():
        rag.close()


def engine_of(
    registry: Mapping[str, GistRAG], *, device: str | None, reranker: str | None, runtime: RuntimeName
) -> Engine:
    """Return the models that the indexes share, or the default ones where there is no index yet."""
    if registry:
        return next(iter(registry.values())).engine
    return Engine.load(fresh({}, None), device=device, reranker=reranker, runtime=runtime)


def source_record(source: Source) -> Record:
    """Return the JSON record of a source of an answer."""
    return {"place": source.place, **asdict(source)}


def hit_record(hit: Hit) -> Record:
    """Return the JSON record of a retrieved chunk, with its whole text and its scores."""
    return {**chunk_record(hit.chunk), "score": hit.score, "dense": hit.dense, "keyword": hit.keyword}


def chunk_record(chunk: StoredChunk) -> Record:
    """Return the JSON record of a chunk."""
    names = ("path", "page", "heading", "start", "end", "text", "tokens", "metadata")
    return {"chunk_id": chunk.id, **{name: getattr(chunk, name) for name in names}}


def passage_record(rag: GistRAG, chunk_id: int) -> Record | None:
    """Return the record of a chunk with the ids of its neighbors, or None if there is no such chunk."""
    with rag.store.snapshot():
        found = rag.store.chunks([chunk_id])
        ids = [one.id for one in rag.store.chunks_of(found[0].path)] if found else []
    if not found:
        return None
    if chunk_id not in ids:  # a summary
        return {**chunk_record(found[0]), "previous": None, "next": None}
    at = ids.index(chunk_id)
    previous, following = ids[at - 1] if at else None, ids[at + 1] if at + 1 < len(ids) else None
    return {**chunk_record(found[0]), "previous": previous, "next": following}


def document_records(rag: GistRAG) -> list[Record]:
    """Return the JSON records of the documents in an index, sorted by path."""
    names = ("path", "kind", "chunks", "tokens", "size", "stale")
    return [
        {**{name: getattr(row, name) for name in names}, "markdown": row.kind not in PLAIN_KINDS}
        for row in rag.store.documents()
    ]


def example_records(rag: GistRAG) -> list[Record]:
    """Return what a newcomer may ask about: the titles of some documents from all over the index, each with a heading.

    The heading is "" where the document has no section of its own.
    """
    by_title = {title: path for path, title in rag.store.summaries.titles().items() if title.strip()}
    titles = [title for title in by_title if len(title) <= EXAMPLE_CHARACTERS]
    chosen = titles[:: max(1, len(titles) // EXAMPLES)][:EXAMPLES]
    return [{"title": title, "heading": _section(rag, by_title[title])} for title in chosen]


def _section(rag: GistRAG, path: str) -> str:
    """Return the heading of a section in the middle of a document, "" where there is none."""
    chunks = rag.store.chunks_of(path)
    headings = [chunk.heading[-1] for chunk in chunks[len(chunks) // 2 :] if len(chunk.heading) > 1]
    return next((heading for heading in headings if len(heading) <= EXAMPLE_CHARACTERS), "")


def status_record(rag: GistRAG) -> Record:
    """Return the JSON record of the totals and settings of an index."""
    settings = rag.store.settings
    return {
        **asdict(rag.store.stats()),
        "is_making_gists": rag.progress.is_working,
        "tokens_per_gist": settings.tokens_per_gist,
        "placement": settings.placement,
        "chunk_tokens": settings.chunk_tokens,
    }
