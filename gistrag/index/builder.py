"""Bringing an index into step with its folder, doing only what changed.

::

    files ─ find ─┬─ same content           nothing
                  ├─ same content, new path  rename
                  ├─ new or changed          load → chunk → compress + embed → commit
                  └─ gone                    remove

Chunks are worked off in batches across documents. A batch's gists are on disk before its rows are committed, so a
build that is killed loses at most one batch, and finds even those gists again by their key.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TypeVar

from gistrag.compression.compress import compress, is_compressible
from gistrag.compression.placements import gist_count
from gistrag.documents.chunking import Chunk, Chunker
from gistrag.documents.discovery import Document, FoundFile, Skipped, find, load
from gistrag.errors import CorruptGistError, DocumentError, GistNotFoundError, ResourceError, UnreadableError
from gistrag.index import manifest
from gistrag.index.embedder import Embedder
from gistrag.index.integrity import remove_unused
from gistrag.index.retriever import write_vector_file
from gistrag.index.schema import DocumentRow, GistRow
from gistrag.index.store import IndexedChunk, Store, damaged_documents
from gistrag.kv.cache import GistCache
from gistrag.kv.quantization import stored_bytes
from gistrag.model.gist_model import GistModel
from gistrag.progress import NoProgress, Progress, megabytes
from gistrag.storage import files

logger = logging.getLogger("gistrag")
_Item = TypeVar("_Item")

BATCH_CHUNKS = 64
BATCH_TOKENS = 6144
"""A batch ends at whichever comes first; on two CPU cores either is some ten seconds of work."""


@dataclass(kw_only=True)
class SyncReport:
    """What a build did: paths by what happened to them, and totals.

    Attributes:
        renamed: ``old → new``, these are not among the other paths; unchanged: how many documents were left alone.
        gists_made, gists_found: gist files computed now, and found from an earlier build or an equal chunk.
        without_gist: chunks that are read as text, being too short or not finite.
        tokens: source tokens compressed now; gist_bytes: written for them.
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
    """One chunk to be indexed: its token ids as they stand in a prompt, and the key of its gist, None for no gist."""

    document: Document
    chunk: Chunk
    is_last: bool
    ids: array[int]  # 4 bytes a token: those of all chunks are held at once
    key: str | None


class Builder:
    """Everything a sync needs: an index open for writing, and what computes.

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
        """Bring the index into step with *folder* and return what was done.

        Args:
            folder: of documents.
            include: gitignore-style patterns; where there are any, only files they match. None for those of last time.
            exclude: gitignore-style patterns of files to leave out. None for those of last time.

        Raises:
            UsageError: no such folder.
            ResourceError: the disk is too small for the gists; nothing was begun.
        """
        started_s = time.monotonic()
        given = {"include": include, "exclude": exclude}
        patterns = self._store.patterns | {name: _patterns(value) for name, value in given.items() if value is not None}
        known = {row.path: row for row in self._store.documents()}
        stamps = {path: (row.size, row.mtime_ns, row.sha256) for path, row in known.items()}
        found, skipped = find(folder, **patterns, known=stamps)
        self._store.set_patterns(**patterns)
        pending = self._settle(known, found, skipped)
        documents, unread = self._read(folder, pending, known)
        works = list(self._work(documents))
        self._plan(works)
        self._index(works)
        self.report.skipped = sorted([*skipped, *unread], key=lambda row: row.path)
        self._finish()
        self.report.seconds = time.monotonic() - started_s
        return self.report

    def _settle(
        self, known: Mapping[str, DocumentRow], found: Sequence[FoundFile], skipped: Sequence[Skipped]
    ) -> list[FoundFile]:
        """Deal with all that needs no reading and return the files that do."""
        unreadable = {row.path for row in skipped}
        hidden = {path for path in known if not unreadable.isdisjoint(_with_folders(path))}
        for path in sorted(hidden):
            self._store.mark_stale(path)
        seen = hidden.union(file.path for file in found)
        gone = {path: row for path, row in known.items() if path not in seen}
        pending = [file for file in found if not self._is_settled(file, known, gone)]
        for path in sorted(gone):
            self._store.remove_document(path)
            self.report.removed.append(path)
        return pending

    def _is_settled(self, file: FoundFile, known: Mapping[str, DocumentRow], gone: dict[str, DocumentRow]) -> bool:
        """Return whether the content of *file* is indexed already, under its path or one that is gone."""
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
        """Return whether nothing of a document has to be made again."""
        return row.gists_current and row.vectors_current and row.id not in self._damaged

    @cached_property
    def _damaged(self) -> set[int]:
        """Ids of documents with a chunk that is damaged, or a gist that is missing or not what was recorded.

        All, where a build that verifies finds index.db changed: what is not hashed row by row is written anew.
        """
        if self._verify and manifest.differences(self._store):
            return {row.id for row in self._store.documents()}
        broken = {
            row.key for row in self._store.gists.rows() if not self._is_sound(row)
        } | self._store.gists.unrecorded()
        damaged = set(damaged_documents(self._store))
        return {row.id for row in self._store.documents() if row.path in damaged or self._uses(row, broken)}

    def _uses(self, row: DocumentRow, keys: set[str]) -> bool:
        return bool(keys) and any(chunk.gist_key in keys for chunk in self._store.chunks_of(row.path))

    def _is_sound(self, row: GistRow) -> bool:
        """Return whether a gist file is as recorded; one not changed since the last build is taken at its size."""
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
        """Return the documents that can be read, cut into chunks, and those that cannot."""
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
        """Say what is ahead, and refuse work that the disk cannot hold."""
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
        """Return the bytes of keys and values in the file of so many gists."""
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
        found = {key for key in wanted if self._store.gists.reuse(key)}
        missing = {key: ids for key, ids in wanted.items() if key not in found}
        caches = compress(self._model, list(missing.values()), self._settings.gists)
        made = {key: cache for key, cache in zip(missing, caches, strict=True) if _is_finite(cache)}
        self._store.gists.put(made)
        self.report.gists_found += len(found)
        self.report.gists_made += len(made)
        self.report.gist_bytes += sum(self._stored_bytes(cache.gists) for cache in made.values())
        self.report.tokens += sum(cache.source_tokens for cache in caches)
        self.report.without_gist += sum(work.key not in found | made.keys() for work in batch)
        return found | made.keys()

    def _finish(self) -> None:
        """Commit what is left, bring the vector snapshot up to date, and remove what nothing refers to."""
        self._store.set_skipped(self.report.skipped)
        self._store.gists.set_checked()
        self._store.commit()
        write_vector_file(self._store)
        remove_unused(self._store)
        manifest.write(self._store)


def compress_texts(store: Store, model: GistModel, texts: Sequence[str]) -> int:
    """Put the gists of texts that an open index does not hold yet, and return how many were made; commits by batch."""
    settings, made = store.settings.gists, 0
    passages = [model.encode_passage(text) for text in texts]
    usable = [ids for ids in passages if is_compressible(model, ids, settings)]
    for batch in _batches(usable, lengths=[len(ids) for ids in usable]):
        missing = {key: ids for ids in batch if not store.gists.reuse(key := store.gists.key(ids))}
        caches = compress(model, list(missing.values()), settings)
        finite = {key: cache for key, cache in zip(missing, caches, strict=True) if _is_finite(cache)}
        store.gists.put(finite)
        store.commit()
        made += len(finite)
    return made


def _is_finite(cache: GistCache) -> bool:
    """Return whether a gist can be used, and say so where it cannot."""
    if cache.is_finite:
        return True
    logger.warning("a gist is not finite; its chunk will be read as text")
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
