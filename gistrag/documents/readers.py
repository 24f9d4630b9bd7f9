"""Which reader reads which file: `READERS`, from a file suffix to a function that turns bytes into a `Text`.

To add a format:

1. Write ``read_<format>(data: bytes) -> Text`` in a module of `gistrag.documents.formats`. Headings become Markdown
   ``#`` lines (`gistrag.documents.markup` helps), and bad input raises a `DocumentError` with the reason.
2. Name its kind in `gistrag.documents.text.Kind`, and add its suffix to `READERS` below.
3. Add a row to docs/documents.md and a test to tests/documents/test_readers.py.

Not here: which files are documents (`gistrag.documents.discovery`), the process that parses hostile files
(`gistrag.documents.parser_worker`), OCR.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import PurePath

from gistrag.documents.encodings import recoded
from gistrag.documents.formats.book import read_epub
from gistrag.documents.formats.hangul import read_hwp
from gistrag.documents.formats.mail import read_eml, read_mbox
from gistrag.documents.formats.notebook import read_notebook
from gistrag.documents.formats.office import read_hwpx, read_odt, read_pptx
from gistrag.documents.formats.pdf import read_pdf
from gistrag.documents.formats.plain_text import read_code, read_markdown, read_rst, read_text
from gistrag.documents.formats.records import read_json, read_jsonl, read_table
from gistrag.documents.formats.rich_text import read_rtf
from gistrag.documents.formats.spreadsheet import read_xlsx
from gistrag.documents.formats.web_page import read_html
from gistrag.documents.formats.word import read_docx
from gistrag.documents.text import Text, composed, require_length
from gistrag.errors import DocumentError

FILE_BYTES_MAX = 256 * 2**20

Reader = Callable[[bytes], Text]

_CODE = (
    "py pyi pyx js mjs cjs jsx ts tsx java kt kts scala c cc cpp cxx h hh hpp hxx cu cs go rs rb php pl pm lua r "
    "jl swift m mm dart ex exs erl hs ml fs clj el lisp vim sh bash zsh fish ps1 bat sql proto graphql css scss "
    "less vue svelte tf cmake gradle toml yaml yml ini cfg conf properties dockerfile mk"
)
READERS: Mapping[str, Reader] = {
    **{f".{suffix}": read_code for suffix in _CODE.split()},
    **dict.fromkeys((".txt", ".text", ".log", ".tex", ".org", ".adoc", ".xml", ".srt", ".vtt"), read_text),
    **dict.fromkeys((".md", ".markdown", ".mdx", ".qmd", ".rmd"), read_markdown),
    **dict.fromkeys((".html", ".htm", ".xhtml"), read_html),
    **dict.fromkeys((".csv", ".tsv"), read_table),
    **dict.fromkeys((".jsonl", ".ndjson"), read_jsonl),
    ".rst": read_rst,
    ".ipynb": read_notebook,
    ".json": read_json,
    ".pdf": read_pdf,
    ".docx": read_docx,
    ".pptx": read_pptx,
    ".xlsx": read_xlsx,
    ".odt": read_odt,
    ".epub": read_epub,
    ".rtf": read_rtf,
    ".hwpx": read_hwpx,
    ".hwp": read_hwp,
    ".eml": lambda data: read_eml(data, _attached),
    ".mbox": lambda data: read_mbox(data, _attached),
}
_CODE_NAMES = "MAKEFILE GNUMAKEFILE DOCKERFILE JENKINSFILE VAGRANTFILE GEMFILE RAKEFILE PROCFILE"
_TEXT_NAMES = "README LICENSE LICENCE COPYING NOTICE AUTHORS CONTRIBUTORS CHANGELOG CHANGES HISTORY NEWS TODO INSTALL"
READERS_BY_NAME: Mapping[str, Reader] = {  # files without a suffix, in capitals
    **dict.fromkeys(_CODE_NAMES.split(), read_code),
    **dict.fromkeys(_TEXT_NAMES.split(), read_text),
}
_WITHOUT_READER = frozenset({".doc", ".ppt", ".odp", ".xls", ".ods", ".msg", ".pst", ".pages", ".key", ".numbers"})


def read(data: bytes, name: str) -> Text:
    r"""Return the text of the file *name* whose bytes are *data*, read in this process.

    Raises:
        DocumentError: the reason, in one line, why the file is not a document.
        Exception: whatever a parser raises on bytes that its author did not expect; call
            `gistrag.documents.parser_worker.guarded_read` to get a `DocumentError` instead.

    >>> read(b"\xef\xbb\xbfone\r\ntwo", "notes.TXT").text
    'one\ntwo'
    """
    if not data:
        raise DocumentError("empty")
    result = composed(_read(data, _reader(name)))
    if not result.text.strip():
        raise DocumentError("empty")
    require_length(len(result.text))
    return result


def _read(data: bytes, reader: Reader) -> Text:
    """Return what a reader makes of *data*, or of the same text as UTF-8 if it is in an encoding that is sure."""
    try:
        return reader(data)
    except DocumentError as error:
        is_text = isinstance(error.__cause__, UnicodeDecodeError)
        text, encoding = recoded(data) if is_text else ("", "")
        if not encoding:
            raise
    result = reader(text.encode())
    return replace(result, metadata={**result.metadata, "encoding": encoding})


def _attached(data: bytes, name: str) -> Text | None:
    """Return the text of an attachment, None where no reader knows it; one that is a mail names only its own."""
    if not is_document(name):
        return None
    if _suffix(name) in (".eml", ".mbox"):
        return (read_eml if _suffix(name) == ".eml" else read_mbox)(data, lambda _data, _name: None)
    return read(data, name)


def is_document(name: str) -> bool:
    """Return whether *name* alone makes the file a document.

    >>> is_document("README"), is_document("a.md"), is_document("a.png")
    (True, True, False)
    """
    return _suffix(name) in READERS or name.upper() in READERS_BY_NAME


def missing_reader(name: str) -> str | None:
    """Return why *name* is skipped if it has the suffix of a well-known document format without a reader, or None."""
    suffix = _suffix(name)
    return f"no reader for {suffix} files; save it as pdf, docx or html" if suffix in _WITHOUT_READER else None


def suffix_of(name: str) -> str:
    """Return the suffix by which a file that no reader knows is counted; ``""`` for one that has none.

    >>> suffix_of("a.PNG"), suffix_of("a"), suffix_of("Dr. No is here")
    ('.png', '', '')
    """
    suffix = _suffix(name)
    return suffix if re.fullmatch(r"\.[\w+~-]{1,16}", suffix) else ""


def _reader(name: str) -> Reader:
    return READERS_BY_NAME.get(name.upper()) or READERS.get(_suffix(name), read_text)


def _suffix(name: str) -> str:
    return PurePath(name).suffix.lower()
