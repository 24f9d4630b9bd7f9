"""Web pages as Markdown.

`HtmlToMarkdown` is written by hand because trafilatura loses words (notes, footnotes, tables of a short page) and
markdownify exceeds the recursion limit on deeply nested pages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html.parser import HTMLParser

from gistrag.documents.markup import Block, fence, join, prose, table_blocks
from gistrag.documents.metadata import known
from gistrag.documents.text import Text, decode, one_line
from gistrag.errors import DocumentError

UNCLOSED_CHARS_MAX = 1_024  # from a tag that nothing closes to the end, which html.parser may read in quadratic time
LIST_LEVELS_MAX = 9  # deeper lists are written at this level: a page of nothing but lists would grow a thousandfold


def read_html(data: bytes) -> Text:
    r"""Return the readable part of a web page; scripts and styles are dropped, the title replaces a missing h1.

    >>> read_html(b"<h2>Fish &amp; chips</h2><ul><li>cod<li>salt</ul>").text
    '## Fish & chips\n\n- cod\n- salt'
    """
    parser = _parsed(decode(data))
    text = join(parser.finish())
    return Text(text=text, kind="html", metadata=known({**parser.metadata, "title": parser.title}))


def html_blocks(page: str) -> list[Block]:
    """Return the readable part of a web page; scripts and styles are dropped, the title replaces a missing h1."""
    return _parsed(page).finish()


def _parsed(page: str) -> HtmlToMarkdown:
    parser = HtmlToMarkdown()
    parser.feed(page)
    if parser.rawdata.startswith("<") and len(parser.rawdata) > UNCLOSED_CHARS_MAX:
        raise DocumentError(f"a tag or comment that nothing closes, {len(parser.rawdata):,} characters before the end")
    parser.close()
    return parser


_HTML_BLOCKS = (
    "address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure "
    "footer form header hgroup hr html legend main nav option p search section select summary"
)


class HtmlToMarkdown(HTMLParser):
    """Turns tags into blocks as they come. It builds no tree, so deep nesting costs nothing."""

    DROPPED = frozenset({"script", "style", "template", "svg"})
    META: Mapping[str, str] = {
        "author": "author",
        **dict.fromkeys(("date", "dc.date", "dcterms.created", "article:published_time"), "date"),
    }
    HEADINGS: Mapping[str, str] = {f"h{level}": "#" * level + " " for level in range(1, 7)}
    BLOCKS = frozenset(_HTML_BLOCKS.split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.words: list[str] = []  # of the paragraph, cell or code that is open
        self.prefix = ""
        self.title = ""
        self.metadata: dict[str, str] = {}
        self.in_title = False
        self.dropped = 0
        self.pre = 0
        self.lists: list[int] = []  # the next number of each open list, 0 for bullets
        self.tables = 0
        self.table: list[list[str]] = []

    def finish(self) -> list[Block]:
        """Return the blocks, after the page's title if the page has no h1."""
        self.end_table()
        self.tables = 0
        if self.pre:
            self.pre = 1
            self.end_code()
        self.flush()
        headed = any(block.text.startswith("# ") for block in self.blocks)
        return self.blocks if headed or not self.title else [Block(f"# {self.title}"), *self.blocks]

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """Return where ``<![…]>`` ends; an unknown kind, on which the library fails, is a comment."""
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:
            return self.parse_bogus_comment(i)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin the block, cell or line that *tag* begins."""
        if tag in self.DROPPED:
            self.dropped += 1
        elif self.dropped:
            return
        elif tag == "br":
            self.words.append("\n" if self.pre else "\v")
        elif tag == "img":
            self.words.append(dict(attrs).get("alt") or "")
        elif tag == "meta":
            self.take_meta(dict(attrs))
        elif tag in ("table", "tr", "td", "th"):
            self.start_cell(tag)
        elif tag in ("pre", "title", "ul", "ol", "li") or tag in self.HEADINGS or tag in self.BLOCKS:
            self.start_block(tag)

    def take_meta(self, attributes: Mapping[str, str | None]) -> None:
        """Remember author and date of the page, as far as a tag names them."""
        name = self.META.get((attributes.get("name") or attributes.get("property") or "").lower())
        if name:
            self.metadata.setdefault(name, attributes.get("content") or "")

    def handle_endtag(self, tag: str) -> None:
        """End what *tag* ends; a stray end tag ends nothing."""
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
        """Collect text, except inside of dropped elements."""
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
        """Write preformatted text as fenced code."""
        self.pre -= 1
        code, self.words = "".join(self.words).strip("\n"), []
        if code.strip():
            self.blocks.append(Block(fence(code)))

    def start_cell(self, tag: str) -> None:
        """Begin a table, a row or a cell; a table inside of a cell becomes words of that cell."""
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
        """Put the collected words into the last cell; words outside of all cells become a paragraph."""
        words, self.words = "".join(self.words), []
        if self.table and self.table[-1]:
            self.table[-1][-1] += words
        elif words.strip():
            self.blocks.append(Block(prose(one_line(words))))

    def end_table(self) -> None:
        """Write the rows collected so far."""
        if self.table:
            self.end_cell()
        self.blocks.extend(table_blocks([row for row in self.table if any(cell.strip() for cell in row)]))
        self.table = []

    def flush(self) -> None:
        """Write the open paragraph; inside of a table or code it continues after a break."""
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
