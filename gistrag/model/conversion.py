"""What is made of a model once, and kept in the user's cache.

A conversion lies in a folder named by all it was made from. It is written and synced beside that place, and appears
there in one step when it is whole. It lists the hash of every file; one that is damaged is made again. Two processes
that convert at the same time make the same, and what a process that was killed left is removed by the next.

Hashes are remembered while size and times of a file stay the same, so a start costs no reading. A bit that changes
without a trace in the times is found by ``gistrag verify --full``, and when a conversion cannot be loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from gistrag.errors import IndexFolderError, ResourceError
from gistrag.model.hashing import cache_folder, file_sha256, writing
from gistrag.storage import files

logger = logging.getLogger("gistrag")

KINDS = ("models", "cpu", "embedders")
FILES = "files.json"
_SCRATCH, _LOCK = ".converting-", ".lock"
_Loaded = TypeVar("_Loaded")


def named(parts: Sequence[str]) -> str:
    """Return the name of a conversion that depends on *parts*."""
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]


def conversion(kind: str, name: str, make: Callable[[Path], None], *, what: str) -> Path:
    """Return the folder of a conversion, made at the first call.

    Args:
        kind: one of `KINDS`, a folder of the cache; name: says all that the conversion depends on.
        make: writes it into an empty folder.
        what: is converted to what, as a message says it.

    Raises:
        ResourceError: the disk is full; UsageError: the cache cannot be written; and what *make* raises.
    """
    target = cache_folder() / kind / name
    if _is_sound(target):
        _sweep(target.parent)
        return target
    if target.exists():
        reason = "is damaged" if (target / FILES).exists() else "has no list of hashes"
        logger.warning("the conversion in %s %s; converting %s again", target, reason, what)
    else:
        logger.info("converting %s, once", what)
    with scratch(target.parent) as beside:
        if target.exists():
            files.rename(target, beside / "damaged")
            shutil.rmtree(beside / "damaged", ignore_errors=True)
        (beside / "whole").mkdir()
        make(beside / "whole")
        _seal(beside / "whole")
        try:
            files.rename(beside / "whole", target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
        files.sync_folder(target.parent)
    return target


def opened(
    kind: str, name: str, make: Callable[[Path], None], load: Callable[[Path], _Loaded], *, what: str
) -> _Loaded:
    """Return what *load* makes of a conversion, and of one made again where it fails because a file is damaged.

    Raises:
        As for `conversion`, and what *load* raises.
    """
    folder = conversion(kind, name, make, what=what)
    try:
        return load(folder)
    except Exception:
        if _is_sound(folder, anew=True):
            raise
    return load(conversion(kind, name, make, what=what))


def damaged() -> list[Path]:
    """Return the conversions in the cache of which a file differs from its hash; every byte is read."""
    folders = [path.parent for kind in KINDS for path in sorted((cache_folder() / kind).glob(f"[!.]*/{FILES}"))]
    return [folder for folder in folders if not _is_sound(folder, anew=True)]


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Yield an empty folder in *parent*, which is removed at the end, or by the next process if this one is killed.

    Raises:
        As for `gistrag.model.hashing.writing`.
    """
    with writing():
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        folder = parent / f"{_SCRATCH}{secrets.token_hex(8)}"
        with files.lock(_lock_of(folder), command="gistrag", holds=folder):
            try:
                folder.mkdir(0o700)
                yield folder
            finally:
                _remove(folder)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)


def _remove(folder: Path) -> None:
    """Remove a scratch folder and its lock, which whoever calls holds."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        _lock_of(folder).unlink()


def _sweep(parent: Path) -> None:
    """Remove the scratch folders of processes that have ended: their locks are free."""
    for name in {path.name.removesuffix(_LOCK) for path in parent.glob(f"{_SCRATCH}*")}:
        with suppress(IndexFolderError, ResourceError), files.lock(_lock_of(parent / name), command="gistrag"):
            _remove(parent / name)


def _seal(folder: Path) -> None:
    """List the hashes of the files in a folder, and bring all of it to the disk."""
    hashes = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    (folder / FILES).write_text(json.dumps(hashes, indent=1) + "\n", "utf-8")
    for path in folder.iterdir():
        sync(path)
    files.sync_folder(folder)


def sync(path: Path) -> None:
    """Bring the bytes of a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        files.sync_file(descriptor)
    finally:
        os.close(descriptor)


def _is_sound(folder: Path, *, anew: bool = False) -> bool:
    """Return whether every file of a conversion is as it was written; *anew* reads them all."""
    with suppress(OSError, ValueError, AttributeError, TypeError):
        recorded = json.loads((folder / FILES).read_text("utf-8"))
        return bool(recorded) and all(
            file_sha256(folder / name, anew=anew) == sha256 for name, sha256 in recorded.items()
        )
    return False
