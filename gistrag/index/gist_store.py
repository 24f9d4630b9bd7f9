"""The gist files of an index: one immutable file for the gist cache of each chunk, and a row that records its hash.

A file reaches the disk before the row that records it is committed, and a row goes before its file does. Its name is
known before it is computed, so a chunk can name a gist that is still to be made, and a build that was killed finds it
again. What is loaded is hashed and compared with its
row: a gist that differs in one bit, or was made by another model, raises and never reaches a model.

The form of a file is in `gistrag.kv.gist_file`.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gistrag.errors import CorruptGistError, GistNotFoundError
from gistrag.index import schema
from gistrag.index.config import IndexConfig
from gistrag.index.database import Database, is_typed
from gistrag.index.schema import GistRow
from gistrag.kv import gist_file
from gistrag.kv.packed import Gists, PackedGists
from gistrag.storage import files

if TYPE_CHECKING:
    from gistrag.kv.cache import GistCache

SETTLED_NS = 1_000_000_000
"""Age from which a file's stamp tells whether it changed; two writes within one clock tick have the same."""
VERIFIED_S = 600.0
"""How long a hash stands for a file whose stamp stays the same: bits can change without the file system knowing."""
PARALLEL_BYTES = 4_000_000
"""Files that hold more are read in several threads; starting those takes longer than reading less."""
GistError = GistNotFoundError | CorruptGistError
WRITERS = 8
"""Gist files that are written at a time."""


class GistStore:
    """The gist files of an open index; what is put belongs to the builder's transaction.

    Attributes:
        config: names the model whose gists are put and loaded.
        bytes_read: bytes of gist files loaded so far.
    """

    def __init__(self, database: Database, config: IndexConfig) -> None:
        self.config = config
        self.bytes_read = 0
        self._database = database
        self._verified: dict[str, tuple[str, files.Stamp, float]] = {}

    def key(self, ids: Sequence[int]) -> str:
        """Return the name of the gist of token *ids* by the current model, 64 hex digits."""
        tokens = np.asarray(ids, "<i8").tobytes()
        return hashlib.sha256(f"{self.config.salt} {self.config.gists_by} ".encode() + tokens).hexdigest()

    def path(self, key: str) -> Path:
        """Return where the file of a gist is, or would be."""
        return self._database.folder / "gists" / key[:2] / f"{key}.safetensors"

    # Reading

    def load(self, key: str) -> PackedGists:
        """Return the gists of a chunk, as their file holds them.

        Raises:
            GistNotFoundError: no row or no file of that name.
            CorruptGistError: not the file that was recorded, or made by another model.
        """
        row = self._row(key)
        self.bytes_read += row.size
        return self._load(row)

    def load_all(self, keys: Sequence[str]) -> list[PackedGists | GistError]:
        """Return what `load` returns or raises for each of *keys*; large files are read several at a time."""
        rows: list[GistRow | GistError] = []
        for key in keys:
            try:
                rows.append(self._row(key))
            except (GistNotFoundError, CorruptGistError) as error:
                rows.append(error)
        size = sum(row.size for row in rows if isinstance(row, GistRow))
        self.bytes_read += size
        run = gist_file.in_parallel if size > PARALLEL_BYTES else lambda load, wanted: list(map(load, wanted))
        return run(self._loaded, rows)

    def _loaded(self, row: GistRow | GistError) -> PackedGists | GistError:
        if not isinstance(row, GistRow):
            return row
        try:
            return self._load(row)
        except (GistNotFoundError, CorruptGistError) as error:
            return error

    def _load(self, row: GistRow) -> PackedGists:
        """Return the gists of a row; any thread may call this."""
        key, path = row.key, self.path(row.key)
        data, stamp = gist_file.read(path, bytes_max=row.size)
        self._verify(row, data, stamp)
        cache = gist_file.decode(data, path, key=key, fingerprint=self.config.gists_by)
        if (cache.gists, cache.source_tokens) != (row.gists, row.source_tokens):
            found = f"{cache.gists} of {cache.source_tokens}"
            raise gist_file.corrupt(path, f"{row.gists} gists of {row.source_tokens} tokens", found)
        return cache

    def _row(self, key: str) -> GistRow:
        rows = self._database.execute(schema.GIST, (key,))
        if not rows:
            raise GistNotFoundError(f"no gist {key} in {self._database.folder}; run gistrag build to make it")
        if not is_typed(row := GistRow(*rows[0])):
            raise gist_file.corrupt(self.path(key), "a row in index.db", "a damaged one")
        return row

    def _verify(self, row: GistRow, data: bytes, stamp: files.Stamp) -> None:
        """Return if *data* is what was recorded; a file that was hashed lately and has not changed is trusted."""
        sha256, known, until_s = self._verified.get(row.key, ("", stamp, 0.0))
        if (sha256, known) == (row.sha256, stamp) and time.monotonic() <= until_s:
            return
        self._require_hash(row, data)
        if stamp[1] < time.time_ns() - SETTLED_NS:
            self._verified[row.key] = row.sha256, stamp, time.monotonic() + VERIFIED_S

    def read(self, row: GistRow) -> bytes:
        """Return the file of a gist, whichever model made it.

        Raises:
            GistNotFoundError: no such file.
            CorruptGistError: not the file that was recorded.
        """
        data, _ = gist_file.read(self.path(row.key), bytes_max=row.size)
        self._require_hash(row, data)
        return data

    def _require_hash(self, row: GistRow, data: bytes) -> None:
        if (found := hashlib.sha256(data).hexdigest()) != row.sha256:
            raise gist_file.corrupt(self.path(row.key), f"sha256 {row.sha256}", found)

    def rows(self) -> list[GistRow]:
        """Return what is recorded of every gist file, by key."""
        rows = self._database.values(GistRow, self._database.execute(schema.GISTS))
        if strange := [row.key for row in rows if not re.fullmatch("[0-9a-f]{64}", row.key)]:
            raise self._database.damaged(f"a gist of the name {strange[0]!r}")
        return rows

    def all_keys(self) -> set[str]:
        """Return the names of all gists, made or still to be made."""
        return {row[0] for row in self._database.execute("SELECT key FROM gists")}

    def is_pending(self, key: str) -> bool:
        """Return whether a gist is still to be made."""
        return bool(self._database.execute(schema.IS_PENDING, (key,)))

    def pending(self) -> dict[str, int]:
        """Return the source tokens of each gist that is still to be made, by its key."""
        return dict(self._database.execute(schema.PENDING, {"gists_by": self.config.gists_by}))

    def chunks(self) -> tuple[int, int]:
        """Return how many chunks are to be read as gists, and of how many of them the gists are still to be made."""
        every, pending = self._database.execute(schema.GIST_CHUNKS, {"gists_by": self.config.gists_by})[0]
        return every, pending

    def unrecorded(self) -> set[str]:
        """Return the keys that chunks name and no gist row does; none in a sound index."""
        return {row[0] for row in self._database.execute(schema.UNRECORDED)}

    # Writing

    def expect(self, key: str, *, source_tokens: int) -> None:
        """Record that a gist is still to be made of so many tokens; chunks may name it from now on."""
        with self._database.writing():
            self._database.execute(schema.EXPECT_GIST, (key, source_tokens))

    def put(self, caches: Mapping[str, GistCache | PackedGists]) -> None:
        """Write gists by their keys; they are on the disk when this returns, and others find them after a commit.

        Several are written at a time, because their fsyncs overlap.

        Raises:
            CorruptGistError: a cache of another shape or dtype than a gist cache has.
        """
        with ThreadPoolExecutor(min(WRITERS, len(caches) or 1)) as writers:
            written = list(writers.map(self._write, caches, caches.values()))
        for key, (sha256, size) in zip(caches, written, strict=True):
            self._record(key, caches[key], sha256, size)

    def _write(self, key: str, cache: GistCache | PackedGists) -> tuple[str, int]:
        """Write a gist and return hash and size of its file."""
        stored_as = self.config.settings.kv_cache_dtype
        data = gist_file.encode(cache, key=key, fingerprint=self.config.gists_by, kv_cache_dtype=stored_as)
        files.make_folder(self.path(key).parent)
        files.write_atomic(self.path(key), data)
        return hashlib.sha256(data).hexdigest(), len(data)

    def reuse(self, key: str) -> bool:
        """Return whether a sound gist is there already, put before a kill or by another chunk of equal text."""
        path = self.path(key)
        with suppress(GistNotFoundError, CorruptGistError):
            if self._database.execute(schema.GIST, (key,)):
                self.load(key)
            else:
                data, _ = gist_file.read(path)
                cache = gist_file.decode(data, path, key=key, fingerprint=self.config.gists_by, check_seal=True)
                self._record(key, cache, hashlib.sha256(data).hexdigest(), len(data))
            return True
        return False

    def _record(self, key: str, cache: Gists, sha256: str, size: int) -> None:
        row = (key, sha256, size, cache.gists, cache.source_tokens)
        with self._database.writing():
            self._database.execute(schema.PUT_GIST, row)

    # When they were checked

    @property
    def checked_ns(self) -> int:
        """When the gist files were last known to be as recorded; nanoseconds as in a file's mtime.

        0 for never, and where the clock was set back since, so that no later change is taken for an earlier one.
        """
        checked_ns = self._database.number("checked_ns")
        return checked_ns if checked_ns <= time.time_ns() else 0

    def set_checked(self) -> None:
        """Record that the gist files are as recorded, now."""
        self._database.set("checked_ns", str(time.time_ns()))
