"""Office files, books and Hangul documents as real programs write them, and as nobody should."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.hostile_files import SEEDS
from support.make_files import with_part
from support.make_office import make_hwp, make_hwpx, make_locked_package, make_zip

from gistrag.documents.readers import read
from gistrag.errors import DocumentError

ODF_LOCK = b'<manifest><file-entry full-path="content.xml"><encryption-data/></file-entry></manifest>'


def reason(data: bytes, name: str) -> str:
    """Return why *data* is refused."""
    with pytest.raises(DocumentError) as caught:
        read(data, name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_slides_are_pages_with_titles_notes_and_tables() -> None:
    """Slides in their order, a title as a heading, notes below their slide."""
    result = read(SEEDS["python-pptx.pptx"], "a.pptx")

    assert result.text == (
        "# Harbour plan\n\n부산항 2026\n\n# Cranes\n\nAnna lifts 12 tonnes\n\nBerta lifts 40 tonnes\n\n"
        "Berta is the youngest.\n\n# Prices\n\n| tool | price |\n| --- | --- |\n| saw \\| blade | 12 |"
    )
    assert [result.text[page:][:8] for page in result.pages] == ["# Harbou", "# Cranes", "# Prices"]
    assert result.metadata == {"title": "Harbour plan", "author": "Kim Min", "date": "2026-01-05T14:30:00+00:00"}


def test_sheets_name_the_values_of_their_rows() -> None:
    """A line above the header stays, numbers lose their noise, dates are dates, empty sheets and cells are nothing."""
    result = read(SEEDS["openpyxl.xlsx"], "a.xlsx")

    assert result.text == (
        "# 크레인\n\nAll cranes\n\nname: Anna\ntonnes: 0.3\nbuilt: 1962-05-01\nworks: TRUE\n\n"
        "name: Berta\ntonnes: 40\nbuilt: 1987-03-02 08:30\nworks: FALSE\ncolumn 5: spare\n\n"
        "name: # no heading\n\n# Days\n\nMon, Tue"
    )
    assert result.metadata["author"] == "Kim Min"
    assert result.metadata["date"][:4] == "2026"


def test_opendocument_texts_become_markdown() -> None:
    """Headings, lists, tables and footnotes in reading order."""
    result = read(SEEDS["pandoc.odt"], "a.odt")

    assert result.text.endswith(
        "# Cranes\n\nThe harbour has three cranes — 크레인 세 대.\n\n- red\n- blue\n\n"
        "| name | tonnes |\n| --- | --- |\n| Anna | 12 |\n| Berta | 40 |\n\n"
        "# Wind\n\nAbove 18 m/s all work stops.\n\nPrinted in 2019."
    )
    assert (result.metadata["title"], result.metadata["author"]) == ("Field guide", "Kim Min")


def test_deleted_text_and_comments_of_opendocument_are_not_read() -> None:
    """What the author took out or only noted is no text of the document; spaces and breaks are kept."""
    body = (
        "<x xmlns:t='t'><t:tracked-changes><t:p>gone</t:p></t:tracked-changes>"
        "<t:p>a<t:s t:c='3'/>b\n   c<t:line-break/>d<t:annotation><t:p>note</t:p></t:annotation></t:p>"
        "<t:h t:outline-level='3'>Deep</t:h></x>"
    )

    assert read(with_part(SEEDS["pandoc.odt"], "content.xml", body.encode()), "a.odt").text == "a b c\nd\n\n### Deep"


def test_books_are_read_chapter_by_chapter() -> None:
    """In the order of the spine, each chapter as a web page."""
    result = read(SEEDS["pandoc.epub"], "a.epub")

    assert result.text.index("# Cranes") < result.text.index("| Berta | 40 |") < result.text.index("# Wind")
    assert result.metadata == {"title": "Field guide", "author": "Kim Min", "date": "2026-01-05"}


def test_rich_text_keeps_its_letters_and_metadata() -> None:
    """Korean by Unicode escapes and by code page, tables by rows, properties of the file."""
    info = b"{\\info{\\title Field guide}{\\author Kim Min}{\\creatim\\yr2026\\mo1\\dy5\\hr9}}"
    page = b"{\\rtf1\\ansi\\ansicpg949 " + info + b"\\'c5\\'a9\\'b7\\'b9\\'c0\\'ce\\par}"

    assert "The harbour has three cranes — 크레인 세 대." in read(SEEDS["pandoc.rtf"], "a.rtf").text
    assert "Anna | 12" in read(SEEDS["pandoc.rtf"], "a.rtf").text
    assert read(page, "a.rtf").text == "크레인"
    assert read(page, "a.rtf").metadata == {"title": "Field guide", "author": "Kim Min", "date": "2026-01-05"}


def test_hwpx_becomes_markdown() -> None:
    """Outline styles are headings, sections stand in the order of their numbers."""
    result = read(make_hwpx(), "a.hwpx")

    assert result.text == (
        "# 제1장 크레인\n\n항만에는 크레인이\n세 대 있다.\n\n"
        "| 이름 | 톤 |\n| --- | --- |\n| 안나 | 12 |\n\n\\# 둘\n\n끝."
    )
    assert result.metadata == {"title": "항만 규정", "author": "김민", "date": "2026-01-05T05:30:00+00:00"}


@pytest.mark.parametrize("flags", [0, 1])
def test_hwp_becomes_markdown(flags: int) -> None:
    """Paragraphs and tables, compressed or not; controls and page headers are no text, line breaks are kept."""
    result = read(make_hwp(flags=flags), "a.hwp")

    assert result.text == (
        "항만에는 크레인이\n세 대 있다.\n\n\\# 표\n\n| 이름 | 톤 |\n| --- | --- |\n| 안나 | 12 |\n\n끝." + "길" * 3000
    )
    assert result.metadata == {"title": "항만 규정", "author": "김민", "date": "2026-01-05T05:30:00+00:00"}


PROTECTED = "protected by a password; save it without one"
REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "docx with a password": ("a.docx", make_locked_package, PROTECTED),
    "pptx with a password": ("a.pptx", make_locked_package, PROTECTED),
    "xlsx with a password": ("a.xlsx", make_locked_package, PROTECTED),
    "xls named xlsx": (
        "a.xlsx",
        lambda: b"\xd0\xcf\x11\xe0" + bytes(99),
        "an older format named .xlsx; save it as xlsx",
    ),
    "odt with a password": (
        "a.odt",
        lambda: with_part(SEEDS["pandoc.odt"], "META-INF/manifest.xml", ODF_LOCK),
        PROTECTED,
    ),
    "hwpx with a password": (
        "a.hwpx",
        lambda: with_part(make_hwpx(), "META-INF/manifest.xml", ODF_LOCK),
        PROTECTED,
    ),
    "hwp with a password": ("a.hwp", lambda: make_hwp(flags=3), PROTECTED),
    "hwp for distribution": ("a.hwp", lambda: make_hwp(flags=5), "a hwp file for distribution"),
    "hwp of version 3": (
        "a.hwp",
        lambda: b"HWP Document File V3.00 \x1a" + bytes(99),
        "a Hangul document of version 3",
    ),
    "hwp of version 9": ("a.hwp", lambda: make_hwp(version=9), "a Hangul document of version 9"),
    "hwpx named hwp": ("a.hwp", make_hwpx, "a hwpx file named .hwp"),
    "hwp of nothing": ("a.hwp", lambda: b"words", "not a hwp file"),
    "hwp that is an office package": ("a.hwp", make_locked_package, "not a hwp file"),
    "book with copy protection": (
        "a.epub",
        lambda: with_part(SEEDS["pandoc.epub"], "META-INF/encryption.xml", b"EPUB/text/ch001.xhtml"),
        "its chapters are encrypted",
    ),
    "pptx that is a zip": ("a.pptx", lambda: make_zip({"a": "b"}), "not a pptx file"),
    "xlsx that is a zip": ("a.xlsx", lambda: make_zip({"a": "b"}), "not an xlsx file"),
    "odt that is a zip": ("a.odt", lambda: make_zip({"a": "b"}), "not an odt file"),
    "epub that is a zip": ("a.epub", lambda: make_zip({"a": "b"}), "not an epub file"),
    "hwpx that is a zip": ("a.hwpx", lambda: make_zip({"a": "b"}), "not a hwpx file"),
    "odt that is no zip": ("a.odt", lambda: b"words", "not a odt file: not a zip archive"),
    "rtf of nothing": ("a.rtf", lambda: b"words", "not an rtf file"),
    "a document type": ("a.odt", lambda: make_zip({"content.xml": "<!DOCTYPE a><a/>"}), "its XML has a document type"),
    "damaged XML": ("a.odt", lambda: make_zip({"content.xml": "<a>"}), "its XML is damaged"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(what: str) -> None:
    """Passwords, old versions, other formats and damage have a reason each."""
    name, make, expected = REFUSED[what]

    assert reason(make(), name).startswith(expected)


@pytest.mark.parametrize(
    ("name", "data", "package", "extra"),
    [("a.hwp", make_hwp(), "olefile", "ko"), ("a.rtf", b"{\\rtf1 x}", "striprtf.striprtf", "office")],
)
def test_a_missing_package_is_named(
    name: str, data: bytes, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says what to install."""
    monkeypatch.setitem(sys.modules, package, None)

    assert reason(data, name).endswith(f"pip install 'gistrag[{extra}]'")


def test_every_real_file_is_small() -> None:
    """The seeds stay a matter of kilobytes."""
    folder = Path(__file__).parents[1] / "data" / "fuzz"

    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2**20
