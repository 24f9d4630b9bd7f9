"""A program as a user writes it: `make check` holds it to mypy's strict rules, so every public call has its types.

It is checked and not run. A value that reached it as `Any` would be an error (``disallow_any_expr``).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from gistrag import (
    Answer,
    Engine,
    GistRAG,
    GistRAGError,
    Hit,
    IndexSettings,
    NoProgress,
    Options,
    Source,
    StoredChunk,
    Stream,
    SyncReport,
    Timings,
    Usage,
)
from gistrag.errors import IndexLockedError, UsageError


def build(folder: Path) -> SyncReport | None:
    """Build an index with settings of one's own."""
    with GistRAG.from_folder(
        folder,
        index="index/",
        include=["*.md"],
        tokens_per_gist=4,
        placement="matched",
        kv_cache_dtype="int8",
        progress=NoProgress(),
        gists="now",
    ) as rag:
        return rag.report


def ask(rag: GistRAG, question: str) -> tuple[str, list[str], float]:
    """Ask, and take the answer apart."""
    answer: Answer = rag.query(question, top_k=5, mode="hybrid", filters={"path": "*.md"}, max_new_tokens=64)
    sources: list[Source] = list(answer.sources)
    timings: Timings = answer.timings
    usage: Usage = answer.usage
    return f"{answer.text} ({usage.question_tokens})", [source.path for source in sources], timings.ttft_s


def search(rag: GistRAG, question: str) -> list[str]:
    """Retrieve chunks without an answer."""
    hits: list[Hit] = rag.retrieve(question, top_k=8, scope="manual.md")
    chunks: list[StoredChunk] = rag.chunks([hit.chunk.id for hit in hits])
    return [f"{hit.score:.2f} {chunk.path}" for hit, chunk in zip(hits, chunks, strict=True)]


def stream(rag: GistRAG, question: str, texts: list[str]) -> Answer:
    """Print an answer from texts of one's own as it comes, and return the snapshot."""
    made: int = rag.compress(texts)
    pieces: Stream = rag.stream_from(question, texts, mode="gist", max_new_tokens=32)
    for piece in pieces:
        print(piece.upper(), end="")
    print(made)
    return pieces.answer


async def stream_without_waiting(rag: GistRAG, question: str) -> str:
    """Stream in an event loop."""
    return "".join([piece async for piece in rag.stream(question, temperature=0.7, seed=1)])


def main() -> int:
    """Share one engine between two indexes."""
    settings = IndexSettings(tokens_per_gist=8)
    engine: Engine = Engine.load(settings, device="cpu")
    options = Options(top_k=3, mode="text")
    try:
        with GistRAG.open("a/", engine=engine) as first, GistRAG.open("b/", engine=engine) as second:
            print(ask(first, "What is new?"), search(second, "What is old?"), options.top_k)
            print(
                asyncio.run(stream_without_waiting(first, "And then?")), stream(second, "Which port?", ["Port 8000."])
            )
    except (IndexLockedError, UsageError) as error:
        print(error)
    except GistRAGError as error:
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
