"""Text in another encoding is read where that is sure, and all text is in Unicode's form NFC."""

from __future__ import annotations

import time
import unicodedata
from pathlib import Path

import pytest
from support.make_files import make_pdf

from gistrag.documents.discovery import find, load
from gistrag.documents.readers import read
from gistrag.documents.text import Part, Text, composed
from gistrag.errors import DocumentError

KOREAN = "회의록: 크레인 세 대를 수리하기로 했다. 비용은 다음 주에 정한다."
JAPANESE = "会議の記録です。クレーンを三台修理することにしました。"
CHINESE = "会议记录：我们决定修理三台起重机。费用下周再定。"


@pytest.mark.parametrize(
    ("text", "encoding", "expected"),
    [
        (KOREAN, "euc_kr", "cp949"),
        (KOREAN + "똠방각하", "cp949", "cp949"),
        (JAPANESE, "cp932", "cp932"),
        (CHINESE, "gb2312", "gb18030"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.csv"])
def test_sure_encodings_are_decoded_and_recorded(text: str, encoding: str, expected: str, name: str) -> None:
    """Korean, Japanese and Chinese of old programs, in every format of text."""
    result = read(text.encode(encoding), name)

    assert result.text == text
    assert result.metadata["encoding"] == expected


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Le café est fermé. Où êtes-vous ? Déjà.", "latin-1"),
        ("Größe, Straße, Öl. " * 9, "cp1252"),
        ("Привет, мир. Это текст о кранах.", "cp1251"),
        ("Καλημέρα κόσμε, αυτό είναι κείμενο", "cp1253"),
        ("會議記錄：我們決定修理三台起重機。", "big5"),
        (JAPANESE, "euc_jp"),
        ("회의", "cp949"),
        (KOREAN + "\0", "cp949"),
    ],
)
def test_what_is_not_sure_is_refused_as_before(text: str, encoding: str) -> None:
    """Other encodings, and too few letters to tell: one line, and no letter is guessed."""
    with pytest.raises(DocumentError, match=r"^(not UTF-8 text at byte \d+ \(.*\); save it as UTF-8|binary: .*)$"):
        read(text.encode(encoding), "a.txt")


def test_a_large_file_is_judged_by_its_beginning() -> None:
    """A look at the first quarter of a megabyte; a byte that does not fit behind it is a refusal."""
    data = (KOREAN + "\n").encode("cp949") * 20_000
    started_s = time.process_time()

    assert read(data, "a.txt").metadata["encoding"] == "cp949"
    with pytest.raises(DocumentError, match="not UTF-8"):
        read(data + b"\xff\xff", "a.txt")
    assert time.process_time() - started_s < 10


def test_text_of_macos_is_composed(tmp_path: Path) -> None:
    """A decomposed file gives the text of a composed one, in every format."""
    decomposed = unicodedata.normalize("NFD", "크레인 café")
    (tmp_path / "a.md").write_text(decomposed, "utf-8")
    (tmp_path / "a.html").write_text(f"<p>{decomposed}", "utf-8")

    found, *_ = find(tmp_path)

    assert [load(tmp_path, file).text for file in found] == ["크레인 café"] * 2


def test_offsets_follow_the_composition() -> None:
    """Pages and parts begin where they did, though the text before them is shorter."""
    text = unicodedata.normalize("NFD", "각\n\n한\n\n글")
    starts = (0, text.index("\n\n") + 2, text.rindex("\n\n") + 2)

    result = composed(Text(text=text, kind="pdf", pages=starts, parts=tuple(Part(at, {}) for at in starts)))

    assert result.text == "각\n\n한\n\n글"
    assert result.pages == tuple(part.start for part in result.parts) == (0, 3, 6)


def test_runs_of_marks_without_end_take_no_time() -> None:
    """Their normalization would take minutes; they stay as they are, the rest is composed."""
    marks = "\u0301\u0316" * 50_000
    started_s = time.process_time()

    text = read(f"e\u0301 a{marks} e\u0301".encode(), "a.txt").text

    assert time.process_time() - started_s < 5
    assert text == f"\u00e9 a{marks} \u00e9"


def test_pdf_pages_are_still_where_they_were() -> None:
    """What is composed already is left alone."""
    assert read(make_pdf(["one"], ["two"]), "a.pdf").pages == (0, 5)
