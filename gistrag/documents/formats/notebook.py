"""Jupyter notebooks: their cells, and the outputs that are short enough to be prose."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gistrag.documents.markup import Block, fence, join
from gistrag.documents.text import Text, decode
from gistrag.errors import DocumentError

OUTPUT_CHARS_MAX = 2_000  # a longer output is data, not prose


def read_notebook(data: bytes) -> Text:
    """Return markdown cells as they stand, code cells fenced, and their short text outputs."""
    raw = decode(data)
    try:
        notebook = json.loads(raw)
        sheets = notebook.get("worksheets") or [notebook]  # worksheets: nbformat 3
        language = str(notebook.get("metadata", {}).get("kernelspec", {}).get("language", "python"))
        language = language if re.fullmatch(r"[\w+#.-]+", language) else ""  # it stands on the line of the fence
        cells = [cell for sheet in sheets for cell in sheet["cells"]]
        blocks = [block for cell in cells for block in _cell_blocks(cell, language)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DocumentError(f"not a Jupyter notebook ({type(error).__name__})") from None
    return Text(text=join(blocks), kind="notebook")


def _cell_blocks(cell: Mapping[str, Any], language: str) -> Iterator[Block]:
    """Yield the source of a cell and each of its short outputs."""
    source = _source(cell.get("source", cell.get("input", "")))
    if not source.strip():
        return
    yield Block(fence(source, language) if cell["cell_type"] == "code" else source.strip())
    for output in cell.get("outputs", ()):
        text = _source(output.get("text", output.get("data", {}).get("text/plain", "")))
        if text.strip() and len(text) <= OUTPUT_CHARS_MAX:
            yield Block(fence(text, "output"))


def _source(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)
