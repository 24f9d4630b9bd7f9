"""A file of JSON lines that a kill cannot spoil.

Records are only ever appended, each as one line, and are on the disk when `JsonLines.append` returns. A process that is
killed in the middle of a line leaves half of it; the next one to open the file removes that half. Lines that are no
JSON, such as a remark somebody typed, stay in the file and are passed over.

It knows nothing of what the records mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from gistrag.errors import IndexFolderError, UsageError
from gistrag.storage import files


class JsonLines:
    """A file of JSON lines that one run holds open for writing.

    Whoever holds it also holds ``.NAME.lock`` beside it, which goes when the file is closed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "rows.jsonl"
    >>> with JsonLines(path, command="example") as file:
    ...     file.append({"step": 1}, {"step": 2})
    >>> read(path)
    [{'step': 1}, {'step': 2}]

    Args:
        path: of the file, made where it is missing.
        command: what holds the file, named to whoever is refused.

    Attributes:
        path: of the file.
        records: what the file held when it was opened.

    Raises:
        UsageError: *path* cannot be written.
        IndexLockedError: another run holds the file; the message names it.
        ResourceError: the disk is full.
    """

    def __init__(self, path: Path, *, command: str) -> None:
        self.path = path
        _make(path)
        with ExitStack() as opened:
            opened.enter_context(_lock(path, command))
            self.records = read(path)
            self._cut()
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._opened.close()

    def append(self, *records: Any) -> None:
        """Add records, all on the disk when this returns; after an error the file holds none of them.

        Raises:
            ResourceError: the disk is full.
            IndexFolderError: any other refusal of the system.
        """
        with files.explained("write", self.path):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            size = os.fstat(descriptor).st_size
            try:
                files.write_all(descriptor, encode(records))
                files.sync_file(descriptor)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise
            finally:
                os.close(descriptor)

    def replace(self, records: Iterable[Any]) -> None:
        """Put *records* in place of all there are, in one step; errors as for `append`."""
        files.write_atomic(self.path, encode(records))

    def _cut(self) -> None:
        """Remove a last line that was not written to its end."""
        with files.explained("read", self.path):
            data = files.read(self.path)
            if len(whole := _whole(data)) < len(data):
                os.truncate(self.path, len(whole))


def encode(records: Iterable[Any]) -> bytes:
    """Return records as lines of UTF-8.

    >>> encode([{"a": 1}, [2]]).splitlines()
    [b'{"a": 1}', b'[2]']
    """
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return "".join(lines).encode(errors="replace")  # half a surrogate pair is no text


def read(path: Path) -> list[Any]:
    """Return the records of a file, none where it is missing; a last line without its end is left out."""
    records = []
    with suppress(FileNotFoundError):
        for line in _whole(files.read(path)).splitlines():
            with suppress(ValueError):
                records.append(json.loads(line))
    return records


def _whole(data: bytes) -> bytes:
    """Return the lines that were written to their end."""
    return data[: data.rfind(b"\n") + 1]


def _make(path: Path) -> None:
    """Make the file where it is missing.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        with files.explained("write", path):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666))
    except IndexFolderError as error:
        raise UsageError(f"cannot write {path}: {_reason(error)}; name another file") from error


def _reason(error: IndexFolderError) -> str:
    return getattr(error.__cause__, "strerror", None) or str(error.__cause__)


@contextmanager
def _lock(path: Path, command: str) -> Iterator[None]:
    """Hold the lock of a file, and leave no lock file behind."""
    place = path.with_name(f".{path.name}.lock")
    with files.lock(place, command=command, holds=path):
        try:
            yield
        finally:
            place.unlink(missing_ok=True)
