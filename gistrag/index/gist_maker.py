"""The second stage of a build: making the gists of chunks that the index answers from their text so far.

::

    pending chunks ─ a batch of them ─ compress ─ files and rows ─ commit         again and again, until none is pending

`make_gists` does so in a build, which holds the index all the time, `gistrag.index.background` beside the questions,
holding the index only while a batch is kept. A batch that was committed is never made again, so whoever
comes after a kill goes on where it was.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from gistrag.compression.making import gist_count, is_compressible
from gistrag.errors import ResourceError
from gistrag.index import manifest
from gistrag.index.builder import SyncReport
from gistrag.index.chunk_rows import leave_as_text
from gistrag.index.schema import StoredChunk
from gistrag.index.store import Store, pending_chunks
from gistrag.kv.packed import stored_bytes
from gistrag.progress import NoProgress, Progress, megabytes
from gistrag.settings import GistSettings
from gistrag.storage import files

if TYPE_CHECKING:
    from gistrag.kv.cache import GistCache
    from gistrag.model.gist_model import GistModel

logger = logging.getLogger("gistrag")

BATCH_CHUNKS = 64
BATCH_TOKENS = 6144
"""A batch ends at whichever comes first; on two CPU cores either is some ten seconds of work."""


def make_gists(store: Store, model: GistModel, report: SyncReport, *, progress: Progress | None = None) -> SyncReport:
    """Make all pending gists of an index open for writing, add what was done to *report*, and return it.

    Raises:
        ResourceError: the disk is too small for the gists; none was made.
    """
    started_s, progress = time.monotonic(), progress or NoProgress()
    pending, needed = store.gists.pending(), require_space(store, model)
    progress.plan(chunks=len(pending), tokens=sum(pending.values()), gist_bytes=needed)
    while chunks := pending_chunks(store, most=BATCH_CHUNKS):
        wanted = token_ids(model, chunks, tokens_max=BATCH_TOKENS)
        missing = {key: ids for key, ids in wanted.items() if not store.gists.reuse(key)}
        made = make(model, missing, store.config.gists)
        report.without_gist += keep(store, made)
        report.gists_found += len(wanted) - len(missing)
        _count(store, model, [cache for cache in made.values() if cache is not None], report)
        store.commit()
        progress.advance(chunks=len(wanted), tokens=sum(map(len, wanted.values())))
    if pending:
        store.gists.set_checked()
        manifest.write(store)
    report.gists_pending = 0
    report.seconds += time.monotonic() - started_s
    return report


def _count(store: Store, model: GistModel, caches: Sequence[GistCache], report: SyncReport) -> None:
    report.gists_made += len(caches)
    report.gist_bytes += sum(file_bytes(store, model, cache.gists) for cache in caches)
    report.tokens += sum(cache.source_tokens for cache in caches)


def require_space(store: Store, model: GistModel) -> int:
    """Return the bytes that the pending gists take at most.

    Raises:
        ResourceError: the disk cannot hold them.
    """
    needed, free = 0, files.free_bytes(store.folder)
    for key, source_tokens in store.gists.pending().items():
        if not files.exists(store.gists.path(key)):
            needed += file_bytes(store, model, gist_count(source_tokens, store.settings.tokens_per_gist))
    if needed > free:
        raise ResourceError(
            f"the gists need {needed:,} bytes ({megabytes(needed)}), {store.folder} has {free:,} "
            f"({megabytes(free)}) free; free some, put --index on another disk, raise --tokens-per-gist, or keep "
            "them in fewer bits (--kv-cache-dtype)"
        )
    return needed


def file_bytes(store: Store, model: GistModel, gists: int) -> int:
    """Return the bytes that keys and values of so many gist tokens take in a file."""
    shape = (model.layers, 2, model.kv_heads, gists, model.head_dim)
    return stored_bytes(shape, store.settings.kv_cache_dtype, itemsize=model.dtype.itemsize)


def token_ids(model: GistModel, chunks: Iterable[StoredChunk], *, tokens_max: int) -> dict[str, list[int]]:
    """Return the token ids of the first chunks, by the key of their gist, that make a batch of about *tokens_max*."""
    wanted: dict[str, list[int]] = {}
    for chunk in chunks:
        if chunk.gist_key is not None:
            wanted[chunk.gist_key] = model.encode_passage(chunk.text, chunk.heading)
        if sum(map(len, wanted.values())) >= tokens_max:
            break
    return wanted


def make(model: GistModel, wanted: Mapping[str, Sequence[int]], settings: GistSettings) -> dict[str, GistCache | None]:
    """Return the gist cache of each passage, None where it is not finite.

    Args:
        wanted: token ids by key.
    """
    from gistrag.compression.compress import compress  # torch, which a process that only answers does without

    caches = compress(model, list(wanted.values()), settings)
    return {key: cache if _is_finite(cache) else None for key, cache in zip(wanted, caches, strict=True)}


def keep(store: Store, made: Mapping[str, GistCache | None]) -> int:
    """Put gists into an index open for writing, and return how many chunks stay text because theirs were not made."""
    store.gists.put({key: cache for key, cache in made.items() if cache is not None})
    return sum(leave_as_text(store.database, key) for key, cache in made.items() if cache is None)


def compress_texts(store: Store, model: GistModel, texts: Sequence[str]) -> int:
    """Put the gists of texts that an open index does not hold yet, and return how many were made; commits by batch."""
    passages = [model.encode_passage(text) for text in texts]
    wanted = {store.gists.key(ids): ids for ids in passages if is_compressible(model, ids, store.config.gists)}
    missing = [key for key in wanted if not store.gists.reuse(key)]
    count = 0
    for start in range(0, len(missing), BATCH_CHUNKS // 2):
        made = make(model, {key: wanted[key] for key in missing[start : start + BATCH_CHUNKS // 2]}, store.config.gists)
        store.gists.put({key: cache for key, cache in made.items() if cache is not None})
        store.commit()
        count += sum(cache is not None for cache in made.values())
    return count


def _is_finite(cache: GistCache) -> bool:
    """Return whether all numbers of a gist are finite, and warn where they are not."""
    if cache.is_finite:
        return True
    logger.warning("a gist is not finite; its chunk is read as text")
    return False
