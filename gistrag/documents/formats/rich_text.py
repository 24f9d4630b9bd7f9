"""Rich text files, by the library striprtf; paragraphs and the cells of tables, without headings."""

from __future__ import annotations

import re

from gistrag.documents.metadata import known
from gistrag.documents.text import Text, clean
from gistrag.errors import DocumentError

MISSING = "rtf files need one more package: pip install 'gistrag[office]'"
_INFO = re.compile(r"\{\\(title|author)\s([^{}]{0,2000})\}")
_CHANGED = re.compile(r"\{\\(?:revtim|creatim)\\yr(\d{4})\\mo(\d{1,2})\\dy(\d{1,2})")


def read_rtf(data: bytes) -> Text:
    """Return the text of a rich text file, with title, author and last change as metadata."""
    raw = data.decode("latin-1")  # a format of ASCII, which names its other characters
    if not raw.lstrip().startswith("{\\rtf"):
        raise DocumentError("not an rtf file: it does not begin with {\\rtf")
    changed = _CHANGED.search(raw)
    values = {
        name: _text("{\\rtf1" + _charset(raw) + " " + value + "}") for name, value in _INFO.findall(raw[:100_000])
    }
    date = ".".join(changed.groups()) if changed else ""
    text = re.sub(r"\s*\n\|", " | ", clean(_text(raw)).strip())  # cells of a row on one line
    return Text(text=text, kind="rtf", metadata=known({**values, "date": date}))


def _charset(raw: str) -> str:
    """Return the control word that names the code page of a file."""
    match = re.search(r"\\ansicpg\d+", raw[:1000])
    return match[0] if match else ""


def _text(raw: str) -> str:
    try:
        from striprtf.striprtf import rtf_to_text
    except ModuleNotFoundError:
        raise DocumentError(MISSING) from None
    try:
        return str(rtf_to_text(raw, errors="ignore"))
    except (LookupError, ValueError, TypeError) as error:
        raise DocumentError(f"not an rtf file that can be read ({type(error).__name__})") from None
