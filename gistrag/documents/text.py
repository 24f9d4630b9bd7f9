"""The text of a document: what every reader returns, its limit on length, and how bytes become characters.

`decode` knows UTF-8, and UTF-16 with a byte order mark; `gistrag.documents.encodings` guesses others where it is sure.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from gistrag.errors import DocumentError

Kind = Literal[
    "markdown", "text", "code", "html", "notebook", "table", "json", "pdf",
    "docx", "pptx", "xlsx", "odt", "epub", "rtf", "hwpx", "hwp", "mail",
]  # fmt: skip

TEXT_CHARS_MAX = 64 * 2**20


@dataclass(frozen=True)
class Part:
    """A part of a document that has metadata of its own, such as a message of a mailbox.

    Attributes:
        start: character offset at which it begins; it ends where the next part does, or the text.
        metadata: see `gistrag.documents.metadata`.
    """

    start: int
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Text:
    r"""The text of a file.

    Attributes:
        text: in Unicode's form NFC, never blank, no NUL, no unpaired surrogates, lines end in ``\n``, at most
            `TEXT_CHARS_MAX` characters.
        kind: kind of the reader; decides how the text is cut into chunks.
        pages: character offset at which each page begins; empty where the format has none.
        metadata: what is known of the whole document, see `gistrag.documents.metadata`.
        parts: those with metadata of their own, in order, the first at 0; a chunk never spans two of them.
    """

    text: str
    kind: Kind
    pages: tuple[int, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()


def require_length(chars: int) -> None:
    """Return if a document may have *chars* characters."""
    if chars > TEXT_CHARS_MAX:
        raise DocumentError(f"too long: {chars:,} characters or more of text; the limit is {TEXT_CHARS_MAX:,}")


def clean(text: str) -> str:
    """Return *text* without the control characters that parsers let through.

    Raises:
        DocumentError: an unpaired surrogate, which no file can store.
    """
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffe\uffff]", "", text).replace("\r\n", "\n")
    if re.search(r"[\ud800-\udfff]", text):
        raise DocumentError("broken encoding: an unpaired surrogate")
    return text.replace("\r", "\n")


def composed(text: Text) -> Text:
    """Return a text in Unicode's form NFC, with the offsets of its pages and parts; macOS writes NFD."""
    if unicodedata.is_normalized("NFC", text.text):
        return text
    cuts = sorted({0, *text.pages, *(part.start for part in text.parts)})
    pieces = [nfc(text.text[start:end]) for start, end in zip(cuts, [*cuts[1:], len(text.text)], strict=True)]
    moved = dict(zip(cuts, itertools.accumulate(map(len, pieces[:-1]), initial=0), strict=True))
    return replace(
        text,
        text="".join(pieces),
        pages=tuple(moved[page] for page in text.pages),
        parts=tuple(replace(part, start=moved[part.start]) for part in text.parts),
    )


def nfc(text: str) -> str:
    """Return text in Unicode's form NFC, but runs of more than `_MARKS_MAX` combining marks as they are.

    No script has such runs, and their normalization takes quadratic time: a minute for 40,000 of them.
    """
    if unicodedata.is_normalized("NFC", text):
        return text
    pieces = _long_runs().split(text)
    return "".join(one if number % 2 else unicodedata.normalize("NFC", one) for number, one in enumerate(pieces))


_MARKS_MAX = 30  # as in the stream-safe text format of Unicode's Annex 15


@functools.cache
def _long_runs() -> re.Pattern[str]:
    marks = "".join(chr(code) for code in range(sys.maxunicode + 1) if unicodedata.combining(chr(code)))
    return re.compile(f"([{re.escape(marks)}]{{{_MARKS_MAX + 1},}})")


def one_line(text: str) -> str:
    """Return *text* with each run of white space as one space."""
    return " ".join(text.split())


_CONTINUATION = bytes(range(0x80, 0xC0))  # UTF-8 bytes that continue a character


def decode(data: bytes) -> str:
    r"""Return *data* as text with ``\n`` line ends: UTF-8, or the encoding of a byte order mark.

    Raises:
        DocumentError: another encoding, its cause a UnicodeDecodeError, or binary data. No byte is replaced by U+FFFD.
    """
    marks = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8")
    if encoding != "utf-16" and b"\0" in data:
        raise DocumentError(f"binary: a zero byte at offset {data.index(0):,}")
    if encoding != "utf-16":  # counted before decoding, which takes up to four bytes a character
        require_length(len(data.translate(None, _CONTINUATION)))
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"not {encoding.removesuffix('-sig').upper()} text at byte {error.start:,} ({error.reason}); "
            "save it as UTF-8"
        ) from error
    if "\0" in text:
        raise DocumentError(f"binary: a zero character at offset {text.index(chr(0)):,}")
    require_length(len(text))
    return text.replace("\r\n", "\n").replace("\r", "\n")
