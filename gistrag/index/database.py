"""The SQLite session of an index: connecting, transactions, settings, and SQLite's errors made ours.

A builder opens ``index.db`` to read and write, with a write-ahead log. A reader never writes: it follows a builder
where the folder allows it, and otherwise opens the file as one that nobody changes. Where another ``index.db`` was put
in place of the one it reads, it opens that one.

Nothing here knows what a table holds; the statements are in `gistrag.index.schema`.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from gistrag.errors import IncompleteIndexError, IndexFolderError, ResourceError, UsageError
from gistrag.index import schema
from gistrag.index.trust import require_trust
from gistrag.storage import files
from gistrag.storage.fingerprint import digest

BUSY_S = 5.0
"""How long SQLite waits for others, seconds; readers take milliseconds."""

CONNECTION_PRAGMAS = (
    "PRAGMA cell_size_check = ON",  # of pages that were damaged
    "PRAGMA temp_store = MEMORY",  # no word of a document gets on a disk outside the folder
)

_Inode = tuple[int, int]
_NOWHERE: _Inode = (0, 0)
_sessions: Counter[_Inode] = Counter()
"""How many databases of each file are open in this process."""
_hashed: dict[_Inode, int] = {}
"""Descriptors by which they were hashed, open as long as a database is.

Closing any descriptor of a file drops the locks that SQLite holds on it, and a builder of another process then takes
the write-ahead log away from a reader.
"""
_registry = threading.Lock()

logger = logging.getLogger("gistrag")
_Row = TypeVar("_Row")


class Database:
    """An open ``index.db``.

    Attributes:
        folder: of the index, absolute.
        path: of the database file.
        is_builder: whether it was opened to write.
        is_immutable: whether SQLite was told that nobody writes.
        openings: how often a file was opened; what was read from an earlier one is of no use any more.
        on_replaced: called after another file was opened; what it raises, the reading statement raises.

    Raises:
        IncompleteIndexError: no build has committed there yet.
        IndexFolderError: not an index, damaged, of a newer format, or everybody may write to it.
    """

    def __init__(self, folder: Path, *, is_builder: bool) -> None:
        self.folder, self.path = folder, folder / "index.db"
        self.is_builder = is_builder
        self._guard = threading.RLock()  # one connection, one transaction: threads take turns
        self._is_closed, self.openings = False, 0
        self.on_replaced: Callable[[], None] = lambda: None
        self._connect()

    def close(self) -> None:
        """Close the connection; what was not committed is lost."""
        with self._guard:
            self._is_closed = True
            self._disconnect()

    # Connecting

    def _connect(self) -> None:
        with self.explained():
            if not self.path.is_file():
                raise nothing_built(self.folder)
            require_trust(self.folder)
            if not self.is_builder and _is_half_made(self.folder):
                raise nothing_built(self.folder)
            self._opened, self._inode = files.stamp(self.path), _inode(self.path)
            is_quiet = not self.is_builder and is_quiet_in(self.folder)
            self.is_immutable = is_quiet and not os.access(self.folder, os.W_OK)
        try:
            self._connect_as("mode=rw" if self.is_builder else "immutable=1" if self.is_immutable else "mode=ro")
        except (IndexFolderError, ResourceError) as error:
            if not is_quiet or self.is_immutable or not _is_refusal(error):
                raise
            self.is_immutable = True  # the disk has no room for the files by which a reader follows a builder
            self._connect_as("immutable=1")
        self._is_counted = True
        self.openings += 1
        with _registry:
            _sessions[self._inode] += 1

    def _follow(self) -> None:
        """Open the file that was put in place of the one that is open, between two transactions of a reader.

        Raises:
            IndexFolderError: there is none, or it is no index; the next statement looks again.
        """
        if self.is_builder or self._is_closed or not self._is_replaced():
            return
        self._disconnect()
        try:
            self._connect()
            self.on_replaced()
        except BaseException:
            self._disconnect()
            self._inode = _NOWHERE
            raise

    def _is_replaced(self) -> bool:
        if self._inode == _NOWHERE:
            return True
        if self.in_transaction:
            return False
        try:
            return (files.stamp(self.path) != self._opened) if self.is_immutable else _inode(self.path) != self._inode
        except OSError:
            return True

    def _disconnect(self) -> None:
        self._connection.close()
        if not self._is_counted:
            return
        self._is_counted = False
        with _registry:
            _sessions[self._inode] -= 1
            if not _sessions[self._inode] and self._inode in _hashed:
                os.close(_hashed.pop(self._inode))

    def _connect_as(self, mode: str) -> None:
        with self.explained():
            self._connection = sqlite3.connect(
                f"{self.path.as_uri()}?{mode}",
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
        is_empty = self._require_format()
        if self.is_builder:
            for pragma in schema.BUILDER_PRAGMAS:
                self._run(pragma)
        if is_empty:
            self._run("BEGIN IMMEDIATE")  # an index exists from the first commit on
            for statement in schema.SCHEMA:
                self._run(statement)

    def _require_format(self) -> bool:
        """Return whether the file is empty, as it may be for a builder; any other is an index of a known format."""
        application, version = self._run("PRAGMA application_id")[0][0], self._run("PRAGMA user_version")[0][0]
        is_empty = not application and not self._run("SELECT 1 FROM sqlite_master LIMIT 1")
        if is_empty and not self.is_builder:
            raise nothing_built(self.folder)
        if not is_empty and application != schema.APPLICATION_ID:
            raise IndexFolderError(f"{self.path} is not an index of gistrag; choose another folder")
        if version > schema.FORMAT_VERSION:
            raise IndexFolderError(
                f"{self.folder} has index format {version}, this gistrag reads up to {schema.FORMAT_VERSION}; "
                "upgrade gistrag, or build into another folder"
            )
        return is_empty

    # Statements and transactions

    def execute(self, statement: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """Return the rows of one statement.

        Raises:
            ResourceError: the disk is full.
            IndexFolderError: SQLite refuses for any other reason, or the index is gone.
        """
        with self._guard:
            self._follow()
            return self._run(statement, values)

    def _run(self, statement: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        with self.explained():
            return self._connection.execute(statement, values).fetchall()

    def values(self, kind: Callable[..., _Row], rows: Iterable[Sequence[Any]]) -> list[_Row]:
        """Return rows as values of the dataclass *kind*.

        Raises:
            IndexFolderError: a column has another type than the field; SQLite does not notice such a damaged page.
        """
        values = [kind(*row) for row in rows]
        if not all(map(is_typed, values)):
            raise self.damaged("a row of other types than were put")
        return values

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Let everything read inside be of one commit, whatever a builder does; other threads wait.

        Inside another snapshot, or in a builder's transaction, it adds nothing.
        """
        with self._guard:
            self._follow()
            if self.in_transaction:
                yield
                return
            self._run("BEGIN")
            try:
                yield
            finally:
                with suppress(sqlite3.Error):  # nothing was written; a failed read may have ended it already
                    self._connection.rollback()

    @property
    def in_transaction(self) -> bool:
        """Whether a snapshot is open, or something was written that is not committed yet."""
        return self._connection.in_transaction

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Make what is written inside one step: all of it joins the transaction, or nothing."""
        with self._guard:
            if not self.in_transaction:
                self.execute("BEGIN IMMEDIATE")
            self.execute("SAVEPOINT step")
            try:
                yield
            except BaseException:
                with suppress(IndexFolderError, ResourceError):  # SQLite may have rolled back by itself
                    self.execute("ROLLBACK TO step")
                    self.execute("RELEASE step")
                raise
            self.execute("RELEASE step")

    def commit(self) -> None:
        """Make all that was written since the last time durable and visible, at once."""
        with self._guard:
            if self.in_transaction:
                self.set("commits", str(self.commits + 1))
                self.execute("COMMIT")

    @property
    def commits(self) -> int:
        """How many commits the index has seen; it tells an older index.db from a newer one."""
        return self.number("commits")

    # The file

    def checkpoint(self) -> bool:
        """Bring all that was committed into index.db itself and return whether the write-ahead log is empty now.

        It is not while a reader is in the middle of a question; it then still holds what was deleted.
        """
        is_busy, *_ = self.execute("PRAGMA wal_checkpoint(TRUNCATE)")[0]
        if is_busy:
            logger.warning("a reader holds the index: what was deleted is in index.db-wal until gistrag gc, or a build")
        return not is_busy

    def sha256(self) -> str:
        """Return the hash of index.db, ``""`` where the write-ahead log holds some of what was committed.

        Inside a snapshot of a reader it is the hash of what the reader sees: an empty log keeps a builder from
        writing into index.db as long as the snapshot lasts.
        """
        with self.explained():
            wal = self.folder / "index.db-wal"
            return "" if wal.exists() and wal.stat().st_size else files.sha256_at(self._descriptor())

    def _descriptor(self) -> int:
        """Return a descriptor of index.db that stays open, see `_hashed`."""
        with _registry:
            if self._inode not in _hashed:
                _hashed[self._inode] = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            return _hashed[self._inode]

    @property
    def size_bytes(self) -> int:
        """Bytes that index.db takes, or will when all that was committed is in it."""
        return int(self.execute("PRAGMA page_count")[0][0]) * int(self.execute("PRAGMA page_size")[0][0])

    def copy_to(self, path: Path) -> None:
        """Replace the pages of the database at *path* by those of this one, in one transaction.

        Inside a snapshot, so that the pages are those of one commit.
        """
        with self._guard, self.explained(), closing(sqlite3.connect(path)) as copied:
            copied.execute("PRAGMA synchronous = FULL")
            self._connection.backup(copied)

    def integrity(self) -> list[str]:
        """Return what SQLite finds wrong in index.db, one line each; nothing for a sound one."""
        return [row[0] for row in self.execute("PRAGMA integrity_check") if row[0] != "ok"]

    # Settings: names with a text

    def get(self, name: str) -> str:
        """Return a setting, ``""`` where it was never set."""
        rows = self.execute("SELECT value FROM settings WHERE name = ?", (name,))
        return str(rows[0][0]) if rows else ""

    def set(self, name: str, value: str) -> None:
        """Record a setting, from the next commit on."""
        with self.writing():
            self.execute("INSERT OR REPLACE INTO settings (name, value) VALUES (?, ?)", (name, value))

    def number(self, name: str) -> int:
        """Return a setting that is a number, 0 where it was never set.

        Raises:
            IndexFolderError: it is no number.
        """
        value = self.get(name) or "0"
        if not value.isdecimal():
            raise self.damaged(f"{name} is {value!r}")
        return int(value)

    def get_sealed(self, name: str) -> dict[str, str]:
        """Return what `set_sealed` recorded, nothing where it never did.

        Raises:
            IndexFolderError: a letter of it was changed.
        """
        seal, _, line = self.get(name).partition(" ")
        with suppress(ValueError, TypeError):
            values: dict[str, str] = json.loads(line or "{}")
            if not line or digest(values) == seal:
                return values
        raise self.damaged(f"{name} differs from its hash")

    def set_sealed(self, name: str, values: dict[str, str]) -> None:
        """Record values with their hash."""
        self.set(name, f"{digest(values)} {json.dumps(values)}")

    # Errors

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an error of SQLite or of the system into one of ours: one line that says where and why."""
        try:
            yield
        except sqlite3.Error as error:
            code = _code(error)
            if code == sqlite3.SQLITE_FULL:
                raise ResourceError(
                    f"no space left for {self.path}; free some and run the same command again, it continues"
                ) from error
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise self.damaged(str(error)) from error
            raise IndexFolderError(
                f"could not use {self.path}: {error}; check the folder and the space left on its disk"
            ) from error
        except UnicodeDecodeError as error:  # Python could not read what SQLite says of it
            raise self.damaged("its schema is no text") from error
        except OSError as error:
            if files.is_shortage(error):
                raise ResourceError(f"could not use {self.path}: {files.shortage(error)}") from error
            raise IndexFolderError(f"could not use {self.path}: {error.strerror}; check the folder") from error
        except UnicodeEncodeError as error:
            raise UsageError(f"half a character, which no index holds: {error.object[:80]!a}") from error
        except OverflowError as error:
            raise UsageError("a number beyond 64 bits; give a smaller one") from error

    def damaged(self, what: str) -> IndexFolderError:
        """Return the error for damage in index.db."""
        return IndexFolderError(f"{self.path} is damaged ({what}); restore it, or remove the folder and build again")


def _inode(path: Path) -> _Inode:
    status = path.stat()
    return status.st_dev, status.st_ino


def nothing_built(folder: Path) -> IncompleteIndexError:
    """Return the error for a folder in which no build has committed."""
    return IncompleteIndexError(f"no index in {folder}, or its first build has not committed yet; run gistrag build")


def is_typed(row: Any) -> bool:
    """Return whether the fields of a dataclass are of the types its class names."""
    types = {"str": str, "int": int, "bool": bool}
    return all(isinstance(getattr(row, field.name), types[str(field.type)]) for field in fields(row))


def is_quiet_in(folder: Path) -> bool:
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
    refusals = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY)
    return _code(error.__cause__) in refusals


def _code(error: BaseException | None) -> int:
    """Return the kind of an error of SQLite, 0 for any other error."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the kind
