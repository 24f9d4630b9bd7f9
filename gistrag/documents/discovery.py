"""Which files of a folder are documents, and their text.

Two steps let a sync read only the changes: `find` lists the files with their hashes, `load` reads one of them.
Nothing outside of the folder is ever opened: a path is opened name by name, so that no part of it can be a symbolic
link, not even a link that appears during the search. Only regular files are opened.
Every document that cannot be read is reported with a reason, and files with the suffix of no document are counted by
suffix. Left out without a report are hidden files, files that a .gitignore, *include* or *exclude* rules out, and index
folders.

Not here: the patterns (`gistrag.documents.patterns`) and the readers (`gistrag.documents.readers`).
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, TypeVar

from gistrag.documents.metadata import date_in_name
from gistrag.documents.parser_worker import guarded_read
from gistrag.documents.patterns import Ignores, compiled, is_ignored, parse_gitignore
from gistrag.documents.readers import FILE_BYTES_MAX, is_document, missing_reader, suffix_of
from gistrag.documents.text import Part
from gistrag.errors import DocumentError, UnreadableError, UsageError

INDEX_FILE = "index.db"  # a folder that contains this file is an index
PATH_CHARS_MAX = 4096
FOREVER_NS = 2**63 - 1
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_BLOCK_BYTES = 2**20
_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class FoundFile:
    """A file that `load` can read as a document.

    Attributes:
        path: relative to the folder, with ``/``.
        size: in bytes.
        mtime_ns: time of the last change, in nanoseconds.
        sha256: hex hash of its bytes.
    """

    path: str
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Document:
    """A file and its text; hash, size and time belong to the bytes from which the text was read.

    Attributes:
        kind: kind of the text, see `gistrag.documents.text.Kind`.
        pages: character offset at which each page begins; empty if the format has none.
        metadata: of the whole document, with the date in the name of the file where the text holds none.
        parts: those with metadata of their own.
    """

    path: str
    sha256: str
    size: int
    mtime_ns: int
    kind: str
    text: str
    pages: tuple[int, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A file that is not a document, and the reason; sha256 is "" if the file was not read."""

    path: str
    sha256: str
    reason: str


class Findings(NamedTuple):
    """The files of a folder, sorted by path.

    Attributes:
        found: those that `load` can read; skipped: those that cannot be read, with reasons.
        left_out: how many files no reader knows, by suffix, the most frequent first; ``""`` counts those without one.
    """

    found: list[FoundFile]
    skipped: list[Skipped]
    left_out: dict[str, int]


def find(
    folder: str | Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    known: Mapping[str, tuple[int, int, str]] | None = None,
    trusted_ns: int = FOREVER_NS,
) -> Findings:
    """Return the documents under *folder*, the skipped files with their reasons, and how many were left out.

    Args:
        folder: searched at every depth.
        include: gitignore-style patterns; if given, only files that match. A pattern that names files (``*.dat``, not
            ``data/**``) also includes unknown suffixes, which are read as text.
        exclude: gitignore-style patterns of files and folders to leave out.
        known: path → (size, mtime_ns, sha256) of an earlier run; a file of the same size and time is not read again.
        trusted_ns: when that run ended; a file whose inode changed later is read again, whatever its size and time.

    Raises:
        UsageError: *folder* is missing, not a folder, an index, unreadable, or its .gitignore is beyond the limits; or
            a pattern is malformed or beyond the limits.
    """
    root = Path(folder)
    _require_folder(root)
    search = _Search(
        root=root, include=tuple(include), exclude=tuple(exclude), known=known or {}, trusted_ns=trusted_ns
    )
    search.walk()
    return Findings(
        sorted(search.found, key=lambda one: one.path),
        sorted(search.skipped, key=lambda one: one.path),
        dict(sorted(search.left_out.items(), key=lambda pair: (-pair[1], pair[0]))),
    )


def listed(folder: str | Path, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[FoundFile]:
    """Return the documents that `find` would, sorted by path, without reading one: their hashes are "".

    Raises:
        UsageError: as for `find`.
    """
    _require_folder(Path(folder))
    search = _Listing(root=Path(folder), include=tuple(include), exclude=tuple(exclude), known={})
    search.walk()
    return sorted(search.found, key=lambda one: one.path)


def load(folder: str | Path, file: FoundFile) -> Document:
    """Return the document *file* of *folder* as it is now, which may be newer than at the time of `find`.

    Raises:
        UnreadableError: the file is gone, not readable, or another program writes to it.
        DocumentError: the reason, in one line, why the file is not a document.
    """
    inner, _, name = file.path.rpartition("/")
    try:
        with _explained(), _entered(Path(folder), inner) as descriptor:
            data, status = _settled(descriptor, name, _read_all)
    except DocumentError as error:
        raise UnreadableError(str(error)) from None
    result = guarded_read(data, name)
    return Document(
        path=file.path,
        sha256=hashlib.sha256(data).hexdigest(),
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        kind=result.kind,
        text=result.text,
        pages=result.pages,
        metadata=result.metadata if result.parts else {**date_in_name(name), **result.metadata},
        parts=result.parts,
    )


def _require_folder(root: Path) -> None:
    try:
        names = {entry.name for entry in root.iterdir()}
    except NotADirectoryError:
        raise UsageError(
            f"expected a folder of documents, found a file: {root}; give the folder that contains it"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a zero character in the name
        found = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"expected a folder of documents at {root}, found none ({found}); check the path") from None
    if INDEX_FILE in names:
        raise UsageError(f"expected a folder of documents, found an index: {root}; give the folder of its documents")


@dataclass(kw_only=True)
class _Search:
    """One walk over a folder, which collects the found and the skipped files, and counts the others."""

    root: Path
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    known: Mapping[str, tuple[int, int, str]]
    trusted_ns: int = FOREVER_NS
    found: list[FoundFile] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.included = compiled("include", self.include)
        self.excluded = compiled("exclude", self.exclude)

    def walk(self) -> None:
        """Visit every folder, each with the .gitignore files above it."""
        folders: list[tuple[str, Ignores]] = [("", ())]
        while folders:
            path, ignores = folders.pop()
            try:
                with _explained(), _entered(self.root, path) as folder:
                    folders.extend(self.enter(folder, path, ignores))
            except DocumentError as error:
                if not path:
                    raise UsageError(f"cannot search {self.root} for documents: {error}; fix that first") from None
                self.skip(path.rstrip("/"), str(error))

    def enter(self, folder: int, path: str, ignores: Ignores) -> list[tuple[str, Ignores]]:
        """Sort the files of an open folder, return the folders in it; *path* is "" or ends in a slash."""
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        names = {entry.name for entry in entries}
        if path and INDEX_FILE in names:
            if any(one.startswith(path) for one in self.known):  # whoever put it there removes no document by it
                self.skip(
                    path.rstrip("/"), f"{INDEX_FILE} in it makes it an index; its documents are kept as they were"
                )
            return []
        if ".gitignore" in names:
            ignores = (*ignores, (path, parse_gitignore(_gitignore(folder))))
        return [(inner, ignores) for inner in self.visit(folder, path, entries, ignores)]

    def visit(self, folder: int, path: str, entries: Iterable[os.DirEntry[str]], ignores: Ignores) -> Iterator[str]:
        """Sort the files of *entries* into found and skipped, yield the folders."""
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)
            inner = path + entry.name + "/" * is_folder
            if entry.name.startswith(".") or self.excluded.match_file(inner) or is_ignored(inner, ignores):
                continue
            if not _is_utf8(entry.name):
                self.skip(inner, "its name is not UTF-8; rename it")
            elif len(inner) > PATH_CHARS_MAX:
                self.skip(inner, f"its path has {len(inner):,} characters; the limit is {PATH_CHARS_MAX:,}")
            elif is_folder:
                yield inner
            else:
                self.take(folder, inner, entry)

    def take(self, folder: int, path: str, entry: os.DirEntry[str]) -> None:
        """Add a file to the found or the skipped ones, or count it."""
        if self.include and not self.included.match_file(path):
            return
        if entry.is_symlink():
            self.skip(path, "a symbolic link; links are not followed")
        elif not entry.is_file(follow_symlinks=False):
            self.skip(path, "not a regular file")
        elif is_document(entry.name) or self.is_named(entry.name):
            try:
                self.found.append(self.hash(folder, path, entry.name))
            except DocumentError as error:
                self.skip(path, str(error))
        elif reason := missing_reader(entry.name):
            self.skip(path, reason)
        else:
            self.left_out[suffix_of(entry.name)] += 1

    def is_named(self, name: str) -> bool:
        """Return whether *include* names files like this one, rather than a folder or everything."""
        lasts = [pattern.rsplit("/", 1)[-1] for pattern in self.include]
        return any(last.strip("*") and fnmatchcase(name, last) for last in lasts)

    def hash(self, folder: int, path: str, name: str) -> FoundFile:
        """Return the file with its hash; read it only if its size or time differs from the known one."""
        size, mtime_ns, sha256 = self.known.get(path, (-1, -1, ""))

        def hashed(descriptor: int, now: os.stat_result) -> str:
            is_same = (size, mtime_ns) == (now.st_size, now.st_mtime_ns) and now.st_ctime_ns <= self.trusted_ns
            return sha256 if is_same else _hash(descriptor)

        digest, status = _settled(folder, name, hashed)
        return FoundFile(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns, sha256=digest)

    def skip(self, path: str, reason: str) -> None:
        """Remember why *path* is not a document."""
        self.skipped.append(
            Skipped(
                path=os.fsencode(path).decode("utf-8", "backslashreplace"),
                sha256="",
                reason=reason,
            )
        )


class _Listing(_Search):
    """A walk that reads no file."""

    def hash(self, folder: int, path: str, name: str) -> FoundFile:
        """Return the file without its hash."""
        with _explained():
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        return FoundFile(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns, sha256="")


def _is_utf8(name: str) -> bool:
    """Return whether *name* can be stored; the system returns undecodable bytes as unpaired surrogates."""
    return not re.search("[\ud800-\udfff]", name)


def _gitignore(folder: int) -> bytes:
    """Return the bytes of a folder's .gitignore, none if it cannot be read."""
    try:
        return _settled(folder, ".gitignore", _read_all)[0]
    except DocumentError:
        return b""


@contextmanager
def _entered(root: Path, path: str) -> Iterator[int]:
    """Open the folder *path* under *root*, name by name; OSError if a part of it is a link or not a folder."""
    descriptor = os.open(root, _FOLDER)
    try:
        for name in filter(None, path.split("/")):
            outer, descriptor = descriptor, os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(outer)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn an error of the system into the reason why a file is not a document."""
    try:
        yield
    except OSError as error:
        raise DocumentError(f"unreadable: {error.strerror}") from None


def _settled(folder: int, name: str, take: Callable[[int, os.stat_result], _Value]) -> tuple[_Value, os.stat_result]:
    """Return what *take* returns for the file *name* of an open folder, and its status; retry once if the file changes.

    Raises:
        DocumentError: unreadable, not a regular file, too large, or still changing.
    """
    for _ in range(2):
        with _explained():
            descriptor = os.open(name, _FILE, dir_fd=folder)
            try:
                before = os.fstat(descriptor)
                _require_ordinary(before)
                value = take(descriptor, before)
                after = os.stat(name, dir_fd=folder, follow_symlinks=False)
            finally:
                os.close(descriptor)
        if _same(before, after):
            return value, after
    raise DocumentError("changing while it is read; build again when no program writes to it")


def _same(before: os.stat_result, after: os.stat_result) -> bool:
    times = ("st_mtime_ns", "st_ctime_ns")  # a program can reset the first, but not the second
    return all(getattr(before, name) == getattr(after, name) for name in ("st_dev", "st_ino", "st_size", *times))


def _require_ordinary(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise DocumentError("not a regular file")
    if status.st_size > FILE_BYTES_MAX:
        raise DocumentError(f"too large: {status.st_size:,} bytes; the limit is {FILE_BYTES_MAX:,}")


def _blocks(descriptor: int) -> Iterator[bytes]:
    """Yield the bytes of an open file, at most `FILE_BYTES_MAX` even if the file grows."""
    left = FILE_BYTES_MAX
    while left > 0 and (block := os.read(descriptor, min(_BLOCK_BYTES, left))):
        left -= len(block)
        yield block


def _read_all(descriptor: int, _: os.stat_result) -> bytes:
    return b"".join(_blocks(descriptor))


def _hash(descriptor: int) -> str:
    digest = hashlib.sha256()
    for block in _blocks(descriptor):
        digest.update(block)
    return digest.hexdigest()
