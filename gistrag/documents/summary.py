"""A document → what it is about: its title, how it begins, and the first sentence of each of its sections.

Everything is taken from the document, so a summary invents nothing, needs no model and is the same each time. It
follows headings where there are any, and paragraphs elsewhere. No word is added: it is in the document's language.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import PurePosixPath

from gistrag.documents.headings import Title, titles_in
from gistrag.documents.sentences import sentences
from gistrag.documents.text import one_line

LEAD_CHARACTERS, LINE_CHARACTERS = 400, 240
SECTIONS_MAX = 16
"""Sections of which a sentence is shown; of as many more the heading."""
SENTENCES = 10
"""Sentences of a document with few sections."""
CELLS_MAX = 8
_SEEN_CHARACTERS = 2000
"""How far into a section one looks for its first sentence."""
_ROW = re.compile(r"\s*\|.*\|\s*$")
_FENCE = re.compile(r"(?ms)^ {0,3}(?:```|~~~).*?(?:^ {0,3}(?:```|~~~)[^\S\n]*$|\Z)")
_FENCE_LINE = re.compile(r" {0,3}(?:```|~~~)")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_ITEM = re.compile(r"\s*(?:[-*+•]|\d{1,3}[.)])\s+")


@dataclass(frozen=True)
class Summary:
    """What a document is about.

    Attributes:
        title: first heading, or the name of the file.
        lead: how the document begins.
        sections: heading and first sentence of each section, either of them may be empty.
    """

    title: str
    lead: str
    sections: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The summary as it is shown and searched."""
        lines = [
            f"- {heading}: {line}" if heading and line else f"- {heading or line}" for heading, line in self.sections
        ]
        head = [self.title, self.lead] if self.lead else [self.title]
        return "\n\n".join([*head, "\n".join(lines)] if lines else head)


def summarize(text: str, path: str, *, has_headings: bool = True) -> Summary:
    r"""Return what a document is about.

    Args:
        text: of the document; path: names it where it has no heading.
        has_headings: whether lines that look like Markdown headings are some.

    >>> summarize("# Bees\nThey fly.\n## Honey\nIt is sweet. It keeps.\n## Wax\n- combs\n- candles", "b.md").text
    'Bees\n\nThey fly.\n\n- Honey: It is sweet. It keeps.\n- Wax: combs; candles'
    """
    titles = titles_in(text) if has_headings else []
    if not titles:
        return _of_paragraphs(text, path)
    first = titles[0]
    is_titled = not text[: first.start].strip() or sum(len(title.path) == 1 for title in titles) == 1
    name = first.path[-1] if is_titled else PurePosixPath(path).stem
    begin = first.end if is_titled else 0
    after = next((title.start for title in titles if title.start > begin), len(text))
    rest = _outermost(titles[1:] if is_titled else titles)
    lead = _line(text[begin:after], LEAD_CHARACTERS, most=2) if rest else ""
    if not rest:  # a title and nothing below it
        return replace(_of_paragraphs(text[first.end :], path), title=_shortened(name, LINE_CHARACTERS))
    return Summary(_shortened(name, LINE_CHARACTERS), lead, tuple(_sections(text, titles, rest)))


def _outermost(titles: Sequence[Title]) -> list[Title]:
    """Return the headings down to the outermost level by which there are several."""
    levels = sorted({len(title.path) for title in titles})
    depth = next((level for level in levels if sum(len(title.path) <= level for title in titles) > 1), 9)
    return [title for title in titles if len(title.path) <= depth]


def _sections(text: str, titles: Sequence[Title], chosen: Sequence[Title]) -> Iterator[tuple[str, str]]:
    """Yield the heading of each section, and the first sentences of its paragraphs: the fewer sections, the more."""
    sentences_each = max(1, SENTENCES // len(chosen))
    ends = {title.start: after.start for title, after in pairwise(titles)}
    for number, title in enumerate(chosen[: 2 * SECTIONS_MAX]):
        body = text[title.end : ends.get(title.start, len(text))]
        inner = next((one for one in titles if one.start == ends.get(title.start)), None)
        if not body.strip() and inner and len(inner.path) > len(title.path):  # a heading right below
            body = text[inner.end : ends.get(inner.start, len(text))]
        lines = _lines(body, sentences_each) if number < SECTIONS_MAX else []
        yield _shortened(title.path[-1], LINE_CHARACTERS), " ".join(lines)


def _of_paragraphs(text: str, path: str) -> Summary:
    """Return the summary of a text without sections: how it begins, and paragraphs at even distances."""
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    lead = _line(paragraphs[0], LEAD_CHARACTERS, most=2 if paragraphs[1:] else 4) if paragraphs else ""
    rest = paragraphs[1:]
    lines = (_line(part, LINE_CHARACTERS) for part in rest[:: max(1, -(-len(rest) // SENTENCES))])
    title = _shortened(PurePosixPath(path).stem, LINE_CHARACTERS)
    return Summary(title, lead, tuple(("", line) for line in lines if line))


def _lines(body: str, most: int) -> list[str]:
    """Return the first sentences of the paragraphs of a section, those that are no code before those that are."""
    seen = body[: _SEEN_CHARACTERS * most]
    prose = [part for part in re.split(r"\n\s*\n", _FENCE.sub("\n\n", seen)) if part.strip()]
    each = max(1, min(5, most // (len(prose) + 1)))
    found = [_line(part, LINE_CHARACTERS * min(2, each), most=each) for part in prose[:most]]
    return [line for line in found if line] or [line for line in [_line(seen, LINE_CHARACTERS)] if line]


def _line(body: str, most_characters: int, *, most: int = 1) -> str:
    """Return how a paragraph begins: a sentence or *most*, the items of a list, or the first column of a table."""
    lines = [line for line in body[:_SEEN_CHARACTERS].split("\n") if line.strip() and not _FENCE_LINE.match(line)]
    body = "\n".join(lines)
    if not lines:
        return ""
    if _ROW.match(lines[0]):
        shown = _column(lines)
    elif _ITEM.match(lines[0]):
        items = (body[start:end] for start, end in sentences(body))
        shown = "; ".join([one_line(_ITEM.sub("", item)) for item in items if _ITEM.match(item)][:CELLS_MAX])
    else:
        shown = one_line(" ".join(body[start:end] for start, end in sentences(body)[:most]))
    return _shortened(_LINK.sub(r"\1", shown), most_characters)


def _column(lines: Sequence[str]) -> str:
    """Return the header of a table's first column, and its first cells."""
    rows = [[one_line(cell) for cell in line.strip().strip("|").split("|")] for line in lines if _ROW.match(line)]
    cells = list(dict.fromkeys(row[0] for row in rows if row[0].strip(":- ")))
    return f"{cells[0]}: {', '.join(cells[1 : CELLS_MAX + 1])}" if len(cells) > 1 else "".join(cells)


def _shortened(text: str, most: int) -> str:
    """Return a text cut at a word, and marked where it was cut."""
    if len(text) <= most:
        return text
    return text[: most - 1].rsplit(" ", 1)[0].rstrip() + "…"
