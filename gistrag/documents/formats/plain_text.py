"""Plain text, source code, Markdown and reStructuredText."""

from __future__ import annotations

import re

from gistrag.documents.metadata import known
from gistrag.documents.text import Text, decode


def read_text(data: bytes) -> Text:
    """Return the text as it is."""
    return Text(text=decode(data), kind="text")


def read_code(data: bytes) -> Text:
    """Return the source code as it is."""
    return Text(text=decode(data), kind="code")


def read_markdown(data: bytes) -> Text:
    """Return the Markdown as it is, with the title, author and date of its front matter as metadata."""
    text = decode(data)
    return Text(text=text, kind="markdown", metadata=_front_matter(text))


_FRONT_MATTER = re.compile(r"---[^\S\n]*\n(.{0,20000}?)\n(?:---|\.\.\.)[^\S\n]*(?:\n|\Z)", re.DOTALL)
_ENTRY = re.compile(r"(?m)^(title|author|date):[^\S\n]*(?:\"([^\"\n]*)\"|'([^'\n]*)'|([^\n#]*))")


def _front_matter(text: str) -> dict[str, str]:
    """Return the entries of the front matter that are one line of text; lists and blocks are left out."""
    match = _FRONT_MATTER.match(text)
    entries = _ENTRY.findall(match[1]) if match else []
    return known(
        {name: "".join(values) for name, *values in entries if not "".join(values).startswith(("[", "{", "|", ">"))}
    )


def read_rst(data: bytes) -> Text:
    r"""Return reStructuredText with its underlined titles as Markdown headings; everything else stays as it is.

    >>> read_rst(b"Guide\n=====\n\nFirst steps\n-----------\nGo.").text
    '# Guide\n\n## First steps\nGo.'
    """
    lines = decode(data).split("\n")
    ranks: dict[str, int] = {}  # the order in which title styles appear is their rank
    out: list[str] = []
    at = 0
    while at < len(lines):
        style, title, used = _rst_title(lines, at)
        out.append(f"{'#' * min(ranks.setdefault(style, len(ranks) + 1), 6)} {title}" if style else lines[at])
        at += used
    return Text(text="\n".join(out), kind="markdown")


def _rst_title(lines: list[str], at: int) -> tuple[str, str, int]:
    """Return (style, title, lines used) of the title that begins at line *at*; style is "" where none does."""
    line, below, last = (*lines[at : at + 3], "", "")[:3]
    if at and lines[at - 1].strip():
        return "", "", 1
    if _is_rule(line, below.strip()) and line == last:
        return line[0] * 2, below.strip(), 3
    if not line[:1].isspace() and _is_rule(below, line) and not _is_rule(line, "x"):
        return below[0], line.strip(), 2
    return "", "", 1


def _is_rule(line: str, title: str) -> bool:
    line = line.rstrip()
    return bool(title.strip()) and len(line) >= len(title.rstrip()) and bool(re.fullmatch(r"([^\w\s])\1+", line))
