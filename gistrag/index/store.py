"""The index folder: one SQLite file that is the truth, and one immutable file for each gist.

::

    index.db                     documents, chunks with their text, words, vectors, gist rows, settings
    gists/ab/<key>.safetensors   the gist cache of a chunk, see `gistrag.index.gist_store`
    faiss-<sha256>.idx           disposable copy of the vectors, see `gistrag.index.vector_store`
    lock                         held by the one builder

Whatever moment a build dies at, the last commit stands. Readers never write. `Store` holds documents and chunks, and
is composed of what knows the rest: the database session, the recorded settings, the gist files and the vectors.

This module embeds nothing, ranks no vectors and knows no model.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from gistrag.documents.discovery import Document, Skipped
from gistrag.errors import IndexLockedError, UsageError
from gistrag.index import doubt, schema
from gistrag.index.chunk_rows import chunk_rows, row_sha256
from gistrag.index.config import IndexConfig
from gistrag.index.database import Database, nothing_built
from gistrag.index.gist_store import GistStore
from gistrag.index.metadata import Metadata, require_known
from gistrag.index.pairs import Pairs, has_pairs, match_of, quoted
from gistrag.index.schema import DocumentRow, Stats, StoredChunk
from gistrag.index.summaries import Summaries
from gistrag.index.vector_store import VectorStore
from gistrag.settings import IndexSettings
from gistrag.storage import files
from gistrag.storage.fingerprint import require_same

if TYPE_CHECKING:
    from gistrag.documents.chunking import Chunk

_HAS_DELETED_WORDS = "has_deleted_words"
BACKGROUND = "gists in the background"
"""Command of whoever holds an index only to keep a batch of gists."""
PATIENCE_S = 30.0
"""How long a builder waits for that."""

logger = logging.getLogger("gistrag")


@dataclass(frozen=True, kw_only=True)
class IndexedChunk:
    """A chunk with what was made of it: ``vectors`` is ``(parts, dim)`` float32, the gist is put or expected."""

    chunk: Chunk
    gist_key: str | None
    vectors: npt.NDArray[np.float32]


class Store:
    """An open index folder; `open` to read, `build` to write.

    Attributes:
        folder: where it is, absolute.
        database: the SQLite session.
        config: what the index was made with.
        gists: its gist files.
        vectors: its vectors.
        summaries, metadata: those of its documents; pairs: of the letters of words that are not written apart.
    """

    def __init__(self, folder: Path, *, is_builder: bool) -> None:
        self.folder = folder.absolute()  # an open index outlives a change of the working folder
        self.database = Database(self.folder, is_builder=is_builder)
        try:
            self.config = IndexConfig.read(self.database)
        except BaseException:
            self.close()
            raise
        self.gists = GistStore(self.database, self.config)
        self.vectors = VectorStore(self.database, self.config)
        self.pairs = Pairs(self.database)
        self.summaries = Summaries(self.database, self.config, chunks_of=self.chunks_of)
        self.metadata = Metadata(self.database)
        self.database.on_replaced = partial(_use_replacement, self)
        self.require_lock: Callable[[], None] = lambda: None

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
            raise nothing_built(store.folder)
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
        with _locked(folder / "lock", command) as require_lock:
            files.make_private(folder / "index.db")
            store = cls(folder, is_builder=True)
            store.require_lock = require_lock
            try:
                doubt.remember(store.database)
                yield store
                store.commit()
                store.database.checkpoint()
            finally:
                store.close()

    def close(self) -> None:
        """Close the folder; what was not committed is lost."""
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def snapshot(self) -> AbstractContextManager[None]:
        """Let everything read inside be of one commit, see `Database.snapshot`."""
        return self.database.snapshot()

    def commit(self) -> None:
        """Make all that was written since the last time durable and visible, at once.

        Raises:
            IndexLockedError: somebody removed the lock file, so that another builder may be at work.
        """
        self.require_lock()
        self.database.commit()

    # What it was made with

    @property
    def is_new(self) -> bool:
        """Whether nothing was configured yet."""
        return not self.config.values

    @property
    def settings(self) -> IndexSettings:
        """The settings the index is made with.

        Raises:
            IndexFolderError: they hold something this version does not know.
        """
        return self.config.settings

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
        config = self.config.write(
            self.database,
            settings,
            source=source,
            gist_fingerprint=gist_fingerprint,
            embedder_fingerprint=embedder_fingerprint,
        )
        _use(self, config)

    @property
    def patterns(self) -> dict[str, list[str]]:
        """The patterns of documents that the last build went by: ``include`` and ``exclude``."""
        try:
            found: dict[str, list[str]] = json.loads(self.database.get("patterns") or '{"include": [], "exclude": []}')
        except ValueError:
            raise self.database.damaged("the patterns are no JSON") from None
        return found

    def set_patterns(self, *, include: Sequence[str], exclude: Sequence[str]) -> None:
        """Record the patterns of documents, for the next build to go by."""
        self.database.set("patterns", json.dumps({"include": list(include), "exclude": list(exclude)}))

    # Reading

    def documents(self) -> list[DocumentRow]:
        """Return all documents, by path."""
        asked = {"gists_by": self.config.gists_by, "vectors_by": self.config.vectors_by}
        return self.database.values(
            DocumentRow, ((*row[:8], *map(bool, row[8:])) for row in self.database.execute(schema.DOCUMENTS, asked))
        )

    def skipped(self) -> list[Skipped]:
        """Return the files that are no documents, by path."""
        rows = self.database.execute("SELECT path, sha256, reason FROM skipped ORDER BY path")
        return self.database.values(lambda *row: Skipped(path=row[0], sha256=row[1], reason=row[2]), rows)

    def chunks(self, ids: Iterable[int]) -> list[StoredChunk]:
        """Return the chunks *ids*, summaries among them, in that order; gone and damaged ones are left out."""
        wanted = list(ids)
        found = {row.id: row for row in chunk_rows(self.database, schema.CHUNKS_BY_ID, (json.dumps(wanted),))}
        for chunk_id in wanted:
            if chunk_id < 0 and (row := self.summaries.of_document(-chunk_id)):
                found[chunk_id] = row
        return self.metadata.added_to([found[chunk_id] for chunk_id in wanted if chunk_id in found])

    def chunks_of(self, path: str) -> list[StoredChunk]:
        """Return the chunks of one document, in the order of its text; none where there is no such document."""
        return self.metadata.added_to(chunk_rows(self.database, schema.CHUNKS_BY_PATH, (path,)))

    def present(self, ids: Iterable[int]) -> set[int]:
        """Return those of the chunk *ids* that are in the index."""
        asked = json.dumps(list(ids))
        return {row[0] for row in self.database.execute(schema.PRESENT, (asked,))}

    def count(self) -> int:
        """Return the number of chunks."""
        return int(self.database.execute("SELECT count(*) FROM chunks")[0][0])

    def select(self, filters: Mapping[str, str] | None = None, scope: str | None = None) -> set[int] | None:
        """Return the ids of the chunks that pass, None where everything does.

        Args:
            filters: all must hold: ``path`` a pattern (``*`` goes across folders), ``kind``, ``heading`` a part of one,
                and conditions on metadata, see `gistrag.index.metadata.conditions_of`.
            scope: path of one document.

        Raises:
            UsageError: an unknown filter, an impossible date, or no such document.
        """
        filters = filters or {}
        require_known(filters)
        if scope is not None and not self.database.execute("SELECT 1 FROM documents WHERE path = ?", (scope,)):
            raise UsageError(f"no document {scope!r} in {self.folder}; gistrag inspect lists them")
        if not filters and scope is None:
            return None
        asked = {"scope": scope, **{name: filters.get(name) for name in ("path", "kind", "heading")}}
        placed = {row[0] for row in self.database.execute(schema.SELECT, asked)}
        described = self.metadata.select(filters)
        return placed if described is None else placed & described

    def keyword_search(
        self, words: Sequence[str], k: int, *, allowed: Collection[int] | None = None
    ) -> list[tuple[int, float]]:
        """Return up to *k* chunk ids that hold any of *words*, with their BM25, best first, equal scores by id."""
        if not words:
            return []
        asked = {"ids": None if allowed is None else json.dumps(list(allowed)), "k": k}
        if self.pairs.serve(words):
            match = " OR ".join(quoted(word) for word in words if not has_pairs(word)) or '""'
            rows = self.database.execute(schema.KEYWORDS_AND_PAIRS, {**asked, "match": match, "pairs": match_of(words)})
        else:
            match = " OR ".join(map(quoted, words))
            rows = self.database.execute(schema.KEYWORDS, {**asked, "match": match})
        return [(row[0], row[1]) for row in rows]

    def stats(self) -> Stats:
        """Return totals."""
        documents, skipped = self.documents(), len(self.skipped())
        gists = self.database.execute(schema.GIST_TOTALS)[0]
        gist_chunks, pending = self.gists.chunks()
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
            gist_chunks=gist_chunks,
            pending_chunks=pending,
            kinds={kind: kinds.count(kind) for kind in sorted(set(kinds))},
        )

    # Writing: everything is one savepoint, and seen by readers after `commit`

    def replace_document(self, document: Document, chunks: Sequence[IndexedChunk]) -> None:
        """Put a document with its chunks in place of what was there under its path."""
        made = (document.path, document.sha256, document.size, document.mtime_ns, document.kind)
        made_by = (self.config.gists_by, self.config.vectors_by)
        with self.database.writing():
            document_id = self.database.execute(schema.PUT_DOCUMENT, (*made, *made_by))[0][0]
            _remove(self.database, "DELETE FROM chunks WHERE document_id = ? RETURNING id", document_id)
            ids = [_put_chunk(self, document_id, entry) for entry in chunks]
            self.metadata.put(document, zip(ids, (entry.chunk.start for entry in chunks), strict=True))

    def remove_document(self, path: str) -> None:
        """Remove a document; `drop_unused` then removes the rows of its gists and every trace of its text."""
        with self.database.writing():
            _remove(self.database, "DELETE FROM documents WHERE path = ? RETURNING id", path)

    def rename_document(self, old: str, new: str) -> None:
        """Give a document another path; its chunks keep their ids."""
        with self.database.writing():
            self.database.execute("UPDATE documents SET path = ? WHERE path = ?", (new, old))
            self.metadata.outdate(new)

    def mark_seen(self, path: str, *, size: int, mtime_ns: int) -> None:
        """Record that the file of a document was seen again with the same content."""
        with self.database.writing():
            self.database.execute(schema.MARK_SEEN, (size, mtime_ns, path))

    def mark_stale(self, path: str) -> None:
        """Record that the file of a document cannot be read now; what is indexed of it stays."""
        with self.database.writing():
            self.database.execute("UPDATE documents SET stale = 1 WHERE path = ?", (path,))

    def set_skipped(self, rows: Iterable[Skipped]) -> None:
        """Replace the list of files that are no documents."""
        with self.database.writing():
            self.database.execute("DELETE FROM skipped")
            for row in rows:
                self.database.execute("INSERT INTO skipped VALUES (?, ?, ?)", (row.path, row.sha256, row.reason))

    def drop_unused(self) -> None:
        """Drop the rows of gists that no chunk names, and every trace of words that were deleted.

        After a removal the words are indexed anew, since FTS5 keeps those of deleted rows until it happens to merge.
        """
        with self.database.writing():
            self.database.execute(schema.DROP_UNUSED_GISTS)
            if self.database.get(_HAS_DELETED_WORDS):
                index_words(self)
                self.database.execute("DELETE FROM settings WHERE name = ?", (_HAS_DELETED_WORDS,))


def index_words(store: Store) -> None:
    """Index the words of all chunks anew."""
    with store.database.writing():
        store.database.execute("INSERT INTO words (words) VALUES ('rebuild')")
        store.pairs.forget()


def _use(store: Store, config: IndexConfig) -> None:
    store.config = store.gists.config = store.vectors.config = store.summaries.config = config


def _use_replacement(store: Store) -> None:
    """Read what the index was made with that was put in place of the one that was opened.

    Raises:
        FingerprintMismatchError: by other models, which whoever opened this one did not load.
    """
    config, where = IndexConfig.read(store.database), f"the index that was put into {store.folder}"
    for kind in ("gist_fingerprint", "embedder_fingerprint"):
        found, expected = getattr(config, kind), getattr(store.config, kind)
        require_same(found, expected, where=where, remedy="open it again; a server, start it again")
    _use(store, config)


@contextmanager
def _locked(path: Path, command: str) -> Iterator[Callable[[], None]]:
    """Hold the lock of builders, see `files.lock`; waits while a batch of gists is kept in the background only.

    Raises:
        IndexLockedError: another builder is at work.
    """
    end_s = time.monotonic() + PATIENCE_S
    with ExitStack() as stack:
        while True:
            try:
                held = stack.enter_context(files.lock(path, command=command))
                break
            except IndexLockedError as error:
                if f"({BACKGROUND})" not in str(error) or time.monotonic() > end_s:
                    raise
                time.sleep(0.02)
        yield held


def pending_chunks(store: Store, ids: Iterable[int] | None = None, *, most: int) -> list[StoredChunk]:
    """Return chunks whose gists are still to be made, in the order of the documents: of *ids*, or of all."""
    asked = {"ids": None if ids is None else json.dumps(list(ids)), "most": most, "gists_by": store.config.gists_by}
    return chunk_rows(store.database, schema.PENDING_CHUNKS, asked)


def chunks_of_gist(store: Store, key: str) -> list[StoredChunk]:
    """Return the chunks that a gist is of: equal ones, each below the same heading path."""
    return chunk_rows(store.database, schema.CHUNKS_BY_GIST, (key,))


def _put_chunk(store: Store, document_id: int, entry: IndexedChunk) -> int:
    """Put a chunk, its pairs and its vectors, and return its id."""
    database, chunk = store.database, entry.chunk
    place = (document_id, chunk.ordinal, chunk.start, chunk.end)
    heading = json.dumps(chunk.heading, ensure_ascii=False)
    values = (*place, chunk.text, heading, chunk.page, chunk.tokens, entry.gist_key)
    chunk_id: int = database.execute(schema.PUT_CHUNK, (*values, row_sha256(values)))[0][0]
    if store.pairs.are_stored:
        store.pairs.put(chunk_id, heading, chunk.text)
    for vector in np.asarray(entry.vectors, "<f4"):
        database.execute("INSERT INTO vectors (chunk_id, vector) VALUES (?, ?)", (chunk_id, vector.tobytes()))
    return chunk_id


def _remove(database: Database, statement: str, value: int | str) -> None:
    if database.execute(statement, (value,)):
        database.set(_HAS_DELETED_WORDS, "1")
