"""Bytes become text, or one reason why not."""

from __future__ import annotations

import io
import json
import time
import zipfile

import docx
import pytest
from support.make_files import make_docx, make_encrypted_pdf, make_pdf, with_part

from gistrag.documents import text as texts
from gistrag.documents.formats import archive, word
from gistrag.documents.readers import is_document, missing_reader, read
from gistrag.documents.text import Text
from gistrag.errors import DocumentError


def reason(data: bytes, name: str) -> str:
    """Return why *data* is refused."""
    with pytest.raises(DocumentError) as caught:
        read(data, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "text"),
        ("A.MD", "markdown"),
        ("a.py", "code"),
        ("README", "text"),
        ("Makefile", "code"),
        ("a", "text"),
    ],
)
def test_plain_text_is_read_as_it_stands(name: str, kind: str) -> None:
    """Suffix or name tell the kind; the text is untouched."""
    expected = "  é # one\n\ttwo \x0c\n"

    result = read(expected.encode(), name)

    assert result.text == expected
    assert result.kind == kind
    assert result.pages == ()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_known_encodings_and_line_ends_give_the_same_text(encoding: str, end: str) -> None:
    """A byte order mark is obeyed and dropped, line ends become one kind."""
    data = end.join(["naïve", "日本"]).encode(encoding)

    assert read(data, "a.txt").text == "naïve\n日本"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("café".encode("latin-1"), "not UTF-8 text at byte 3"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "binary: a zero byte at offset 8"),
        ("wide".encode("utf-16-le"), "binary"),
        ("wide".encode("utf-32"), "binary"),
        (b"\xff\xfea", "not UTF-16 text"),
        (b"\xff\xfe\x00\xd8", "not UTF-16 text"),
        (b"\xed\xa0\x80", "not UTF-8 text"),
        (b"", "empty"),
        (b"\xef\xbb\xbf \r\n\t", "empty"),
    ],
)
def test_what_is_no_text_is_refused(data: bytes, expected: str) -> None:
    """Another encoding, binary data and blank files have a reason each, never a replacement character."""
    assert reason(data, "a.txt").startswith(expected)


def test_a_replacement_character_of_the_author_stays() -> None:
    """A U+FFFD that is really in the file is text like any other."""
    assert read("a\ufffdb".encode(), "a.txt").text == "a\ufffdb"


def test_too_much_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text over the limit is refused with both numbers."""
    monkeypatch.setattr(texts, "TEXT_CHARS_MAX", 3)

    assert reason(b"four", "a.txt") == "too long: 4 characters or more of text; the limit is 3"


def test_too_much_text_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters are counted as bytes: decoded, a file of mostly ASCII takes four times its size."""

    class Undecoded(bytes):
        def decode(self, *_: object) -> str:
            raise AssertionError("decoded")

    monkeypatch.setattr(texts, "TEXT_CHARS_MAX", 4)

    assert reason(Undecoded("née🎉s".encode()), "a.txt") == "too long: 5 characters or more of text; the limit is 4"


def test_names_tell_documents() -> None:
    """Suffixes and well-known names are documents, others are not; office formats without a reader are told."""
    names = ["a.PDF", "LICENSE", "a.b.rst", "a.png", "a", "pdf"]

    assert list(filter(is_document, names)) == ["a.PDF", "LICENSE", "a.b.rst"]
    assert missing_reader("a.png") is None
    assert missing_reader("a.PPT") == "no reader for .ppt files; save it as pdf, docx or html"


def test_rst_titles_become_headings() -> None:
    """Title styles rank in the order they appear; tables and quoted rules are left alone."""
    source = (
        "====\nTop\n====\n\nOne\n---\ntext\n\nDeep\n~~~~\n\nTwo\n---\n\n==== ====\na    b\n==== ====\n\n::\n\n  --\n"
    )

    text = read(source.encode(), "a.rst").text

    assert [line for line in text.split("\n") if line.startswith("#")] == ["# Top", "## One", "### Deep", "## Two"]
    assert text.endswith("==== ====\na    b\n==== ====\n\n::\n\n  --\n")


def test_rst_with_very_many_title_styles_takes_no_time() -> None:
    """The rank of a style is looked up, not searched for: 40,000 of them, 1.1 MB, would take a minute."""
    source = "".join(f"t\n{chr(0x40000 + n) * 2}\n\n" for n in range(40_000))
    started_s = time.process_time()

    text = read(source.encode(), "a.rst").text

    assert time.process_time() - started_s < 5
    assert [text.split("\n")[at] for at in (0, 2, -3)] == ["# t", "## t", "###### t"]


def test_html_becomes_markdown() -> None:
    """Headings, lists, tables, code and entities are readable; scripts and styles are gone."""
    page = b"""<!doctype html><head><title>Shop &ndash; tools</title><style>p{}</style></head><body>
    <h1>Tools</h1><p>Fish &amp; <b>chips</b>, a&lt;b<br>next<script>alert("x")</script>
    <ol><li>one<li>two<ul><li>deep</ul></ol>
    <table><tr><th>name<th>price</tr><tr><td>saw|blade<td><p>12</p><ul><li>net</ul></table>
    <p># no heading<pre>def f():
    return "```"</pre><h2>End<p>bye<svg><title>drawn</title></svg>"""

    expected = (
        "# Tools\n\nFish & chips, a<b\nnext\n\n1. one\n2. two\n  - deep\n\n"
        "| name | price |\n| --- | --- |\n| saw\\|blade | 12 net |\n\n\\# no heading\n\n"
        '````\ndef f():\n    return "```"\n````\n\n## End\n\nbye'
    )
    assert read(page, "a.html") == Text(text=expected, kind="html", metadata={"title": "Shop – tools"})


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (b"<title>T</title>x", "# T\n\nx"),
        (b"<pre>open", "```\nopen\n```"),
        (b"<table><tr><td>open", "| open |\n| --- |"),
        (b"a</p></ul></table></pre></title></script>b", "a\n\nb"),
        (b"<li>stray<li>again", "- stray\n- again"),
        (b"<table><tr><td>a<table><tr><td>b</table></table>c", "| a b |\n| --- |\n\nc"),
        (b"a < b &nosuch; &#x110000;", "a < b &nosuch; \ufffd"),
        (b"<p>a<![@ b]>c<![foo[x]]>d<![if gte mso 9]>e<![endif]>f", "acdef"),
        (b"a<![x", "a<![x"),
    ],
)
def test_broken_html_loses_no_words(page: bytes, expected: str) -> None:
    """Missing and stray tags are forgiven."""
    assert read(page, "a.htm").text == expected


@pytest.mark.parametrize("unit", [b"<!--", b"<a ", b"<a b='", b"<?", b"</a ", b"<![CDATA["])
def test_a_page_that_html_parser_reads_in_quadratic_time(unit: bytes) -> None:
    """A tag or comment that nothing closes is the reason, at once; a short one at the end is forgiven."""
    assert reason(unit * 1_000_000, "a.html").startswith("a tag or comment that nothing closes, ")
    assert read(b"<p>text" + unit, "a.html").text.startswith("text")


def test_lists_in_lists_without_end_do_not_grow() -> None:
    """From the ninth level on no item is indented further: 2,000 levels would make four million spaces."""
    text = read(b"<ul><li>x" * 2000, "a.html").text

    assert [*text.split("\n")[:2], text.split("\n")[-1]] == ["- x", "  - x", " " * 16 + "- x"]


def test_notebooks_keep_markdown_code_and_short_outputs() -> None:
    """Cells in order, code fenced, long outputs dropped."""
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
        {"cell_type": "code", "source": "1 + 1", "outputs": [{"data": {"text/plain": ["2"]}}]},
        {"cell_type": "code", "source": "noise()", "outputs": [{"text": "x" * 5000}]},
        {"cell_type": "code", "source": [], "outputs": []},
    ]
    data = json.dumps({"cells": cells, "nbformat": 4}).encode()

    expected = "# Title\nwords\n\n```python\n1 + 1\n```\n\n```output\n2\n```\n\n```python\nnoise()\n```"
    assert read(data, "a.ipynb") == Text(text=expected, kind="notebook")


@pytest.mark.parametrize("language", ["r\n```\n# Forged", "r```", "a b", ["r"]])
def test_a_kernel_cannot_end_the_fence(language: object) -> None:
    """A language that is no word is left out, so that the code stays in one fence and no heading is forged."""
    about = {"kernelspec": {"language": language}}
    data = json.dumps({"cells": [{"cell_type": "code", "source": "1"}], "metadata": about, "nbformat": 4}).encode()

    assert read(data, "a.ipynb").text == "```\n1\n```"


@pytest.mark.parametrize("data", [b"{}", b"[]", b"nonsense", b'{"cells": [1]}', b"[" * 100_000])
def test_what_is_no_notebook_is_refused(data: bytes) -> None:
    """A notebook that is none has a reason."""
    assert reason(data, "a.ipynb").startswith("not a Jupyter notebook")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'name;note\nAda;"two\nlines"\nAlan;', "name: Ada\nnote: two lines\n\nname: Alan"),
        (b"a\tb\n1\t2\t3\n\n", "a: 1\nb: 2\ncolumn 3: 3"),
        (b"only,header\n", "only,header\n"),
        (b'a,b\n"' + b"x" * 140_000, 'a,b\n"' + "x" * 140_000),
    ],
)
def test_tables_become_records(data: bytes, expected: str) -> None:
    """Every row says what its cells are; what is no table stays as it is."""
    assert read(data, "a.csv") == Text(text=expected, kind="table")


def test_a_header_far_longer_than_its_rows_takes_no_time() -> None:
    """A row costs what it holds, not what the header does: 100,000 columns by 100,000 rows would take minutes."""
    data = b"," * 99_999 + b"\n" + b"x\n" * 100_000
    started_s = time.process_time()

    text = read(data, "a.csv").text

    assert time.process_time() - started_s < 5
    assert text.startswith("x: x\n\nx: x")


def test_a_name_that_would_be_repeated_without_end_stays_once() -> None:
    """What would grow a thousandfold as ``path: value`` lines stays as it is."""
    data = b'{"%s": {%s}}' % (b"k" * 100_000, b",".join(b'"%d":1' % n for n in range(1_000)))

    assert data.decode() == read(data, "a.json").text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"a": {"b c": 1.50}, "d": [1, true, null], "d": "twice"}', "a.b c: 1.50\nd: 1, true, null\nd: twice"),
        (b'[{"a": 1}, {"a": [{"b": 2}, {}]}]', "a: 1\n\na[0].b: 2\na[1]: {}"),
        (b'{"a": 1} // comment', '{"a": 1} // comment'),
        (b'{"a": "\\ud800"}', '{"a": "\\ud800"}'),
        (b'{"a": "x\\u0000y"}', "a: xy"),
        (b"[" * 50_000, "[" * 50_000),
        (b"[]", "[]"),
    ],
)
def test_json_becomes_paths_and_values(data: bytes, expected: str) -> None:
    """Values keep their path and digits; what is no JSON stays as it is."""
    assert read(data, "a.json") == Text(text=expected, kind="json")


def test_jsonl_has_a_record_a_line() -> None:
    """A broken line stays as it is, among the others."""
    assert read(b'{"a": 1}\nbroken {\n\n{"a": 2}\n', "a.jsonl").text == "a: 1\n\nbroken {\n\na: 2"


def test_pdf_pages_have_offsets() -> None:
    """Pages begin where they are said to, an empty one included, and a word cut at a line end is whole."""
    result = read(make_pdf(["Hello infor-", "mation"], [], ["page three"]), "a.pdf")

    assert result.text == "Hello information\n\npage three"
    assert result.kind == "pdf"
    assert result.pages == (0, 19, 19)


def test_docx_becomes_markdown() -> None:
    """Headings, lists and tables in reading order."""
    expected = "# Handbook\n\nRead me first.\n\n## Tools\n\n- hammer\n- saw\n\n"
    expected += "| tool | price |\n| --- | --- |\n| hammer | 12 |"

    known = {"author": "python-docx", "date": "2013-12-23T23:15:00+00:00"}
    assert read(make_docx(), "a.docx") == Text(text=expected, kind="docx", metadata=known)


def test_a_docx_as_long_as_a_book_takes_no_time() -> None:
    """A paragraph costs the same whatever number of styles the document has: 20,000 of them took half a minute."""
    paragraph = "<w:p><w:r><w:t>x</w:t></w:r></w:p>"
    xml = (
        '<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main">'
        f"<w:body>{paragraph * 20_000}</w:body></w:document>"
    )
    data = with_part(make_docx(), "word/document.xml", xml.encode())
    started_s = time.process_time()

    text = read(data, "a.docx").text

    assert time.process_time() - started_s < 10
    assert text.count("x") == 20_000


def test_docx_cells_that_span_rows_stand_in_each_row() -> None:
    """A merged cell is read once and told in every row; 600 rows take no time."""
    document = docx.Document()
    table = document.add_table(rows=600, cols=3)
    table.cell(0, 1).merge(table.cell(599, 1)).text = "all year"
    for number, row in enumerate(table._tbl.tr_lst):
        row.tc_lst[2].p_lst[0].add_r().text = f"day {number}"
    out = io.BytesIO()
    document.save(out)
    started_s = time.process_time()

    lines = read(out.getvalue(), "a.docx").text.split("\n")

    assert time.process_time() - started_s < 8
    assert [*lines[:2], lines[-1]] == ["|  | all year | day 0 |", "| --- | --- | --- |", "|  | all year | day 599 |"]


@pytest.mark.parametrize(
    ("span", "expected"),
    [('<w:gridSpan w:val="1000000000"/>', "| x |\n| --- |"), ("<w:vMerge/>", "|  |\n| --- |")],
)
def test_docx_spans_are_not_believed(span: str, expected: str) -> None:
    """A cell said to span a billion columns is one cell; one said to go on from above the table is empty."""
    cell = f"<w:tc><w:tcPr>{span}</w:tcPr><w:p><w:r><w:t>x</w:t></w:r></w:p></w:tc>"
    xml = (
        '<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main">'
        f"<w:body><w:tbl><w:tblGrid/><w:tr>{cell}</w:tr></w:tbl></w:body></w:document>"
    )

    text = read(with_part(make_docx(), "word/document.xml", xml.encode()), "a.docx").text

    assert text == expected


def locked_zip() -> bytes:
    """Return an archive that says its one file is encrypted."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("[Content_Types].xml", "x")
    data = bytearray(out.getvalue())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "name", "expected"),
    [
        (make_pdf([], []), "scan.pdf", "no text on its 2 pages; if it is a scan, run OCR on it first"),
        (make_encrypted_pdf(), "locked.pdf", "encrypted; save it without a password"),
        (b"%PDF-1.4 nonsense", "broken.pdf", "Failed to load document"),
        (b"\xd0\xcf\x11\xe0 ole", "locked.docx", "an older format named .docx"),
        (b"PK nonsense", "broken.docx", "not a docx file"),
        (b"PK\x05\x06" + bytes(18), "nothing.docx", "not a docx file: the archive holds no Word document"),
        (with_part(make_docx(), "_rels/.rels", b"<Relationships/>"), "other.docx", "not a docx file: the archive"),
        (locked_zip(), "locked.docx", "protected by a password; save it without one"),
        (with_part(make_docx(), "x", b"0" * 2**25), "ratio.docx", "unpacks to "),
    ],
)
def test_documents_that_cannot_be_read_have_a_reason(data: bytes, name: str, expected: str) -> None:
    """Scans, passwords, torn files and zip bombs are refused in one line."""
    assert reason(data, name).startswith(expected)


def test_a_zip_that_expands_too_far_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The expanded size counts even where the ratio is harmless."""
    monkeypatch.setattr(archive, "ZIP_BYTES_MAX", 1000)

    with pytest.raises(DocumentError, match=r"unpacks to [\d,]+ bytes; the limit is 1,000"):
        word.read_docx(make_docx())


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("title: 'The port'\nauthor: Kim Min # of Busan\ndate: 2026-01-05", ("The port", "Kim Min", "2026-01-05")),
        ('title: "A: b"\ndate: 2026-01-05T14:30:00+09:00', ("A: b", None, "2026-01-05T14:30:00+09:00")),
        ("title: >\n  folded\nauthor: [a, b]\ndate: 2026-02-30", (None, None, None)),
        ("draft: true\nsubtitle: no", (None, None, None)),
    ],
)
def test_front_matter_is_metadata(front: str, expected: tuple[str | None, ...]) -> None:
    """Title, author and date of one line each; lists, blocks and impossible dates are left out, the text stays."""
    page = f"---\n{front}\n---\n# Port\n"

    result = read(page.encode(), "a.md")

    assert result.text == page
    assert tuple(map(result.metadata.get, ("title", "author", "date"))) == expected


def test_a_rule_is_no_front_matter() -> None:
    """Only what begins a file and ends is some."""
    assert read(b"words\n---\ntitle: x\n---\n", "a.md").metadata == {}
    assert read(b"---\ntitle: x\n", "a.md").metadata == {}


def test_tags_of_a_web_page_are_metadata() -> None:
    """Title, author and date, by any of the usual names."""
    page = (
        b'<title>Port &amp; sea</title><meta name="Author" content="Kim Min">'
        b'<meta property="article:published_time" content="2026-01-05T14:30:00+09:00"><meta name=date><p>x'
    )

    assert read(page, "a.html").metadata == {
        "title": "Port & sea",
        "author": "Kim Min",
        "date": "2026-01-05T14:30:00+09:00",
    }


def test_a_docx_without_properties_has_none() -> None:
    """The library would invent an author and the date of today."""
    spaces = "http://schemas.openxmlformats.org"
    relation = f'Id="rId1" Type="{spaces}/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"'
    only = f'<Relationships xmlns="{spaces}/package/2006/relationships"><Relationship {relation}/></Relationships>'
    bare = with_part(make_docx(), "_rels/.rels", only.encode())

    assert read(bare, "a.docx").metadata == {}
