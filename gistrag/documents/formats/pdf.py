"""PDF files: the text layer, page by page. Without OCR, and without the layout of a page."""

from __future__ import annotations

import itertools
import re
import threading
import unicodedata
from collections.abc import Iterator
from typing import Any

from gistrag.documents.text import Text, clean, one_line, require_length
from gistrag.errors import DocumentError

_PDF_LOCK = threading.Lock()  # pdfium is not thread-safe


def read_pdf(data: bytes) -> Text:
    """Return the text of a PDF, pages a blank line apart, hyphenated words joined, ligatures as letters."""
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
    r"""Return the text of a page without hyphenation and ligatures.

    >>> _pdf_text("e\ufb03cient infor\x02mation\r\nH\u00b2")
    'efficient information\nH²'
    """
    text = re.sub("[\x02\ufffe\u00ad](\r?\n)?", "", text)  # pdfium marks a hyphen at a line end
    text = re.sub("[\ufb00-\ufdff\ufe70-\ufefc]+", lambda match: unicodedata.normalize("NFKC", match[0]), text)
    return unicodedata.normalize("NFC", clean(text)).strip()
