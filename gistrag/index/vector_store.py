"""The vectors of an index: the rows of index.db, which are the truth, and the faiss file, a copy that loads faster.

It ranks nothing; that is `gistrag.index.vector_index`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gistrag.errors import IndexFolderError
from gistrag.index import schema
from gistrag.index.config import IndexConfig
from gistrag.index.database import Database
from gistrag.storage import files

RECORD = "snapshot"


@dataclass(frozen=True)
class VectorRows:
    """Vectors ``(n, dim)`` with the chunk each stands for ``(n,)``; rows up to ``last_id`` are in them."""

    chunk_ids: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float32]
    last_id: int


@dataclass(frozen=True)
class VectorFile:
    """What a faiss file holds: its hash, the embedder, the newest vector row in it and how many there are."""

    sha256: str
    vectors_by: str
    last_id: int
    count: int


class VectorStore:
    """The vectors of an open index.

    Attributes:
        config: names the embedder whose vectors are read.
    """

    def __init__(self, database: Database, config: IndexConfig) -> None:
        self.config = config
        self._database = database

    def rows(self, *, after: int = 0) -> VectorRows:
        """Return the vectors of the current embedder in rows after *after*, in the order they came.

        Raises:
            IndexFolderError: they have different lengths.
        """
        with self._database.snapshot():
            asked = {"after": after, "vectors_by": self.config.vectors_by}
            rows = self._database.execute(schema.VECTORS, asked)
            last_id = self.last_id()
        if not all(isinstance(row[1], int) for row in rows):
            raise self._database.damaged("a vector of no chunk")
        return VectorRows(np.array([row[1] for row in rows], np.int64), self._matrix([row[2] for row in rows]), last_id)

    def _matrix(self, blobs: Sequence[Any]) -> npt.NDArray[np.float32]:
        lengths = {len(blob) if isinstance(blob, bytes) else -1 for blob in blobs}
        if len(lengths) > 1 or any(length < 4 or length % 4 for length in lengths):
            raise self._database.damaged("vectors of different lengths")
        return np.frombuffer(b"".join(blobs), "<f4").reshape(len(blobs), -1 if blobs else 0)

    def last_id(self) -> int:
        """Return the id of the newest vector row, 0 where there is none."""
        return int(self._database.execute("SELECT coalesce(max(id), 0) FROM vectors")[0][0])

    def file(self) -> VectorFile | None:
        """Return what the current faiss file holds, None where there is none for this embedder."""
        with suppress(IndexFolderError):
            values = self._database.get_sealed(RECORD)
            if values and values["vectors_by"] == self.config.vectors_by:
                last_id, count = int(values["last_id"]), int(values["count"])
                return VectorFile(values["sha256"], self.config.vectors_by, last_id, count)
        return None

    def read_file(self, record: VectorFile) -> bytes | None:
        """Return the faiss file, None where it is missing or not the one recorded; the rows then serve."""
        with suppress(OSError, MemoryError):
            data = files.read(self.path(record))
            if hashlib.sha256(data).hexdigest() == record.sha256:
                return data
        return None

    def put_file(self, data: bytes, rows: VectorRows) -> None:
        """Write *data*, the faiss file of *rows*, and record it from the next commit on."""
        sha256 = hashlib.sha256(data).hexdigest()
        record = VectorFile(sha256, self.config.vectors_by, rows.last_id, len(rows.chunk_ids))
        files.write_atomic(self.path(record), data)
        self._database.set_sealed(RECORD, {name: str(value) for name, value in asdict(record).items()})

    def path(self, record: VectorFile) -> Path:
        """Return where the faiss file is."""
        return self._database.folder / f"faiss-{record.sha256}.idx"
