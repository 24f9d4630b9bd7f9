"""A tiny model, a compressor that takes no time, and documents whose every chunk names its document and version.

A fake gist is a function of its token ids, so a test that knows a chunk knows every bit of its gist.
"""

from __future__ import annotations

import hashlib
import re
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import HashEmbedder, tiny_model

from gistrag.answering.answer import Options, Timings, Usage
from gistrag.answering.passages import Passage
from gistrag.compression import compress as making_gists
from gistrag.documents.chunking import Chunk
from gistrag.documents.discovery import Document
from gistrag.engine import Engine
from gistrag.errors import IncompleteIndexError
from gistrag.index.schema import StoredChunk
from gistrag.index.store import IndexedChunk, Store
from gistrag.kv.cache import GistCache, as_stored
from gistrag.kv.packed import PackedGists
from gistrag.rag import GistRAG
from gistrag.settings import GistSettings, IndexSettings

TOKENS_PER_GIST = 8
LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 8  # of the tiny model

State = dict[str, tuple[tuple[str, bool], ...]]
"""What an index holds: of every document its chunks in order, each with whether it has a gist."""


def engine() -> Engine:
    """Return the tiny model of the tests, in float32, and an embedder without one."""
    return Engine(tiny_model(dtype=torch.float32), HashEmbedder())  # type: ignore[arg-type]


def gist_of(ids: Sequence[int], tokens_per_gist: int = TOKENS_PER_GIST) -> GistCache:
    """Return the fake gist of token *ids*."""
    seed = int.from_bytes(hashlib.sha256(array("i", ids).tobytes()).digest()[:7], "little")
    gists = -(-len(ids) // tokens_per_gist)
    kv = torch.randn(LAYERS, 2, KV_HEADS, gists, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    return GistCache(kv, torch.arange(gists) * tokens_per_gist, len(ids))


def stored_gist_of(ids: Sequence[int], tokens_per_gist: int = TOKENS_PER_GIST) -> GistCache:
    """Return the fake gist of token *ids* as it comes back from its file."""
    return as_stored(gist_of(ids, tokens_per_gist), IndexSettings().kv_cache_dtype)


def fake_compress(delay_s: float = 0.0) -> Any:
    """Return a fake for `gistrag.compression.compress.compress` that takes *delay_s* for a chunk."""

    def compress(model: Any, chunks: Sequence[Sequence[int]], settings: GistSettings) -> list[GistCache]:
        if delay_s:
            time.sleep(delay_s * len(chunks))
        return [gist_of(chunk, settings.tokens_per_gist) for chunk in chunks]

    return compress


@contextmanager
def fake_compression(delay_s: float = 0.0) -> Iterator[None]:
    """Let builds of the block compress by the fake."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making_gists, "compress", fake_compress(delay_s))
        yield


# An index without any model: the store alone, for tests of the order in which things reach the disk


def configure(store: Store) -> None:
    """Record the making of a fake index."""
    store.configure(
        IndexSettings(tokens_per_gist=TOKENS_PER_GIST),
        source="../docs",
        gist_fingerprint={"model": "fake"},
        embedder_fingerprint={"embedder": "hash"},
    )


def ids_of(text: str) -> list[int]:
    """Return the token ids of a text: its bytes."""
    return list(text.encode())


def put(store: Store, path: str, texts: Sequence[str], *, are_gists_pending: bool = False) -> None:
    """Put a document of one chunk for each text as a build does: its gists, unless they are pending, then its rows."""
    embedder, entries = HashEmbedder(), []
    for ordinal, text in enumerate(texts):
        key = store.gists.key(ids_of(text))
        if are_gists_pending:
            store.gists.expect(key, source_tokens=len(ids_of(text)))
        elif not store.gists.reuse(key):
            store.gists.put({key: gist_of(ids_of(text))})
        chunk = Chunk(
            ordinal=ordinal, start=0, end=len(text), text=text, heading=(), page=None, tokens=len(ids_of(text))
        )
        entries.append(IndexedChunk(chunk=chunk, gist_key=key, vectors=embedder.embed_documents([text])[0]))
    sha256 = hashlib.sha256("".join(texts).encode()).hexdigest()
    document = Document(path=path, sha256=sha256, size=1, mtime_ns=1, kind="text", text="")
    store.replace_document(document, entries)


def state_of(store: Store) -> State:
    """Return what an index holds."""

    def has_gist(chunk: StoredChunk) -> bool:
        return chunk.gist_key is not None and not store.gists.is_pending(chunk.gist_key)

    return {
        row.path: tuple((chunk.text, has_gist(chunk)) for chunk in store.chunks_of(row.path))
        for row in store.documents()
    }


@dataclass(frozen=True)
class Seen:
    """What a reader finds in a folder: its documents, None for no index yet; and what is wrong with their gists."""

    state: State | None
    wrong: tuple[str, ...]


def look_into(folder: Path, ids: Callable[[str], Sequence[int]] = ids_of) -> Seen:
    """Return what a reader finds: every gist is loaded and compared with the one its text must have.

    Args:
        folder: of the index.
        ids: gives the token ids of a text, by default its bytes.
    """
    try:
        opened = Store.open(folder)
    except IncompleteIndexError:
        return Seen(None, ())
    wrong = []
    with opened as store, store.snapshot():
        state = state_of(store)
        for path in state:
            for chunk in store.chunks_of(path):
                if chunk.gist_key is None or store.gists.is_pending(chunk.gist_key):
                    continue
                expected = stored_gist_of(ids(chunk.text), store.settings.tokens_per_gist)
                try:
                    found = GistCache.unpacked(store.gists.load(chunk.gist_key))
                except Exception as error:
                    wrong.append(f"{path}: {type(error).__name__}: {error}")
                else:
                    if not torch.equal(expected.kv, found.kv):
                        wrong.append(f"{path}: another gist")
        if any(row.chunks != len(state[row.path]) for row in store.documents()):
            wrong.append("a chunk is damaged")
    return Seen(state, tuple(wrong))


# Documents of a folder, each chunk of which says whose it is


def text_of(name: str, version: int, *, parts: int = 3) -> str:
    """Return the text of a document: paragraphs that each name document, version, place and number of parts."""
    words = ("harbour", "crane", "mill", "rye", "honey", "salt", "bridge", "lantern")
    lines = []
    for part in range(parts):
        told = " ".join(words[(version + part + i) % len(words)] for i in range(12))
        lines.append(f"document {name} version {version} part {part} of {parts}: {told}.")
    return "\n\n".join(lines)


def write_documents(folder: Path, versions: Mapping[str, int], *, parts: int = 3) -> None:
    """Make a folder hold exactly these documents, each in its version."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.stem not in versions:
            path.unlink()
    for name, version in versions.items():
        path, text = folder / f"{name}.txt", text_of(name, version, parts=parts)
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def versions_in(state: State) -> dict[str, int]:
    """Return which version of each document an index holds.

    Raises:
        AssertionError: a document is not whole, or made of two versions.
    """
    found = {}
    for path, chunks in state.items():
        told = re.findall(r"document (\w+) version (\d+) part (\d+) of (\d+):", "\n".join(text for text, _ in chunks))
        names, versions, parts, counts = (sorted(set(column)) for column in zip(*told, strict=True))
        assert ([Path(path).stem], 1, 1) == (names, len(versions), len(counts)), f"{path} holds {told}"
        assert [str(part) for part in range(int(counts[0]))] == sorted(parts, key=int), f"{path} holds parts {parts}"
        found[Path(path).stem] = int(versions[0])
    return found


def is_right(passage: Passage, engine: Engine, *, tokens_per_gist: int = TOKENS_PER_GIST) -> bool:
    """Return whether what would reach the model is what the chunk was made of, in every bit."""
    ids = engine.model.encode_passage(passage.text, passage.source.heading)
    if not isinstance(passage.content, PackedGists):
        return passage.content == ids
    expected, found = stored_gist_of(ids, tokens_per_gist), GistCache.unpacked(passage.content)
    return torch.equal(expected.kv, found.kv) and torch.equal(expected.positions, found.positions)


def retrieved(rag: GistRAG, question: str, *, top_k: int) -> tuple[list[Passage], Usage]:
    """Return the passages that a question would be answered from, and what loading them took."""
    usage = Usage()
    return rag._finder.find(question, Options(top_k=top_k), usage, Timings()).passages, usage
