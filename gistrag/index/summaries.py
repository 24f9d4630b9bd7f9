"""The summaries of documents: stored by a build, made on the spot where there are none.

A summary is a chunk of its own kind. Its id is that of its document with a minus, its ordinal is `SUMMARY_ORDINAL`, and
it has no gists. It is in no list of the two searches, so it takes no place from a chunk: whoever wants one asks for it.

A document of one chunk has none stored, nor has an index made before there were summaries, until its next build; theirs
are made from their chunks when they are asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gistrag.documents.chunking import PLAIN_KINDS
from gistrag.documents.summary import Summary, summarize
from gistrag.index import schema
from gistrag.index.config import IndexConfig
from gistrag.index.database import Database
from gistrag.index.schema import SUMMARY_ORDINAL, StoredChunk
from gistrag.storage.fingerprint import digest

VERSION = "1"
"""Of the way summaries are made; a build makes those of another version again."""


@dataclass(frozen=True)
class Missing:
    """A document whose summary is not stored, or made from something else: a line of `Summaries.missing`."""

    document_id: int
    path: str
    sha256: str
    kind: str


class Summaries:
    """The summaries of an open index.

    Args:
        chunks_of: returns the chunks of the document at a path.

    Attributes:
        config: names the embedder whose vectors are compared.
    """

    def __init__(
        self, database: Database, config: IndexConfig, *, chunks_of: Callable[[str], list[StoredChunk]]
    ) -> None:
        self.config = config
        self._database, self._chunks_of = database, chunks_of
        self._vectors: tuple[tuple[int, int], list[int], npt.NDArray[np.float32]] | None = None

    @property
    def are_stored(self) -> bool:
        """Whether the index can hold summaries; one that was made before there were any cannot, until it is built."""
        return bool(self._database.execute(schema.HAS_SUMMARIES))

    def titles(self) -> dict[str, str]:
        """Return the title of each document, by path: that of its summary, or the first heading, or nothing."""
        statement = schema.TITLES if self.are_stored else schema.FIRST_HEADINGS
        found = {}
        for path, title, heading in self._database.execute(statement):
            headings = json.loads(heading or "[]")
            found[path] = str(title or (headings[0] if headings else ""))
        return found

    def of_path(self, path: str) -> StoredChunk | None:
        """Return the summary of the document at *path*, stored or made now; None where it has no chunks."""
        rows = self._database.execute("SELECT id FROM documents WHERE path = ?", (path,))
        return self.of_document(rows[0][0]) if rows else None

    def of_document(self, document_id: int) -> StoredChunk | None:
        """Return the summary of a document, stored or made now; None where it has no chunks."""
        rows = self._database.execute(schema.SUMMARY, (document_id,)) if self.are_stored else []
        if rows and self._is_sound(rows[0]):
            return self._chunk(rows[0])
        places = self._database.execute("SELECT path, kind FROM documents WHERE id = ?", (document_id,))
        chunks = self._chunks_of(places[0][0]) if places else []
        return as_chunk(summary_of(places[0][0], chunks, places[0][1]), chunks) if chunks else None

    def _chunk(self, row: Sequence[Any]) -> StoredChunk:
        document_id, path, _, _, title, text, tokens, end, _ = row
        place = (-document_id, document_id, path, SUMMARY_ORDINAL, 0, end)
        return StoredChunk(*place, text, (title,), None, tokens, None)

    def _is_sound(self, row: Sequence[Any]) -> bool:
        """Return whether a row of SUMMARIES is what was put, and of the document as it is now."""
        document_id, path, document_sha256, made_from, *values, sha256 = row
        return bool(
            made_from == self.made_from(path, document_sha256) and sha256 == _sha256(document_id, made_from, *values)
        )

    def made_from(self, path: str, sha256: str) -> str:
        """Return what tells the summary of a document from every other one."""
        return digest({"version": VERSION, "path": path, "sha256": sha256, "vectors_by": self.config.vectors_by})

    def nearest(self, vector: npt.NDArray[np.float32], k: int) -> list[tuple[int, float]]:
        """Return up to *k* negative ids of stored summaries with their cosine, best first, equal ones by id."""
        with self._database.snapshot():
            ids, vectors = self._matrix()
        cosines = vectors @ vector if ids else np.empty(0, np.float32)
        best: dict[int, float] = {}
        for chunk_id, cosine in zip(ids, cosines.tolist(), strict=True):
            best[chunk_id] = max(cosine, best.get(chunk_id, cosine))
        return sorted(best.items(), key=lambda pair: (-pair[1], -pair[0]))[:k]

    def _matrix(self) -> tuple[list[int], npt.NDArray[np.float32]]:
        """Return the ids and vectors of all summaries, read anew after each commit."""
        if not self.are_stored:
            return [], np.empty((0, 0), np.float32)
        state = self._database.openings, self._database.commits
        if self._vectors is None or self._vectors[0] != state:
            rows = self._database.execute(schema.SUMMARY_VECTORS, {"vectors_by": self.config.vectors_by})
            parts = [
                (-document_id, np.frombuffer(blob, "<f4").reshape(count, -1))
                for document_id, path, sha256, made_from, blob, count in rows
                if made_from == self.made_from(path, sha256)
            ]
            ids = [chunk_id for chunk_id, vectors in parts for _ in vectors]
            empty = np.empty((0, 0), np.float32)
            self._vectors = state, ids, np.concatenate([part for _, part in parts]) if parts else empty
        return self._vectors[1], self._vectors[2]

    # Writing

    def prepare(self) -> None:
        """Let the index hold summaries, if it was made before there were any."""
        if not self.are_stored:
            with self._database.writing():
                self._database.execute(schema.CREATE_SUMMARIES)

    def missing(self) -> Iterator[Missing]:
        """Yield the documents of several chunks whose summary is not stored, or is of another text, path or version."""
        for document_id, path, sha256, kind, made_from in self._database.execute(schema.SUMMARIZED):
            if made_from != self.made_from(path, sha256):
                yield Missing(document_id, path, sha256, kind)

    def put(self, of: Missing, chunk: StoredChunk, vectors: npt.NDArray[np.float32]) -> None:
        """Store the summary of a document; *vectors* are ``(parts, dim)`` float32."""
        made_from = self.made_from(of.path, of.sha256)
        values = (chunk.heading[0], chunk.text, chunk.tokens, chunk.end)
        sha256 = _sha256(of.document_id, made_from, *values)
        parts = np.asarray(vectors, "<f4")
        with self._database.writing():
            row = (of.document_id, made_from, *values, sha256, parts.tobytes(), len(parts))
            self._database.execute(schema.PUT_SUMMARY, row)

    def drop_orphans(self) -> None:
        """Remove the summaries of documents that have one chunk now."""
        with self._database.writing():
            self._database.execute(schema.DROP_SUMMARIES)


def summary_of(path: str, chunks: Sequence[StoredChunk], kind: str) -> Summary:
    """Return the summary of a document from its chunks, between which only white space is lost."""
    return summarize("\n\n".join(chunk.text for chunk in chunks), path, has_headings=kind not in PLAIN_KINDS)


def as_chunk(summary: Summary, chunks: Sequence[StoredChunk], *, tokens: int = 0) -> StoredChunk:
    """Return a summary as a chunk of the document that *chunks*, of which there is one at least, are."""
    first, last = chunks[0], chunks[-1]
    place = (-first.document_id, first.document_id, first.path, SUMMARY_ORDINAL, 0, last.end)
    return StoredChunk(*place, summary.text, (summary.title,), None, tokens, None)


def _sha256(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=repr).encode()).hexdigest()
