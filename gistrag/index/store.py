"""The index folder: one SQLite file that is the truth, and one immutable file for each gist.

::

    index.db                     documents, chunks with their text, words, vectors, gist rows, settings
    gists/ab/<key>.safetensors   the cache of a chunk; named before it is computed, so a killed build finds it again
    faiss-<sha256>.idx           disposable copy of the vectors, see `gistrag.index.retriever`
    lock                         held by the one builder

A gist reaches the disk before the row that names it is committed, and a row goes before its file does: whatever
moment a build dies at, the last commit stands. Readers never write. What is read is hashed and compared with what was
recorded: a gist that differs in one bit, or was made by another model, raises and never reaches a model.

This module embeds nothing, ranks no vectors and knows no model.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from gistrag.documents.discovery import Document, Skipped
from gistrag.errors import (
    CorruptGistError,
    GistNotFoundError,
    IncompleteIndexError,
    IndexFolderError,
    ResourceError,
    UsageError,
)
from gistrag.index import schema
from gistrag.index.schema import DocumentRow, GistRow, Snapshot, Stats, StoredChunk
from gistrag.kv import gist_file
from gistrag.kv.cache import GistCache
from gistrag.settings import IndexSettings, digest
from gistrag.storage import files

if TYPE_CHECKING:
    from gistrag.documents.chunking import Chunk

SETTLED_NS = 1_000_000_000
"""Age from which a file's stamp tells whether it changed; two writes within one clock tick have the same."""
VERIFIED_S = 600.0
"""How long a hash stands for a file whose stamp stays the same: bits can change without the file system knowing."""
WRITERS = 8
"""Gist files that are written at a time."""
BUSY_S = 5.0
"""How long SQLite waits for others, seconds; readers take milliseconds."""

CONNECTION_PRAGMAS = (
    "PRAGMA cell_size_check = ON",  # of pages that were damaged
    "PRAGMA temp_store = MEMORY",  # no word of a document gets on a disk outside the folder
)

_LEFT_BY_A_BUILD = re.compile(
    r"[0-9a-f]{64}\.safetensors|faiss-[0-9a-f]{64}\.idx"
    rf"|\.([0-9a-f]{{64}}\.safetensors|faiss-[0-9a-f]{{64}}\.idx|manifest\.json)\.[0-9-]+{re.escape(files.TEMPORARY)}"
)

logger = logging.getLogger("gistrag")
_Row = TypeVar("_Row")


@dataclass(frozen=True, kw_only=True)
class IndexedChunk:
    """A chunk with what was made of it: ``vectors`` is ``(parts, dim)`` float32, the gist is already put."""

    chunk: Chunk
    gist_key: str | None
    vectors: npt.NDArray[np.float32]


@dataclass(frozen=True)
class VectorRows:
    """Vectors ``(n, dim)`` with the chunk each stands for ``(n,)``; rows up to ``last_id`` are in them."""

    chunk_ids: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float32]
    last_id: int


class Store:
    """An open index folder; `open` to read, `build` to write.

    Attributes:
        folder: where it is.
        bytes_read: bytes of gist files read so far.
    """

    def __init__(self, folder: Path, *, is_builder: bool) -> None:
        self.folder = folder.absolute()  # an open index outlives a change of the working folder
        self.bytes_read = 0
        self._is_builder = is_builder
        self._verified: dict[str, tuple[str, files.Stamp, float]] = {}
        self._guard = threading.RLock()  # one connection, one transaction: threads take turns
        self._connect()
        try:
            self._use(self._get_sealed("config"))
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """Return the index in *folder*, to read what was committed last; nothing is ever written.

        Raises:
            IncompleteIndexError: no build has committed there yet.
            IndexFolderError: not an index, damaged, or of a newer format.
        """
        store = cls(Path(folder), is_builder=False)
        if store.is_new:
            store.close()
            raise _nothing_built(store.folder)
        return store

    @classmethod
    @contextmanager
    def build(cls, folder: str | Path, *, command: str = "gistrag build") -> Iterator[Store]:
        """Hold the index in *folder* open for writing, made where it is missing; commits at a clean end.

        A new one needs `configure` before anything is put in. After an error the last commit stands.

        Raises:
            IndexLockedError: another builder is at work; names it.
            IndexFolderError: as for `open`, or the folder cannot be written.
        """
        folder = Path(folder).absolute()
        files.make_folder(folder)
        with files.lock(folder / "lock", command=command):
            files.make_private(folder / "index.db")
            store = cls(folder, is_builder=True)
            try:
                yield store
                store.commit()
                store.settle()
            finally:
                store.close()

    def close(self) -> None:
        """Close the folder; what was not committed is forgotten."""
        with self._guard:
            self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Let everything read inside be of one commit, whatever a builder does; other threads wait.

        Inside another snapshot, or in a builder's transaction, it adds nothing.
        """
        with self._guard:
            if self._connection.in_transaction:
                yield
                return
            if self._is_immutable and self._is_replaced():
                self._connection.close()
                self._connect()
            self._run("BEGIN")
            try:
                yield
            finally:
                with suppress(sqlite3.Error):  # nothing was written; a failed read may have ended it already
                    self._connection.rollback()

    # What it was made with

    @property
    def is_new(self) -> bool:
        """Whether nothing was configured yet."""
        return not self._config

    @property
    def settings(self) -> IndexSettings:
        """The settings the index is made with.

        Raises:
            IndexFolderError: they hold something this version does not know.
        """
        try:
            return IndexSettings.from_json(self._configured("settings"))
        except (TypeError, UsageError) as error:
            raise IndexFolderError(
                f"{self.folder} was made by another version of gistrag, its settings are not understood ({error}); "
                "upgrade gistrag, or build into another folder"
            ) from error

    @property
    def source(self) -> str:
        """The folder of documents, as the builder wrote it down."""
        return self._configured("source")

    @property
    def gist_fingerprint(self) -> dict[str, str]:
        """What makes a gist usable; the one this store was opened with, even if a builder changes it meanwhile."""
        return _strings(self._configured("gist_fingerprint"))

    @property
    def embedder_fingerprint(self) -> dict[str, str]:
        """What makes a vector comparable; the one this store was opened with."""
        return _strings(self._configured("embedder_fingerprint"))

    @property
    def salt(self) -> str:
        """Random text in every key, so that two indexes never share one."""
        return self._configured("salt")

    def configure(
        self,
        settings: IndexSettings,
        *,
        source: str,
        gist_fingerprint: Mapping[str, str],
        embedder_fingerprint: Mapping[str, str],
    ) -> None:
        """Record what the index is made with, from the next commit on.

        Documents made with other fingerprints stay, say so in their `DocumentRow`, and are answered from their text
        until they are replaced.
        """
        config = {
            "settings": settings.to_json(),
            "source": source,
            "gist_fingerprint": json.dumps(dict(gist_fingerprint), sort_keys=True),
            "embedder_fingerprint": json.dumps(dict(embedder_fingerprint), sort_keys=True),
            "salt": self._config.get("salt") or secrets.token_hex(16),
        }
        with self._writing():
            self._set_sealed("config", config)
        self._use(config)

    # Reading

    def documents(self) -> list[DocumentRow]:
        """Return all documents, by path."""
        asked = {"gists_by": self._gists_by, "vectors_by": self._vectors_by}
        return self._rows(DocumentRow, ((*row[:8], *map(bool, row[8:])) for row in self._run(schema.DOCUMENTS, asked)))

    def skipped(self) -> list[Skipped]:
        """Return the files that are no documents, by path."""
        rows = self._run("SELECT path, sha256, reason FROM skipped ORDER BY path")
        return self._rows(lambda *row: Skipped(path=row[0], sha256=row[1], reason=row[2]), rows)

    def chunks(self, ids: Iterable[int]) -> list[StoredChunk]:
        """Return the chunks *ids*, in that order; gone and damaged ones are left out."""
        wanted = list(ids)
        found = {row.id: row for row in self._chunk_rows(schema.CHUNKS_BY_ID, json.dumps(wanted))}
        return [found[chunk_id] for chunk_id in wanted if chunk_id in found]

    def chunks_of(self, path: str) -> list[StoredChunk]:
        """Return the chunks of one document, in the order of its text; none where there is no such document."""
        return self._chunk_rows(schema.CHUNKS_BY_PATH, path)

    def present(self, ids: Iterable[int]) -> set[int]:
        """Return those of the chunk *ids* that are in the index."""
        asked = json.dumps(list(ids))
        return {row[0] for row in self._run(schema.PRESENT, (asked,))}

    def count(self) -> int:
        """Return the number of chunks."""
        return int(self._run("SELECT count(*) FROM chunks")[0][0])

    def select(self, filters: Mapping[str, str] | None = None, scope: str | None = None) -> set[int] | None:
        """Return the ids of the chunks that pass, None where everything does.

        Args:
            filters: all must hold: ``path`` a pattern (``*`` goes across folders), ``kind``, ``heading`` a part of one.
            scope: path of one document.

        Raises:
            UsageError: an unknown filter, or no such document.
        """
        filters = filters or {}
        if unknown := sorted(set(filters) - {"path", "kind", "heading"}):
            raise UsageError(f"filters are path, kind and heading, got {', '.join(unknown)}")
        if scope is not None and not self._run("SELECT 1 FROM documents WHERE path = ?", (scope,)):
            raise UsageError(f"no document {scope!r} in {self.folder}; gistrag inspect lists them")
        if not filters and scope is None:
            return None
        asked = {"path": None, "kind": None, "heading": None, **filters, "scope": scope}
        return {row[0] for row in self._run(schema.SELECT, asked)}

    def keyword_search(
        self, words: Sequence[str], k: int, *, allowed: Collection[int] | None = None
    ) -> list[tuple[int, float]]:
        """Return up to *k* chunk ids that hold any of *words*, with their BM25, best first, equal scores by id."""
        if not words:
            return []
        match = " OR ".join('"' + word.replace('"', '""') + '"' for word in words)
        ids = None if allowed is None else json.dumps(list(allowed))
        return [(row[0], row[1]) for row in self._run(schema.KEYWORDS, {"match": match, "ids": ids, "k": k})]

    def vectors(self, *, after: int = 0) -> VectorRows:
        """Return the vectors of the current embedder in rows after *after*, in the order they came."""
        with self.snapshot():
            rows = self._run(schema.VECTORS, {"after": after, "vectors_by": self._vectors_by})
            last_id = self.last_vector_id()
        if not all(isinstance(row[1], int) for row in rows):
            raise self._damaged("a vector of no chunk")
        return VectorRows(np.array([row[1] for row in rows], np.int64), self._matrix([row[2] for row in rows]), last_id)

    def vectors_of(self, chunk_id: int) -> npt.NDArray[np.float32]:
        """Return the vectors of one chunk, ``(parts, dim)``, whichever embedder made them."""
        rows = self._run("SELECT vector FROM vectors WHERE chunk_id = ? ORDER BY id", (chunk_id,))
        return self._matrix([row[0] for row in rows])

    def _matrix(self, blobs: Sequence[Any]) -> npt.NDArray[np.float32]:
        lengths = {len(blob) if isinstance(blob, bytes) else -1 for blob in blobs}
        if len(lengths) > 1 or any(length < 4 or length % 4 for length in lengths):
            raise self._damaged("vectors of different lengths")
        return np.frombuffer(b"".join(blobs), "<f4").reshape(len(blobs), -1 if blobs else 0)

    def last_vector_id(self) -> int:
        """Return the id of the newest vector row, 0 where there is none."""
        return int(self._run("SELECT coalesce(max(id), 0) FROM vectors")[0][0])

    def stats(self) -> Stats:
        """Return totals."""
        documents, skipped = self.documents(), len(self.skipped())
        gists = self._run("SELECT count(*), coalesce(sum(gists), 0), coalesce(sum(size), 0) FROM gists")[0]
        kinds = [row.kind for row in documents]
        return Stats(
            documents=len(documents),
            stale=sum(row.stale for row in documents),
            skipped=skipped,
            chunks=sum(row.chunks for row in documents),
            tokens=sum(row.tokens for row in documents),
            gist_files=gists[0],
            gists=gists[1],
            gist_bytes=gists[2],
            kinds={kind: kinds.count(kind) for kind in sorted(set(kinds))},
        )

    # Gists

    def gist_key(self, ids: Sequence[int]) -> str:
        """Return the name of the gist of token *ids* by the current model, 64 hex digits."""
        tokens = np.asarray(ids, "<i8").tobytes()
        return hashlib.sha256(f"{self.salt} {self._gists_by} ".encode() + tokens).hexdigest()

    def gist_path(self, key: str) -> Path:
        """Return where the gist *key* is, or would be."""
        return self.folder / "gists" / key[:2] / f"{key}.safetensors"

    def load(self, key: str) -> GistCache:
        """Return a gist, exactly as it was put; from a quantized file, nearly.

        Raises:
            GistNotFoundError: no row or no file of that name.
            CorruptGistError: not the file that was recorded, or made by another model.
        """
        rows = self._run(schema.GIST, (key,))
        if not rows:
            raise GistNotFoundError(f"no gist {key} in {self.folder}; run gistrag build to make it")
        path = self.gist_path(key)
        if not _is_typed(row := GistRow(*rows[0])):
            raise gist_file.corrupt(path, "a row in index.db", "a damaged one")
        data, stamp = gist_file.read(path, bytes_max=row.size)
        self.bytes_read += len(data)
        sha256, known, until_s = self._verified.get(key, ("", stamp, 0.0))
        if (sha256, known) != (row.sha256, stamp) or time.monotonic() > until_s:
            _require_hash(row, data, path)
            if stamp[1] < time.time_ns() - SETTLED_NS:
                self._verified[key] = row.sha256, stamp, time.monotonic() + VERIFIED_S
        cache = gist_file.decode(data, path, key=key, fingerprint=self._gists_by)
        if (cache.gists, cache.source_tokens) != (row.gists, row.source_tokens):
            found = f"{cache.gists} of {cache.source_tokens}"
            raise gist_file.corrupt(path, f"{row.gists} gists of {row.source_tokens} tokens", found)
        return cache

    def gist_bytes(self, row: GistRow) -> bytes:
        """Return the file of a gist, whichever model made it.

        Raises:
            GistNotFoundError: no such file.
            CorruptGistError: not the file that was recorded.
        """
        path = self.gist_path(row.key)
        data, _ = gist_file.read(path, bytes_max=row.size)
        _require_hash(row, data, path)
        return data

    def gist_rows(self) -> list[GistRow]:
        """Return what is recorded of every gist file, by key."""
        rows = self._rows(GistRow, self._run(schema.GISTS))
        if strange := [row.key for row in rows if not re.fullmatch("[0-9a-f]{64}", row.key)]:
            raise self._damaged(f"a gist of the name {strange[0]!r}")
        return rows

    def unrecorded(self) -> set[str]:
        """Return the keys that chunks name and no gist row does; none in a sound index."""
        return {row[0] for row in self._run(schema.UNRECORDED)}

    def put_gist(self, key: str, cache: GistCache) -> None:
        """Write the gist *key*; it is on the disk when this returns, and is found by others after `commit`."""
        self.put_gists({key: cache})

    def put_gists(self, caches: Mapping[str, GistCache]) -> None:
        """Write gists by their keys, as `put_gist` does; the disk brings several to rest in the time of one."""
        with ThreadPoolExecutor(min(WRITERS, len(caches) or 1)) as writers:
            written = writers.map(self._write_gist, caches, caches.values())
            rows = dict(zip(caches, written, strict=True))
        for key, (sha256, size) in rows.items():
            self._record(key, caches[key], sha256, size)

    def _write_gist(self, key: str, cache: GistCache) -> tuple[str, int]:
        """Write a gist and return hash and size of its file."""
        stored_as = self.settings.kv_cache_dtype
        data = gist_file.encode(cache, key=key, fingerprint=self._gists_by, kv_cache_dtype=stored_as)
        files.make_folder(self.gist_path(key).parent)
        files.write_atomic(self.gist_path(key), data)
        return hashlib.sha256(data).hexdigest(), len(data)

    def adopt(self, key: str) -> bool:
        """Return whether a sound gist *key* is there already, put before a kill or by another chunk of equal text."""
        path = self.gist_path(key)
        with suppress(GistNotFoundError, CorruptGistError):
            if self._run("SELECT 1 FROM gists WHERE key = ?", (key,)):
                self.load(key)
            else:
                data, _ = gist_file.read(path)
                cache = gist_file.decode(data, path, key=key, fingerprint=self._gists_by, check_seal=True)
                self._record(key, cache, hashlib.sha256(data).hexdigest(), len(data))
            return True
        return False

    def _record(self, key: str, cache: GistCache, sha256: str, size: int) -> None:
        row = (key, sha256, size, cache.gists, cache.source_tokens)
        with self._writing():
            self._run(schema.PUT_GIST, row)

    # Writing: everything is one savepoint, and seen by readers after `commit`

    def replace_document(self, document: Document, chunks: Sequence[IndexedChunk]) -> None:
        """Put a document with its chunks in place of what was there under its path."""
        made = (document.path, document.sha256, document.size, document.mtime_ns, document.kind)
        with self._writing():
            document_id = self._run(schema.PUT_DOCUMENT, (*made, self._gists_by, self._vectors_by))[0][0]
            self._forget("DELETE FROM chunks WHERE document_id = ? RETURNING id", document_id)
            for entry in chunks:
                self._put_chunk(document_id, entry)

    def _put_chunk(self, document_id: int, entry: IndexedChunk) -> None:
        chunk = entry.chunk
        place = (document_id, chunk.ordinal, chunk.start, chunk.end)
        heading = json.dumps(chunk.heading, ensure_ascii=False)
        values = (*place, chunk.text, heading, chunk.page, chunk.tokens, entry.gist_key)
        chunk_id = self._run(schema.PUT_CHUNK, (*values, _row_sha256(values)))[0][0]
        for vector in np.asarray(entry.vectors, "<f4"):
            self._run("INSERT INTO vectors (chunk_id, vector) VALUES (?, ?)", (chunk_id, vector.tobytes()))

    def remove_document(self, path: str) -> None:
        """Remove a document; `gc` then removes its gists and every trace of its text."""
        with self._writing():
            self._forget("DELETE FROM documents WHERE path = ? RETURNING id", path)

    def rename_document(self, old: str, new: str) -> None:
        """Give a document another path; its chunks keep their ids."""
        with self._writing():
            self._run("UPDATE documents SET path = ? WHERE path = ?", (new, old))

    def touch(self, path: str, *, size: int, mtime_ns: int) -> None:
        """Record that the file of a document was seen again with the same content."""
        with self._writing():
            self._run("UPDATE documents SET size = ?, mtime_ns = ?, stale = 0 WHERE path = ?", (size, mtime_ns, path))

    def mark_stale(self, path: str) -> None:
        """Record that the file of a document cannot be read now; what is indexed of it stays."""
        with self._writing():
            self._run("UPDATE documents SET stale = 1 WHERE path = ?", (path,))

    def set_skipped(self, rows: Iterable[Skipped]) -> None:
        """Replace the list of files that are no documents."""
        with self._writing():
            self._run("DELETE FROM skipped")
            for row in rows:
                self._run("INSERT INTO skipped VALUES (?, ?, ?)", (row.path, row.sha256, row.reason))

    def commit(self) -> None:
        """Make all that was written since the last time durable and visible, at once."""
        with self._guard:
            if self._connection.in_transaction:
                self._set("commits", str(self.commits + 1))
                self._run("COMMIT")

    @property
    def commits(self) -> int:
        """How many commits the index has seen; it tells an older index.db from a newer one."""
        return self._number("commits")

    def settle(self) -> bool:
        """Bring all that was committed into index.db itself and return whether the write-ahead log is empty now.

        It is not while a reader is in the middle of a question; it then still holds what was deleted.
        """
        is_busy, *_ = self._run("PRAGMA wal_checkpoint(TRUNCATE)")[0]
        if is_busy:
            logger.warning("a reader holds the index: what was deleted is in index.db-wal until gistrag gc, or a build")
        return not is_busy

    def database_sha256(self) -> str:
        """Return the hash of index.db, ``""`` where the write-ahead log holds some of what was committed.

        Inside a snapshot of a reader it is the hash of what the reader sees: an empty log keeps a builder from
        writing into index.db as long as the snapshot lasts.
        """
        with self._explained():
            wal = self.folder / "index.db-wal"
            return "" if wal.exists() and wal.stat().st_size else files.sha256(self._database)

    @property
    def database_bytes(self) -> int:
        """Bytes that index.db takes, or will when all that was committed is in it."""
        return int(self._run("PRAGMA page_count")[0][0]) * int(self._run("PRAGMA page_size")[0][0])

    def copy_to(self, folder: Path) -> None:
        """Put the vector file and the database of this snapshot in *folder*, in one step in place of what is there.

        The gists must be there already. Inside a snapshot, so that the pages are those of one commit.
        """
        record = self.snapshot_record()
        if record and (data := self.snapshot_bytes(record)) is not None:
            files.write_atomic(folder / self._snapshot_path(record.sha256).name, data)
        files.make_private(folder / "index.db")
        with self._guard, self._explained(), closing(sqlite3.connect(folder / "index.db")) as copied:
            copied.execute("PRAGMA synchronous = FULL")
            self._connection.backup(copied)
        files.sync_folder(folder)  # SQLite does not wait for its journal to be gone

    @property
    def checked_ns(self) -> int:
        """When the gist files were last known to be as recorded, 0 for never; nanoseconds as in a file's mtime."""
        return self._number("checked_ns")

    def set_checked(self) -> None:
        """Record that the gist files are as recorded, now."""
        with self._writing():
            self._set("checked_ns", str(time.time_ns()))

    @property
    def patterns(self) -> dict[str, list[str]]:
        """The patterns of documents that the last build went by: ``include`` and ``exclude``."""
        try:
            found: dict[str, list[str]] = json.loads(self._get("patterns") or '{"include": [], "exclude": []}')
        except ValueError:
            raise self._damaged("the patterns are no JSON") from None
        return found

    def set_patterns(self, *, include: Sequence[str], exclude: Sequence[str]) -> None:
        """Record the patterns of documents, for the next build to go by."""
        with self._writing():
            self._set("patterns", json.dumps({"include": list(include), "exclude": list(exclude)}))

    # The faiss file, see `gistrag.index.retriever.write_snapshot`

    def snapshot_record(self) -> Snapshot | None:
        """Return what the current faiss file holds, None where there is none for this embedder."""
        with suppress(IndexFolderError):
            values = self._get_sealed("snapshot")
            if values and values["vectors_by"] == self._vectors_by:
                return Snapshot(values["sha256"], self._vectors_by, int(values["last_id"]), int(values["count"]))
        return None

    def snapshot_bytes(self, record: Snapshot) -> bytes | None:
        """Return the faiss file, None where it is missing or not the one recorded; the vectors then serve."""
        with suppress(OSError, MemoryError):
            data = files.read(self._snapshot_path(record.sha256))
            if hashlib.sha256(data).hexdigest() == record.sha256:
                return data
        return None

    def put_snapshot(self, data: bytes, rows: VectorRows) -> None:
        """Write *data*, the faiss file of *rows*, and commit."""
        record = Snapshot(hashlib.sha256(data).hexdigest(), self._vectors_by, rows.last_id, len(rows.chunk_ids))
        files.write_atomic(self._snapshot_path(record.sha256), data)
        with self._writing():
            self._set_sealed("snapshot", {name: str(value) for name, value in asdict(record).items()})
        self.commit()

    def _snapshot_path(self, sha256: str) -> Path:
        return self.folder / f"faiss-{sha256}.idx"

    # Housekeeping

    def gc(self) -> int:
        """Commit, remove what nothing refers to, and return how many files that were.

        After a removal the words are indexed anew, since FTS5 keeps those of deleted rows until it happens to merge.
        """
        with self._writing():
            self._run(schema.DROP_UNUSED_GISTS)
            if self._get("has_deleted_words"):
                self._run("INSERT INTO words (words) VALUES ('rebuild')")
                self._run("DELETE FROM settings WHERE name = 'has_deleted_words'")
        self.commit()
        strays = self.unreferenced()
        for path in strays:
            files.remove(path)
        return len(strays)

    def unreferenced(self) -> list[Path]:
        """Return the files a build left behind: gists without a row, old faiss files, half-written ones.

        Only names that a build gives count; whatever else somebody keeps in the folder stays.
        """
        kept = {self.gist_path(row.key) for row in self.gist_rows()}
        if record := self.snapshot_record():
            kept.add(self._snapshot_path(record.sha256))
        with self._explained():
            found = [*self.folder.iterdir(), *self.folder.glob("gists/??/*")]
        return sorted(path for path in found if is_by_a_build(path.name) and path not in kept)

    def damaged_documents(self) -> list[str]:
        """Return the paths of documents of which a chunk is damaged; a build replaces them."""
        return sorted({row[2] for row in self._run(schema.CHUNKS) if not _is_whole(row)})

    def integrity(self) -> list[str]:
        """Return what SQLite finds wrong in index.db, one line each; nothing for a sound one."""
        return [row[0] for row in self._run("PRAGMA integrity_check") if row[0] != "ok"]

    # Below: SQLite

    def _is_replaced(self) -> bool:
        with self._explained():
            return files.stamp(self._database) != self._opened

    def _connect(self) -> None:
        self._database = self.folder / "index.db"
        with self._explained():
            if not self._database.is_file():
                raise _nothing_built(self.folder)
            _require_trust(self.folder)
            if not self._is_builder and _is_half_made(self.folder):
                raise _nothing_built(self.folder)
            self._opened = files.stamp(self._database)
            is_quiet = not self._is_builder and _is_quiet(self.folder)
            self._is_immutable = is_quiet and not os.access(self.folder, os.W_OK)
        try:
            self._connect_as("mode=rw" if self._is_builder else "immutable=1" if self._is_immutable else "mode=ro")
        except (IndexFolderError, ResourceError) as error:
            if not is_quiet or self._is_immutable or not _is_refusal(error):
                raise
            self._is_immutable = True  # the disk has no room for the files by which a reader follows a builder
            self._connect_as("immutable=1")

    def _connect_as(self, mode: str) -> None:
        with self._explained():
            self._connection = sqlite3.connect(
                f"{self._database.absolute().as_uri()}?{mode}",
                uri=True,
                timeout=BUSY_S,
                isolation_level=None,
                check_same_thread=False,
            )
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        self._connection.text_factory = lambda data: data.decode(errors="replace")  # what is damaged fails its hash
        self._connection.create_function("casefold", 1, str.casefold, deterministic=True)
        for pragma in CONNECTION_PRAGMAS:
            self._run(pragma)
        application, version = self._run("PRAGMA application_id")[0][0], self._run("PRAGMA user_version")[0][0]
        is_empty = not application and not self._run("SELECT 1 FROM sqlite_master LIMIT 1")
        if is_empty and not self._is_builder:
            raise _nothing_built(self.folder)
        if not is_empty and application != schema.APPLICATION_ID:
            raise IndexFolderError(f"{self._database} is not an index of gistrag; choose another folder")
        if version > schema.FORMAT_VERSION:
            raise IndexFolderError(
                f"{self.folder} has index format {version}, this gistrag reads up to {schema.FORMAT_VERSION}; "
                "upgrade gistrag, or build into another folder"
            )
        if self._is_builder:
            for pragma in schema.BUILDER_PRAGMAS:
                self._run(pragma)
        if is_empty:
            self._run("BEGIN IMMEDIATE")  # an index exists from the first commit on
            for statement in schema.SCHEMA:
                self._run(statement)

    def _run(self, statement: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """Return the rows of one statement; SQLite's errors become ours."""
        with self._guard, self._explained():
            return self._connection.execute(statement, values).fetchall()

    def _rows(self, kind: Callable[..., _Row], rows: Iterable[Sequence[Any]]) -> list[_Row]:
        """Return rows as values; a damaged page may give a column another type, which SQLite does not notice."""
        values = [kind(*row) for row in rows]
        if not all(map(_is_typed, values)):
            raise self._damaged("a row of other types than were put")
        return values

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Make what is written inside one step: all of it joins the transaction, or nothing."""
        with self._guard:
            if not self._connection.in_transaction:
                self._run("BEGIN IMMEDIATE")
            self._run("SAVEPOINT step")
            try:
                yield
            except BaseException:
                with suppress(IndexFolderError, ResourceError):  # SQLite may have rolled back by itself
                    self._run("ROLLBACK TO step")
                    self._run("RELEASE step")
                raise
            self._run("RELEASE step")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the kind
            if code == sqlite3.SQLITE_FULL:
                raise ResourceError(
                    f"no space left for {self._database}; free some and run the same command again, it continues"
                ) from error
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise self._damaged(str(error)) from error
            raise IndexFolderError(
                f"could not use {self._database}: {error}; check the folder and the space left on its disk"
            ) from error
        except UnicodeDecodeError as error:  # Python could not read what SQLite says of it
            raise self._damaged("its schema is no text") from error
        except OSError as error:
            raise IndexFolderError(f"could not use {self._database}: {error.strerror}; check the folder") from error

    def _damaged(self, what: str) -> IndexFolderError:
        return IndexFolderError(
            f"{self._database} is damaged ({what}); restore it, or remove the folder and build again"
        )

    def _get(self, name: str) -> str:
        rows = self._run("SELECT value FROM settings WHERE name = ?", (name,))
        return str(rows[0][0]) if rows else ""

    def _number(self, name: str) -> int:
        """Return a setting that is a number, 0 where it was never set."""
        value = self._get(name) or "0"
        if not value.isdecimal():
            raise self._damaged(f"{name} is {value!r}")
        return int(value)

    def _set(self, name: str, value: str) -> None:
        self._run("INSERT OR REPLACE INTO settings (name, value) VALUES (?, ?)", (name, value))

    def _get_sealed(self, name: str) -> dict[str, str]:
        """Return what `_set_sealed` put, nothing where it put nothing; a changed letter is damage."""
        seal, _, line = self._get(name).partition(" ")
        with suppress(ValueError, TypeError):
            values: dict[str, str] = json.loads(line or "{}")
            if not line or digest(values) == seal:
                return values
        raise self._damaged(f"{name} differs from its hash")

    def _set_sealed(self, name: str, values: dict[str, str]) -> None:
        self._set(name, f"{digest(values)} {json.dumps(values)}")

    def _use(self, config: dict[str, str]) -> None:
        self._config = config
        self._gists_by = digest(_strings(config.get("gist_fingerprint", "{}")))
        self._vectors_by = digest(_strings(config.get("embedder_fingerprint", "{}")))

    def _configured(self, name: str) -> str:
        if self.is_new:
            raise _nothing_built(self.folder)
        return self._config[name]

    def _forget(self, statement: str, value: int | str) -> None:
        if self._run(statement, (value,)):
            self._set("has_deleted_words", "1")

    def _chunk_rows(self, statement: str, value: str) -> list[StoredChunk]:
        rows = self._run(statement, (value,))
        whole = [row for row in rows if _is_whole(row)]
        if len(whole) < len(rows):
            logger.warning("%d damaged chunks are left out; run gistrag build", len(rows) - len(whole))
        values = ([*row[:7], tuple(json.loads(row[7])), *row[8:11]] for row in whole)
        return [StoredChunk(*value) for value in values]


def is_by_a_build(name: str) -> bool:
    """Return whether a build gives a file this name: a gist, a vector file, or something half written.

    >>> is_by_a_build(f"faiss-{'0' * 64}.idx"), is_by_a_build("notes.txt")
    (True, False)
    """
    return bool(_LEFT_BY_A_BUILD.fullmatch(name))


def _is_quiet(folder: Path) -> bool:
    """Return whether SQLite may be told that nobody writes: it then needs no ``-shm``, which it could not make.

    Told so, it would silently ignore commits that are still in a ``-wal``; then it has to fail instead.
    """
    wal, shm = folder / "index.db-wal", folder / "index.db-shm"
    return not wal.exists() or (not wal.stat().st_size and not shm.exists())


def _is_half_made(folder: Path) -> bool:
    """Return whether SQLite was stopped while it made index.db; only then does it need a journal, later the log.

    Its first byte is no zero while it counts. A builder rolls it back; a reader may not, and would read what is half
    written if it were told that nobody writes.
    """
    with suppress(FileNotFoundError):
        return files.read(folder / "index.db-journal")[:1] not in (b"", b"\0")
    return False


def _is_refusal(error: Exception) -> bool:
    """Return whether an error of ours comes from the system refusing SQLite a file."""
    code = getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY)


def _require_trust(folder: Path) -> None:
    """Return if no stranger can put a gist into an index and so steer the model; known others are only told.

    Raises:
        IndexFolderError: everybody can, or index.db is a link out of the folder. Root, as whom containers run on
            folders that are open to everybody, is only told as well.
    """
    if (folder / "index.db").is_symlink():
        raise IndexFolderError(f"expected a file at {folder / 'index.db'}, found a link; name the folder of the index")
    for path in (folder, folder / "gists", folder / "index.db"):
        others = files.writers(path) if path.exists() else ""
        if others == "everybody" and os.geteuid():
            raise IndexFolderError(
                f"everybody may write to {path}, and whoever does steers the answers; if all in it is yours, run "
                f"chmod -R go-w {folder}"
            )
        if others:
            _warn(folder, others)
            return


@functools.cache
def _warn(folder: Path, others: str) -> None:
    """Tell it once in a process."""
    logger.warning("%s may write to the index in %s, and whoever does steers the answers", others, folder)


def _require_hash(row: GistRow, data: bytes, path: Path) -> None:
    """Return if *data* is the file that was recorded.

    Raises:
        CorruptGistError: it is not.
    """
    if (found := hashlib.sha256(data).hexdigest()) != row.sha256:
        raise gist_file.corrupt(path, f"sha256 {row.sha256}", found)


def _nothing_built(folder: Path) -> IncompleteIndexError:
    return IncompleteIndexError(f"no index in {folder}, or its first build has not committed yet; run gistrag build")


def _strings(line: str) -> dict[str, str]:
    values: dict[str, str] = json.loads(line)
    return values


def _is_typed(row: Any) -> bool:
    """Return whether the fields of a row are of the types its class names."""
    types = {"str": str, "int": int, "bool": bool}
    return all(isinstance(getattr(row, field.name), types[str(field.type)]) for field in fields(row))


def _row_sha256(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(list(values), default=repr).encode()).hexdigest()


def _is_whole(row: Sequence[Any]) -> bool:
    """Return whether a row of CHUNKS is what was put: SQLite notices a broken page, not a changed letter."""
    return bool(row[11] == _row_sha256((row[1], *row[3:11])))
