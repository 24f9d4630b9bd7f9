r"""Text → sentences: what one points at to show where an answer stands.

A sentence ends at its mark, at a blank line, and at the end of a heading, a list item or a table row. The end of a line
of prose ends it only where the next word would have fitted on that line: text that was wrapped is one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

Span = tuple[int, int]

_END = re.compile(r"[.!?…]+[\"'”’»)\]*_`]*(?=\s)|[。！？]+[」』）”]*|(?<=[다요까죠])[.!?]+(?=[가-힣])")
_DATE = re.compile(r"(?:19|20)\d\d\. ?\d{1,2}\.(?: ?\d{1,2}\.)?")
"""A date as Korean writes it, 2026. 1. 13., whose full stops end nothing."""
_HANGUL = re.compile("[\uac00-\ud7a3]")
_STRUCTURE = re.compile(r"\s*(?:[|#>]|[-*+•]\s|\(?\w{1,3}[.)]\s|```|~~~|={3,}|-{3,})")
"""How a line begins that is a heading, a row, an item or a fence."""
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“])(?:\w|[A-Z]\.[A-Z]|e\.g|i\.e|Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|vs|cf|ca|approx|etc|No|Nos|Art|Sec|Fig|Eq|pp|"
    r"Vol|Inc|Ltd|Co|Gen|Col|Capt|Lt|Rev|Hon|Gov|Sen|Rep|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.$"
)


def sentences(text: str) -> list[Span]:
    r"""Return (start, end) of each sentence of a text, in order, without the white space around them.

    >>> text = "It has 3 modes. See e.g. the\nmanual.\n\n- gist\n- text"
    >>> [text[start:end] for start, end in sentences(text)]
    ['It has 3 modes.', 'See e.g. the\nmanual.', '- gist', '- text']
    """
    return [span for block in _blocks(text) for span in _sentences(text, *block)]


def _blocks(text: str) -> Iterator[Span]:
    """Yield (start, end) of each paragraph, heading, item and row."""
    lines = [match.span() for match in re.finditer(r"^.*$", text, re.MULTILINE)]
    begin: int | None = None
    width = 0
    for (start, end), after in zip(lines, [*lines[1:], None], strict=True):
        line = text[start:end]
        if begin is None:
            begin, width = start, _width(text, start)
        following = text[slice(*after)] if after else ""
        if not after or _ends_block(line, following, width):
            yield begin, end
            begin = None


def _width(text: str, start: int) -> int:
    """Return the length of the longest line of the paragraph that begins at *start*."""
    end = re.compile(r"\n\s*\n|\Z").search(text, start)
    return max(map(len, text[start : end.start() if end else len(text)].split("\n")))


def _ends_block(line: str, following: str, width: int) -> bool:
    """Return whether nothing goes on from a line to the *following* one."""
    if not line.strip() or not following.strip() or _STRUCTURE.match(following):
        return True
    if re.match(r"\s*[|#]", line):
        return True
    first = following.split(maxsplit=1)[0]
    return len(line.rstrip()) + 1 + len(first) <= width


def _sentences(text: str, start: int, end: int) -> Iterator[Span]:
    """Yield (start, end) of the sentences of a block."""
    begin = start
    in_dates = {stop for date in _DATE.finditer(text, start, end) for stop in range(*date.span())}
    for match in _END.finditer(text, start, end):
        after = text[match.end() : end].lstrip()[:1]
        is_korean = bool(_HANGUL.match(text[match.start() - 1 : match.start()]))  # which has no capitals
        if match.start() in in_dates or (after.islower() and not is_korean):
            continue
        if after and not _ABBREVIATION.search(text[begin : match.end()]):
            yield from _stripped(text, begin, match.end())
            begin = match.end()
    yield from _stripped(text, begin, end)


def _stripped(text: str, start: int, end: int) -> Iterator[Span]:
    """Yield the span without the white space around it; nothing where nothing is left."""
    piece = text[start:end]
    if piece.strip():
        first = start + len(piece) - len(piece.lstrip())
        yield first, start + len(piece.rstrip())
