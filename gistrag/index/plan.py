"""What a build would do, found out by reading the new documents and writing nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gistrag.compression.making import gist_count, is_compressible
from gistrag.documents.chunking import Chunk
from gistrag.documents.cutting import GuardedChunker
from gistrag.documents.discovery import FoundFile, Skipped, load
from gistrag.errors import DocumentError
from gistrag.index.changes import compared
from gistrag.index.schema import DocumentRow
from gistrag.index.store import Store
from gistrag.kv.packed import stored_bytes
from gistrag.model.runtime import AnyRuntime
from gistrag.settings import IndexSettings

TIMED_TOKENS = 256
MAKING_SHARE = 0.53
"""Tokens compressed in the time in which the runtime reads one, as `notebooks/bench/plan.py` measures."""


@dataclass(kw_only=True)
class Plan:
    """What a build would do.

    Attributes:
        added, changed, removed: paths of documents; renamed: ``old → new``.
        kept: paths of documents whose file is gone and that stay all the same.
        unchanged: how many documents would be left alone.
        skipped: files that are no documents.
        left_out: how many files no reader knows, by suffix; ``""`` counts those without one.
        chunks: how many would be indexed.
        tokens: source tokens to compress, those of gists that are still pending included.
        gist_bytes: bytes of their gists, at most.
    """

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    unchanged: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    chunks: int = 0
    tokens: int = 0
    gist_bytes: int = 0


def planned(
    folder: str | Path,
    store: Store | None,
    *,
    runtime: AnyRuntime,
    settings: IndexSettings,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    delete: bool = True,
    prune: bool = False,
    make_again: bool = False,
) -> Plan:
    """Return what `Builder.sync` and the making of gists would do with *folder*.

    Args:
        store: the index, None where there is none yet.
        settings: of the index.
        make_again: whether every document is read and every gist made again.

    Raises:
        UsageError: as `Builder.sync` would.
    """
    found = compared(
        store,
        folder,
        include=include,
        exclude=exclude,
        is_current=lambda row: row.gists_current and row.vectors_current and not make_again,
        removes_any=prune or not delete,
    )
    differing = found.changes
    plan = Plan(
        renamed=[f"{before} → {file.path}" for before, file in differing.renamed],
        removed=differing.gone if delete else [],
        kept=[] if delete else differing.gone,
        unchanged=len(differing.unchanged),
        skipped=found.skipped,
        left_out=found.left_out,
    )
    for source_tokens in store.gists.pending().values() if store and not make_again else ():
        _count(plan, source_tokens, runtime, settings)
    _read(plan, folder, differing.to_read, found.known, runtime, settings)
    return plan


def _read(
    plan: Plan,
    folder: str | Path,
    files: Sequence[FoundFile],
    known: Mapping[str, DocumentRow],
    runtime: AnyRuntime,
    settings: IndexSettings,
) -> None:
    """Add the new and changed documents to a plan."""
    chunker = GuardedChunker(runtime.text_tokenizer, chunk_tokens=settings.chunk_tokens)
    for file in files:
        try:
            chunks: Sequence[Chunk] = chunker.split(load(folder, file))
        except DocumentError as error:
            plan.skipped.append(Skipped(path=file.path, sha256=file.sha256, reason=str(error)))
            continue
        (plan.changed if file.path in known else plan.added).append(file.path)
        plan.chunks += len(chunks)
        for chunk in chunks:
            ids = runtime.encode_passage(chunk.text, chunk.heading)
            if is_compressible(runtime, ids, settings.gists):
                _count(plan, len(ids), runtime, settings)


def _count(plan: Plan, source_tokens: int, runtime: AnyRuntime, settings: IndexSettings) -> None:
    """Add a gist to a plan."""
    gists = gist_count(source_tokens, settings.tokens_per_gist)
    shape = (runtime.layers, 2, runtime.kv_heads, gists, runtime.head_dim)
    plan.tokens += source_tokens
    plan.gist_bytes += stored_bytes(shape, settings.kv_cache_dtype, itemsize=2)


def making_rate(runtime: AnyRuntime) -> float:
    """Return roughly how many tokens a second this machine would compress, from how fast it reads some now."""
    ids = list(np.resize(runtime.encode("the mill by the river grinds corn "), TIMED_TOKENS))
    seconds = []
    for _ in range(3):
        memory = runtime.concatenate([])
        began = time.perf_counter()
        runtime.read_text(memory, ids)
        seconds.append(time.perf_counter() - began)
    return MAKING_SHARE * TIMED_TOKENS / min(seconds)
