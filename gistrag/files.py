"""The only module that changes files of an index folder.

A file is either there whole or not there: bytes go to a temporary name in the same folder, are synced, renamed, and
the folder is synced. Each step is a function of its own, so that a test can record, fail or leave out any of them.

It knows nothing of what the bytes mean; SQLite writes its own file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from gistrag.errors import IndexFolderError, IndexLockedError, ResourceError

TEMPORARY = ".tmp"

Stamp = tuple[int, int, int, int]
"""Size, mtime_ns, ctime_ns and inode: what changes when a file does."""


def write_atomic(path: Path, data: bytes) -> None:
    """Put *data* at *path*, whole and on the disk, or leave what was there.

    Raises:
        ResourceError: the disk is full.
        IndexFolderError: any other refusal of the system.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY}")
    with _explained("write", path):
        try:
            write_new(temporary, data)
            rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Write and sync *data* under a name nobody reads yet, 0600."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_all(descriptor, data)
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of *data*, however little the system takes at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_file(descriptor: int) -> None:
    """Bring the bytes of an open file to the disk."""
    os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Give *old* the name *new*, in one step."""
    old.replace(new)


def remove(path: Path) -> None:
    """Remove a file; one that is not there is fine."""
    with _explained("remove", path), suppress(FileNotFoundError):
        path.unlink()
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder, 0700, and those above it where missing; one that is there stays as it is."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with _explained("make", path), suppress(FileExistsError):
        path.mkdir(0o700)
        sync_folder(path.parent)


def make_private(path: Path) -> None:
    """Make an empty file, 0600; one that is there stays as it is."""
    with _explained("make", path), suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        sync_folder(path.parent)


def read(path: Path) -> bytes:
    """Return the bytes of a file; OSError as the system gives it."""
    return read_stamped(path)[0]


def read_stamped(path: Path) -> tuple[bytes, Stamp]:
    """Return the bytes of a file and the stamp it had when opened.

    Read, never mapped: a file truncated under a mapping kills the process.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        pieces, offset = [], 0
        while piece := os.pread(descriptor, max(status.st_size - offset, 1), offset):
            pieces.append(piece)
            offset += len(piece)
    finally:
        os.close(descriptor)
    return b"".join(pieces), _stamp(status)


def stamp(path: Path) -> Stamp:
    """Return what changes when the file does."""
    return _stamp(path.stat())


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def free_bytes(path: Path) -> int:
    """Return how many bytes fit on the disk that holds *path*, which need not exist yet."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


@contextmanager
def lock(path: Path, *, command: str) -> Iterator[None]:
    """Hold the file *path* locked; the system frees it when the process ends, however it ends.

    The file stays: removing a lock somebody is about to take would let two in.

    Raises:
        IndexLockedError: names who holds it.
        IndexFolderError: the folder cannot be written.
    """
    with _explained("lock", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with _explained("lock", path):
            _take(descriptor, path)
            _sign(descriptor, command)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise IndexLockedError(
            f"{path.parent} is being built by {_holder(path)}; wait until it ends, or stop it"
        ) from None


def _sign(descriptor: int, command: str) -> None:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "start": started, "command": command}
    os.ftruncate(descriptor, 0)
    write_all(descriptor, json.dumps(holder).encode())


def _holder(path: Path) -> str:
    for _ in range(10):  # whoever just took the lock signs it a moment later
        with suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads(read(path))
            return f"process {holder['pid']} on {holder['host']} since {holder['start']} ({holder['command']})"
        time.sleep(0.02)
    return "another process"


@contextmanager
def _explained(verb: str, path: Path) -> Iterator[None]:
    """Turn what the system refuses into one line that says where and why."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"no space left to {verb} {path}; free some and run the same command again, it continues"
            ) from error
        raise IndexFolderError(f"could not {verb} {path}: {error.strerror or error}; check the folder") from error
