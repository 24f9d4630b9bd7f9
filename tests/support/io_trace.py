"""Observe, or refuse, every operation of Python and of SQLite on the files of a folder.

Python's operations go through the functions of ``os``, which `watched` replaces. SQLite's go through a VFS,
https://www.sqlite.org/vfs.html, made here with ctypes: the real one of the system, with `Watch` in front of the
methods that read, write, truncate, sync, open and remove. So the code under test is the shipped code, unchanged.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

Kind = Literal[
    "open", "create", "read", "write", "truncate", "sync", "rename", "remove", "make folder", "sync folder", "look"
]


@dataclass(frozen=True)
class Operation:
    """One thing done to a file.

    Attributes:
        path: relative to the watched folder, ``"."`` for the folder itself.
        target: new path of a rename.
        offset: where bytes are written, or the size a file is truncated to.
        data: the bytes written.
        by: who asked for it.
    """

    kind: Kind
    path: str
    offset: int = 0
    data: bytes = b""
    target: str = ""
    by: Literal["python", "sqlite"] = "python"

    @property
    def changes(self) -> bool:
        """Whether the operation changes the disk, or makes a change durable."""
        return self.kind not in ("open", "read", "look")


class ShortWrite(Exception):
    """Raised by an observer to let the system take only half of the bytes."""


class Watch:
    """What happens to the files of a folder.

    Args:
        folder: watched at every depth.
        before: called with each operation before it is done; the program gets the OSError it raises.
        after: called with each operation that was done.
    """

    def __init__(
        self,
        folder: Path,
        *,
        before: Callable[[Operation], None] = lambda operation: None,
        after: Callable[[Operation], None] = lambda operation: None,
    ) -> None:
        self.folder = folder.resolve()
        self.before, self.after = before, after

    def relative(self, path: Any) -> str | None:
        """Return *path* relative to the watched folder, None for one outside it."""
        with suppress(TypeError, ValueError):
            return str(Path(os.fsdecode(path)).absolute().relative_to(self.folder))
        return None


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Let *watch* observe all operations of the block; close databases inside the block that opened them."""
    with pytest.MonkeyPatch.context() as patch:
        _watch_python(watch, patch)
        with _sqlite_watched(watch):
            yield


# Python


def _watch_python(watch: Watch, patch: pytest.MonkeyPatch) -> None:
    """Put *watch* in front of the functions of ``os`` that an index uses."""
    real = {name: getattr(os, name) for name in ("open", "close", "write", "pread", "fsync", "ftruncate", "lseek")}
    paths: dict[int, str] = {}  # of open descriptors

    def open_(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        inner = watch.relative(path)
        if inner is None:
            return int(real["open"](path, flags, *rest, **options))
        kind: Kind = "create" if flags & os.O_CREAT and not os.path.lexists(path) else "open"
        operation = Operation(kind, inner)
        watch.before(operation)
        descriptor = int(real["open"](path, flags, *rest, **options))
        paths[descriptor] = inner
        watch.after(operation)
        if flags & os.O_TRUNC and kind == "open":
            watch.after(Operation("truncate", inner))
        return descriptor

    def close(descriptor: int) -> None:
        paths.pop(descriptor, None)
        real["close"](descriptor)

    def on_descriptor(kind: Kind, name: str, place: Callable[..., tuple[int, bytes]]) -> Callable[..., Any]:
        def call(descriptor: int, *rest: Any) -> Any:
            if descriptor not in paths:
                return real[name](descriptor, *rest)
            offset, data = place(descriptor, *rest)
            path = paths[descriptor]
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            sort: Kind = "sync folder" if kind == "sync" and is_folder else kind
            operation = Operation(sort, path, offset, data)
            try:
                watch.before(operation)
            except ShortWrite:
                operation = Operation(sort, path, offset, data[: max(1, len(data) // 2)])
                rest = (operation.data,)
            result = real[name](descriptor, *rest)
            watch.after(operation)
            return result

        return call

    def where(descriptor: int, data: Any) -> tuple[int, bytes]:
        return real["lseek"](descriptor, 0, os.SEEK_CUR), bytes(data)

    patch.setattr(os, "open", open_)
    patch.setattr(os, "close", close)
    patch.setattr(os, "write", on_descriptor("write", "write", where))
    patch.setattr(os, "pread", on_descriptor("read", "pread", lambda *_: (0, b"")))
    patch.setattr(os, "fsync", on_descriptor("sync", "fsync", lambda *_: (0, b"")))
    patch.setattr(os, "ftruncate", on_descriptor("truncate", "ftruncate", lambda _, size: (size, b"")))
    by_path: tuple[tuple[str, Kind], ...] = (
        ("replace", "rename"), ("unlink", "remove"), ("mkdir", "make folder"), ("scandir", "look"), ("listdir", "look"),
        ("stat", "look"),
    )  # fmt: skip
    for name, kind in by_path:
        patch.setattr(os, name, _on_path(watch, kind, getattr(os, name)))


def _on_path(watch: Watch, kind: Kind, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any = ".", *rest: Any, **options: Any) -> Any:
        inner = None if isinstance(path, int) else watch.relative(path)
        if inner is None:
            return real(path, *rest, **options)
        operation = Operation(kind, inner, target=(watch.relative(rest[0]) or "") if kind == "rename" else "")
        watch.before(operation)
        result = real(path, *rest, **options)
        watch.after(operation)
        return result

    return call


# SQLite

_FULL, _CANTOPEN = 13, 14
_FAILED = {"read": 266, "write": 778, "sync": 1034, "truncate": 1546, "remove": 2570}  # SQLITE_IOERR_…
_OPEN_CREATE, _JOURNALS = 0x4, 0x4800 | 0x80000  # main journal, super journal, write-ahead log

_POINTER = ctypes.c_void_p
_METHODS = {
    "xRead": ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER, ctypes.c_int, ctypes.c_int64),
    "xWrite": ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER, ctypes.c_int, ctypes.c_int64),
    "xTruncate": ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, ctypes.c_int64),
    "xSync": ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, ctypes.c_int),
    "xShmMap": ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, ctypes.c_int, ctypes.c_int, ctypes.c_int, _POINTER),
}
_OPEN = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, _POINTER, _POINTER, ctypes.c_int, _POINTER)
_DELETE = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, ctypes.c_char_p, ctypes.c_int)


class _IoMethods(ctypes.Structure):
    _fields_ = (
        ("iVersion", ctypes.c_int),
        *(
            (name, _POINTER)
            for name in (
                "xClose", "xRead", "xWrite", "xTruncate", "xSync", "xFileSize", "xLock", "xUnlock",
                "xCheckReservedLock", "xFileControl", "xSectorSize", "xDeviceCharacteristics", "xShmMap", "xShmLock",
                "xShmBarrier", "xShmUnmap", "xFetch", "xUnfetch",
            )
        ),
    )  # fmt: skip


class _File(ctypes.Structure):
    _fields_ = (("pMethods", ctypes.POINTER(_IoMethods)),)


class _Vfs(ctypes.Structure):
    _fields_ = (
        ("iVersion", ctypes.c_int),
        ("szOsFile", ctypes.c_int),
        ("mxPathname", ctypes.c_int),
        ("pNext", _POINTER),
        ("zName", ctypes.c_char_p),
        ("pAppData", _POINTER),
        ("xOpen", _POINTER),
        ("xDelete", _POINTER),
        *((name, _POINTER) for name in ("xAccess", "xFullPathname", "xDlOpen", "xDlError", "xDlSym", "xDlClose")),
        *((name, _POINTER) for name in ("xRandomness", "xSleep", "xCurrentTime", "xGetLastError")),
        *((name, _POINTER) for name in ("xCurrentTimeInt64", "xSetSystemCall", "xGetSystemCall", "xNextSystemCall")),
    )


_kept: list[Any] = []
"""What SQLite holds pointers to, for as long as the process lives."""


def _library() -> Any:
    """Return the SQLite that Python itself uses."""
    library = ctypes.CDLL(_sqlite3.__file__)
    library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
    library.sqlite3_vfs_register.argtypes = [ctypes.POINTER(_Vfs), ctypes.c_int]
    library.sqlite3_vfs_unregister.argtypes = [ctypes.POINTER(_Vfs)]
    return library


@contextmanager
def _sqlite_watched(watch: Watch) -> Iterator[None]:
    """Make a VFS that asks *watch* the default one for a while."""
    try:
        library = _library()
        real = library.sqlite3_vfs_find(None)
    except (OSError, AttributeError) as error:
        pytest.skip(f"this Python does not show its SQLite: {error}")
    vfs = _Vfs.from_buffer_copy(real.contents)
    shim = _Shim(watch, real)
    vfs.zName = f"watched-{id(shim)}".encode()
    vfs.pNext = None
    vfs.xOpen, vfs.xDelete = (ctypes.cast(call, _POINTER) for call in (shim.open, shim.delete))
    _kept.extend((vfs, shim))
    library.sqlite3_vfs_register(ctypes.byref(vfs), 1)
    try:
        yield
    finally:
        library.sqlite3_vfs_unregister(ctypes.byref(vfs))
        library.sqlite3_vfs_register(real, 1)


class _Shim:
    """The functions that stand in front of the real VFS."""

    def __init__(self, watch: Watch, real: Any) -> None:
        self._watch, self._vfs = watch, real
        self._paths: dict[int, str] = {}  # by the address of SQLite's file object
        self._unlisted: set[str] = set()  # files whose folder SQLite syncs with their next sync
        self._methods: dict[int, tuple[Any, dict[str, Any]]] = {}  # by the address of the real ones
        self._of_file: dict[int, dict[str, Any]] = {}
        self.open, self.delete = _OPEN(self._open), _DELETE(self._delete)
        self._calls = {
            "xRead": _METHODS["xRead"](self._read),
            "xWrite": _METHODS["xWrite"](self._write),
            "xTruncate": _METHODS["xTruncate"](self._truncate),
            "xSync": _METHODS["xSync"](self._sync),
            "xShmMap": _METHODS["xShmMap"](self._map),
        }

    def _open(self, vfs: Any, name: int | None, file: int, flags: int, out: Any) -> int:
        real = _OPEN(self._vfs.contents.xOpen)  # keeps the pointer to the name, so it gets the very one
        address = ctypes.cast(self._vfs, _POINTER)
        path = self._watch.relative(ctypes.string_at(name)) if name else None
        if path is None:
            return int(real(address, name, file, flags, out))
        exists = os.path.lexists(self._watch.folder / path)
        kind: Kind = "create" if flags & _OPEN_CREATE and not exists else "open"
        operation = Operation(kind, path, by="sqlite")
        if refused := self._refused(operation):
            _File.from_address(file).pMethods = None
            return refused
        code = int(real(address, name, file, flags, out))
        if code == 0:
            self._stand_before(file)
            self._paths[file] = path
            if flags & _JOURNALS and flags & _OPEN_CREATE:
                self._unlisted.add(path)
            self._watch.after(operation)
        return code

    def _stand_before(self, file: int) -> None:
        opened = _File.from_address(file)
        address = ctypes.cast(opened.pMethods, _POINTER).value or 0
        if address not in self._methods:
            version = opened.pMethods.contents.iVersion
            size = getattr(_IoMethods, {1: "xShmMap", 2: "xFetch"}[version]).offset if version < 3 else None
            copy = _IoMethods()
            ctypes.memmove(ctypes.byref(copy), address, size or ctypes.sizeof(_IoMethods))
            former = {
                name: prototype(getattr(copy, name)) for name, prototype in _METHODS.items() if getattr(copy, name)
            }
            for name, call in self._calls.items():
                if name in former:
                    setattr(copy, name, ctypes.cast(call, _POINTER))
            self._methods[address] = copy, former
        copy, self._of_file[file] = self._methods[address]
        opened.pMethods = ctypes.pointer(copy)

    def _delete(self, vfs: Any, name: bytes, syncs_folder: int) -> int:
        path = self._watch.relative(name)
        operation = Operation("remove", path or "", by="sqlite")
        if path is not None and (refused := self._refused(operation)):
            return refused
        code = int(_DELETE(self._vfs.contents.xDelete)(ctypes.cast(self._vfs, _POINTER), name, syncs_folder))
        if path is not None and code == 0:
            self._watch.after(operation)
            if syncs_folder:
                self._watch.after(Operation("sync folder", str(Path(path).parent), by="sqlite"))
        return code

    def _read(self, file: int, buffer: int, count: int, offset: int) -> int:
        return self._refused(Operation("read", self._paths[file], by="sqlite")) or int(
            self._of_file[file]["xRead"](file, buffer, count, offset)
        )

    def _write(self, file: int, buffer: int, count: int, offset: int) -> int:
        data = ctypes.string_at(buffer, count)
        operation = Operation("write", self._paths[file], offset, data, by="sqlite")
        try:
            refused = self._refused(operation)
        except ShortWrite:
            half = Operation("write", self._paths[file], offset, data[: count // 2], by="sqlite")
            self._of_file[file]["xWrite"](file, buffer, count // 2, offset)
            self._watch.after(half)
            return _FULL  # as SQLite's own VFS calls it
        return refused or self._done("xWrite", operation, file, buffer, count, offset)

    def _truncate(self, file: int, size: int) -> int:
        operation = Operation("truncate", self._paths[file], size, by="sqlite")
        return self._refused(operation) or self._done("xTruncate", operation, file, size)

    def _sync(self, file: int, flags: int) -> int:
        path = self._paths[file]
        operation = Operation("sync", path, by="sqlite")
        if code := self._refused(operation) or self._done("xSync", operation, file, flags):
            return code
        if path in self._unlisted:
            self._unlisted.remove(path)
            self._watch.after(Operation("sync folder", str(Path(path).parent), by="sqlite"))
        return 0

    def _map(self, file: int, region: int, size: int, extends: int, address: int) -> int:
        """Map the memory that readers and builders share; what is in it never outlives them, so it is not recorded."""
        path = self._paths[file] + "-shm"
        kind: Kind = "open" if os.path.lexists(self._watch.folder / path) else "create"
        return self._refused(Operation(kind, path, by="sqlite")) or int(
            self._of_file[file]["xShmMap"](file, region, size, extends, address)
        )

    def _done(self, name: str, operation: Operation, file: int, *rest: int) -> int:
        code = int(self._of_file[file][name](file, *rest))
        if code == 0:
            self._watch.after(operation)
        return code

    def _refused(self, operation: Operation) -> int:
        """Return SQLite's number for what *before* raises, 0 where it agrees."""
        try:
            self._watch.before(operation)
        except OSError as error:
            if operation.kind in ("open", "create"):
                return _CANTOPEN
            return _FULL if error.errno == errno.ENOSPC and operation.kind == "write" else _FAILED[operation.kind]
        return 0
