"""Small real files made on the spot: PDFs, Word documents, and hostile versions of both."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence

import docx


def make_pdf(*pages: Sequence[str], trailer: str = "", extra: Sequence[str] = (), content: str | None = None) -> bytes:
    """Return a PDF with one line of text per string.

    *extra* objects get the numbers after those of the pages; *content* replaces the drawing of every page, with the
    extra objects at hand as forms ``/X0``, ``/X1``, …; *trailer* goes into the trailer dictionary.
    """
    first = 4 + 2 * len(pages)
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    forms = " ".join(f"/X{number} {first + number} 0 R" for number in range(len(extra)))
    bodies = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for number, lines in enumerate(pages):
        bodies.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] "
            f"/Resources << /Font << /F1 3 0 R >> /XObject << {forms} >> >> /Contents {5 + 2 * number} 0 R >>"
        )
        shown = " ".join(f"({line}) Tj T*" for line in lines)
        bodies.append(make_stream(content or f"BT /F1 11 Tf 14 TL 50 780 Td {shown} ET"))
    return _assemble([*bodies, *extra], trailer)


def make_stream(body: str, dictionary: str = "") -> str:
    """Return a PDF stream object."""
    return f"<< {dictionary} /Length {len(body.encode('cp1252'))} >>\nstream\n{body}\nendstream"


def make_bomb_pdf(depth: int = 12) -> bytes:
    """Return a PDF of a few kilobytes whose page draws ten forms of ten forms of … ten words."""
    first = 6  # number of the first extra object of a PDF with one page
    forms = []
    for level in range(depth):
        inner = f"/Resources << /Font << /F1 3 0 R >> /XObject << /N {first + level + 1} 0 R >> >>"
        body = "/N Do " * 10 if level < depth - 1 else "BT /F1 11 Tf 50 780 Td (boom) Tj ET"
        forms.append(make_stream(body, f"/Type /XObject /Subtype /Form /BBox [0 0 595 842] {inner}"))
    return make_pdf([], extra=forms, content="/X0 Do")


def _assemble(bodies: Sequence[str], trailer: str) -> bytes:
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(bodies, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode("cp1252")
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    end = f"xref\n0 {len(bodies) + 1}\n0000000000 65535 f \n{table}trailer\n"
    size = f"<< /Size {len(bodies) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(out)}\n%%EOF\n"
    return out + (end + size).encode()


def make_encrypted_pdf() -> bytes:
    """Return a PDF that opens only with a password."""
    key = "0" * 64
    trailer = f"/Encrypt << /Filter /Standard /V 1 /R 2 /O <{key}> /U <{key}> /P -4 >> /ID [<00> <00>]"
    return make_pdf(["secret"], trailer=trailer)


def make_docx() -> bytes:
    """Return a Word document with headings, a list and a table."""
    document = docx.Document()
    document.add_heading("Handbook", 1)
    document.add_paragraph("Read me first.")
    document.add_heading("Tools", 2)
    document.add_paragraph("hammer", style="List Bullet")
    document.add_paragraph("saw", style="List Bullet")
    table = document.add_table(rows=2, cols=2)
    for row, cells in zip(table.rows, (("tool", "price"), ("hammer", "12")), strict=True):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def with_part(data: bytes, name: str, body: bytes) -> bytes:
    """Return the zip archive *data* with the part *name* replaced or added."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            if entry != name:
                new.writestr(entry, old.read(entry))
        new.writestr(name, body)
    return out.getvalue()


def make_docx_of_xml(text: str, doctype: str = "") -> bytes:
    """Return a Word document whose one paragraph and document type are the given XML."""
    space = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    xml = (
        f'<?xml version="1.0"?>{doctype}<w:document xmlns:w="{space}"><w:body><w:p><w:r><w:t>{text}</w:t></w:r></w:p>'
        "</w:body></w:document>"
    )
    return with_part(make_docx(), "word/document.xml", xml.encode())
