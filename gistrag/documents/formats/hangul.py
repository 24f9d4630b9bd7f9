"""Hangul documents of the binary format 5.0 (.hwp), as Hancom describes it: an OLE container of compressed records.

The container is read by the library olefile. A walk over the records is all that text needs. The source of
hwp-hwpx-parser 1.0.0 reads from paths only, drops footnotes and line breaks, and guesses how long a control is, which
the description says.

Not here: outline levels, which only numbers of styles tell; pictures; documents of the version 3.0.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from gistrag.documents.formats.archive import PROTECTED, ZIP_BYTES_MAX
from gistrag.documents.markup import Block, join, prose, table_blocks
from gistrag.documents.metadata import known
from gistrag.documents.text import Text
from gistrag.errors import DocumentError

MISSING = "hwp files need one more package: pip install 'gistrag[ko]'"
_SIGNATURE = b"HWP Document File"
_COMPRESSED, _LOCKED, _FOR_READING_ONLY = 1, 2, 4  # bits of the file header
_TEXT, _CONTROL, _LIST, _TABLE = 67, 71, 72, 77  # tags of records
_DROPPED = frozenset({b"daeh", b"toof", b"tmct"})  # page header and footer, hidden comment
_UNITS = {9: "\t", 10: "\n", 24: "-", 30: " ", 31: " "}
_LONG = frozenset({*range(1, 10), *range(11, 13), *range(14, 24)})  # controls that take eight units of two bytes

Record = tuple[int, int, bytes]
"""Tag, level and body."""


def read_hwp(data: bytes) -> Text:
    """Return a Hangul document of version 5: paragraphs, notes, tables; title, author and last change as metadata."""
    if data.startswith(b"HWP Document File V3"):
        raise DocumentError("a Hangul document of version 3; save it as hwpx with a newer program")
    if data.startswith(b"PK"):
        raise DocumentError("a hwpx file named .hwp; name it .hwpx")
    try:
        import olefile
    except ModuleNotFoundError:
        raise DocumentError(MISSING) from None
    if not data.startswith(olefile.MAGIC):
        raise DocumentError("not a hwp file: not an OLE container")
    try:
        container = olefile.OleFileIO(io.BytesIO(data))
        header = _stream(container, "FileHeader")
        flags = _flags(header)
        names = sorted(
            (path for path in container.listdir() if path[0] == "BodyText"), key=lambda path: (len(path[-1]), path)
        )
        sections = [_unpacked(_stream(container, path), flags) for path in names]
        metadata = _summary(container)
    except (OSError, ValueError, IndexError, struct.error, zlib.error) as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError(f"not a hwp file that can be read ({type(error).__name__})") from None
    blocks = [block for section in sections for block in _blocks(list(_records(section)))]
    return Text(text=join(blocks), kind="hwp", metadata=metadata)


def _stream(container: Any, path: str | list[str]) -> bytes:
    return bytes(container.openstream(path).read()) if container.exists(path) else b""


def _flags(header: bytes) -> int:
    """Return the flags of a document that can be read."""
    if not header.startswith(_SIGNATURE) or len(header) < 40:
        raise DocumentError("not a hwp file: the container holds no Hangul document")
    version, flags = struct.unpack_from("<II", header, 32)
    if version >> 24 != 5:
        raise DocumentError(f"a Hangul document of version {version >> 24}; save it as hwpx with a newer program")
    if flags & _LOCKED:
        raise DocumentError(PROTECTED)
    if flags & _FOR_READING_ONLY:
        raise DocumentError("a hwp file for distribution, whose text is encrypted; save it as an ordinary one")
    return int(flags)


def _unpacked(data: bytes, flags: int) -> bytes:
    """Return a section as it was before it was compressed, within the limit."""
    if not flags & _COMPRESSED:
        return data
    unpacker = zlib.decompressobj(-15)
    text = unpacker.decompress(data, ZIP_BYTES_MAX)
    if unpacker.unconsumed_tail:
        raise DocumentError(f"unpacks to more than {ZIP_BYTES_MAX:,} bytes, which is the limit")
    return text


def _records(section: bytes) -> Iterator[Record]:
    """Yield the records of a section; one that is cut short ends it."""
    at = 0
    while at + 4 <= len(section):
        (head,) = struct.unpack_from("<I", section, at)
        size, at = head >> 20, at + 4
        if size == 0xFFF and at + 4 <= len(section):
            (size,) = struct.unpack_from("<I", section, at)
            at += 4
        yield head & 0x3FF, head >> 10 & 0x3FF, section[at : at + size]
        at += size


def _blocks(records: list[Record]) -> Iterator[Block]:
    """Yield the paragraphs and tables of a section; what is inside of a table in a table is words of the outer cell."""
    table: list[list[str]] = []
    inside = dropped = -1  # levels at which a table, and what is dropped, began
    for tag, level, body in records:
        if dropped >= 0 and level > dropped:
            continue
        dropped = -1
        if inside >= 0 and level < inside:
            yield from table_blocks(_filled(table))
            table, inside = [], -1
        if tag == _CONTROL and body[:4] in _DROPPED:
            dropped = level
        elif tag == _TABLE and inside < 0:
            inside = level
        elif tag == _LIST and level == inside and len(body) >= 12:
            (row,) = struct.unpack_from("<H", body, 10)
            table += [[] for _ in range(min(row + 1, len(table) + 1) - len(table))]
            table[-1].append("")
        elif tag == _TEXT and (text := _words(body).strip()):
            if inside < 0:
                yield Block(prose(text))
            elif table and table[-1]:
                table[-1][-1] += f" {text}"
    yield from table_blocks(_filled(table))


def _filled(table: list[list[str]]) -> list[list[str]]:
    return [row for row in table if any(row)]


def _words(body: bytes) -> str:
    """Return the words of a paragraph without its controls, each of which says that it takes one unit or eight."""
    units = struct.unpack(f"<{len(body) // 2}H", body[: len(body) // 2 * 2])
    words, at = bytearray(), 0
    while at < len(units):
        unit = units[at]
        if unit >= 32:
            words += unit.to_bytes(2, "little")
        elif unit in _UNITS:
            words += _UNITS[unit].encode("utf-16-le")
        at += 8 if unit in _LONG else 1
    return words.decode("utf-16-le", "ignore")


def _summary(container: Any) -> dict[str, str]:
    """Return title, author and last change of a document, as far as they can be read."""
    name = "\x05HwpSummaryInformation"
    try:
        values = container.getproperties(name, convert_time=True) if container.exists(name) else {}
    except (OSError, ValueError, OverflowError, struct.error):
        return {}
    changed = next((values[key] for key in (13, 12) if isinstance(values.get(key), datetime)), None)
    texts = {"title": values.get(2), "author": values.get(4)}
    shown = {name: value.partition("\0")[0] for name, value in texts.items() if isinstance(value, str)}
    return known({**shown, "date": changed.replace(tzinfo=UTC).isoformat(timespec="seconds") if changed else ""})
