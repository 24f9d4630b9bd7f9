"""Document → chunks: pieces of its text that begin and end where sense does.

The splitter finds the boundaries (headings, paragraphs, sentences, words); this module bounds its work, counts with
the generator's own tokenizer, and joins what came out too small to mean anything. ``document.text[start:end]`` is the
text of a chunk, exactly; chunks do not overlap, and what no chunk covers is white space.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import tokenizers
from semantic_text_splitter import MarkdownSplitter, TextSplitter

from gistrag.documents.discovery import Document

MARKDOWN_KINDS = frozenset({"markdown", "html", "notebook", "docx"})
_SEGMENT_CHARS = 64  # characters of a segment per token of a chunk: about 16 chunks of prose
_LONG_CHARS = 8  # characters per token of a chunk: more than prose has, so one count of these tells that it is too long
_SEAM = 2  # tokens of the white space between two pieces that are joined
_SLACK = 16  # tokens that a cut in the middle of a word can add at most, for all practical words


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One piece of a document.

    Attributes:
        ordinal: its number in the document, from 0.
        start: character offset of its first character in the document's text.
        end: offset after its last character.
        text: ``document.text[start:end]``.
        heading: the titles it stands under, outermost first.
        page: page on which it begins, from 1; None where the format has no pages.
        tokens: how many tokens of the generator it takes, special tokens read as plain text.
    """

    ordinal: int
    start: int
    end: int
    text: str
    heading: tuple[str, ...]
    page: int | None
    tokens: int

    @property
    def search_text(self) -> str:
        """The text that is embedded: the chunk below its headings, which often name what it is about.

        >>> chunk = Chunk(ordinal=0, start=0, end=3, text="One", heading=("Oil", "Gas"), page=None, tokens=1)
        >>> chunk.search_text.splitlines()
        ['Oil > Gas', 'One']
        """
        return "\n".join((" > ".join(self.heading), self.text)).strip()


class Chunker:
    """Cuts documents into chunks of at most *chunk_tokens* tokens of *tokenizer*."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self._small = chunk_tokens // 8  # what is no larger joins a neighbour, for which room is left
        self._tokenizer = _plain(tokenizer)
        room = chunk_tokens - self._small - _SEAM
        self._prose = TextSplitter.from_callback(self._size, room, trim=False)
        self._markdown = MarkdownSplitter.from_callback(self._size, room, trim=False)

    def split(self, document: Document) -> list[Chunk]:
        """Return the chunks of *document*, in order."""
        titles = _titles(document.text) if document.kind in MARKDOWN_KINDS else []
        spans = self._join(document.text, self._pieces(document, titles), titles)
        return [
            Chunk(
                ordinal=ordinal,
                start=start,
                end=end,
                text=document.text[start:end],
                heading=_heading(document.text, titles, start),
                page=bisect.bisect_right(document.pages, start) or None,
                tokens=self.count(document.text[start:end]),
            )
            for ordinal, (start, end) in enumerate(spans)
        ]

    def count(self, text: str) -> int:
        """Return how many tokens *text* takes, with nothing added and special tokens read as plain text."""
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)  # fast: without offsets
        return len(encoding)

    def _size(self, text: str) -> int:
        """Return `count`, or for text much too long only something larger than a chunk: the splitter asks no more.

        It asks for the size of everything that is left over and over, so without this a long line takes quadratic time.
        """
        chars = _LONG_CHARS * self.chunk_tokens
        while chars < len(text):
            tokens = self.count(text[:chars])
            if tokens > self.chunk_tokens + _SLACK:
                return tokens
            chars *= 2
        return self.count(text)

    def _pieces(self, document: Document, titles: Sequence[_Title]) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of each piece the splitter makes, without the white space around it."""
        splitter = self._markdown if document.kind in MARKDOWN_KINDS else self._prose
        starts = [title.start for title in titles]
        for start, end in _segments(document.text, starts, self.chunk_tokens * _SEGMENT_CHARS):
            segment = document.text[start:end]
            for offset, piece in splitter.chunk_indices(segment) if segment.strip() else ():
                if piece.strip():
                    yield _trim(document.text, start + offset, start + offset + len(piece))

    def _join(self, text: str, pieces: Iterable[tuple[int, int]], titles: Sequence[_Title]) -> list[tuple[int, int]]:
        """Return the pieces with the small ones joined to a neighbour; a bare heading goes to what it heads."""
        starts, ends = {title.start for title in titles}, {title.end for title in titles}
        spans: list[tuple[int, int]] = []
        for start, end in pieces:
            before = spans[-1] if spans else (start, start)
            wanted = before[1] in ends or (
                start not in starts and (self._is_small(text, *before) or self._is_small(text, start, end))
            )
            if spans and wanted and self._size(text[before[0] : end]) <= self.chunk_tokens:
                spans[-1] = (before[0], end)
            else:
                spans.append((start, end))
        return spans

    def _is_small(self, text: str, start: int, end: int) -> bool:
        return end - start <= _SEGMENT_CHARS * self._small and self._size(text[start:end]) <= self._small


@dataclass(frozen=True)
class _Title:
    """A heading line: where it starts and ends, its level, and all titles from the outermost down to it."""

    start: int
    end: int
    path: tuple[str, ...]


def _plain(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a copy that neither cuts nor pads, and to which ``<|im_start|>`` is seven characters of text or so."""
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Return (start, end) without the white space around it, but with the indentation of a first line."""
    piece = text[start:end]
    first = end - len(piece.lstrip())
    line_end = text.rfind("\n", max(start - 1, 0), first)
    begin = line_end + 1 if line_end >= 0 or start == 0 else first
    return begin, start + len(piece.rstrip())


def _segments(text: str, titles: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of parts of at most *size* characters that make up *text*."""
    start = 0
    while len(text) - start > size:
        end = _cut(text, titles, start + size // 2, start + size)
        yield start, end
        start = end
    yield start, len(text)


def _cut(text: str, titles: Sequence[int], low: int, high: int) -> int:
    """Return the best place to cut between *low* and *high*: a heading, a blank line, a line end, a space, anywhere."""
    at = bisect.bisect_right(titles, high)
    if at and titles[at - 1] > low:
        return titles[at - 1]
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, low, high)
        if found >= 0:
            return found + len(mark)
    return high


def _titles(text: str) -> list[_Title]:
    r"""Return the headings of a markdown text, in order; those in code fences and front matter are none.

    >>> [title.path for title in _titles("# A\n```\n# no\n```\n## B\n# C #")]
    [('A',), ('A', 'B'), ('C',)]
    """
    found: list[_Title] = []
    open_titles: list[tuple[int, str]] = []
    for start, end, level, title in _heading_lines(text):
        while open_titles and open_titles[-1][0] >= level:
            open_titles.pop()
        open_titles.append((level, title))
        found.append(_Title(start, end, tuple(name for _, name in open_titles)))
    return found


TITLE_CHARACTERS = 200

_LINE = re.compile(
    r"^(?:(?P<fence> {0,3}(?:`{3,}(?=[^`\n]*$)|~{3,})).*"
    r"|(?P<marks>#{1,6})[ \t]+(?P<title>\S.*)"
    r"|(?P<over>(?![-+*>|#=`~\s]).*)\n(?P<under>=+|-{2,})[ \t]*)$",
    re.MULTILINE,
)


def _heading_lines(text: str) -> Iterator[tuple[int, int, int, str]]:
    """Yield (start, end, level, title) of every heading line."""
    front = re.match(r"---\n(?:.*\n)*?---\n", text)
    fence = ""
    for match in _LINE.finditer(text, front.end() if front else 0):
        mark = (match["fence"] or "").strip()
        end = match.start() + len(match[0].rstrip())
        if fence:
            fence = "" if mark.startswith(fence) and match[0].strip() == mark else fence
        elif mark:
            fence = mark
        elif len(match["over"] or match["title"] or "") > TITLE_CHARACTERS:
            continue  # a paragraph that happens to look like one; it would be repeated before every chunk
        elif match["over"]:
            yield match.start(), end, 1 if match["under"][0] == "=" else 2, match["over"].strip()
        elif match["marks"]:
            yield match.start(), end, len(match["marks"]), _bare(match["title"])


def _bare(title: str) -> str:
    """Return an ATX title without the marks that may close it."""
    words, _, last = title.strip().rpartition(" ")
    return words.strip() if words and not last.strip("#") else title.strip()


def _heading(text: str, titles: Sequence[_Title], start: int) -> tuple[str, ...]:
    """Return the titles in force at *start*, counting those with which the chunk begins."""
    at = bisect.bisect_right(titles, start, key=lambda title: title.start)
    while 0 < at < len(titles) and titles[at - 1].start >= start:
        if text[titles[at - 1].end : titles[at].start].strip():
            break
        at += 1
    return titles[at - 1].path if at else ()
