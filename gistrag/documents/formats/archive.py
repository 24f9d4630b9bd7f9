"""Office files as zip archives of XML: opened within limits, their parts read as a stream of tags.

No tree is built and no document type is accepted, so neither deep nesting nor entities cost anything.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any
from xml.etree.ElementTree import ParseError, XMLParser

from gistrag.documents.metadata import known
from gistrag.errors import DocumentError

ZIP_BYTES_MAX = 256 * 2**20
ZIP_RATIO_MAX = 200
PROTECTED = "protected by a password; save it without one"
_OLE = b"\xd0\xcf\x11\xe0"
_OLE_PACKAGE = "EncryptedPackage".encode("utf-16-le")
_BLOCK_BYTES = 2**16


def opened(data: bytes, kind: str) -> zipfile.ZipFile:
    """Return the archive that a file of this *kind* is, small when unpacked; zipfile never reads beyond what it says.

    Raises:
        DocumentError: not a zip archive, protected by a password, or it grows beyond the limits.
    """
    if data.startswith(_OLE):
        raise DocumentError(
            PROTECTED
            if _OLE_PACKAGE in data
            else f"an older format named .{kind}; save it as {kind} without a password"
        )
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        raise DocumentError(f"not a {kind} file: not a zip archive") from None
    entries = archive.infolist()
    if any(entry.flag_bits & 1 for entry in entries):
        raise DocumentError(PROTECTED)
    expanded = sum(entry.file_size for entry in entries)
    if expanded > ZIP_BYTES_MAX:
        raise DocumentError(f"unpacks to {expanded:,} bytes; the limit is {ZIP_BYTES_MAX:,}")
    if expanded > ZIP_RATIO_MAX * len(data):
        raise DocumentError(f"unpacks to {expanded // len(data)} times its size; the limit is {ZIP_RATIO_MAX} times")
    return archive


def part(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return a part of an archive, nothing where there is none; a leading slash does not count.

    Raises:
        DocumentError: it is damaged.
    """
    try:
        return archive.read(name.lstrip("/"))
    except KeyError:
        return b""
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError, ValueError) as error:
        raise DocumentError(f"its part {name[:80]!r} is damaged ({type(error).__name__})") from None
    except Exception as error:
        if type(error).__module__ in ("zlib", "lzma", "_lzma", "bz2"):
            raise DocumentError(f"its part {name[:80]!r} is damaged") from None
        raise


class Tags:
    """What happens at each tag and text of an XML part; names come without their namespace."""

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Begin an element."""
        self.begin(_local(tag), {_local(name): value for name, value in attributes.items()})

    def end(self, tag: str) -> None:
        """End an element."""
        self.finish(_local(tag))

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        """Begin the element *name*."""

    def finish(self, name: str) -> None:
        """End the element *name*."""

    def data(self, text: str) -> None:
        """Take text."""

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        """Refuse a document type, which could declare entities without end."""
        raise DocumentError("its XML has a document type, which no office program writes")

    def close(self) -> None:
        """Do nothing: the caller keeps what was collected."""


def read_xml(data: bytes, tags: Tags) -> None:
    """Send the tags of an XML part to *tags*; an empty part has none.

    Raises:
        DocumentError: it is no XML.
    """
    parser: Any = XMLParser(target=tags)
    try:
        for at in range(0, len(data), _BLOCK_BYTES):
            parser.feed(data[at : at + _BLOCK_BYTES])
        if data:
            parser.close()
    except (ParseError, LookupError, ValueError) as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError("its XML is damaged") from None


def _local(name: str) -> str:
    return name.rpartition("}")[2]


class Values(Tags):
    """The texts of elements by name, the first of each; those of ``<meta name="…">`` by that name."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._name, self._text = "", ""

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        """Begin an element whose text may say something."""
        self._name, self._text = attributes.get("name", name) if name == "meta" else name, ""

    def data(self, text: str) -> None:
        """Take the text of the element."""
        self._text += text[:1000]

    def finish(self, name: str) -> None:
        """Keep the text, if it is the first of this name."""
        if self._text.strip():
            self.found.setdefault(self._name.lower(), self._text)
        self._text = ""


def properties(data: bytes) -> dict[str, str]:
    """Return title, author and last change from the part of an office file that holds its properties.

    >>> properties(b"<a><title>Plan</title><creator>Kim</creator><modified>2026-01-05T08:00:00Z</modified></a>")
    {'title': 'Plan', 'author': 'Kim', 'date': '2026-01-05T08:00:00+00:00'}
    """
    values = Values()
    try:
        read_xml(data, values)
    except DocumentError:
        return {}
    date = ("modified", "modifieddate", "date", "created", "creation-date", "createddate")
    author = ("creator", "initial-creator", "lastsaveby")
    return known(
        {
            "title": values.found.get("title"),
            "author": next((values.found[name] for name in author if name in values.found), None),
            "date": next((values.found[name] for name in date if name in values.found), None),
        }
    )


class Relations(Tags):
    """The targets of a part's relations: by id, and those of a type by its last word."""

    def __init__(self) -> None:
        self.targets: dict[str, str] = {}
        self.by_type: dict[str, str] = {}

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        """Keep a relation inside of the archive."""
        if name == "Relationship" and attributes.get("TargetMode") != "External":
            target = attributes.get("Target", "")
            self.targets[attributes.get("Id", "")] = target
            self.by_type.setdefault(attributes.get("Type", "").rpartition("/")[2], target)


def relations(archive: zipfile.ZipFile, name: str) -> Relations:
    """Return the relations of the part *name*, with targets as names of parts."""
    folder, _, last = name.rpartition("/")
    found = Relations()
    read_xml(part(archive, f"{folder}/_rels/{last}.rels"), found)
    for targets in (found.targets, found.by_type):
        targets.update({key: resolved(folder, target) for key, target in targets.items()})
    return found


def resolved(folder: str, target: str) -> str:
    """Return the part that a relative *target* in a folder names.

    >>> resolved("ppt/slides", "../notes/n1.xml"), resolved("ppt", "/xl/a.xml"), resolved("", "../../etc/passwd")
    ('ppt/notes/n1.xml', 'xl/a.xml', 'etc/passwd')
    """
    names = [] if target.startswith("/") else [name for name in folder.split("/") if name]
    for name in target.split("/"):
        if name == "..":
            names = names[:-1]
        elif name not in ("", "."):
            names.append(name)
    return "/".join(names)
