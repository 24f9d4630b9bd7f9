"""Word documents: headings, paragraphs, lists and tables. Without page headers, page footers and footnotes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gistrag.documents.formats.archive import opened
from gistrag.documents.markup import Block, join, prose, table_blocks
from gistrag.documents.metadata import known
from gistrag.documents.text import Text, one_line
from gistrag.errors import DocumentError


def read_docx(data: bytes) -> Text:
    """Return a Word document: headings as ``#`` lines, list items, tables as rows. XML entities are not expanded."""
    opened(data, "docx")
    import docx

    try:
        document = docx.Document(io.BytesIO(data))
    except (AttributeError, KeyError, ValueError):  # another file format in a zip archive
        raise DocumentError("not a docx file: the archive holds no Word document") from None
    styles = {
        style.style_id: style.name or "" for style in document.styles
    }  # looked up once: python-docx searches all styles for each paragraph
    return Text(text=join(_docx_blocks(document, styles)), kind="docx", metadata=_properties(document))


def _properties(document: Any) -> dict[str, str]:
    """Return title, author and last change of a document, as far as they can be read."""
    from docx.opc.constants import RELATIONSHIP_TYPE

    try:  # python-docx would invent those of a document that has none
        core = document.part.package.part_related_by(RELATIONSHIP_TYPE.CORE_PROPERTIES).core_properties
        changed = core.modified or core.created
        date = changed.isoformat() if changed else ""
        return known({"title": core.title, "author": core.author, "date": date})
    except (AttributeError, KeyError, ValueError, TypeError):  # properties that are no such XML
        return {}


def _docx_blocks(container: Any, styles: Mapping[str, str]) -> Iterator[Block]:
    """Yield the blocks of a document or a table cell in reading order; *styles* are names of styles by their ids."""
    from docx.table import Table

    for item in container.iter_inner_content():
        if isinstance(item, Table):
            yield from table_blocks(list(_docx_rows(item, styles)))
        elif text := item.text.strip():
            yield _docx_paragraph(item, text, styles.get(item._p.style, ""))


def _docx_paragraph(item: Any, text: str, style: str) -> Block:
    if heading := re.fullmatch(r"Heading ([1-9])|Title", style):
        return Block("#" * min(int(heading[1] or 1), 6) + " " + one_line(text))
    if style.startswith("List") or item._p.xpath("./w:pPr/w:numPr"):
        return Block("- " + text, "item")
    return Block(prose(text))


def _docx_rows(table: Any, styles: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield the text of the cells of each row; a cell appears once a row, whatever columns and rows it spans.

    ``row.cells`` would take quadratic time: it goes back to the top of a merged column in every row.
    """
    from docx.table import _Cell

    above: dict[int, str] = {}  # by the first column of a cell
    for row in table.rows:
        cells: dict[int, str] = {}
        column = row.grid_cols_before
        for cell in row._tr.tc_lst:
            is_merged = cell.vMerge == "continue"
            blocks = () if is_merged else _docx_blocks(_Cell(cell, table), styles)
            cells[column] = above.get(column, "") if is_merged else " ".join(block.text for block in blocks)
            column += cell.grid_span
        yield list(cells.values())
        above = cells
