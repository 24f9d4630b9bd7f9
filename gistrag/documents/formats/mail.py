"""Mail: single messages (.eml) and mailboxes (.mbox), by the standard library.

A message becomes its subject as a heading, who wrote to whom and when, its body, and its attachments: each is named,
and the text of those that have a reader follows. Of a body in several forms the plain text is read, else the web page.

Limits keep a hostile message cheap: so many attachments, so many messages inside of messages.
"""

from __future__ import annotations

import email
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.errors import HeaderParseError, MessageError
from email.header import decode_header
from email.message import Message
from pathlib import PurePath
from typing import Any

from gistrag.documents.encodings import guessed
from gistrag.documents.formats.web_page import html_blocks
from gistrag.documents.markup import Block, join, prose
from gistrag.documents.metadata import known
from gistrag.documents.text import Part, Text, clean, one_line, require_length
from gistrag.errors import DocumentError

NESTED_MAX = 5
ATTACHMENTS_MAX = 100
_SUPERSETS = {"euc-kr": "cp949", "ks_c_5601-1987": "cp949", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932"}
_UNSURE = frozenset({"", "us-ascii", "ascii", "iso-8859-1", "windows-1252"})  # what programs say that do not know
_FROM = re.compile(rb"(?m)^From .*\r?\n?")
_LONG_FORMS = frozenset({"html", "docx", "pptx", "odt", "xlsx", "epub", "hwpx", "hwp", "rtf", "notebook", "markdown"})

AttachmentReader = Callable[[bytes, str], Text | None]
"""Returns the text of an attachment from its bytes and its name, None where no reader knows it."""


def read_eml(data: bytes, read: AttachmentReader) -> Text:
    """Return a message, with date, sender, recipients and subject as metadata."""
    message = _parsed(data)
    if not message.keys():
        raise DocumentError("not a mail: it has no header")
    return Text(text=join(_Letter(read).blocks(message)), kind="mail", metadata=_metadata(message))


def read_mbox(data: bytes, read: AttachmentReader) -> Text:
    """Return the messages of a mailbox, each a part with metadata of its own."""
    if not data.startswith(b"From "):
        raise DocumentError("not a mailbox: it does not begin with a line From")
    texts: list[str] = []
    parts: list[Part] = []
    start = 0
    for raw in _messages(data):
        message = _parsed(raw)
        text = join(_Letter(read).blocks(message))
        if text.strip():
            parts.append(Part(start, _metadata(message)))
            texts.append(text)
            start += len(text) + 2
            require_length(start)
    return Text(text="\n\n".join(texts), kind="mail", parts=tuple(parts))


def _messages(data: bytes) -> Iterator[bytes]:
    """Yield the messages of a mailbox: each begins with a line From, at the start or below a blank line."""
    marks = [found for found in _FROM.finditer(data) if found.start() == 0 or _is_below_blank(data, found.start())]
    for mark, after in zip(marks, [*marks[1:], None], strict=True):
        yield re.sub(rb"(?m)^>(>*From )", rb"\1", data[mark.end() : after.start() if after else len(data)])


def _is_below_blank(data: bytes, at: int) -> bool:
    return data[max(0, at - 4) : at].replace(b"\r", b"").endswith(b"\n\n")


def _parsed(data: bytes) -> Message[str, str]:
    try:
        return email.message_from_bytes(data)
    except (MessageError, ValueError, LookupError, TypeError, IndexError, RecursionError) as error:
        raise DocumentError(f"not a mail that can be read ({type(error).__name__})") from None


def _metadata(message: Message[str, str]) -> dict[str, str]:
    return known({name: header(message, name) for name in ("date", "from", "to", "subject")})


def header(message: Message[str, str], name: str) -> str:
    """Return a header in words; one that is encoded wrongly as it stands."""
    raw: Any = message.get(name, "")
    try:
        pieces = decode_header(raw)
        text = "".join(piece if isinstance(piece, str) else decoded(piece, charset or "") for piece, charset in pieces)
    except (HeaderParseError, LookupError, ValueError, TypeError):
        text = str(raw)
    return one_line(clean(text.encode("utf-8", "ignore").decode()))


def decoded(data: bytes, charset: str) -> str:
    """Return bytes as text, by what is said of them if that holds, else by what they are; "" if nobody knows.

    >>> decoded("크레인 세 대를 수리하기로 했다.".encode("cp949"), "utf-8")
    '크레인 세 대를 수리하기로 했다.'
    """
    said = charset.lower().strip("\"' ")
    given = "" if said == "unknown-8bit" else _SUPERSETS.get(said, said)
    tried = ["utf-8", "?", given, "latin-1"] if given in _UNSURE else [given, "utf-8", "?"]
    for name in tried:
        encoding = guessed(data) if name == "?" else name
        try:
            if encoding:
                return data.decode(encoding)
        except (UnicodeError, LookupError, ValueError):
            continue
    return ""


@dataclass
class _Letter:
    """What becomes of one message: blocks of text, and how many attachments may still be read."""

    read: AttachmentReader
    left: int = ATTACHMENTS_MAX
    names: list[str] = field(default_factory=list)

    def blocks(self, message: Message[str, str], depth: int = 0) -> Iterator[Block]:
        """Yield the text of a message, and of those inside of it."""
        subject = header(message, "subject")
        yield Block(("#" if not depth else "##") + " " + (subject or "(no subject)"))
        lines = [
            f"{name.capitalize()}: {text}" for name in ("from", "to", "cc", "date") if (text := header(message, name))
        ]
        yield Block(prose("\n".join(lines)))
        yield from self.content(message, depth)

    def content(self, message: Message[str, str], depth: int) -> Iterator[Block]:
        """Yield the body of a part, or what it is attached as."""
        kind = message.get_content_type()
        if kind == "message/rfc822" and message.is_multipart():
            yield from self.inner(message, depth)
        elif message.is_multipart():
            yield from self.several(message, depth)
        elif message.get_content_disposition() == "attachment" or (message.get_filename() and kind[:5] != "text/"):
            yield from self.attachment(message)
        elif kind in ("text/plain", "text/html"):
            yield from self.body(message, kind)
        elif message.get_filename():
            yield from self.attachment(message)

    def inner(self, message: Message[str, str], depth: int) -> Iterator[Block]:
        """Yield the messages that a part holds."""
        for inner in message.get_payload():
            if depth >= NESTED_MAX:
                yield Block(f"(a message inside of {NESTED_MAX} others is not read)")
            elif isinstance(inner, Message):
                yield from self.blocks(inner, depth + 1)

    def several(self, message: Message[str, str], depth: int) -> Iterator[Block]:
        """Yield the parts of a message, of alternatives the first that is plain text, or else the last."""
        parts = [part for part in message.get_payload() if isinstance(part, Message)]
        if message.get_content_subtype() == "alternative" and parts:
            plain = [part for part in parts if part.get_content_type() == "text/plain"]
            parts = [next((part for part in plain if list(self.body(part, "text/plain"))), parts[-1])]
        for part in parts:
            yield from self.content(part, depth)

    def body(self, message: Message[str, str], kind: str) -> Iterator[Block]:
        """Yield the text of a body."""
        data = message.get_payload(decode=True)
        text = decoded(data, _charset(message)) if isinstance(data, bytes) else ""
        if data and not text:
            yield Block("(this part is in an unknown encoding)")
        elif kind == "text/html":
            try:
                yield from map(_below, html_blocks(text))
            except DocumentError as error:  # one message of a mailbox, which has others
                yield Block(f"(not read: {error})")
        elif text.strip():
            yield Block(prose(clean(text).strip()))

    def attachment(self, message: Message[str, str]) -> Iterator[Block]:
        """Yield the name of an attachment, and its text if there is a reader for it."""
        name = PurePath(_filename(message)).name or "unnamed"
        data = message.get_payload(decode=True)
        self.left -= 1
        yield Block(f"## Attachment: {name}")
        try:
            if self.left < 0:
                raise DocumentError(f"one of more than {ATTACHMENTS_MAX}")
            text = self.read(data, name) if isinstance(data, bytes) else None
        except DocumentError as error:
            yield Block(f"(not read: {error})")
        else:
            if text:
                yield _below(Block(text.text)) if text.kind in _LONG_FORMS else Block(prose(text.text))


def _below(block: Block) -> Block:
    """Return a block whose headings are two levels further down, below the subject and the name of an attachment."""
    return Block(re.sub(r"(?m)^(#{1,4}) ", r"##\1 ", block.text), block.kind)


def _charset(message: Message[str, str]) -> str:
    try:
        return str(message.get_param("charset") or "")
    except (ValueError, TypeError, LookupError):
        return ""


def _filename(message: Message[str, str]) -> str:
    """Return the name of an attachment in words."""
    try:
        raw = message.get_filename() or ""
        pieces = decode_header(raw)
        name = "".join(piece if isinstance(piece, str) else decoded(piece, charset or "") for piece, charset in pieces)
    except (HeaderParseError, LookupError, ValueError, TypeError):
        return ""
    return one_line(clean(name.encode("utf-8", "ignore").decode()))[:200]
