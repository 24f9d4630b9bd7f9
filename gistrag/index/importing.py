"""Importing documents of another index with their gists, and removing them again.

An imported document is in no folder, so a sync leaves it alone; `gistrag.index.folder_record` lists them.
Everything is looked at before anything is written, and one commit makes all of it visible.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gistrag.compression.making import is_compressible
from gistrag.documents.chunking import Chunk
from gistrag.errors import CorruptGistError, UsageError
from gistrag.index.builder import Builder
from gistrag.index.document_file import Contents, Exported
from gistrag.index.embedder import Embedder
from gistrag.index.folder_record import imported_documents, mark_imported
from gistrag.index.store import IndexedChunk, Store
from gistrag.kv.packed import PackedGists
from gistrag.model.runtime import AnyRuntime


def import_from(store: Store, contents: Contents, path: Path, *, runtime: AnyRuntime, embedder: Embedder) -> list[str]:
    """Put documents into an index open for writing, commit, and return their paths; earlier imports are replaced.

    Args:
        contents: made by the model of the index; path: of their file, for messages.

    Raises:
        UsageError: the index has a document of its folder under such a path.
        CorruptGistError: a gist is not one of this model and of its text.
    """
    imported = imported_documents(store)
    own = {row.path for row in store.documents()} - imported
    paths = [one.document.path for one in contents.documents]
    if taken := sorted(own.intersection(paths)):
        raise UsageError(f"{store.folder} holds {taken[0]} of its own folder, and {path} another; rename one of them")
    for one in contents.documents:
        for chunk, gists in one.chunks:
            _require_gists(store, runtime, chunk, gists, f"{path}: {one.document.path}, chunk {chunk.ordinal}")
    for one in contents.documents:
        _put(store, one, runtime, embedder)
    mark_imported(store, imported.union(paths))
    Builder(store, runtime=runtime, embedder=embedder).settle()
    return paths


def remove_imported(store: Store, paths: Sequence[str], *, runtime: AnyRuntime, embedder: Embedder) -> None:
    """Remove imported documents from an index open for writing, and commit.

    Raises:
        UsageError: one that was not imported.
    """
    imported = imported_documents(store)
    if unknown := [path for path in paths if path not in imported]:
        listed = ", ".join(sorted(imported)) or "none"
        raise UsageError(f"no imported document {unknown[0]!r} in {store.folder}; these are: {listed}")
    for path in paths:
        store.remove_document(path)
    mark_imported(store, imported.difference(paths))
    Builder(store, runtime=runtime, embedder=embedder).settle()


def _put(store: Store, exported: Exported, runtime: AnyRuntime, embedder: Embedder) -> None:
    vectors = embedder.embed_documents([chunk.search_text for chunk, _ in exported.chunks])
    entries = [
        IndexedChunk(chunk=chunk, gist_key=_key(store, runtime, chunk, gists), vectors=parts)
        for (chunk, gists), parts in zip(exported.chunks, vectors, strict=True)
    ]
    store.replace_document(exported.document, entries)


def _key(store: Store, runtime: AnyRuntime, chunk: Chunk, gists: PackedGists | None) -> str | None:
    """Return the key of a chunk's gist, put or still to be made; None where the chunk is read as text."""
    ids = runtime.encode_passage(chunk.text, chunk.heading)
    if not is_compressible(runtime, ids, store.settings.gists):
        return None
    key = store.gists.key(ids)
    if not store.gists.reuse(key):
        if gists is None:
            store.gists.expect(key, source_tokens=len(ids))
        else:
            store.gists.put({key: gists})
    return key


def _require_gists(store: Store, runtime: AnyRuntime, chunk: Chunk, gists: PackedGists | None, where: str) -> None:
    """Return if a chunk fits the index, and its gists the chunk, the model and the settings.

    Raises:
        CorruptGistError: says what does not.
    """
    ids, most = runtime.encode_passage(chunk.text, chunk.heading), (runtime.window - runtime.prefix_slots) // 2
    expected: list[tuple[str, object, object]] = [("at most as many tokens", min(len(ids), most), len(ids))]
    if gists is not None:
        kv_cache_dtype, numbers = store.settings.kv_cache_dtype, gists.arrays["kv"].dtype.name
        stored = {"int8": "int8", "uint8": "int4"}.get(numbers, numbers) if gists.is_quantized else "auto"
        expected += [
            ("source tokens", len(ids), gists.source_tokens),
            ("heads", (runtime.layers, runtime.kv_heads), gists.counts.shape),
            ("a head_dim", runtime.head_dim, gists.slots_and_width[1]),
            ("numbers", kv_cache_dtype, stored),
            ("only finite numbers", True, _is_finite(gists)),
        ]
    for what, wanted, found in expected:
        if wanted != found:
            raise CorruptGistError(f"{where}: expected {what}: {wanted}, found {found}; export it again")


def _is_finite(gists: PackedGists) -> bool:
    rows = gists.rows()
    return bool(np.isfinite(rows.keys).all() and np.isfinite(rows.values).all())
