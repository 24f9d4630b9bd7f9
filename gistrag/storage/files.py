"""The only module that changes files of an index folder.

A file is either there whole or not there: bytes go to a temporary name in the same folder, are synced, renamed, and
the folder is synced. Each step is a function of its own, so that a test can record, fail or leave out any of them.

It knows nothing of what the bytes mean; SQLite writes its own file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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
    with explained("write", path):
        try:
            write_new(temporary, data)
            rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Write and sync *data* under a name nobody reads yet, 0600; a link of that name is refused."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
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
    with explained("remove", path), suppress(FileNotFoundError):
        path.unlink()
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder, 0700, and those above it where missing; one that is there stays as it is."""
    with explained("make", path):
        if path.is_dir():
            return
    make_folder(path.parent)
    with explained("make", path), suppress(FileExistsError):
        path.mkdir(0o700)
        sync_folder(path.parent)


def make_private(path: Path) -> None:
    """Make an empty file, 0600; one that is there stays as it is."""
    with explained("make", path), suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        sync_folder(path.parent)


def read(path: Path, *, bytes_max: int | None = None) -> bytes:
    """Return the bytes of a file; OSError as the system gives it, EFBIG for one that holds more than *bytes_max*."""
    return read_stamped(path, bytes_max=bytes_max)[0]


def read_stamped(path: Path, *, bytes_max: int | None = None) -> tuple[bytes, Stamp]:
    """Return the bytes of a file and the stamp it had when opened; errors as for `read`.

    Read, never mapped: a file truncated under a mapping kills the process.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe of that name is not waited for
    try:
        status = os.fstat(descriptor)
        if (
            bytes_max is not None and status.st_size > bytes_max
        ):  # a sparse file of a terabyte would not fit into memory
            raise OSError(errno.EFBIG, f"holds {status.st_size:,} bytes, at most {bytes_max:,} expected")
        pieces, offset = [], 0
        while piece := os.pread(descriptor, max(status.st_size - offset, 1), offset):
            pieces.append(piece)
            offset += len(piece)
    finally:
        os.close(descriptor)
    return b"".join(pieces), _stamp(status)


def sha256(path: Path) -> str:
    """Return the hex hash of a file of any size; OSError as the system gives it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_at(descriptor: int) -> str:
    """Return the hex hash of an open file, which stays open; OSError as the system gives it."""
    found, offset = hashlib.sha256(), 0
    while piece := os.pread(descriptor, 2**20, offset):
        found.update(piece)
        offset += len(piece)
    return found.hexdigest()


def stamp(path: Path) -> Stamp:
    """Return what changes when the file does."""
    return _stamp(path.stat())


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def writers(path: Path) -> str:
    """Return who may change *path* besides this user and root: nobody ``""``, a user, a group, or ``"everybody"``.

    A group with the number of the owner is the owner's own. Root trusts every owner: in a container the user who owns
    a mounted folder is a number from outside.
    """
    status, user = path.stat(), os.geteuid()
    if status.st_mode & stat.S_IWOTH:
        return "everybody"
    if user and status.st_uid not in (0, user):
        return f"user {status.st_uid}"
    if status.st_mode & stat.S_IWGRP and status.st_gid not in (0, status.st_uid):
        return f"group {status.st_gid}"
    return ""


def is_shortage(error: BaseException | None) -> bool:
    """Return whether the system refused for want of descriptors or memory, whatever is in the file."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def shortage(error: BaseException) -> str:
    """Return what is short, and what to do."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{os.strerror(error.errno).lower()}; close some, or raise the limit with `ulimit -n`"
    return "not enough memory; free some"


def exists(path: Path) -> bool:
    """Return whether something is at *path*."""
    with explained("look at", path):
        return path.exists()


def free_bytes(path: Path) -> int:
    """Return how many bytes fit on the disk that holds *path*, which need not exist yet."""
    with explained("look at", path):
        while not path.exists():
            path = path.absolute().parent
        return shutil.disk_usage(path).free


@contextmanager
def lock(path: Path, *, command: str, holds: Path | None = None) -> Iterator[Callable[[], None]]:
    """Hold the file *path* locked; the system frees it when the process ends, however it ends.

    What is yielded returns as long as the lock holds, and raises IndexLockedError when its file was removed.

    Whoever holds it may remove the file. A link of that name is refused, since signing the lock would empty what it
    points to.

    Args:
        path: of the lock file, made where it is missing; it stays.
        command: named to whoever is refused.
        holds: what the lock protects; by default the folder it lies in.

    Raises:
        IndexLockedError: another run holds it; the message names process and command.
        IndexFolderError: the folder cannot be written.
    """
    with explained("lock", path):
        descriptor = _take(path, holds or path.parent)
    try:
        with explained("lock", path):
            _sign(descriptor, command)
        yield lambda: _require_held(descriptor, path, holds or path.parent)
    finally:
        os.close(descriptor)


def _take(path: Path, holds: Path) -> int:
    """Return the descriptor of the locked file; one whose name was removed before it was locked does not count."""
    while True:
        with ExitStack() as opened:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            opened.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                told = f"{holds} is in use by {_holder(path)}; wait until it ends, or stop it"
                raise IndexLockedError(told) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(descriptor)):
                    opened.pop_all()
                    return descriptor


def _require_held(descriptor: int, path: Path, holds: Path) -> None:
    with explained("look at", path), suppress(FileNotFoundError):
        if os.path.samestat(path.stat(), os.fstat(descriptor)):
            return
    by = f"{_holder(path)} holds it now" if path.exists() else "nobody holds it now"
    raise IndexLockedError(
        f"{path} was removed while {holds} was in use, {by}; what was committed stands, run the same command again"
    )


def _sign(descriptor: int, command: str) -> None:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "start": started, "command": command}
    os.ftruncate(descriptor, 0)
    write_all(descriptor, json.dumps(holder).encode())


def _holder(path: Path) -> str:
    for _ in range(10):  # whoever just took the lock signs it a moment later
        with suppress(OSError, ValueError, KeyError, TypeError):
            holder = json.loads(read(path, bytes_max=4096))
            return f"process {holder['pid']} on {holder['host']} since {holder['start']} ({holder['command']})"
        time.sleep(0.02)
    return "another process"


@contextmanager
def explained(verb: str, path: Path) -> Iterator[None]:
    """Turn what the system refuses into one line that says where and why."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"no space left to {verb} {path}; free some and run the same command again, it continues"
            ) from error
        if is_shortage(error):
            raise ResourceError(f"could not {verb} {path}: {shortage(error)}") from error
        raise IndexFolderError(f"could not {verb} {path}: {error.strerror or error}; check the folder") from error
