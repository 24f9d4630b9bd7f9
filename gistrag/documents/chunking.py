"""Document → chunks: pieces of its text that begin and end at headings, paragraphs or sentences.

The splitter finds the boundaries. This module bounds its work, counts tokens with the base model's tokenizer, and
joins pieces that are too small to be useful alone. ``document.text[start:end]`` is exactly the text of a chunk; chunks
do not overlap, and only white space lies between them.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import regex
import tokenizers
from semantic_text_splitter import MarkdownSplitter, TextSplitter

from gistrag.documents.discovery import Document
from gistrag.documents.headings import Title, titles_in

PLAIN_KINDS = frozenset({"text", "code", "table", "json", "pdf", "rtf"})  # all other kinds have Markdown headings
_SEGMENT_CHARS = 64  # characters of a segment per token of a chunk: about 16 chunks of prose
_LONG_CHARS = 8  # characters per token of a chunk, more than prose has: a longer text is mostly too long
_STOP = re.compile("[\n.!?。．！？]")  # where a sentence may end
_SEAM = 2  # tokens of the white space between two joined pieces
_LETTER = regex.compile(r"\X")  # with its accents, and emojis of several characters
_LETTER_CHARS = 64  # more than a letter has
_SLACK = 16  # the most tokens that a cut inside of a practical word adds


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One piece of a document.

    Attributes:
        ordinal: number in the document, from 0.
        start: character offset of its first character in the document's text.
        end: offset after its last character.
        text: ``document.text[start:end]``.
        heading: path of the titles above it, outermost first.
        page: page on which it begins, from 1; None if the format has no pages.
        tokens: number of tokens of the text, special tokens read as plain text.
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
    """Splits documents into chunks of at most *chunk_tokens* tokens.

    Args:
        tokenizer: counts the tokens, and is used as it is: it must not truncate, pad, or recognize special tokens in
            text (see `gistrag.model.tokenizer.plain_tokenizer`).
        chunk_tokens: the most tokens of a chunk.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, chunk_tokens: int) -> None:
        self.chunk_tokens = chunk_tokens
        self._small = chunk_tokens // 8  # a piece of at most this size joins a neighbour, for which room is left
        self._tokenizer = tokenizer
        room = chunk_tokens - self._small - _SEAM
        self._prose = TextSplitter.from_callback(self._size, room, trim=False)
        self._markdown = MarkdownSplitter.from_callback(self._size, room, trim=False)

    def split(self, document: Document) -> list[Chunk]:
        """Return the chunks of *document*, in order."""
        titles = titles_in(document.text) if document.kind not in PLAIN_KINDS else []
        spans = self._join(document, self._pieces(document, titles), titles)
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
        """Return the number of tokens of *text*, without tokens that the tokenizer adds at its ends."""
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)  # without offsets, so faster
        return len(encoding)

    def _size(self, text: str) -> int:
        """Return `count`, or for a text that is much too long, any number larger than `chunk_tokens`.

        The splitter asks for the size of the whole rest again and again, so exact counts would take quadratic time.
        """
        chars = _LONG_CHARS * self.chunk_tokens
        while chars < len(text):
            tokens = self.count(text[:chars])
            if tokens > self.chunk_tokens + _SLACK:
                return tokens
            chars *= 2
        return self.count(text)

    def _pieces(self, document: Document, titles: Sequence[Title]) -> Iterator[tuple[int, int]]:
        """Yield (start, end) of each piece of the splitter, without the white space around it."""
        splitter = self._markdown if document.kind not in PLAIN_KINDS else self._prose
        starts = [title.start for title in titles]
        parts = itertools.pairwise([0, *(part.start for part in document.parts if part.start), len(document.text)])
        segments = (span for part in parts for span in self._segments(document.text, starts, part))
        for start, end in segments:
            segment = document.text[start:end]
            for offset, piece in splitter.chunk_indices(segment) if segment.strip() else ():
                if piece.strip():
                    yield _trim(document.text, start + offset, start + offset + len(piece))

    def _segments(self, text: str, titles: Sequence[int], part: tuple[int, int]) -> Iterator[tuple[int, int]]:
        """Yield the segments of a part; short ones where a sentence is long: each chunk costs a look at its rest."""
        long = self.chunk_tokens * _LONG_CHARS
        for start, end in _segments(text, titles, self.chunk_tokens * _SEGMENT_CHARS, part):
            is_long = any(len(sentence) > long for sentence in _STOP.split(text[start:end]))
            yield from _segments(text, titles, long, (start, end)) if is_long else [(start, end)]

    def _join(
        self, document: Document, pieces: Iterable[tuple[int, int]], titles: Sequence[Title]
    ) -> list[tuple[int, int]]:
        """Return the pieces, small ones joined to a neighbour and a heading joined to the text below it."""
        text, parts = document.text, [part.start for part in document.parts]
        starts, ends = {title.start for title in titles}, {title.end for title in titles}
        spans: list[tuple[int, int]] = []
        for start, end in pieces:
            before = spans[-1] if spans else (start, start)
            wanted = before[1] in ends or (
                start not in starts and (self._is_small(text, *before) or self._is_small(text, start, end))
            )
            is_one = bisect.bisect_right(parts, before[0]) == bisect.bisect_right(parts, start)
            if spans and wanted and is_one and self._size(text[before[0] : end]) <= self.chunk_tokens:
                spans[-1] = (before[0], end)
            else:
                spans.append((start, end))
        return spans

    def _is_small(self, text: str, start: int, end: int) -> bool:
        return end - start <= _SEGMENT_CHARS * self._small and self._size(text[start:end]) <= self._small


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Return (start, end) without the white space around the text, but with the indentation of its first line."""
    piece = text[start:end]
    first = end - len(piece.lstrip())
    line_end = text.rfind("\n", max(start - 1, 0), first)
    begin = line_end + 1 if line_end >= 0 or start == 0 else first
    return begin, start + len(piece.rstrip())


def _segments(text: str, titles: Sequence[int], size: int, part: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the consecutive segments of a part of *text*, each of at most *size* characters."""
    start, last = part
    while last - start > size:
        end = _cut(text, titles, start + size // 2, start + size)
        yield start, end
        start = end
    yield start, last


def _cut(text: str, titles: Sequence[int], low: int, high: int) -> int:
    """Return where to cut between *low* and *high*: at a heading, blank line, line end, space, else between letters."""
    at = bisect.bisect_right(titles, high)
    if at and titles[at - 1] > low:
        return titles[at - 1]
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, low, high)
        if found >= 0:
            return found + len(mark)
    *_, last = _LETTER.finditer(text, high - _LETTER_CHARS, high + 1)  # the one of which *high* would be a part
    return max(int(last.start()), low + 1)


def _heading(text: str, titles: Sequence[Title], start: int) -> tuple[str, ...]:
    """Return the heading path at *start*, including the headings with which the chunk begins."""
    at = bisect.bisect_right(titles, start, key=lambda title: title.start)
    while 0 < at < len(titles) and titles[at - 1].start >= start:
        if text[titles[at - 1].end : titles[at].start].strip():
            break
        at += 1
    return titles[at - 1].path if at else ()
