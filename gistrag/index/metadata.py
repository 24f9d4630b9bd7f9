"""The metadata of documents in an index: stored by a build, returned with chunks, and what filters look at.

A row gives a document a value for a name, or one of its chunks where a part of it has metadata of its own, such as a
message of a mailbox. The row without a name says from which content and path the metadata were read. The next build
reads the documents for which it is missing: those of an index that was made before there was metadata.
"""

from __future__ import annotations

import bisect
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from gistrag.documents.discovery import PATH_CHARS_MAX, Document, FoundFile
from gistrag.documents.metadata import FIELDS, is_date
from gistrag.errors import UsageError
from gistrag.index import schema
from gistrag.index.database import Database
from gistrag.index.schema import StoredChunk

VERSION = "1"
"""Of the way metadata are read; a build reads those of another version again."""
BUILT_IN = ("path", "kind", "heading")
_CONDITION = re.compile(r"\s*(>=|<=|==|>|<|)\s*(.*?)\s*", re.DOTALL)


class Metadata:
    """The metadata of the documents of an open index."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def are_stored(self) -> bool:
        """Whether the index can hold metadata; one that was made before there was any cannot, until it is built."""
        return bool(self._database.execute(schema.HAS_METADATA))

    def added_to(self, chunks: Sequence[StoredChunk]) -> list[StoredChunk]:
        """Return chunks with their metadata; a summary has those of its document."""
        if not chunks or not self.are_stored:
            return list(chunks)
        ids, documents = {chunk.id for chunk in chunks}, {chunk.document_id for chunk in chunks}
        asked = {"chunks": json.dumps(sorted(ids)), "documents": json.dumps(sorted(documents))}
        found: dict[int, dict[str, str]] = defaultdict(dict)
        for key, name, value in self._database.execute(schema.METADATA, asked):
            found[key][name] = value
        known = [{**found.get(-chunk.document_id, {}), **found.get(chunk.id, {})} for chunk in chunks]
        return [replace(chunk, metadata=one) for chunk, one in zip(chunks, known, strict=True)]

    def select(self, filters: Mapping[str, str]) -> set[int] | None:
        """Return the ids of the chunks that pass the filters on metadata, None where there are no such filters.

        Raises:
            UsageError: an impossible date, or a condition that makes no sense.
        """
        conditions = [one for name, value in filters.items() if name in FIELDS for one in conditions_of(name, value)]
        if not conditions:
            return None
        if not self.are_stored:
            return set()
        passing = [{row[0] for row in self._database.execute(schema.SELECT_METADATA, one)} for one in conditions]
        return set.intersection(*passing)

    def misplaced(self, documents: Iterable[int]) -> set[int]:
        """Return those of the *documents*, by id, whose path differs from the one their metadata were read under.

        None where no metadata were read yet, or those of other content, as by a version that knew none.
        """
        if not self.are_stored:
            return set()
        asked = json.dumps(sorted(documents))
        return {row[0] for row in self._database.execute(schema.MISPLACED, (asked,))}

    # Writing

    def outdate(self, path: str) -> None:
        """Let the metadata of a document that was given this *path* be read again."""
        if self.are_stored:
            self._database.execute(schema.OUTDATE_METADATA, (path,))

    def prepare(self) -> None:
        """Let the index hold metadata, if it was made before there was any."""
        if not self.are_stored:
            with self._database.writing():
                self._database.execute(schema.CREATE_METADATA)
                self._database.execute(schema.CREATE_METADATA_INDEX)
                self._database.execute(schema.CREATE_METADATA_CHUNK_INDEX)

    def missing(self) -> list[FoundFile]:
        """Return the documents whose metadata were not read, or not from the content and path that they have."""
        rows = self._database.execute(schema.WITHOUT_METADATA, {"version": VERSION})
        return [FoundFile(path=path, size=size, mtime_ns=at, sha256=sha256) for path, size, at, sha256 in rows]

    def put(self, document: Document, chunks: Iterable[tuple[int, int]]) -> None:
        """Store the metadata of a document in the index, in place of those before; *chunks* are (id, start) of each."""
        self.prepare()
        made_from = f"{VERSION} {document.sha256} {document.path}"
        starts = [part.start for part in document.parts]
        with self._database.writing():
            self._database.execute(schema.DROP_METADATA, (document.path,))
            for name, value in {"": made_from, **document.metadata}.items():
                self._database.execute(schema.PUT_METADATA, (None, name, value, document.path))
            for chunk_id, start in chunks if starts else ():
                part = document.parts[max(0, bisect.bisect_right(starts, start) - 1)]
                for name, value in part.metadata.items():
                    self._database.execute(schema.PUT_METADATA, (chunk_id, name, value, document.path))


def require_known(filters: Mapping[str, str]) -> None:
    """Return if every filter is one that there is, and says something that can be compared.

    Raises:
        UsageError: names the first that is not.
    """
    names = (*BUILT_IN, *FIELDS)
    if unknown := sorted(set(filters) - set(names)):
        raise UsageError(f"filters are {', '.join(names)}, got {', '.join(unknown)}")
    for name, value in filters.items():
        if len(value) > PATH_CHARS_MAX:
            raise UsageError(f"a filter on {name} has at most {PATH_CHARS_MAX:,} characters, got {len(value):,}")
        if name in FIELDS:
            conditions_of(name, value)


def conditions_of(name: str, value: str) -> list[dict[str, str]]:
    """Return what a filter on metadata asks for, as values of `schema.SELECT_METADATA`.

    A date is compared as far as it goes: 2026-01 equals every day of that month. Any other value is part of a text, in
    upper or lower case, or after ``==`` the whole of it.

    >>> conditions_of("date", ">=2026-01-01, <2026-03")
    [{'name': 'date', 'op': '>=', 'value': '2026-01-01'}, {'name': 'date', 'op': '<', 'value': '2026-03'}]
    >>> conditions_of("from", "kim")
    [{'name': 'from', 'op': '', 'value': 'kim'}]
    """
    pieces = value.split(",") if name == "date" else [value]
    found = []
    for piece in pieces:
        match = _CONDITION.fullmatch(piece)
        op, wanted = match.groups() if match else ("", "")
        if name == "date" and not is_date(wanted):
            raise UsageError(f"a filter on date takes a real date such as >=2026-01-01, 2026-01 or 2026, got {piece!r}")
        if name != "date" and (not wanted or op not in ("", "==")):
            raise UsageError(f"a filter on {name} takes a part of it, or == and the whole of it, got {value!r}")
        found.append({"name": name, "op": (op or "==") if name == "date" else op, "value": wanted})
    return found
