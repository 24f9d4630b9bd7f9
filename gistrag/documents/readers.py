"""Bytes of one file → its text, one function per format.

`READERS` maps a file suffix to the function that reads it; adding a format is one function and one line there.
Headings come out as markdown ``#`` lines whatever the format was, so that one rule cuts them all. Tables of records
(csv, json) come out as ``name: value`` lines, so that a piece of a table still says what its numbers are.

Not here: which files are documents (`gistrag.documents.discovery`), the guard around the parsers
(`gistrag.documents.parser_worker`), OCR, page layout, headers and footnotes of docx.
No encoding is guessed: what is not UTF-8, or UTF-16 with its mark, is refused rather than read wrongly.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import threading
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from gistrag.documents.markup import (
    Block,
    clean,
    fence,
    html_blocks,
    join,
    one_line,
    prose,
    require_length,
    table_blocks,
)
from gistrag.errors import DocumentError

Kind = Literal["markdown", "text", "code", "html", "notebook", "table", "json", "pdf", "docx"]

FILE_BYTES_MAX = 256 * 2**20
ZIP_BYTES_MAX = 256 * 2**20
ZIP_RATIO_MAX = 200
OUTPUT_CHARS_MAX = 2_000  # a longer output of a notebook cell is data, not prose


@dataclass(frozen=True, kw_only=True)
class Text:
    r"""What a file says.

    Attributes:
        text: never blank, without NUL or half surrogates, lines end in ``\n``, no longer than `require_length` says.
        kind: what the reader made of it; decides how it is cut.
        pages: character offset at which each page begins; empty where the format has none.
    """

    text: str
    kind: Kind
    pages: tuple[int, ...] = ()


def read(data: bytes, name: str) -> Text:
    r"""Return the text of the file *name* whose bytes are *data*, read in this process.

    Raises:
        DocumentError: the reason, in one line, why this is not a document.
        Exception: whatever a parser raises on a file its author did not think of; `gistrag.documents.parser_worker`
        is the guard.

    >>> read(b"\xef\xbb\xbfone\r\ntwo", "notes.TXT").text
    'one\ntwo'
    """
    if not data:
        raise DocumentError("empty")
    result = _reader(name)(data)
    if not result.text.strip():
        raise DocumentError("empty")
    require_length(len(result.text))
    return result


def has_parser(name: str) -> bool:
    """Return whether reading the file *name* takes a parser, which a hostile file could lead astray.

    >>> has_parser("a.pdf"), has_parser("a.md")
    (True, False)
    """
    return _reader(name) not in _PLAIN


def is_document(name: str) -> bool:
    """Return whether the name alone says that the file is a document.

    >>> is_document("README"), is_document("a.md"), is_document("a.png")
    (True, True, False)
    """
    return PurePath(name).suffix.lower() in READERS or name.upper() in _NAMES


def missing_reader(name: str) -> str | None:
    """Return why a well-known document format is left out, or None if *name* is not one of those."""
    suffix = PurePath(name).suffix.lower()
    return f"no reader for {suffix} files; save it as pdf, docx or html" if suffix in _NO_READER else None


def _reader(name: str) -> Reader:
    if name.upper() in _NAMES:
        return read_code if name.upper() in _CODE_NAMES else read_text
    return READERS.get(PurePath(name).suffix.lower(), read_text)


# ---------------------------------------------------------------- plain text


def read_text(data: bytes) -> Text:
    """Return the text as it stands."""
    return Text(text=_decode(data), kind="text")


def read_code(data: bytes) -> Text:
    """Return the source code as it stands."""
    return Text(text=_decode(data), kind="code")


def read_markdown(data: bytes) -> Text:
    """Return the markdown as it stands."""
    return Text(text=_decode(data), kind="markdown")


def read_rst(data: bytes) -> Text:
    r"""Return reStructuredText with its underlined titles as markdown headings; all else stands.

    >>> read_rst(b"Guide\n=====\n\nFirst steps\n-----------\nGo.").text
    '# Guide\n\n## First steps\nGo.'
    """
    lines = _decode(data).split("\n")
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


_CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character


def _decode(data: bytes) -> str:
    r"""Return *data* as text with ``\n`` line ends: UTF-8, or what a byte order mark says.

    Raises:
        DocumentError: another encoding, or no text at all. Nothing is replaced by U+FFFD.
    """
    marks = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8")
    if encoding != "utf-16" and b"\0" in data:
        raise DocumentError(f"binary: a zero byte at offset {data.index(0):,}")
    if encoding != "utf-16":  # before each character takes four bytes
        require_length(len(data.translate(None, _CONTINUATION)))
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"not {encoding.removesuffix('-sig').upper()} text at byte {error.start:,} ({error.reason}); "
            "save it as UTF-8"
        ) from None
    if "\0" in text:
        raise DocumentError(f"binary: a zero character at offset {text.index(chr(0)):,}")
    require_length(len(text))
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ---------------------------------------------------------------- html, notebooks, records


def read_html(data: bytes) -> Text:
    r"""Return the readable part of a web page; scripts and styles are dropped, the title stands in for a missing h1.

    >>> read_html(b"<h2>Fish &amp; chips</h2><ul><li>cod<li>salt</ul>").text
    '## Fish & chips\n\n- cod\n- salt'
    """
    return Text(text=join(html_blocks(_decode(data))), kind="html")


def read_notebook(data: bytes) -> Text:
    """Return markdown cells as they stand, code cells fenced, and their short text outputs."""
    raw = _decode(data)
    try:
        notebook = json.loads(raw)
        sheets = notebook.get("worksheets") or [notebook]  # worksheets: nbformat 3
        language = notebook.get("metadata", {}).get("kernelspec", {}).get("language", "python")
        cells = [cell for sheet in sheets for cell in sheet["cells"]]
        blocks = [block for cell in cells for block in _cell(cell, str(language))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DocumentError(f"not a Jupyter notebook ({type(error).__name__})") from None
    return Text(text=join(blocks), kind="notebook")


def _cell(cell: Mapping[str, Any], language: str) -> Iterator[Block]:
    source = _source(cell.get("source", cell.get("input", "")))
    if not source.strip():
        return
    yield Block(fence(source, language) if cell["cell_type"] == "code" else source.strip())
    for output in cell.get("outputs", ()):
        text = _source(output.get("text", output.get("data", {}).get("text/plain", "")))
        if text.strip() and len(text) <= OUTPUT_CHARS_MAX:
            yield Block(fence(text, "output"))


def _source(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)


def read_table(data: bytes) -> Text:
    r"""Return each row of a csv or tsv as ``header: value`` lines, rows a blank line apart.

    A file that is no such table, or grows too long this way, stays as it is.

    >>> read_table(b"name,born\nAda,1815\nAlan,1912").text
    'name: Ada\nborn: 1815\n\nname: Alan\nborn: 1912'
    """
    raw = _decode(data)
    first = raw.lstrip("\n").partition("\n")[0]
    delimiter = max(",\t;|", key=first.count)
    rows = csv.reader(io.StringIO(raw, newline=""), delimiter=delimiter)
    return Text(text=_records_or(raw, _table_records(rows)), kind="table")


def _table_records(rows: Iterable[list[str]]) -> Iterator[str]:
    header: list[str] = []
    for row in rows:
        cells = [one_line(cell) for cell in row]
        if header and any(cells):
            further = (f"column {number}" for number in range(len(header) + 1, len(cells) + 1))
            names = itertools.chain(header, further)  # a header can be far longer than its rows
            yield _lines(f"{name}: {cell}" for name, cell in zip(names, cells, strict=False) if cell)
        elif any(cells):
            header = [cell or f"column {number}" for number, cell in enumerate(cells, 1)]


def read_json(data: bytes) -> Text:
    r"""Return ``path: value`` lines; the items of a list on top are a blank line apart.

    JSON with comments, and what grows too long this way, stays as it is. Numbers keep the digits they came with.

    >>> read_json(b'{"a": {"b": [1.10, 2]}, "c": null}').text
    'a.b: 1.10, 2\nc: null'
    """
    raw = _decode(data)
    return Text(text=_records_or(raw, (record for value in _load(raw) for record in _json_records(value))), kind="json")


def read_jsonl(data: bytes) -> Text:
    """Return the record of each line as `read_json` does, a blank line apart; a broken line stays as it is."""
    raw = _decode(data)
    lines = (line for line in raw.split("\n") if line.strip())
    return Text(text=_records_or(raw, (_records_or(line, _line_records(line)) for line in lines)), kind="json")


def _line_records(line: str) -> Iterator[str]:
    for value in _load(line):
        yield _lines(_flat(value, ""))


class _Object(list[tuple[str, Any]]):
    """The pairs of a JSON object, in order, repeated names kept."""


def _load(raw: str) -> Iterator[Any]:
    """Yield the one value of *raw*; lazily, so that what it raises is raised to whoever reads the records."""
    yield json.loads(raw, object_pairs_hook=_Object, parse_float=str, parse_int=str, parse_constant=str)


def _json_records(value: Any) -> Iterator[str]:
    if isinstance(value, list) and not isinstance(value, _Object) and any(isinstance(one, list) for one in value):
        for one in value:
            yield _lines(_flat(one, ""))
    else:
        yield _lines(_flat(value, ""))


def _flat(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, _Object) and value:
        for name, inner in value:
            yield from _flat(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(isinstance(inner, list) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{path}[{number}]")
    else:
        yield f"{path}: {_scalar(value)}" if path else _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, _Object):
        return "{}"
    if isinstance(value, list):
        return ", ".join(map(_scalar, value))
    return value if isinstance(value, str) else json.dumps(value)


def _lines(lines: Iterable[str]) -> str:
    """Return *lines* as one text, counted as they come: a long name on many short values makes far more than it was."""
    out: list[str] = []
    chars = 0
    for line in lines:
        out.append(line)
        chars += len(line) + 1
        require_length(chars)
    return "\n".join(out)


def _records_or(raw: str, records: Iterable[str]) -> str:
    """Return the records a blank line apart, or *raw* where they cannot be told or do not fit."""
    try:
        return join(Block(record) for record in records) or raw
    except (ValueError, RecursionError, csv.Error):  # DocumentError is a ValueError
        return raw


# ---------------------------------------------------------------- pdf, docx

_PDF_LOCK = threading.Lock()  # pdfium is not thread-safe


def read_pdf(data: bytes) -> Text:
    """Return the text of a PDF, pages a blank line apart, words cut at a line end joined, ligatures spelt out."""
    from pypdfium2 import PdfDocument, PdfiumError

    with _PDF_LOCK:
        try:
            document = PdfDocument(data)
        except PdfiumError as error:
            encrypted = error.err_code == 4  # FPDF_ERR_PASSWORD
            raise DocumentError(
                "encrypted; save it without a password" if encrypted else one_line(str(error))
            ) from None
        try:
            pages = list(_pdf_pages(document))
        finally:
            document.close()
    if not any(pages):
        raise DocumentError(f"no text on its {len(pages)} pages; if it is a scan, run OCR on it first")
    text = "\n\n".join(filter(None, pages))
    ends = itertools.accumulate((len(page) + 2 if page else 0 for page in pages[:-1]), initial=0)
    return Text(text=text, kind="pdf", pages=tuple(min(end, len(text)) for end in ends))


def _pdf_pages(document: Any) -> Iterator[str]:
    """Yield the text of each page, stripped."""
    chars = 0
    for page in document:
        words = page.get_textpage()
        text = _pdf_text(words.get_text_bounded())
        words.close()
        page.close()
        chars += len(text) + 2
        require_length(chars)
        yield text


def _pdf_text(text: str) -> str:
    r"""Return the text of a page without the traces of typesetting.

    >>> _pdf_text("e\ufb03cient infor\x02mation\r\nH\u00b2")
    'efficient information\nH²'
    """
    text = re.sub("[\x02\ufffe\u00ad](\r?\n)?", "", text)  # pdfium marks a hyphen at a line end
    text = re.sub("[\ufb00-\ufdff\ufe70-\ufefc]+", lambda match: unicodedata.normalize("NFKC", match[0]), text)
    return unicodedata.normalize("NFC", clean(text)).strip()


def read_docx(data: bytes) -> Text:
    """Return a Word document: headings as ``#`` lines, list items, tables as rows. Entities of the XML stay closed."""
    _require_small_zip(data)
    import docx

    try:
        document = docx.Document(io.BytesIO(data))
    except (AttributeError, KeyError, ValueError):  # its parts are those of something else
        raise DocumentError("not a docx file: the archive holds no Word document") from None
    styles = {style.style_id: style.name or "" for style in document.styles}  # to ask a paragraph searches all of them
    return Text(text=join(_docx_blocks(document, styles)), kind="docx")


def _require_small_zip(data: bytes) -> None:
    """Return if the archive stays small when it is opened; zipfile never reads past the size that is declared."""
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise DocumentError("encrypted, or an old .doc file by another name; save it as docx without a password")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        raise DocumentError("not a docx file: it is no zip archive") from None
    if any(entry.flag_bits & 1 for entry in entries):
        raise DocumentError("encrypted; save it without a password")
    expanded = sum(entry.file_size for entry in entries)
    if expanded > ZIP_BYTES_MAX:
        raise DocumentError(f"expands to {expanded:,} bytes; the most is {ZIP_BYTES_MAX:,}")
    if expanded > ZIP_RATIO_MAX * len(data):
        raise DocumentError(f"expands {expanded // len(data)} times; the most is {ZIP_RATIO_MAX}")


def _docx_blocks(container: Any, styles: Mapping[str, str]) -> Iterator[Block]:
    """Yield the blocks of a document or a table cell in reading order; *styles* are names of styles by their ids."""
    from docx.table import Table

    for item in container.iter_inner_content():
        if isinstance(item, Table):
            yield from table_blocks(list(_docx_rows(item, styles)))
        elif text := item.text.strip():
            yield _docx_paragraph(item, text, styles.get(item._p.style, ""))


def _docx_paragraph(item: Any, text: str, style: str) -> Block:
    if heading := re.fullmatch(r"Heading ([1-9])|Title", style):
        return Block("#" * min(int(heading[1] or 1), 6) + " " + one_line(text))
    if style.startswith("List") or item._p.xpath("./w:pPr/w:numPr"):
        return Block("- " + text, "item")
    return Block(prose(text))


def _docx_rows(table: Any, styles: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield the text of the cells of each row; one that spans columns counts once, one that spans rows in each.

    Not by ``row.cells``, which climbs to the top of a merged column again for every row.
    """
    from docx.table import _Cell

    above: dict[int, str] = {}  # by the column a cell begins in
    for row in table.rows:
        cells: dict[int, str] = {}
        column = row.grid_cols_before
        for cell in row._tr.tc_lst:
            is_merged = cell.vMerge == "continue"
            blocks = () if is_merged else _docx_blocks(_Cell(cell, table), styles)
            cells[column] = above.get(column, "") if is_merged else " ".join(block.text for block in blocks)
            column += cell.grid_span
        yield list(cells.values())
        above = cells


# ---------------------------------------------------------------- who reads what

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
}
_PLAIN_CODE = "MAKEFILE GNUMAKEFILE DOCKERFILE JENKINSFILE VAGRANTFILE GEMFILE RAKEFILE PROCFILE"
_PLAIN_TEXT = "README LICENSE LICENCE COPYING NOTICE AUTHORS CONTRIBUTORS CHANGELOG CHANGES HISTORY NEWS TODO INSTALL"
_PLAIN = frozenset({read_text, read_code, read_markdown, read_rst})
_CODE_NAMES = frozenset(_PLAIN_CODE.split())
_NAMES = _CODE_NAMES | frozenset(_PLAIN_TEXT.split())
_NO_READER = frozenset({".doc", ".odt", ".rtf", ".ppt", ".pptx", ".odp", ".xls", ".xlsx", ".ods", ".epub"})
