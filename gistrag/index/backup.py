"""Copying an index as of one moment, also while a build is at work.

Copying the folder file by file would not do: gists come and go and index.db changes meanwhile. Here the order is that
of a build. The gist files of one snapshot reach the disk first, then the pages of that snapshot replace those of the
copy in one transaction. A copy that is stopped leaves the earlier one as it was; the same call continues it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gistrag.errors import (
    CorruptGistError,
    GistNotFoundError,
    IncompleteIndexError,
    IndexLockedError,
    ResourceError,
    UsageError,
)
from gistrag.index.integrity import collect, is_by_a_build
from gistrag.index.schema import GistRow
from gistrag.index.store import Store
from gistrag.progress import megabytes
from gistrag.storage import files

ATTEMPTS = 5
UNFINISHED = frozenset({"lock", "gists", "index.db", "index.db-journal", "index.db-wal", "index.db-shm"})
"""Names in a first copy that was stopped, besides those that a build gives."""


@dataclass(kw_only=True)
class Copied:
    """What a backup did.

    Attributes:
        gists: gist files that were copied; bytes: their size.
        kept: gist files that were in the copy already.
        damaged: a line for each gist file that is not what the index records; these were left out.
    """

    gists: int = 0
    kept: int = 0
    bytes: int = 0
    damaged: list[str] = field(default_factory=list)


def copy(store: Store, destination: str | Path) -> Copied:
    """Copy an index that is open for reading, as of one commit, and return what was copied.

    Raises:
        UsageError: something else is at *destination*.
        ResourceError: the disk there is too small; nothing was copied.
        IndexLockedError: another backup is at work there, or builds removed what was being copied again and again.
    """
    target = Path(destination).absolute()
    _require_place(store, target)
    _require_room(store, target)
    files.make_folder(target)
    with files.lock(target / "lock", command="gistrag backup"):
        work = _Copy(store, target)
        work.gists()  # most of the work, without holding a snapshot
        work.snapshot()
    with Store.build(target, command="gistrag backup") as copied:
        collect(copied)
    return work.done


class _Copy:
    """One copy in the making.

    Attributes:
        done: what was copied so far.
    """

    def __init__(self, store: Store, target: Path) -> None:
        self.done = Copied()
        self._store, self._target = store, target
        self._sound: set[tuple[str, str]] = set()  # key and hash of what the copy holds

    def snapshot(self) -> None:
        """Copy the gists of one commit that are not there yet, then its vectors and its database.

        A file that is gone was removed by a build, whose newer commit names it no more; or it is missing indeed.
        """
        missing: set[str] = set()
        for _ in range(ATTEMPTS):
            with self._store.snapshot():
                found = self.gists()
                if found <= missing:
                    put_database(self._store, self._target)
                    return
                missing = found
        raise IndexLockedError(
            f"builds of {self._store.folder} removed files faster than they were copied; run the same command again "
            "when they have ended"
        )

    def gists(self) -> set[str]:
        """Copy the gist files that the copy does not hold yet and return the keys of those that are not there."""
        rows = self._store.gists.rows()
        self.done.damaged, missing = [], set()
        for row in rows:
            try:
                self._copy(row)
            except GistNotFoundError as error:
                missing.add(row.key)
                self.done.damaged.append(str(error).partition(";")[0])
            except CorruptGistError as error:
                self.done.damaged.append(str(error).partition(";")[0])
        self.done.kept = len(rows) - self.done.gists - len(self.done.damaged)
        return missing

    def _copy(self, row: GistRow) -> None:
        place = self._target / self._store.gists.path(row.key).relative_to(self._store.folder)
        if (row.key, row.sha256) in self._sound:
            return
        if not _is(place, row.sha256):
            data = self._store.gists.read(row)
            files.make_folder(place.parent)
            files.write_atomic(place, data)
            self.done.gists += 1
            self.done.bytes += len(data)
        self._sound.add((row.key, row.sha256))


def _is(path: Path, sha256: str) -> bool:
    """Return whether a file is there and has this hash."""
    try:
        return files.sha256(path) == sha256
    except OSError:
        return False


def _require_place(store: Store, target: Path) -> None:
    """Return if *target* is free, or holds an earlier copy of the same index.

    Raises:
        UsageError: it holds something else, or lies in the index itself.
    """
    if target.resolve().is_relative_to(store.folder.resolve()):
        raise UsageError(f"expected a folder outside {store.folder} for the copy, got {target}")
    if not target.exists():
        return
    found = {path.name for path in target.iterdir()} if target.is_dir() else {target.name}
    is_unfinished = all(name in UNFINISHED or is_by_a_build(name) for name in found)
    if is_unfinished and not (target / "index.db").is_file():
        return  # empty, or a first copy that was stopped
    try:
        with Store.open(target) as copied:
            is_same = copied.config.salt == store.config.salt
    except IncompleteIndexError:
        is_same = is_unfinished
    if not is_same:
        raise UsageError(f"expected nothing or an earlier copy of {store.folder} at {target}, found something else")


def _require_room(store: Store, target: Path) -> None:
    """Return if the disk of *target* can hold what is not there yet.

    Raises:
        ResourceError: with both numbers.
    """
    folders = {row: target / store.gists.path(row.key).relative_to(store.folder) for row in store.gists.rows()}
    needed = sum(row.size for row, place in folders.items() if not place.exists()) + store.database.size_bytes
    if needed > (free := files.free_bytes(target)):
        raise ResourceError(
            f"the copy needs {needed:,} bytes ({megabytes(needed)}), {target} has {free:,} ({megabytes(free)}) free; "
            "free some, or name a folder on another disk"
        )


def put_database(store: Store, folder: Path) -> None:
    """Put the vector file and the database of this snapshot in *folder*, in one step in place of what is there.

    The gists must be there already.
    """
    record = store.vectors.file()
    if record and (data := store.vectors.read_file(record)) is not None:
        files.write_atomic(folder / store.vectors.path(record).name, data)
    files.make_private(folder / "index.db")
    store.database.copy_to(folder / "index.db")
    files.sync_folder(folder)  # SQLite does not wait for its journal to be gone
