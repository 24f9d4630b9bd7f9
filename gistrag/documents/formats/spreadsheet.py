"""Excel workbooks: each row as ``header: value`` lines, so that each piece of a sheet keeps the names of its values.

Read by the standard library, see `gistrag.documents.formats.office` for why. Formulas are read as the values that the
program stored; charts, comments and merged cells are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta

from gistrag.documents.formats.archive import Tags, opened, part, properties, read_xml, relations
from gistrag.documents.markup import Block, join, prose
from gistrag.documents.text import Text, one_line, require_length
from gistrag.errors import DocumentError

SHEETS_MAX = 1000
_DATE_FORMATS = frozenset({*range(14, 23), *range(27, 37), *range(45, 48), *range(50, 59)})
_LITERALS = re.compile(r'"[^"]*"|\[[^\]]*\]|\\.')
_Row = Mapping[int, str]


def read_xlsx(data: bytes) -> Text:
    """Return a workbook sheet by sheet; the first row of several cells names the values below it."""
    archive, main = opened(data, "xlsx"), "xl/workbook.xml"
    book, targets = _Book(), relations(archive, main)
    read_xml(part(archive, main), book)
    if not book.sheets or len(book.sheets) > SHEETS_MAX:
        raise DocumentError("not an xlsx file: the archive holds no workbook")
    shared, styles = _Shared(), _Styles()
    read_xml(part(archive, targets.by_type.get("sharedStrings", "")), shared)
    read_xml(part(archive, targets.by_type.get("styles", "")), styles)
    blocks: list[Block] = []
    for title, identifier in book.sheets:
        sheet = _Sheet(shared.texts, styles.dates, starts_1904=book.starts_1904)
        read_xml(part(archive, targets.targets.get(identifier, "")), sheet)
        records = [Block(prose(record)) for record in _records(sheet.rows)]
        blocks += [Block(f"# {one_line(title)}"), *records] if records else []
    return Text(text=join(blocks), kind="xlsx", metadata=properties(part(archive, "docProps/core.xml")))


def _records(rows: Sequence[_Row]) -> Iterator[str]:
    """Yield a text for each row: what stands before the header as it is, the others with the names of their values."""
    header: _Row = {}
    for row in rows:
        cells = {column: one_line(cell) for column, cell in row.items() if cell.strip()}
        if not cells:
            continue
        if header:
            yield "\n".join(f"{header.get(column) or f'column {column}'}: {cell}" for column, cell in cells.items())
        elif len(cells) > 1:
            header = cells
        else:
            yield from cells.values()
    if header and not any(len(row) > 1 for row in rows if row != header):  # nothing below it
        yield ", ".join(header.values())


class _Book(Tags):
    """The titles and relation ids of the sheets of a workbook."""

    def __init__(self) -> None:
        self.sheets: list[tuple[str, str]] = []
        self.starts_1904 = False

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        """Keep a sheet."""
        if name == "sheet":
            self.sheets.append((attributes.get("name", ""), attributes.get("id", "")))
        elif name == "workbookPr":
            self.starts_1904 = attributes.get("date1904") in ("1", "true")


class _Shared(Tags):
    """The texts that cells share, without the readings of their characters."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._words: list[str] = []
        self._is_text, self._readings = False, 0

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        """Begin a text or a reading."""
        self._readings += name == "rPh"
        self._is_text = name == "t"

    def data(self, text: str) -> None:
        """Take words."""
        if self._is_text and not self._readings:
            self._words.append(text)

    def finish(self, name: str) -> None:
        """Keep a text."""
        self._readings -= name == "rPh"
        self._is_text = False
        if name == "si":
            self.texts.append("".join(self._words))
            self._words = []


class _Styles(Tags):
    """Which styles of cells show a number as a date."""

    def __init__(self) -> None:
        self.dates: list[bool] = []
        self._custom: dict[str, str] = {}
        self._is_inside = False

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        """Keep a format or a style."""
        if name == "numFmt":
            self._custom[attributes.get("numFmtId", "")] = attributes.get("formatCode", "")
        elif name == "cellXfs":
            self._is_inside = True
        elif name == "xf" and self._is_inside:
            number = attributes.get("numFmtId", "")
            shown = _LITERALS.sub("", self._custom.get(number, "")).lower()
            is_known = number.isdecimal() and int(number[:9]) in _DATE_FORMATS
            self.dates.append(is_known or bool(re.search(r"y|d|m+[-/. ]?y|h", shown)))

    def finish(self, name: str) -> None:
        """End the list of styles."""
        self._is_inside = self._is_inside and name != "cellXfs"


class _Sheet(Tags):
    """The rows of a sheet, each the texts of its filled cells by column, from 1."""

    def __init__(self, shared: Sequence[str], dates: Sequence[bool], *, starts_1904: bool) -> None:
        self.rows: list[dict[int, str]] = []
        self._shared, self._dates = shared, dates
        self._epoch = datetime(1904, 1, 1) if starts_1904 else datetime(1899, 12, 30)
        self._words: list[str] = []
        self._column, self._kind, self._style, self._is_value, self._chars = 0, "", "", False, 0

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        """Begin a row, a cell or its value."""
        if name == "row":
            self.rows.append({})
            self._column = 0
        elif name == "c":
            self._column = _column(attributes.get("r", "")) or self._column + 1
            self._kind, self._style = attributes.get("t", "n"), attributes.get("s", "")
        self._is_value = name in ("v", "t")

    def data(self, text: str) -> None:
        """Take the value of a cell."""
        if self._is_value:
            self._words.append(text)

    def finish(self, name: str) -> None:
        """Keep the text of a cell."""
        self._is_value = False
        if name == "c":
            text, self._words = self._shown("".join(self._words)), []
            if text.strip() and self.rows:
                self.rows[-1][self._column] = text
                self._chars += len(text)
                require_length(self._chars)

    def _shown(self, value: str) -> str:
        """Return the text of a cell: a shared one, a date, or a number without the noise of its last digits."""
        if self._kind == "s":
            number = int(value) if value.isdecimal() and len(value) < 10 else -1
            return self._shared[number] if 0 <= number < len(self._shared) else ""
        if self._kind == "b":
            return {"0": "FALSE", "1": "TRUE"}.get(value, value)
        if self._kind != "n":
            return value
        try:
            number_ = float(value)
            style = int(self._style[:9]) if self._style.isdecimal() else -1
            if 0 <= style < len(self._dates) and self._dates[style]:
                moment = self._epoch + timedelta(seconds=round(number_ * 86400))
                return moment.isoformat(" ", "minutes").removesuffix(" 00:00")
            return f"{number_:.15g}"
        except (ValueError, OverflowError):
            return value


def _column(place: str) -> int:
    """Return the column of a cell, 0 where its place says none.

    >>> _column("A1"), _column("AB12"), _column("")
    (1, 28, 0)
    """
    found = 0
    for letter in re.match(r"[A-Z]{0,3}", place)[0]:  # type: ignore[index]  # it matches anything
        found = found * 26 + ord(letter) - 64
    return found
