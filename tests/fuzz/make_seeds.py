"""Makes the seeds of the fuzzers: small real files of every format, each written by a library people write it with.

    pip install reportlab pypdf matplotlib python-docx nbformat docutils markdown python-pptx openpyxl pypandoc_binary
    python tests/fuzz/make_seeds.py

They are committed, under ``tests/data/fuzz/<suffix>/``, so that nobody needs these libraries to fuzz from them.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path
from typing import Any

SEEDS = Path(__file__).parents[1] / "data" / "fuzz"
GUIDE = """\
Field guide
===========

The *Lund harbour* office keeps three cranes. See `the map`_ and [1]_.

Cranes
------

=====  ======  =========
name   tonnes  built
=====  ======  =========
Anna   12      1962
Berta  40      1987
=====  ======  =========

- red: the oldest
- blue: for containers

  1. lock
  2. lift

.. code-block:: python

   def lift(tonnes: float) -> bool:
       return tonnes < 40

.. note:: Wind above 18 m/s stops all work.

.. _the map: https://example.org/map
.. [1] Printed in 2019 – naïve, “quoted”, 日本, 🎉.
"""
NOTES = """\
---
title: Bees
---

# Bees & <honey>

Setext
------

> quoted *text* with `code` and a [link](https://example.org "title") ![alt](a.png)

1. one
   - deep

| a | b |
|---|--:|
| x \\| y | 2 |

```python
# no heading
print("``")
```

~~~~
<|im_start|>system
~~~~

Term[^1]
[^1]: note &amp; <br> <b>bold</b>

###### Deep ######
"""


def pdf_by_reportlab() -> bytes:
    """Return two pages with a heading, justified text, a table, an outline and a second font."""
    from reportlab.lib.pagesizes import A5
    from reportlab.lib.styles import getSampleStyleSheet
    from reportlab.platypus import PageBreak, Paragraph, SimpleDocTemplate, Table

    styles, out = getSampleStyleSheet(), io.BytesIO()
    cells = [["name", "tonnes"], ["Anna", "12"], ["Berta", "40"]]
    story = [
        Paragraph("Harbour report", styles["Title"]),
        Paragraph(
            "The office keeps three cranes. <b>Wind</b> above <i>18 m/s</i> stops all work. " * 6, styles["Normal"]
        ),
        Table(cells),
        PageBreak(),
        Paragraph("Caf\u00e9 r\u00e9sum\u00e9 \u2013 H<super>2</super>O", styles["Code"]),
    ]
    SimpleDocTemplate(out, pagesize=A5, title="Harbour", author="Lund").build(story)
    return out.getvalue()


def pdf_by_pypdf() -> bytes:
    """Return the same pages with compressed streams, an attachment, a bookmark and a password to open them."""
    from pypdf import PdfReader, PdfWriter

    writer, out = PdfWriter(PdfReader(io.BytesIO(pdf_by_reportlab()))), io.BytesIO()
    writer.add_attachment("a.txt", b"attached")
    writer.add_outline_item(title="Two", page_number=1)
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(out)
    return out.getvalue()


def pdf_by_matplotlib() -> bytes:
    """Return a figure, whose words are in a subset of a font."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(3, 2))
    axes.plot([1, 2, 4], label="wind")
    axes.set_title("efficient flow")
    axes.legend()
    out = io.BytesIO()
    figure.savefig(out, format="pdf")
    return out.getvalue()


def docx_by_python_docx() -> bytes:
    """Return headings, lists, a link, a picture, a section, a table with merged cells and one inside another."""
    import docx

    document = docx.Document()
    document.add_heading("Handbook", 0)
    document.add_heading("Tools", 2).add_run(" and more").bold = True
    document.add_paragraph("hammer", style="List Bullet")
    document.add_paragraph("first", style="List Number")
    table = document.add_table(rows=3, cols=3)
    table.cell(0, 0).merge(table.cell(1, 1)).text = "wide and high"
    table.cell(2, 2).add_table(rows=1, cols=1).cell(0, 0).text = "inner"
    document.add_page_break()
    document.sections[0].header.paragraphs[0].text = "header"
    document.core_properties.title = "Handbook"
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def word_xml() -> bytes:
    """Return the main part of that document."""
    with zipfile.ZipFile(io.BytesIO(docx_by_python_docx())) as archive:
        return archive.read("word/document.xml")


def notebook_by_nbformat(version: int) -> bytes:
    """Return cells of every kind with outputs of every kind, in format 4 or 3."""
    import nbformat
    from nbformat import v4

    stream = v4.new_output("stream", text="1\n2\n")
    result = v4.new_output("execute_result", {"text/plain": "3", "text/html": "<b>3</b>"}, execution_count=1)
    error = v4.new_output("error", ename="E", evalue="v", traceback=["\x1b[31mred"])
    code = v4.new_code_cell("print(1)\nprint(2)\n1 + 2", outputs=[stream, result, error])
    cells = [v4.new_markdown_cell("# Title\n\nwords"), code, v4.new_raw_cell("raw")]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = v4.new_notebook(cells=cells, metadata=spec)
    return nbformat.writes(nbformat.convert(notebook, version), version=version).encode()


def page_by_docutils() -> bytes:
    """Return the guide as a web page, without its style sheet."""
    from docutils.core import publish_string

    settings = {"embed_stylesheet": False, "stylesheet_path": None, "output_encoding": "utf-8"}
    return publish_string(GUIDE, writer_name="html5", settings_overrides=settings)


def page_by_markdown() -> bytes:
    """Return the notes as a web page of the kind a site generator makes, scripts and drawings included."""
    import markdown

    body = markdown.markdown(NOTES, extensions=["tables", "fenced_code", "footnotes", "toc"])
    head = "<title>Bees &ndash; notes</title><style>p { color: red }</style><script>if (a < b) { c() }</script>"
    drawing = "<svg><title>drawn</title><path d='M0 0'/></svg><!-- note --><template><p>no</p></template>"
    return f"<!DOCTYPE html>\n<html lang=en><head>{head}</head><body>{drawing}{body}</body></html>\n".encode()


def table_by_csv(dialect: str, **options: str) -> bytes:
    """Return a table with quotes, line ends and empty cells in it."""
    out = io.StringIO()
    rows = [["name", "note", ""], ["Anna", 'the "old" one,\nred', "12"], ["", "", ""], ["Berta;", "x", "40", "more"]]
    csv.writer(out, dialect, **options).writerows(rows)
    return out.getvalue().encode("utf-8-sig")


def slides_by_python_pptx() -> bytes:
    """Return three slides: a title, a list with notes, a table."""
    from datetime import datetime

    from pptx import Presentation
    from pptx.util import Inches

    deck = Presentation()
    deck.core_properties.title, deck.core_properties.author = "Harbour plan", "Kim Min"
    deck.core_properties.modified = datetime(2026, 1, 5, 14, 30)
    first = deck.slides.add_slide(deck.slide_layouts[0])
    first.shapes.title.text, first.placeholders[1].text = "Harbour plan", "부산항 2026"
    second = deck.slides.add_slide(deck.slide_layouts[1])
    second.shapes.title.text, second.placeholders[1].text = "Cranes", "Anna lifts 12 tonnes\nBerta lifts 40 tonnes"
    second.notes_slide.notes_text_frame.text = "Berta is the youngest."
    third = deck.slides.add_slide(deck.slide_layouts[5])
    third.shapes.title.text = "Prices"
    table = third.shapes.add_table(2, 2, Inches(1), Inches(2), Inches(4), Inches(1)).table
    for place, text in {(0, 0): "tool", (0, 1): "price", (1, 0): "saw | blade", (1, 1): "12"}.items():
        table.cell(*place).text = text
    return _saved(deck)


def sheets_by_openpyxl() -> bytes:
    """Return a workbook with a title, texts, numbers, dates, a formula, an empty sheet and a sheet of one row."""
    from datetime import date, datetime

    from openpyxl import Workbook

    book = Workbook()
    book.properties.title, book.properties.creator = "Cranes", "Kim Min"
    book.properties.modified = datetime(2026, 1, 5, 14, 30)
    sheet = book.active
    sheet.title = "크레인"
    for row in (["All cranes"], ["name", "tonnes", "built", "works"], ["Anna", 0.1 + 0.2, date(1962, 5, 1), True]):
        sheet.append(row)
    sheet.append(["Berta", 40, datetime(1987, 3, 2, 8, 30), False, "spare"])
    sheet.append(["# no heading", None, None, None])
    book.create_sheet("Empty")
    book.create_sheet("Days").append(["Mon", "Tue"])
    return _saved(book)


def _saved(document: Any) -> bytes:
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


BOOK = """\
---
title: Field guide
author: Kim Min
date: 2026-01-05
---

# Cranes {#one}

The *harbour* has three cranes — 크레인 세 대.

- red
- blue

| name  | tonnes |
|-------|-------:|
| Anna  | 12     |
| Berta | 40     |

# Wind

Above 18 m/s all work stops.[^1]

[^1]: Printed in 2019.
"""


def by_pandoc(kind: str) -> bytes:
    """Return the same text in a format that pandoc writes."""
    import tempfile

    import pypandoc

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"book.{kind}"
        pypandoc.convert_text(BOOK, kind, "markdown", outputfile=str(path), extra_args=["--standalone"])
        return path.read_bytes()


def mail(subject: str, day: int, *, sender: str = "김민 <kim@example.org>", crane: str = "Anna") -> EmailMessage:
    """Return a message with a body in two forms and two attachments."""
    message = EmailMessage()
    message["From"], message["To"] = sender, "Ann <ann@example.org>, bo@example.org"
    message["Subject"], message["Date"] = subject, f"Mon, {day} Jan 2026 14:30:00 +0900"
    message.set_content(f"Crane {crane} lifts 12 tonnes.\n\nFrom Monday on it is painted.\n\n# not a heading\n크레인\n")
    message.add_alternative(f"<h1>Crane {crane}</h1><p>lifts <b>12</b> tonnes", subtype="html")
    message.add_attachment("name,tonnes\nAnna,12\n", subtype="csv", filename="크레인.csv")
    message.add_attachment(b"\x89PNG", maintype="image", subtype="png", filename="crane.png")
    return message


def box() -> bytes:
    """Return a mailbox of two messages."""
    import mailbox
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = mailbox.mbox(f"{folder}/box")
        for message in (mail("First crane", 5), mail("둘째 크레인", 12, sender="lee@example.org", crane="Berta")):
            made.add(message)
        made.close()
        return (Path(folder) / "box").read_bytes()


def values() -> bytes:
    """Return JSON with every kind of value."""
    cranes = [{"name": "Anna", "tonnes": 12.50, "tags": ["red", "old"]}, {"name": "Bérta", "tags": [], "at": None}]
    return json.dumps({"cranes": cranes, "grid": [[1, 2], [3, [4, {"x": True}]]], "empty": {}}, indent=1).encode()


def lines() -> bytes:
    """Return JSON lines, one of them broken."""
    return (
        b"".join(json.dumps({"id": n, "text": "w" * n}).encode() + b"\n" for n in range(4)) + b"{broken\n\n[1, [2]]\n"
    )


MAKERS: dict[str, Callable[[], bytes]] = {
    "pdf/reportlab.pdf": pdf_by_reportlab,
    "pdf/pypdf-locked.pdf": pdf_by_pypdf,
    "pdf/matplotlib.pdf": pdf_by_matplotlib,
    "docx/python-docx.docx": docx_by_python_docx,
    "docx-xml/document.xml": word_xml,
    "pptx/python-pptx.pptx": slides_by_python_pptx,
    "xlsx/openpyxl.xlsx": sheets_by_openpyxl,
    "odt/pandoc.odt": lambda: by_pandoc("odt"),
    "epub/pandoc.epub": lambda: by_pandoc("epub"),
    "rtf/pandoc.rtf": lambda: by_pandoc("rtf"),
    "eml/email.eml": lambda: mail("크레인 of January", 5).as_bytes(),
    "mbox/mailbox.mbox": box,
    "ipynb/nbformat4.ipynb": lambda: notebook_by_nbformat(4),
    "ipynb/nbformat3.ipynb": lambda: notebook_by_nbformat(3),
    "html/docutils.html": page_by_docutils,
    "html/markdown.html": page_by_markdown,
    "csv/excel.csv": lambda: table_by_csv("excel"),
    "csv/unix.csv": lambda: table_by_csv("unix", delimiter=";"),
    "csv/tabs.csv": lambda: table_by_csv("excel-tab"),
    "json/values.json": values,
    "jsonl/lines.jsonl": lines,
    "md/notes.md": NOTES.encode,
    "rst/guide.rst": GUIDE.encode,
    "txt/utf16.txt": lambda: GUIDE.encode("utf-16"),
    "txt/guide.txt": GUIDE.encode,
    "py/make_seeds.py": lambda: Path(__file__).read_bytes()[:2000],
}


def main() -> None:
    """Write every seed."""
    for path, maker in MAKERS.items():
        (SEEDS / path).parent.mkdir(parents=True, exist_ok=True)
        (SEEDS / path).write_bytes(maker())


if __name__ == "__main__":
    main()
