"""A small index made without a model: random caches, and chunks of a few words."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from gistrag.documents.chunking import Chunk
from gistrag.documents.discovery import Document
from gistrag.index.store import IndexedChunk, Store
from gistrag.kv.cache import GistCache
from gistrag.settings import IndexSettings

GISTS_BY = {"base": "a", "rate": "2"}
VECTORS_BY = {"embedder": "e"}
DIM = 8


def cache(*, seed: int = 0, gists: int = 4, per_head: bool = False, dtype: torch.dtype = torch.bfloat16) -> GistCache:
    """Return a random cache of 2 layers and 3 heads over 10 tokens."""
    random = torch.Generator().manual_seed(seed)
    kv = torch.randn(2, 2, 3, gists, 8, generator=random).to(dtype)
    shape = (2, 3, gists) if per_head else (gists,)
    return GistCache(kv, torch.randint(0, 10, shape, generator=random), 10)


def configure(opened: Store, *, kv_cache_dtype: str = "auto", **changes: dict[str, str]) -> None:
    """Record the making of the test index."""
    values = {"gist_fingerprint": GISTS_BY, "embedder_fingerprint": VECTORS_BY, **changes}
    opened.configure(IndexSettings(kv_cache_dtype=kv_cache_dtype), source="docs", **values)


def document(path: str = "a.md", *, kind: str = "markdown") -> Document:
    return Document(path=path, sha256=path * 2, size=5, mtime_ns=7, kind=kind, text="")


def entries(texts: Iterable[str], *, key: str | None = None, heading: tuple[str, ...] = ()) -> list[IndexedChunk]:
    """Return one chunk for each text, each with two vectors."""
    chunks = [
        Chunk(ordinal=i, start=i, end=i + len(text), text=text, heading=heading, page=None, tokens=3)
        for i, text in enumerate(texts)
    ]
    return [IndexedChunk(chunk=chunk, gist_key=key, vectors=np.full((2, DIM), 0.5, np.float32)) for chunk in chunks]


def make(folder: Path, *texts: str, kv_cache_dtype: str = "auto") -> str:
    """Make an index of one document with one gist, and return the gist's key."""
    with Store.build(folder) as opened:
        configure(opened, kv_cache_dtype=kv_cache_dtype)
        key = opened.gists.key([1, 2, 3])
        opened.gists.put({key: cache()})
        opened.replace_document(document(), entries(texts or ["hello world"], key=key))
    return key


def vectors_of(store: Store, chunk_id: int) -> npt.NDArray[np.float32]:
    """Return the vectors of one chunk, ``(parts, dim)``."""
    rows = store.vectors.rows()
    return rows.vectors[rows.chunk_ids == chunk_id]


def gist_file(folder: Path) -> Path:
    return next((folder / "gists").rglob("*.safetensors"))
