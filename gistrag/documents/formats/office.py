"""Slides and text of office suites: pptx, odt and hwpx, by the standard library.

markitdown was weighed: for slides and sheets alone it brings thirteen packages, among them pandas and a neural network
that guesses file types. What these formats hold of text is a few tags, and a stream of tags cannot run out of memory.

Not here: page headers and footers, comments, deleted text, pictures.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping

from gistrag.documents.formats.archive import PROTECTED, Tags, opened, part, properties, read_xml, relations
from gistrag.documents.markup import Block, join, prose, table_blocks
from gistrag.documents.text import Text, one_line
from gistrag.errors import DocumentError

_MANY_PARTS = 10_000


class Paragraphs(Tags):
    """Turns the tags of a text into blocks: paragraphs, headings, items and tables.

    A table inside of a cell becomes words of that cell.
    """

    PARAGRAPHS: Collection[str] = frozenset({"p"})
    TEXTS: Collection[str] = frozenset({"t"})  # whose text is words of the paragraph
    TABLE, ROW, CELLS = "tbl", "tr", frozenset({"tc"})
    BREAKS: Mapping[str, str] = {"br": "\n", "tab": " "}
    DROPPED: Collection[str] = frozenset()

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.words: list[str] = []
        self.table: list[list[str]] = []
        self.level = 0  # of the heading that is open
        self.tables = self.texts = self.dropped = self.items = 0  # how deep in each

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        """Begin a paragraph, a table, a row, a cell or what is dropped."""
        if self.dropped or name in self.DROPPED:
            self.dropped += 1
            return
        if name in self.BREAKS:
            self.words.append(self.BREAKS[name])
        elif name == self.TABLE:
            self.flush()
            self.tables += 1
        elif name in self.PARAGRAPHS:
            self.flush()
            self.level = self.level_of(name, attributes)
        elif self.tables == 1 and name == self.ROW:
            self.table.append([])
        elif self.tables == 1 and name in self.CELLS:
            self.table = self.table or [[]]
            self.table[-1].append("")
        self.texts += name in self.TEXTS

    def level_of(self, name: str, attributes: Mapping[str, str]) -> int:
        """Return the level of the heading that a paragraph is, 0 for any other."""
        return 0

    def data(self, text: str) -> None:
        """Take words."""
        if self.texts and not self.dropped:
            self.words.append(text)

    def finish(self, name: str) -> None:
        """End what `begin` began."""
        if self.dropped:
            self.dropped -= 1
            return
        self.texts -= name in self.TEXTS
        if name in self.PARAGRAPHS:
            self.flush()
            self.level = 0
        elif name == self.TABLE:
            self.flush()
            self.tables = max(0, self.tables - 1)
            if not self.tables:
                self.blocks.extend(table_blocks([row for row in self.table if any(cell.strip() for cell in row)]))
                self.table = []

    def flush(self) -> None:
        """Write the open paragraph, or add it to the open cell."""
        text, self.words = re.sub(" +", " ", "".join(self.words)).strip(), []
        if self.tables:
            if self.table and self.table[-1] and text:
                self.table[-1][-1] += f" {text}"
        elif text and self.level:
            self.blocks.append(Block("#" * min(self.level, 6) + " " + one_line(text)))
        elif text:
            self.blocks.append(Block(f"- {one_line(text)}", "item") if self.items else Block(prose(text)))


# Slides


class _Slide(Paragraphs):
    """The shapes of a slide; the text of a title is a heading, fields such as the slide's number are dropped."""

    DROPPED = frozenset({"fld"})
    is_title = False

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        """Begin a paragraph or a shape."""
        if name == "sp":
            self.is_title = False
        elif name == "ph":
            self.is_title = attributes.get("type") in ("title", "ctrTitle")
        super().begin(name, attributes)

    def level_of(self, name: str, attributes: Mapping[str, str]) -> int:
        """Return 1 for the title of a slide."""
        return int(self.is_title)


class _Ids(Tags):
    """The relation ids of the slides of a presentation, in order."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Keep the id of a slide, which has two attributes of that name."""
        if tag.endswith("}sldId"):
            self.found += [value for name, value in attributes.items() if name.endswith("}id")]


def read_pptx(data: bytes) -> Text:
    """Return a presentation slide by slide, titles as headings, notes below their slide; a slide is a page."""
    archive, main = opened(data, "pptx"), "ppt/presentation.xml"
    ids, targets = _Ids(), relations(archive, main)
    read_xml(part(archive, main), ids)
    names = [targets.targets[one] for one in ids.found if one in targets.targets]
    if not names or len(names) > _MANY_PARTS:
        raise DocumentError("not a pptx file: the archive holds no presentation")
    slides = []
    for name in names:
        notes = relations(archive, name).by_type.get("notesSlide", "")
        blocks = [*_blocks(part(archive, name), _Slide()), *_notes(part(archive, notes) if notes else b"")]
        slides.append(join(blocks))
    ends = itertools.accumulate((len(slide) + 2 if slide else 0 for slide in slides[:-1]), initial=0)
    text = "\n\n".join(filter(None, slides))
    return Text(
        text=text,
        kind="pptx",
        pages=tuple(min(end, len(text)) for end in ends),
        metadata=properties(part(archive, "docProps/core.xml")),
    )


def _blocks(data: bytes, paragraphs: Paragraphs) -> list[Block]:
    read_xml(data, paragraphs)
    paragraphs.flush()
    return paragraphs.blocks


def _notes(data: bytes) -> Iterable[Block]:
    """Return the notes of a slide; what is a heading there repeats the slide."""
    return [block for block in _blocks(data, _Slide()) if not block.text.startswith("#")]


# OpenDocument


class _OpenDocument(Paragraphs):
    PARAGRAPHS = frozenset({"p", "h"})
    TEXTS = frozenset({"p", "h"})
    TABLE, ROW, CELLS = "table", "table-row", frozenset({"table-cell", "covered-table-cell"})
    BREAKS: Mapping[str, str] = {"line-break": "\n", "tab": " ", "s": " "}
    DROPPED = frozenset({"annotation", "tracked-changes", "note-citation", "sequence-decls", "forms"})

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        """Begin a paragraph or an item."""
        self.items += name == "list-item"
        super().begin(name, attributes)

    def data(self, text: str) -> None:
        """Take words, of which only `BREAKS` break lines."""
        super().data(re.sub(r"\s+", " ", text))

    def finish(self, name: str) -> None:
        """End a paragraph or an item."""
        super().finish(name)
        self.items -= name == "list-item"

    def level_of(self, name: str, attributes: Mapping[str, str]) -> int:
        """Return the outline level of a heading."""
        level = attributes.get("outline-level", "1")
        return (int(level) if level.isdecimal() and len(level) < 3 else 1) if name == "h" else 0


def read_odt(data: bytes) -> Text:
    """Return an OpenDocument text: headings, paragraphs, lists and tables."""
    archive = opened(data, "odt")
    manifest = part(archive, "META-INF/manifest.xml")
    if b"encryption-data" in manifest:
        raise DocumentError(PROTECTED)
    content = part(archive, "content.xml")
    if not content:
        raise DocumentError("not an odt file: the archive holds no OpenDocument text")
    return Text(
        text=join(_blocks(content, _OpenDocument())), kind="odt", metadata=properties(part(archive, "meta.xml"))
    )


# Hangul


class _Styles(Tags):
    """The levels of the outline styles of a hwpx file, by id."""

    def __init__(self) -> None:
        self.levels: dict[str, int] = {}

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        """Keep an outline style."""
        match = re.fullmatch(r"(?:개요|Outline) ([1-9])", attributes.get("name", "")) if name == "style" else None
        if match:
            self.levels[attributes.get("id", "")] = int(match[1])


class _Section(Paragraphs):
    BREAKS: Mapping[str, str] = {"lineBreak": "\n", "tab": " ", "nbSpace": " ", "fwSpace": " "}
    DROPPED = frozenset({"header", "footer", "hiddenComment", "masterPage", "shapeComment", "parameterset"})

    def __init__(self, levels: Mapping[str, int]) -> None:
        super().__init__()
        self._levels = levels

    def level_of(self, name: str, attributes: Mapping[str, str]) -> int:
        """Return the level of the outline style of a paragraph."""
        return self._levels.get(attributes.get("styleIDRef", ""), 0)


def read_hwpx(data: bytes) -> Text:
    """Return a Hangul document of the open format: outline headings, paragraphs, notes and tables."""
    archive = opened(data, "hwpx")
    if b"encryption-data" in part(archive, "META-INF/manifest.xml"):
        raise DocumentError(PROTECTED)
    sections = [name for name in archive.namelist() if re.fullmatch(r"Contents/section\d{1,6}\.xml", name)]
    if not sections or len(sections) > _MANY_PARTS:
        raise DocumentError("not a hwpx file: the archive holds no section of a Hangul document")
    styles = _Styles()
    read_xml(part(archive, "Contents/header.xml"), styles)
    sections.sort(key=lambda name: (len(name), name))
    blocks = (block for name in sections for block in _blocks(part(archive, name), _Section(styles.levels)))
    return Text(text=join(blocks), kind="hwpx", metadata=properties(part(archive, "Contents/content.hpf")))
