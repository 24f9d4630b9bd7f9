"""Markdown in the making: blocks of text joined into one.

What web pages, notebooks and Word documents have in common. A reader makes a `Block` of each paragraph, heading, list
item, table row or piece of code; `join` puts the blank lines between them and enforces the limit on length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from gistrag.documents.text import clean, one_line, require_length


@dataclass(frozen=True)
class Block:
    """One paragraph, heading, list item, table row or fence of a text."""

    text: str
    kind: Literal["paragraph", "item", "row"] = "paragraph"


def join(blocks: Iterable[Block]) -> str:
    """Return the blocks with a blank line between them, but none between list items or table rows.

    An empty block ends the list or table before it.
    """
    parts: list[str] = []
    before, chars = "", 0
    for block in blocks:
        if not block.text:
            before = ""
            continue
        tight = block.kind == before != "paragraph"
        parts.append(("\n" if tight else "\n\n") if parts else "")
        parts.append(block.text)
        before, chars = block.kind, chars + len(block.text) + 2
        require_length(chars)
    return clean("".join(parts))


def prose(text: str) -> str:
    """Return *text* with marks of headings and fences escaped."""
    return re.sub(r"(?m)^(#{1,6}\s|```|~~~)", r"\\\1", text)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(one_line(cell).replace("|", "\\|") for cell in cells) + " |"


def table_blocks(table: list[list[str]]) -> Iterator[Block]:
    """Yield a table as Markdown: the first row, the delimiter row, the other rows."""
    for number, cells in enumerate(table):
        yield Block(_row(cells), "row")
        if number == 0:
            yield Block("|" + " --- |" * len(cells), "row")
    if table:
        yield Block("")  # keeps the next table apart


def fence(code: str, language: str = "") -> str:
    """Return *code* between fences longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", code)), default=2)
    mark = "`" * (longest + 1)
    return f"{mark}{language}\n{code.rstrip()}\n{mark}"
