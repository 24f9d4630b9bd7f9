"""Bytes of one file → its text, one function per format, and a worker process for the formats with real parsers.

`READERS` maps a file suffix to the function that reads it; adding a format is one function and one line there.
Headings come out as markdown ``#`` lines whatever the format was, so that one rule cuts them all. Tables of records
(csv, json) come out as ``name: value`` lines, so that a piece of a table still says what its numbers are.

Plain text is read here. Everything with a parser is read in a child process with limits on memory, CPU and time, so
that a hostile file costs one reason and nothing else; nothing but JSON and UTF-8 comes back through the pipe.

Not here: which files are documents (`gistrag.documents`), OCR, page layout, headers and footnotes of docx.
No encoding is guessed: what is not UTF-8, or UTF-16 with its mark, is refused rather than read wrongly.
"""

from __future__ import annotations

import atexit
import csv
import functools
import io
import itertools
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path, PurePath
from typing import IO, Any, Literal

from gistrag.errors import DocumentError

Kind = Literal["markdown", "text", "code", "html", "notebook", "table", "json", "pdf", "docx"]

FILE_BYTES_MAX = 256 * 2**20
TEXT_CHARS_MAX = 64 * 2**20
ZIP_BYTES_MAX = 256 * 2**20
ZIP_RATIO_MAX = 200
OUTPUT_CHARS_MAX = 2_000  # a longer output of a notebook cell is data, not prose
MEMORY_BYTES = 2**30
CPU_S = 30
WALL_S = 60

_log = logging.getLogger("gistrag")
_OUT_OF_MEMORY = 3  # exit code of the worker


@dataclass(frozen=True, kw_only=True)
class Text:
    r"""What a file says.

    Attributes:
        text: never blank, without NUL or half surrogates, lines end in ``\n``, at most `TEXT_CHARS_MAX` characters.
        kind: what the reader made of it; decides how it is cut.
        pages: character offset at which each page begins; empty where the format has none.
    """

    text: str
    kind: Kind
    pages: tuple[int, ...] = ()


def read(data: bytes, name: str) -> Text:
    r"""Return the text of the file *name* whose bytes are *data*; parsers run in the worker process.

    Raises:
        DocumentError: the reason, in one line, why this is not a document.

    >>> read(b"\xef\xbb\xbfone\r\ntwo", "notes.TXT").text
    'one\ntwo'
    """
    if _reader(name) in _PLAIN:
        return _parse(data, name)
    return _worker(os.getpid()).read(data, name)


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


def _parse(data: bytes, name: str) -> Text:
    """Return the text of *data*, read in this process."""
    if not data:
        raise DocumentError("empty")
    result = _reader(name)(data)
    if not result.text.strip():
        raise DocumentError("empty")
    _require_length(len(result.text))
    return result


def _require_length(chars: int) -> None:
    if chars > TEXT_CHARS_MAX:
        raise DocumentError(f"holds {chars:,} characters or more of text; the most is {TEXT_CHARS_MAX:,}")


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
    styles: list[str] = []  # the order in which title styles appear is their rank
    out: list[str] = []
    at = 0
    while at < len(lines):
        style, title, used = _rst_title(lines, at)
        if style and style not in styles:
            styles.append(style)
        out.append(f"{'#' * min(styles.index(style) + 1, 6)} {title}" if style else lines[at])
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


def _decode(data: bytes) -> str:
    r"""Return *data* as text with ``\n`` line ends: UTF-8, or what a byte order mark says.

    Raises:
        DocumentError: another encoding, or no text at all. Nothing is replaced by U+FFFD.
    """
    marks = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8")
    if encoding != "utf-16" and b"\0" in data:
        raise DocumentError(f"binary: a zero byte at offset {data.index(0):,}")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"not {encoding.removesuffix('-sig').upper()} text at byte {error.start:,} ({error.reason}); "
            "save it as UTF-8"
        ) from None
    if "\0" in text:
        raise DocumentError(f"binary: a zero character at offset {text.index(chr(0)):,}")
    _require_length(len(text))
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ---------------------------------------------------------------- blocks: html, notebook and docx meet here


@dataclass(frozen=True)
class _Block:
    """One paragraph, heading, list item, table row or fence of a text in the making."""

    text: str
    kind: Literal["paragraph", "item", "row"] = "paragraph"


def _join(blocks: Iterable[_Block]) -> str:
    """Return the blocks a blank line apart; items of a list and rows of a table follow line on line.

    An empty block only ends the list or table before it.
    """
    parts: list[str] = []
    before, chars = "", 0
    for block in blocks:
        if not block.text:
            before = ""
            continue
        tight = block.kind == before != "paragraph"
        parts.append(("\n" if tight else "\n\n") if parts else "")
        parts.append(block.text)
        before, chars = block.kind, chars + len(block.text) + 2
        _require_length(chars)
    return _clean("".join(parts))


def _clean(text: str) -> str:
    """Return *text* without the control characters that parsers let through.

    Raises:
        DocumentError: half of a surrogate pair, which no file can store.
    """
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffe\uffff]", "", text).replace("\r\n", "\n")
    if re.search(r"[\ud800-\udfff]", text):
        raise DocumentError("broken encoding: half of a surrogate pair")
    return text.replace("\r", "\n")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _prose(text: str) -> str:
    """Return *text* such that it cannot be taken for a heading or a fence."""
    return re.sub(r"(?m)^(#{1,6}\s|```|~~~)", r"\\\1", text)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |"


def _rows(table: list[list[str]]) -> Iterator[_Block]:
    """Yield a table as markdown: the first row, the ruler under it, the others."""
    for number, cells in enumerate(table):
        yield _Block(_row(cells), "row")
        if number == 0:
            yield _Block("|" + " --- |" * len(cells), "row")
    if table:
        yield _Block("")  # two tables in a row stay two


def _fence(code: str, language: str = "") -> str:
    """Return *code* between fences longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`{3,}", code)), default=2)
    mark = "`" * (longest + 1)
    return f"{mark}{language}\n{code.rstrip()}\n{mark}"


# ---------------------------------------------------------------- html


def read_html(data: bytes) -> Text:
    r"""Return the readable part of a web page; scripts and styles are dropped, the title stands in for a missing h1.

    >>> read_html(b"<h2>Fish &amp; chips</h2><ul><li>cod<li>salt</ul>").text
    '## Fish & chips\n\n- cod\n- salt'
    """
    page = _Html()
    page.feed(_decode(data))
    page.close()
    return Text(text=_join(page.finish()), kind="html")


_HTML_BLOCKS = (
    "address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure "
    "footer form header hgroup hr html legend main nav option p search section select summary"
)


class _Html(HTMLParser):
    """Turns tags into blocks as they come; builds no tree, so nesting costs nothing."""

    DROPPED = frozenset({"script", "style", "template", "svg"})
    HEADINGS: Mapping[str, str] = {f"h{level}": "#" * level + " " for level in range(1, 7)}
    BLOCKS = frozenset(_HTML_BLOCKS.split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[_Block] = []
        self.words: list[str] = []  # the paragraph, cell or code under way
        self.prefix = ""
        self.title = ""
        self.in_title = False
        self.dropped = 0
        self.pre = 0
        self.lists: list[int] = []  # next number of each open list, 0 where it has bullets
        self.tables = 0
        self.table: list[list[str]] = []

    def finish(self) -> list[_Block]:
        """Return the blocks, headed by the page's title if it has no h1."""
        self.end_table()
        self.tables = 0
        if self.pre:
            self.pre = 1
            self.end_code()
        self.flush()
        headed = any(block.text.startswith("# ") for block in self.blocks)
        return self.blocks if headed or not self.title else [_Block(f"# {self.title}"), *self.blocks]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open what *tag* opens."""
        if tag in self.DROPPED:
            self.dropped += 1
        elif self.dropped:
            return
        elif tag == "br":
            self.words.append("\n" if self.pre else "\v")
        elif tag == "img":
            self.words.append(dict(attrs).get("alt") or "")
        elif tag in ("table", "tr", "td", "th"):
            self.start_cell(tag)
        elif tag in ("pre", "title", "ul", "ol", "li") or tag in self.HEADINGS or tag in self.BLOCKS:
            self.start_block(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close what *tag* closes; a stray end tag closes nothing."""
        if tag in self.DROPPED:
            self.dropped = max(self.dropped - 1, 0)
        elif self.dropped:
            return
        elif tag == "title" and self.in_title:
            self.title = self.title or _one_line("".join(self.words))
            self.words, self.in_title = [], False
        elif tag == "table":
            self.tables = max(self.tables - 1, 0)
            if not self.tables:
                self.end_table()
        elif tag in ("td", "th", "tr"):
            self.words.append(" ")
        elif tag in ("pre", "ul", "ol", "li") or tag in self.HEADINGS or tag in self.BLOCKS:
            self.end_block(tag)

    def handle_data(self, data: str) -> None:
        """Take text, unless it stands in what is dropped."""
        if not self.dropped:
            self.words.append(data)

    def start_block(self, tag: str) -> None:
        """Begin a heading, an item, a list, code or a paragraph."""
        self.flush()
        if self.tables:
            return
        if tag in self.HEADINGS:
            self.prefix = self.HEADINGS[tag]
        elif tag in ("ul", "ol"):
            self.lists.append(1 if tag == "ol" else 0)
        elif tag == "li":
            number = self.lists[-1] if self.lists else 0
            self.prefix = "  " * (len(self.lists) - 1) + (f"{number}. " if number else "- ")
            if number:
                self.lists[-1] += 1
        elif tag == "pre":
            self.pre += 1
        elif tag == "title":
            self.in_title = True

    def end_block(self, tag: str) -> None:
        """Finish a heading, an item, a list, code or a paragraph."""
        if tag == "pre" and self.pre and not self.tables:
            self.end_code()
        self.flush()
        if self.tables or tag in self.BLOCKS:
            return
        self.prefix = ""
        if tag in ("ul", "ol") and self.lists:
            self.lists.pop()

    def end_code(self) -> None:
        """Write preformatted text as a fence."""
        self.pre -= 1
        code, self.words = "".join(self.words).strip("\n"), []
        if code.strip():
            self.blocks.append(_Block(_fence(code)))

    def start_cell(self, tag: str) -> None:
        """Begin a table, a row or a cell; a table inside a cell is read as words of that cell."""
        if tag == "table":
            self.flush()
            self.tables += 1
        elif self.tables != 1:
            self.words.append(" ")
        elif tag == "tr":
            self.end_cell()
            self.table.append([])
        else:
            self.end_cell()
            self.table = self.table or [[]]
            self.table[-1].append("")

    def end_cell(self) -> None:
        """Put the words under way into the last cell; words outside any cell become a paragraph of their own."""
        words, self.words = "".join(self.words), []
        if self.table and self.table[-1]:
            self.table[-1][-1] += words
        elif words.strip():
            self.blocks.append(_Block(_prose(_one_line(words))))

    def end_table(self) -> None:
        """Write the rows gathered so far."""
        if self.table:
            self.end_cell()
        self.blocks.extend(_rows([row for row in self.table if any(cell.strip() for cell in row)]))
        self.table = []

    def flush(self) -> None:
        """Write the paragraph under way; inside a table or code it goes on, one break further."""
        if self.tables or self.pre:
            self.words.append("\n" if self.pre else " ")
            return
        words = re.sub(r"[ \t\n\r\f]+", " ", "".join(self.words)).strip()
        text = re.sub(r" ?\v ?", "\n", words).strip("\n")
        self.words = []
        if text:
            is_item = self.prefix.endswith(("- ", ". "))
            body = _one_line(text) if self.prefix.startswith("#") else _prose(text)
            self.blocks.append(_Block(self.prefix + body, "item" if is_item else "paragraph"))
            self.prefix = ""


# ---------------------------------------------------------------- notebooks, records


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
    return Text(text=_join(blocks), kind="notebook")


def _cell(cell: Mapping[str, Any], language: str) -> Iterator[_Block]:
    source = _source(cell.get("source", cell.get("input", "")))
    if not source.strip():
        return
    yield _Block(_fence(source, language) if cell["cell_type"] == "code" else source.strip())
    for output in cell.get("outputs", ()):
        text = _source(output.get("text", output.get("data", {}).get("text/plain", "")))
        if text.strip() and len(text) <= OUTPUT_CHARS_MAX:
            yield _Block(_fence(text, "output"))


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
        cells = [_one_line(cell) for cell in row]
        if header and any(cells):
            names = header + [f"column {number}" for number in range(len(header) + 1, len(cells) + 1)]
            yield "\n".join(f"{name}: {cell}" for name, cell in zip(names, cells, strict=False) if cell)
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
        yield "\n".join(_flat(value, ""))


class _Object(list[tuple[str, Any]]):
    """The pairs of a JSON object, in order, repeated names kept."""


def _load(raw: str) -> Iterator[Any]:
    """Yield the one value of *raw*; lazily, so that what it raises is raised to whoever reads the records."""
    yield json.loads(raw, object_pairs_hook=_Object, parse_float=str, parse_int=str, parse_constant=str)


def _json_records(value: Any) -> Iterator[str]:
    if isinstance(value, list) and not isinstance(value, _Object) and any(isinstance(one, list) for one in value):
        for one in value:
            yield "\n".join(_flat(one, ""))
    else:
        yield "\n".join(_flat(value, ""))


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


def _records_or(raw: str, records: Iterable[str]) -> str:
    """Return the records a blank line apart, or *raw* where they cannot be told or do not fit."""
    try:
        return _join(_Block(record) for record in records) or raw
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
                "encrypted; save it without a password" if encrypted else _one_line(str(error))
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
        _require_length(chars)
        yield text


def _pdf_text(text: str) -> str:
    r"""Return the text of a page without the traces of typesetting.

    >>> _pdf_text("e\ufb03cient infor\x02mation\r\nH\u00b2")
    'efficient information\nH²'
    """
    text = re.sub("[\x02\ufffe\u00ad](\r?\n)?", "", text)  # pdfium marks a hyphen at a line end
    text = re.sub("[\ufb00-\ufdff\ufe70-\ufefc]+", lambda match: unicodedata.normalize("NFKC", match[0]), text)
    return unicodedata.normalize("NFC", _clean(text)).strip()


def read_docx(data: bytes) -> Text:
    """Return a Word document: headings as ``#`` lines, list items, tables as rows. Entities of the XML stay closed."""
    _require_small_zip(data)
    import docx

    return Text(text=_join(_docx_blocks(docx.Document(io.BytesIO(data)))), kind="docx")


def _require_small_zip(data: bytes) -> None:
    """Return if the archive stays small when it is opened; zipfile never reads past the size that is declared."""
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise DocumentError("encrypted, or an old .doc file by another name; save it as docx without a password")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            expanded = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        raise DocumentError("not a docx file: it is no zip archive") from None
    if expanded > ZIP_BYTES_MAX:
        raise DocumentError(f"expands to {expanded:,} bytes; the most is {ZIP_BYTES_MAX:,}")
    if expanded > ZIP_RATIO_MAX * len(data):
        raise DocumentError(f"expands {expanded // len(data)} times; the most is {ZIP_RATIO_MAX}")


def _docx_blocks(container: Any) -> Iterator[_Block]:
    """Yield the blocks of a document or a table cell in reading order."""
    from docx.table import Table

    for item in container.iter_inner_content():
        if isinstance(item, Table):
            yield from _rows([_docx_row(row) for row in item.rows])
        elif text := item.text.strip():
            yield _docx_paragraph(item, text)


def _docx_paragraph(item: Any, text: str) -> _Block:
    style = (item.style.name if item.style is not None else None) or ""
    if heading := re.fullmatch(r"Heading ([1-9])|Title", style):
        return _Block("#" * min(int(heading[1] or 1), 6) + " " + _one_line(text))
    if style.startswith("List") or item._p.xpath("./w:pPr/w:numPr"):
        return _Block("- " + text, "item")
    return _Block(_prose(text))


def _docx_row(row: Any) -> list[str]:
    """Return the text of each cell; a cell that spans columns counts once."""
    cells = {id(cell._tc): cell for cell in row.cells}
    return [" ".join(block.text for block in _docx_blocks(cell)) for cell in cells.values()]


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


# ---------------------------------------------------------------- the worker


class Worker:
    """A child process that parses one file at a time; started at the first file, and again after it was killed.

    It holds no more than `MEMORY_BYTES`, and dies with this process. Safe to share between threads.
    """

    def __init__(self, *, cpu_s: int = CPU_S, wall_s: float = WALL_S) -> None:
        self.cpu_s = cpu_s
        self.wall_s = wall_s
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, data: bytes, name: str) -> Text:
        """Return the text of *data*, or raise the `DocumentError` that the worker met or was."""
        with self._lock:
            process = self._process or self._start()
            started_s = time.monotonic()
            timer = threading.Timer(self.wall_s, process.kill)
            timer.start()
            try:
                head, body = _exchange(process, {"name": name}, data)
            except (OSError, EOFError):
                self._stop()
                raise DocumentError(self._cause(process, time.monotonic() - started_s)) from None
            except BaseException:  # interrupted in the middle of an answer
                self._stop()
                raise
            finally:
                timer.cancel()
        if "reason" in head:
            raise DocumentError(head["reason"])
        return Text(text=body.decode(), kind=head["kind"], pages=tuple(head["pages"]))

    def close(self) -> None:
        """Stop the child; a process that inherited this object by a fork leaves it alone."""
        if self._owner == os.getpid():
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        """Return a fresh child. It finds its modules where we do, never in the current folder (-P)."""
        path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gistrag.readers", str(os.getpid()), str(self.cpu_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                pass  # what could not be sent is not wanted any more

    def _cause(self, process: subprocess.Popen[bytes], elapsed_s: float) -> str:
        """Return why the child is gone."""
        code = process.returncode
        if elapsed_s >= self.wall_s:
            return f"parsing took more than {self.wall_s:g} s"
        if code == -signal.SIGXCPU:
            return f"parsing took more than {self.cpu_s} s of CPU time"
        if code == _OUT_OF_MEMORY:
            return f"parsing needs more than {MEMORY_BYTES // 2**20} MiB of memory"
        _log.debug("the parser ended with %s", code)
        return "the parser crashed on it"


@functools.cache
def _worker(pid: int) -> Worker:
    """Return the worker of this process; keyed by *pid*, because a fork must not share its parent's pipe."""
    worker = Worker()
    atexit.register(worker.close)
    return worker


def _exchange(process: subprocess.Popen[bytes], head: Mapping[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    assert process.stdin is not None
    assert process.stdout is not None
    _send(process.stdin, head, body)
    return _receive(process.stdout)


def _send(pipe: IO[bytes], head: Mapping[str, Any], body: bytes) -> None:
    """Write one message: a line of JSON that holds the size of the body, then the body."""
    pipe.write(json.dumps({**head, "bytes": len(body)}).encode() + b"\n")
    pipe.write(body)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Return one message; raises EOFError where the other side is gone."""
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    head: dict[str, Any] = json.loads(line)
    body = pipe.read(head["bytes"])
    if len(body) < head["bytes"]:
        raise EOFError
    return head, body


def _serve(parent: int, cpu_s: int) -> None:
    """Answer requests on stdin until it closes: the whole life of the worker process."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # whatever a parser prints must not reach the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":  # elsewhere the kernel refuses it or takes it for something else
        _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    while True:
        try:
            head, body = _receive(requests)
        except EOFError:
            return
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + cpu_s)
        _send(replies, *_answer(body, head["name"]))


def _limit(which: int, most: int) -> None:
    """Set a soft limit; one the machine's owner set lower stays."""
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def _answer(data: bytes, name: str) -> tuple[dict[str, Any], bytes]:
    """Return the text of *data* as a message, or the reason why there is none."""
    try:
        text = _parse(data, name)
        return {"kind": text.kind, "pages": text.pages}, text.text.encode()
    except DocumentError as error:
        return {"reason": str(error)}, b""
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except Exception as error:  # a parser met something its author did not think of
        return {"reason": f"cannot be parsed: {type(error).__name__}: {_one_line(str(error))}"[:200]}, b""


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
