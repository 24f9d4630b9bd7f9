"""Simulated power loss: from a log of file operations, every folder that a disk could leave behind.

What was synced stays. Of other bytes a disk may lose all, keep the length and lose the content, keep a part, or keep
all. Independently of that, it may or may not have recorded the names that a folder got or lost. A simulated crash is a
prefix of the log, one choice for the bytes and one for the names.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from support.io_trace import Operation

Bytes = Literal["lost", "zeroed", "half", "kept", "late half"]
Names = Literal["lost", "kept"]
CHOICES: tuple[tuple[Bytes, Names], ...] = tuple(itertools.product(get_args(Bytes), get_args(Names)))

Image = dict[str, bytes | None]
"""A folder: the bytes of its files by path, None for a folder."""


@dataclass
class _File:
    """The synced bytes of a file, and the operations since."""

    durable: bytes = b""
    pending: list[Operation] = field(default_factory=list)

    def sync(self) -> None:
        self.durable, self.pending = self.after("kept"), []

    def after(self, choice: Bytes) -> bytes:
        """Return the bytes that a crash leaves."""
        data = bytearray(self.durable)
        for operation in _survivors(self.pending, choice):
            if operation.kind == "truncate":
                del data[operation.offset :]
                data.extend(bytes(operation.offset - len(data)))
            else:
                end = operation.offset + len(operation.data)
                data.extend(bytes(max(0, end - len(data))))
                data[operation.offset : end] = operation.data
        return bytes(data)


def _survivors(pending: list[Operation], choice: Bytes) -> Iterator[Operation]:
    """Yield the unsynced operations of a file that a crash keeps, in the way it keeps them."""
    writes = [operation for operation in pending if operation.kind == "write"]
    half = sum(len(operation.data) for operation in writes) // 2
    done = 0
    for operation in pending:
        size = len(operation.data)
        if operation.kind == "truncate":
            if choice in ("kept", "zeroed", "late half"):
                yield operation
        elif choice == "kept":
            yield operation
        elif choice == "zeroed":
            yield Operation("write", operation.path, operation.offset, bytes(size))
        elif choice == "half" and done < half:
            yield Operation("write", operation.path, operation.offset, operation.data[: half - done])
        elif choice == "late half" and done + size > half:
            lost = max(0, half - done)
            yield Operation("write", operation.path, operation.offset + lost, operation.data[lost:])
        done += size


class Disk:
    """The folder as operations change it; ``None`` in the names stands for a folder."""

    def __init__(self) -> None:
        self._live: dict[str, _File | None] = {".": None}
        self._durable: dict[str, _File | None] = {".": None}

    def do(self, operation: Operation) -> None:
        """Apply an operation."""
        path, live = operation.path, self._live
        file = live.get(path)
        match operation.kind:
            case "create":
                live[path] = _File()
            case "make folder":
                live[path] = None
            case "rename":
                live[operation.target] = live.pop(path)
            case "remove":
                live.pop(path, None)
            case "sync folder":
                self._sync_names(path)
            case "sync" if file:
                file.sync()
            case "write" | "truncate" if file:
                file.pending.append(operation)

    def _sync_names(self, folder: str) -> None:
        inside = {path for path in {*self._live, *self._durable} if path != "." and str(Path(path).parent) == folder}
        for path in inside:
            if path in self._live:
                self._durable[path] = self._live[path]
            else:
                del self._durable[path]

    def crash(self, data: Bytes, names: Names) -> Image:
        """Return the folder after power is lost now."""
        entries = self._live if names == "kept" else self._durable
        image: Image = {}
        for path in sorted(entries, key=lambda path: len(Path(path).parts)):
            file, parent = entries[path], str(Path(path).parent)
            if path == "." or parent in image or parent == ".":  # what is in a lost folder is lost
                image[path] = None if file is None else file.after(data)
        return image


def write_image(image: Image, folder: Path) -> None:
    """Put a crashed folder on the real disk."""
    for path, data in image.items():
        if data is None:
            (folder / path).mkdir(mode=0o700, parents=True, exist_ok=True)
        else:
            (folder / path).write_bytes(data)
            (folder / path).chmod(0o600)
