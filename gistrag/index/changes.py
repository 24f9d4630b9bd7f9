"""What differs between an index and its folder, told from names, times and hashes; nothing is written here.

`compared` looks at both, for a build and for its dry run; `changes` compares what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from gistrag.documents.discovery import FoundFile, Skipped, find
from gistrag.errors import UsageError
from gistrag.index.folder_record import imported_documents
from gistrag.index.schema import DocumentRow
from gistrag.index.store import Store

IMPORTED = "an imported document has this path; gistrag import --remove gives it up"

MANY = 10
"""Documents of an index from which on the loss of most of them is not believed."""


@dataclass(kw_only=True)
class Changes:
    """What a sync has to do.

    Attributes:
        to_read: files that are new, or have other content than the index.
        unchanged: files whose content the index has under their path.
        renamed: files whose content the index has under a path that is gone, each with that path.
        gone: paths of documents whose file is gone.
        hidden: paths of documents that cannot be looked at, as they or a folder above them cannot be read.
    """

    to_read: list[FoundFile] = field(default_factory=list)
    unchanged: list[FoundFile] = field(default_factory=list)
    renamed: list[tuple[str, FoundFile]] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)


def changes(
    known: Mapping[str, DocumentRow],
    found: Sequence[FoundFile],
    skipped: Sequence[Skipped],
    *,
    is_current: Callable[[DocumentRow], bool],
) -> Changes:
    """Return how the files of a folder differ from the documents of its index.

    Args:
        known: the documents, by path.
        found: the files that can be read; skipped: those that cannot, and folders.
        is_current: whether no part of a document has to be computed again.
    """
    unreadable = {row.path for row in skipped}
    done = Changes(hidden=sorted(path for path in known if not unreadable.isdisjoint(_with_folders(path))))
    seen = {*done.hidden, *(file.path for file in found)}
    gone = {path: row for path, row in known.items() if path not in seen}
    for file in found:
        row = known.get(file.path)
        if row and row.sha256 == file.sha256 and is_current(row):
            done.unchanged.append(file)
        elif row is None and (before := _before(file, gone, is_current)):
            del gone[before]
            done.renamed.append((before, file))
        else:
            done.to_read.append(file)
    done.gone = sorted(gone)
    return done


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An index beside its folder.

    Attributes:
        patterns: ``include`` and ``exclude`` to search with; known: documents of the folder, by path.
        imported: paths of documents that are in no folder.
        changes: what a sync has to do; skipped, left_out: see `gistrag.documents.discovery.Findings`.
    """

    patterns: dict[str, list[str]]
    known: dict[str, DocumentRow]
    imported: set[str]
    changes: Changes
    skipped: list[Skipped]
    left_out: dict[str, int]


def compared(
    store: Store | None,
    folder: str | Path,
    *,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    is_current: Callable[[DocumentRow], bool],
    removes_any: bool,
    read_all: bool = False,
) -> Comparison:
    """Return how an index differs from its folder.

    Args:
        store: the index, None where there is none yet.
        include: patterns, None for those of the last build; exclude: likewise.
        is_current: whether no part of a document has to be computed again.
        removes_any: whether documents may leave the index even if most of their files are gone.
        read_all: whether every file is read, whatever its size and times.

    Raises:
        UsageError: no such folder, or most of its documents are gone and that is not asked for.
    """
    last = store.patterns if store else {"include": [], "exclude": []}
    given = {"include": include, "exclude": exclude}
    patterns = last | {name: _patterns(value) for name, value in given.items() if value is not None}
    imported = imported_documents(store) if store else set()
    known = {row.path: row for row in store.documents() if row.path not in imported} if store else {}
    stamps = {path: (row.size, row.mtime_ns, row.sha256) for path, row in known.items()}
    trusted_ns = store.gists.checked_ns if store and not read_all else 0
    found, skipped, left_out = find(folder, **patterns, known=stamps, trusted_ns=trusted_ns)
    found, skipped = without_imported(found, skipped, imported)
    differing = changes(known, found, skipped, is_current=is_current)
    if not removes_any and patterns == last:
        require_present(differing, known, folder)
    return Comparison(
        patterns=patterns, known=known, imported=imported, changes=differing, skipped=skipped, left_out=left_out
    )


def _patterns(given: Sequence[str]) -> list[str]:
    """Return patterns as a list; one string is one pattern."""
    return [given] if isinstance(given, str) else list(given)


def without_imported(
    found: Sequence[FoundFile], skipped: Sequence[Skipped], imported: Set[str]
) -> tuple[list[FoundFile], list[Skipped]]:
    """Return the files of a folder that are not at the path of an imported document, and what is skipped with these."""
    told = [Skipped(path=file.path, sha256="", reason=IMPORTED) for file in found if file.path in imported]
    return [file for file in found if file.path not in imported], [*skipped, *told]


def require_present(differing: Changes, known: Mapping[str, DocumentRow], folder: str | Path) -> None:
    """Return unless most documents of an index are gone from its folder, as when its disk is not mounted.

    Raises:
        UsageError: says how many, and what removes them all the same.
    """
    if len(known) >= MANY and len(differing.gone) > len(known) / 2:
        raise UsageError(
            f"{len(differing.gone):,} of {len(known):,} documents are gone from {folder}: is its disk mounted? "
            "--prune removes them from the index, --no-delete keeps them"
        )


def _before(file: FoundFile, gone: Mapping[str, DocumentRow], is_current: Callable[[DocumentRow], bool]) -> str | None:
    """Return the path that *file* had before, None where it is new.

    The suffix must be the same: it decides how the content is read.
    """
    suffix = PurePosixPath(file.path).suffix
    for path, row in gone.items():
        if row.sha256 == file.sha256 and PurePosixPath(path).suffix == suffix and is_current(row):
            return path
    return None


def _with_folders(path: str) -> list[str]:
    """Return a path and all folders it lies in."""
    return [path, *map(str, PurePosixPath(path).parents)]
