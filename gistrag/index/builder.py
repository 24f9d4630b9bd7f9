"""Syncing an index with its folder of documents: only what changed is computed again.

::

    files ─ find ─┬─ same content           nothing
                  ├─ same content, new path  rename
                  ├─ new or changed          load → chunk → compress + embed → commit
                  └─ gone                    remove

Chunks are computed in batches across documents. A batch's gists are on the disk before its rows are committed, so a
build that is killed loses at most one batch, and the next build reuses even the gists of that one.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from gistrag.compression.making import gist_count, is_compressible
from gistrag.documents.chunking import Chunk, Chunker
from gistrag.documents.discovery import Document, FoundFile, Skipped, find, load
from gistrag.errors import CorruptGistError, DocumentError, GistNotFoundError, ResourceError, UnreadableError
from gistrag.index import manifest
from gistrag.index.embedder import Embedder
from gistrag.index.integrity import remove_unused
from gistrag.index.retriever import write_vector_file
from gistrag.index.schema import DocumentRow, GistRow
from gistrag.index.store import IndexedChunk, Store, damaged_documents
from gistrag.kv.packed import stored_bytes
from gistrag.progress import NoProgress, Progress, megabytes
from gistrag.storage import files

if TYPE_CHECKING:
    from gistrag.kv.cache import GistCache
    from gistrag.model.gist_model import GistModel

logger = logging.getLogger("gistrag")
_Item = TypeVar("_Item")

BATCH_CHUNKS = 64
BATCH_TOKENS = 6144
"""A batch ends at whichever comes first; on two CPU cores either is some ten seconds of work."""


@dataclass(kw_only=True)
class SyncReport:
    """What a build did: paths by what happened to them, and totals.

    Attributes:
        added, changed, removed: paths of documents.
        renamed: ``old → new``; these paths are in no other list.
        unchanged: how many documents were left alone.
        skipped: files that are no documents.
        chunks: how many were indexed now.
        tokens: source tokens compressed now.
        gists_made: gist files written now.
        gists_found: gist files reused from an earlier build or an equal chunk.
        without_gist: chunks that are read as text, because they are too short or their gists are not finite.
        gist_bytes: bytes of keys and values written now.
        seconds: how long the build took.
    """

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    chunks: int = 0
    tokens: int = 0
    gists_made: int = 0
    gists_found: int = 0
    without_gist: int = 0
    gist_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Work:
    """One chunk to index: its token ids as they stand in a prompt, and the key of its gist, None for no gist."""

    document: Document
    chunk: Chunk
    is_last: bool
    ids: array[int]  # 4 bytes a token: those of all chunks are held at once
    key: str | None


class Builder:
    """Syncs one index with its folder.

    Args:
        store: open for writing and configured.
        model: makes the gists.
        embedder: makes the vectors.
        progress: receives what is planned and done.
        verify: hash every gist file before it is trusted, and try again what was skipped before.

    Attributes:
        report: what was done so far.
    """

    def __init__(
        self,
        store: Store,
        *,
        model: GistModel,
        embedder: Embedder,
        progress: Progress | None = None,
        verify: bool = False,
    ) -> None:
        self.report = SyncReport()
        self._store, self._model, self._embedder = store, model, embedder
        self._progress = progress or NoProgress()
        self._verify = verify
        self._settings = store.settings

    def sync(
        self, folder: str | Path, *, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
    ) -> SyncReport:
        """Sync the index with *folder* and return what was done.

        Args:
            folder: of documents.
            include: gitignore-style patterns; where there are any, only files they match. None: as last time.
            exclude: gitignore-style patterns of files to leave out. None: as last time.

        Raises:
            UsageError: no such folder.
            ResourceError: the disk is too small for the gists; no gist was computed.
        """
        started_s = time.monotonic()
        given = {"include": include, "exclude": exclude}
        patterns = self._store.patterns | {name: _patterns(value) for name, value in given.items() if value is not None}
        known = {row.path: row for row in self._store.documents()}
        stamps = {path: (row.size, row.mtime_ns, row.sha256) for path, row in known.items()}
        found, skipped = find(folder, **patterns, known=stamps)
        self._store.set_patterns(**patterns)
        pending = self._apply_unread(known, found, skipped)
        documents, unread = self._read(folder, pending, known)
        works = list(self._work(documents))
        self._plan(works)
        self._index(works)
        self.report.skipped = sorted([*skipped, *unread], key=lambda row: row.path)
        self._finish()
        self.report.seconds = time.monotonic() - started_s
        return self.report

    def _apply_unread(
        self, known: Mapping[str, DocumentRow], found: Sequence[FoundFile], skipped: Sequence[Skipped]
    ) -> list[FoundFile]:
        """Record what is clear without reading a file: gone, renamed, unchanged. Return the files to read."""
        unreadable = {row.path for row in skipped}
        hidden = {path for path in known if not unreadable.isdisjoint(_with_folders(path))}
        for path in sorted(hidden):
            self._store.mark_stale(path)
        seen = hidden.union(file.path for file in found)
        gone = {path: row for path, row in known.items() if path not in seen}
        pending = [file for file in found if not self._is_unchanged(file, known, gone)]
        for path in sorted(gone):
            self._store.remove_document(path)
            self.report.removed.append(path)
        return pending

    def _is_unchanged(self, file: FoundFile, known: Mapping[str, DocumentRow], gone: dict[str, DocumentRow]) -> bool:
        """Return whether the content of *file* is indexed already, under its path or under one that is gone."""
        row = known.get(file.path) or self._renamed(file, gone)
        if row is None or row.sha256 != file.sha256 or not self._is_current(row):
            return False
        self._store.mark_seen(file.path, size=file.size, mtime_ns=file.mtime_ns)
        self.report.unchanged += row.path == file.path
        return True

    def _renamed(self, file: FoundFile, gone: dict[str, DocumentRow]) -> DocumentRow | None:
        """Return the document that *file* was under another path, None where it is new.

        The suffix must be the same: it decides how the content is read.
        """
        suffix = PurePosixPath(file.path).suffix
        for row in gone.values():
            if row.sha256 == file.sha256 and PurePosixPath(row.path).suffix == suffix and self._is_current(row):
                del gone[row.path]
                self._store.rename_document(row.path, file.path)
                self.report.renamed.append(f"{row.path} → {file.path}")
                return row
        return None

    def _is_current(self, row: DocumentRow) -> bool:
        """Return whether no part of a document has to be computed again."""
        return row.gists_current and row.vectors_current and row.id not in self._damaged

    @cached_property
    def _damaged(self) -> set[int]:
        """Ids of documents with a damaged chunk, or a gist that is missing or differs from its record.

        When a build that verifies finds index.db changed, all documents: not every row has a hash of its own.
        """
        if self._verify and manifest.differences(self._store):
            return {row.id for row in self._store.documents()}
        gists = self._store.gists
        broken = {row.key for row in gists.rows() if not self._is_sound(row)} | gists.unrecorded()
        damaged = set(damaged_documents(self._store))
        return {row.id for row in self._store.documents() if row.path in damaged or self._uses(row, broken)}

    def _uses(self, row: DocumentRow, keys: set[str]) -> bool:
        return bool(keys) and any(chunk.gist_key in keys for chunk in self._store.chunks_of(row.path))

    def _is_sound(self, row: GistRow) -> bool:
        """Return whether a gist file is as recorded; one that did not change since the last build is not read."""
        try:
            status = self._store.gists.path(row.key).stat()
            if status.st_size != row.size:
                return False
            if self._verify or status.st_ctime_ns > self._store.gists.checked_ns:  # a file moved here keeps its mtime
                self._store.gists.load(row.key)
        except (OSError, GistNotFoundError, CorruptGistError):
            return False
        return True

    def _read(
        self, folder: str | Path, pending: Sequence[FoundFile], known: Mapping[str, DocumentRow]
    ) -> tuple[list[tuple[Document, list[Chunk]]], list[Skipped]]:
        """Return the documents that can be read, with their chunks, and the files that cannot."""
        reasons = {(row.path, row.sha256): row.reason for row in self._store.skipped()}
        chunker = Chunker(self._model.text_tokenizer, chunk_tokens=self._settings.chunk_tokens)
        documents, unread = [], []
        for file in pending:
            try:
                if (file.path, file.sha256) in reasons and not self._verify:  # the same bytes failed before
                    raise DocumentError(reasons[file.path, file.sha256])
                document = load(folder, file)
                documents.append((document, chunker.split(document)))
                (self.report.changed if file.path in known else self.report.added).append(file.path)
            except UnreadableError as error:  # the next build looks at it again
                unread.append(Skipped(path=file.path, sha256="", reason=str(error)))
                self._store.mark_stale(file.path)
            except DocumentError as error:
                unread.append(Skipped(path=file.path, sha256=file.sha256, reason=str(error)))
                self._store.remove_document(file.path)
        return documents, unread

    def _work(self, documents: Sequence[tuple[Document, list[Chunk]]]) -> Iterator[_Work]:
        for document, chunks in documents:
            for chunk in chunks:
                ids = array("i", self._model.encode_passage(chunk.text, chunk.heading))
                has_gists = is_compressible(self._model, ids, self._settings.gists)
                key = self._store.gists.key(ids) if has_gists else None
                yield _Work(document, chunk, chunk is chunks[-1], ids, key)

    def _plan(self, works: Sequence[_Work]) -> None:
        """Report what is ahead.

        Raises:
            ResourceError: the disk cannot hold it.
        """
        lengths = {work.key: len(work.ids) for work in works if work.key}
        missing = [length for key, length in lengths.items() if not files.exists(self._store.gists.path(key))]
        counts = [gist_count(length, self._settings.tokens_per_gist) for length in missing]
        needed, free = sum(map(self._stored_bytes, counts)), files.free_bytes(self._store.folder)
        self._progress.plan(chunks=len(works), tokens=sum(len(work.ids) for work in works), gist_bytes=needed)
        if needed > free:
            raise ResourceError(
                f"the gists need {needed:,} bytes ({megabytes(needed)}), {self._store.folder} has {free:,} "
                f"({megabytes(free)}) free; free some, put --index on another disk, raise --tokens-per-gist, or keep "
                "them in fewer bits (--kv-cache-dtype)"
            )

    def _stored_bytes(self, gists: int) -> int:
        """Return the bytes that keys and values of so many gist tokens take in a file."""
        model = self._model
        shape = (model.layers, 2, model.kv_heads, gists, model.head_dim)
        return stored_bytes(shape, self._settings.kv_cache_dtype, itemsize=model.dtype.itemsize)

    def _index(self, works: Sequence[_Work]) -> None:
        """Compress, embed and commit, batch by batch; a document is put when its last chunk is done."""
        finished: list[IndexedChunk] = []
        for batch in _batches(works, lengths=[len(work.ids) for work in works]):
            usable = self._compress(batch)
            vectors = self._embedder.embed_documents([work.chunk.search_text for work in batch])
            for work, parts in zip(batch, vectors, strict=True):
                key = work.key if work.key in usable else None
                finished.append(IndexedChunk(chunk=work.chunk, gist_key=key, vectors=parts))
                if work.is_last:
                    self._store.replace_document(work.document, finished)
                    finished = []
            self._store.commit()
            self.report.chunks += len(batch)
            self._progress.advance(chunks=len(batch), tokens=sum(len(work.ids) for work in batch))

    def _compress(self, batch: Sequence[_Work]) -> set[str]:
        """Make the gists of a batch that are not there yet and return the keys of all that are usable."""
        wanted = {work.key: work.ids for work in batch if work.key}
        usable, made = _make_gists(self._store, self._model, wanted)
        self.report.gists_found += len(usable) - len(made)
        self.report.gists_made += len(made)
        self.report.gist_bytes += sum(self._stored_bytes(cache.gists) for cache in made)
        self.report.tokens += sum(cache.source_tokens for cache in made)
        self.report.without_gist += sum(work.key not in usable for work in batch)
        return usable

    def _finish(self) -> None:
        """Commit what is left, write the vector file, and remove what nothing refers to."""
        self._store.set_skipped(self.report.skipped)
        self._store.gists.set_checked()
        self._store.commit()
        write_vector_file(self._store)
        remove_unused(self._store)
        manifest.write(self._store)


def compress_texts(store: Store, model: GistModel, texts: Sequence[str]) -> int:
    """Put the gists of texts that an open index does not hold yet, and return how many were made; commits by batch."""
    passages = [model.encode_passage(text) for text in texts]
    usable = [ids for ids in passages if is_compressible(model, ids, store.settings.gists)]
    count = 0
    for batch in _batches(usable, lengths=[len(ids) for ids in usable]):
        _, made = _make_gists(store, model, {store.gists.key(ids): ids for ids in batch})
        store.commit()
        count += len(made)
    return count


def _make_gists(
    store: Store, model: GistModel, wanted: Mapping[str, Sequence[int]]
) -> tuple[set[str], list[GistCache]]:
    """Put the gists that are not there yet, and return the keys of all that are usable and the caches made now.

    Args:
        wanted: token ids by the key of their gist.
    """
    from gistrag.compression.compress import compress  # torch, which a process that only answers does without

    found = {key for key in wanted if store.gists.reuse(key)}
    missing = {key: ids for key, ids in wanted.items() if key not in found}
    caches = compress(model, list(missing.values()), store.settings.gists)
    made = {key: cache for key, cache in zip(missing, caches, strict=True) if _is_finite(cache)}
    store.gists.put(made)
    return found | made.keys(), list(made.values())


def _is_finite(cache: GistCache) -> bool:
    """Return whether all numbers of a gist are finite, and warn where they are not."""
    if cache.is_finite:
        return True
    logger.warning("a gist is not finite; its chunk is read as text")
    return False


def _patterns(given: Sequence[str]) -> list[str]:
    """Return patterns as a list; one string is one pattern."""
    return [given] if isinstance(given, str) else list(given)


def _with_folders(path: str) -> list[str]:
    """Return a path and all folders it lies in."""
    return [path, *map(str, PurePosixPath(path).parents)]


def _batches(items: Sequence[_Item], *, lengths: Sequence[int]) -> Iterator[list[_Item]]:
    """Yield items in order, in batches of at most `BATCH_CHUNKS` and about `BATCH_TOKENS`."""
    batch: list[_Item] = []
    tokens = 0
    for item, length in zip(items, lengths, strict=True):
        batch.append(item)
        tokens += length
        if len(batch) == BATCH_CHUNKS or tokens >= BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch
