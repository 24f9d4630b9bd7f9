"""`gistrag backup`: a copy of an index that is whole, also while a build is at work.

Copying the folder file by file would not do: gists come and go and index.db changes meanwhile. Here the order is that
of a build. The gist files of one snapshot reach the disk first, then the pages of that snapshot replace those of the
copy in one transaction. A copy that is stopped leaves the earlier one as it was; the same command goes on with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gistrag.cli import command
from gistrag.errors import (
    CorruptGistError,
    GistNotFoundError,
    IncompleteIndexError,
    IndexLockedError,
    ResourceError,
    UsageError,
)
from gistrag.progress import megabytes
from gistrag.storage import files

if TYPE_CHECKING:
    from gistrag.index.schema import GistRow
    from gistrag.index.store import Store

DAMAGED = 4
ATTEMPTS = 5
UNFINISHED = frozenset({"lock", "gists", "index.db", "index.db-journal", "index.db-wal", "index.db-shm"})
"""Names in a first copy that was stopped, besides those that a build gives."""

app = command.application()


@dataclass(kw_only=True)
class Copied:
    """What a backup did.

    Attributes:
        gists: files copied; kept: files that were in the copy already; bytes: of those that were copied.
        damaged: files that are not what the index records, which were left out.
    """

    gists: int = 0
    kept: int = 0
    bytes: int = 0
    damaged: list[str] = field(default_factory=list)


@app.command("backup", epilog=command.examples("gistrag backup /mnt/disk/index", "gistrag backup copy/ --index notes/"))
def backup(
    destination: Annotated[
        Path, typer.Argument(metavar="DEST", help="Folder of the copy: none yet, empty, or an earlier copy.")
    ],
    index: command.Index = command.INDEX,
    as_json: command.Json = False,
    quiet: command.Quiet = False,
    debug: command.Debug = False,
) -> int:
    """Copy an index as of one moment, while it is used and built.

    A second copy to the same place takes only what is new. Ends with code 4 if a damaged gist was left out.
    """
    from gistrag.index.store import Store

    with Store.open(index) as store:
        done = copy(store, destination)
    if as_json:
        command.print_json({"index": str(index), "destination": str(destination), **asdict(done)})
    else:
        print("\n".join([*(f"damaged: {line}" for line in done.damaged), _line(done, destination)]))
    return DAMAGED if done.damaged else 0


def copy(store: Store, destination: str | Path) -> Copied:
    """Copy an index that is open for reading, as of one commit, and return what was copied.

    Raises:
        UsageError: something else is at *destination*.
        ResourceError: the disk there is too small; nothing was copied.
        IndexLockedError: another backup is at work there, or builds removed what was being copied again and again.
    """
    from gistrag.index import manifest
    from gistrag.index.store import Store

    target = Path(destination).absolute()
    _require_place(store, target)
    _require_room(store, target)
    files.make_folder(target)
    with files.lock(target / "lock", command="gistrag backup"):
        work = _Copy(store, target)
        work.gists()  # most of the work, without holding a snapshot
        work.snapshot()
    with Store.build(target, command="gistrag backup") as copied:
        copied.gc()
        manifest.write(copied)
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
                    self._store.copy_to(self._target)
                    return
                missing = found
        raise IndexLockedError(
            f"builds of {self._store.folder} removed files faster than they were copied; run the same command again "
            "when they have ended"
        )

    def gists(self) -> set[str]:
        """Copy the gist files that the copy does not hold yet and return the keys of those that are not there."""
        rows = self._store.gist_rows()
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
        place = self._target / self._store.gist_path(row.key).relative_to(self._store.folder)
        if (row.key, row.sha256) in self._sound:
            return
        if not _is(place, row.sha256):
            data = self._store.gist_bytes(row)
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
    from gistrag.index.store import Store, is_by_a_build

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
            is_same = copied.salt == store.salt
    except IncompleteIndexError:
        is_same = is_unfinished
    if not is_same:
        raise UsageError(f"expected nothing or an earlier copy of {store.folder} at {target}, found something else")


def _require_room(store: Store, target: Path) -> None:
    """Return if the disk of *target* can hold what is not there yet.

    Raises:
        ResourceError: with both numbers.
    """
    folders = {row: target / store.gist_path(row.key).relative_to(store.folder) for row in store.gist_rows()}
    needed = sum(row.size for row, place in folders.items() if not place.exists()) + store.database_bytes
    if needed > (free := files.free_bytes(target)):
        raise ResourceError(
            f"the copy needs {needed:,} bytes ({megabytes(needed)}), {target} has {free:,} ({megabytes(free)}) free; "
            "free some, or name a folder on another disk"
        )


def _line(done: Copied, destination: Path) -> str:
    copied = f"{done.gists:,} gist files copied ({megabytes(done.bytes)})"
    return f"{destination}: {copied}, {done.kept:,} were there already"


def main(argv: Sequence[str] | None = None) -> int:
    """Copy an index and return the exit code."""
    return command.run(app, argv, program="gistrag backup")


if __name__ == "__main__":
    sys.exit(main())
