"""The rows of chunks in index.db as values: only those that are what was put.

SQLite notices a broken page, not a changed letter, so a chunk has a hash of its own, and its document has its path in
two places: see `gistrag.index.metadata.Metadata.misplaced`. What differs is left out, and a build makes it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from gistrag.index import schema
from gistrag.index.database import Database
from gistrag.index.metadata import Metadata
from gistrag.index.schema import StoredChunk

logger = logging.getLogger("gistrag")


def chunk_rows(database: Database, statement: str, values: Sequence[Any] | Mapping[str, Any]) -> list[StoredChunk]:
    """Return the whole chunks that a statement which begins with `schema.CHUNKS` finds, without their metadata."""
    rows = database.execute(statement, values)
    misplaced = Metadata(database).misplaced({row[1] for row in rows})
    whole = [row for row in rows if is_whole(row) and row[1] not in misplaced]
    if len(whole) < len(rows):
        logger.warning("%d damaged chunks are left out; run gistrag build", len(rows) - len(whole))
    columns = ([*row[:7], tuple(json.loads(row[7])), *row[8:11]] for row in whole)
    return [StoredChunk(*column) for column in columns]


def damaged_documents(database: Database) -> list[str]:
    """Return the paths of documents of which a chunk or the path is damaged; a build replaces them."""
    rows = database.execute(schema.CHUNKS)
    misplaced = Metadata(database).misplaced({row[1] for row in rows})
    return sorted({row[2] for row in rows if row[1] in misplaced or not is_whole(row)})


def leave_as_text(database: Database, key: str) -> int:
    """Let the chunks of a gist that cannot be made be read as text for good, and return how many they are."""
    rows = database.execute(schema.CHUNKS_BY_GIST, (key,))
    with database.writing():
        for row in rows:
            sha256 = row_sha256((row[1], *row[3:10], None)) if is_whole(row) else row[11]
            database.execute(schema.LEAVE_AS_TEXT, (sha256, row[0]))
        database.execute("DELETE FROM gists WHERE key = ?", (key,))
    return len(rows)


def row_sha256(values: Sequence[Any]) -> str:
    """Return the hash of a chunk: of its document's id, and of what stands in its row."""
    return hashlib.sha256(json.dumps(list(values), default=repr).encode()).hexdigest()


def is_whole(row: Sequence[Any]) -> bool:
    """Return whether a row of `schema.CHUNKS` is what was put."""
    return bool(row[11] == row_sha256((row[1], *row[3:11])))
