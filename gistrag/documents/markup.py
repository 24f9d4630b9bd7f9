"""Markdown in the making: blocks of text joined into one, and a web page taken apart into blocks.

What html, notebooks and docx have in common. A reader makes a `Block` of each paragraph, heading, list item, table row
or piece of code; `join` puts the blank lines between them and holds the limit on length.

Not here: bytes and their encoding, and which file is read how (`gistrag.documents.readers`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Literal

from gistrag.errors import DocumentError

TEXT_CHARS_MAX = 64 * 2**20
LIST_LEVELS_MAX = 9  # deeper lists are written at this level: a page of nothing but lists would grow a thousandfold


def require_length(chars: int) -> None:
    """Return if a text of *chars* characters is no longer than a document may be."""
    if chars > TEXT_CHARS_MAX:
        raise DocumentError(f"holds {chars:,} characters or more of text; the most is {TEXT_CHARS_MAX:,}")


@dataclass(frozen=True)
class Block:
    """One paragraph, heading, list item, table row or fence of a text in the making."""

    text: str
    kind: Literal["paragraph", "item", "row"] = "paragraph"


def join(blocks: Iterable[Block]) -> str:
    """Return the blocks a blank line apart; items of a list and rows of a table follow line on line.

    An empty block only ends the list or table before it.
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


def clean(text: str) -> str:
    """Return *text* without the control characters that parsers let through.

    Raises:
        DocumentError: half of a surrogate pair, which no file can store.
    """
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffe\uffff]", "", text).replace("\r\n", "\n")
    if re.search(r"[\ud800-\udfff]", text):
        raise DocumentError("broken encoding: half of a surrogate pair")
    return text.replace("\r", "\n")


def one_line(text: str) -> str:
    """Return *text* with single spaces for all its white space."""
    return " ".join(text.split())


def prose(text: str) -> str:
    """Return *text* such that it cannot be taken for a heading or a fence."""
    return re.sub(r"(?m)^(#{1,6}\s|```|~~~)", r"\\\1", text)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(one_line(cell).replace("|", "\\|") for cell in cells) + " |"


def table_blocks(table: list[list[str]]) -> Iterator[Block]:
    """Yield a table as markdown: the first row, the ruler under it, the others."""
    for number, cells in enumerate(table):
        yield Block(_row(cells), "row")
        if number == 0:
            yield Block("|" + " --- |" * len(cells), "row")
    if table:
        yield Block("")  # two tables in a row stay two


def fence(code: str, language: str = "") -> str:
    """Return *code* between fences longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", code)), default=2)
    mark = "`" * (longest + 1)
    return f"{mark}{language}\n{code.rstrip()}\n{mark}"


# ---------------------------------------------------------------- html


def html_blocks(page: str) -> list[Block]:
    """Return the readable part of a web page; scripts and styles are dropped, the title stands in for a missing h1."""
    parser = _Html()
    parser.feed(page)
    parser.close()
    return parser.finish()


_HTML_BLOCKS = (
    "address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure "
    "footer form header hgroup hr html legend main nav option p search section select summary"
)


class _Html(HTMLParser):
    """Turns tags into blocks as they come; builds no tree, so nesting costs nothing."""

    DROPPED = frozenset({"script", "style", "template", "svg"})
    HEADINGS: Mapping[str, str] = {f"h{level}": "#" * level + " " for level in range(1, 7)}
    BLOCKS = frozenset(_HTML_BLOCKS.split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.words: list[str] = []  # the paragraph, cell or code under way
        self.prefix = ""
        self.title = ""
        self.in_title = False
        self.dropped = 0
        self.pre = 0
        self.lists: list[int] = []  # next number of each open list, 0 where it has bullets
        self.tables = 0
        self.table: list[list[str]] = []

    def finish(self) -> list[Block]:
        """Return the blocks, headed by the page's title if it has no h1."""
        self.end_table()
        self.tables = 0
        if self.pre:
            self.pre = 1
            self.end_code()
        self.flush()
        headed = any(block.text.startswith("# ") for block in self.blocks)
        return self.blocks if headed or not self.title else [Block(f"# {self.title}"), *self.blocks]

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """Return where ``<![…]>`` ends; one of an unknown kind, over which the library trips, is a comment."""
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:
            return self.parse_bogus_comment(i)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open what *tag* opens."""
        if tag in self.DROPPED:
            self.dropped += 1
        elif self.dropped:
            return
        elif tag == "br":
            self.words.append("\n" if self.pre else "\v")
        elif tag == "img":
            self.words.append(dict(attrs).get("alt") or "")
        elif tag in ("table", "tr", "td", "th"):
            self.start_cell(tag)
        elif tag in ("pre", "title", "ul", "ol", "li") or tag in self.HEADINGS or tag in self.BLOCKS:
            self.start_block(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close what *tag* closes; a stray end tag closes nothing."""
        if tag in self.DROPPED:
            self.dropped = max(self.dropped - 1, 0)
        elif self.dropped:
            return
        elif tag == "title" and self.in_title:
            self.title = self.title or one_line("".join(self.words))
            self.words, self.in_title = [], False
        elif tag == "table":
            self.tables = max(self.tables - 1, 0)
            if not self.tables:
                self.end_table()
        elif tag in ("td", "th", "tr"):
            self.words.append(" ")
        elif tag in ("pre", "ul", "ol", "li") or tag in self.HEADINGS or tag in self.BLOCKS:
            self.end_block(tag)

    def handle_data(self, data: str) -> None:
        """Take text, unless it stands in what is dropped."""
        if not self.dropped:
            self.words.append(data)

    def start_block(self, tag: str) -> None:
        """Begin a heading, an item, a list, code or a paragraph."""
        self.flush()
        if self.tables:
            return
        if tag in self.HEADINGS:
            self.prefix = self.HEADINGS[tag]
        elif tag in ("ul", "ol"):
            self.lists.append(1 if tag == "ol" else 0)
        elif tag == "li":
            number = self.lists[-1] if self.lists else 0
            self.prefix = "  " * (min(len(self.lists), LIST_LEVELS_MAX) - 1) + (f"{number}. " if number else "- ")
            if number:
                self.lists[-1] += 1
        elif tag == "pre":
            self.pre += 1
        elif tag == "title":
            self.in_title = True

    def end_block(self, tag: str) -> None:
        """Finish a heading, an item, a list, code or a paragraph."""
        if tag == "pre" and self.pre and not self.tables:
            self.end_code()
        self.flush()
        if self.tables or tag in self.BLOCKS:
            return
        self.prefix = ""
        if tag in ("ul", "ol") and self.lists:
            self.lists.pop()

    def end_code(self) -> None:
        """Write preformatted text as a fence."""
        self.pre -= 1
        code, self.words = "".join(self.words).strip("\n"), []
        if code.strip():
            self.blocks.append(Block(fence(code)))

    def start_cell(self, tag: str) -> None:
        """Begin a table, a row or a cell; a table inside a cell is read as words of that cell."""
        if tag == "table":
            self.flush()
            self.tables += 1
        elif self.tables != 1:
            self.words.append(" ")
        elif tag == "tr":
            self.end_cell()
            self.table.append([])
        else:
            self.end_cell()
            self.table = self.table or [[]]
            self.table[-1].append("")

    def end_cell(self) -> None:
        """Put the words under way into the last cell; words outside any cell become a paragraph of their own."""
        words, self.words = "".join(self.words), []
        if self.table and self.table[-1]:
            self.table[-1][-1] += words
        elif words.strip():
            self.blocks.append(Block(prose(one_line(words))))

    def end_table(self) -> None:
        """Write the rows gathered so far."""
        if self.table:
            self.end_cell()
        self.blocks.extend(table_blocks([row for row in self.table if any(cell.strip() for cell in row)]))
        self.table = []

    def flush(self) -> None:
        """Write the paragraph under way; inside a table or code it goes on, one break further."""
        if self.tables or self.pre:
            self.words.append("\n" if self.pre else " ")
            return
        words = re.sub(r"[ \t\n\r\f]+", " ", "".join(self.words)).strip()
        text = re.sub(r" ?\v ?", "\n", words).strip("\n")
        self.words = []
        if text:
            is_item = self.prefix.endswith(("- ", ". "))
            body = one_line(text) if self.prefix.startswith("#") else prose(text)
            self.blocks.append(Block(self.prefix + body, "item" if is_item else "paragraph"))
            self.prefix = ""
