"""The Korean README keeps in step with the English one: same code, same figures, same shape.

``python tests/test_korean.py`` copies the blocks of code; the sentences are for a person to translate.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGLISH, KOREAN = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README.ko.md"))
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HANGUL = re.compile(r"[\uac00-\ud7a3]")


def prose(text: str) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", text)


def tables(text: str) -> list[list[list[str]]]:
    """Return every table of a page as rows of cells."""
    found = re.findall(r"(?:^\|.*\n)+", prose(text), re.MULTILINE)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in each.splitlines()] for each in found]


def figures(text: str) -> list[str]:
    """Return the numbers of a text, intervals as two; sorted, since word order is a matter of language."""
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", text))


def links(text: str) -> list[str]:
    """Return where the prose of a text links to, without anchors."""
    return re.findall(r"\]\(([^)\s#]+)", prose(text))


def test_code_blocks_are_the_same() -> None:
    """Every block of code stands in both, in the same order, letter for letter."""
    assert FENCE.findall(ENGLISH) == FENCE.findall(KOREAN)


def test_tables_have_the_same_figures() -> None:
    """Row by row and cell by cell, the numbers are the same."""
    ours, theirs = tables(ENGLISH), tables(KOREAN)

    assert [[len(row) for row in table] for table in ours] == [[len(row) for row in table] for table in theirs]
    assert [[[figures(cell) for cell in row] for row in table] for table in ours] == [
        [[figures(cell) for cell in row] for row in table] for table in theirs
    ]


def sections(text: str) -> list[str]:
    """Return the prose of each section of a page."""
    return re.split(r"^## ", prose(text), flags=re.MULTILINE)


def test_there_are_as_many_sections() -> None:
    """No section is missing, and none of their lists is shorter."""
    ours, theirs = sections(ENGLISH), sections(KOREAN)

    assert [section.count("\n- ") for section in ours] == [section.count("\n- ") for section in theirs]


def test_sentences_have_the_same_figures() -> None:
    """Every number in the prose of a section stands in both languages."""
    assert list(map(figures, sections(KOREAN))) == list(map(figures, sections(ENGLISH)))


def test_sections_have_the_same_links() -> None:
    """Every section links to the same pages, but for the page in the other language."""
    ours, theirs = ([sorted(links(section)) for section in sections(text)] for text in (ENGLISH, KOREAN))

    assert ours[1:] == theirs[1:]


def test_links_lead_somewhere() -> None:
    """Every relative link is to a file that exists."""
    assert [link for link in links(KOREAN) if "://" not in link and not (ROOT / link).exists()] == []


def test_it_is_korean() -> None:
    """Each section has Korean sentences, and a link leads from either page to the other."""
    for section in sections(KOREAN):
        assert len(HANGUL.findall(section)) > 10
    assert "(README.ko.md)" in ENGLISH
    assert "(README.md)" in KOREAN


@pytest.mark.parametrize("figure", [r"\d\.\d+초", r"\d,\d+", r"[\d.]+ \(\d+–\d+\)"])
def test_another_figure_is_found(figure: str) -> None:
    """A table with another number is noticed, so the test above means something."""
    table = tables(KOREAN)[0]
    changed = re.sub(figure, "7", str(table), count=1)

    assert changed != str(table)
    assert figures(changed) != figures(str(tables(ENGLISH)[0]))


def copy_blocks() -> None:
    """Put the code of the English page into the Korean one."""
    blocks = iter(FENCE.findall(ENGLISH))
    (ROOT / "README.ko.md").write_text(FENCE.sub(lambda _: next(blocks), KOREAN), "utf-8")


if __name__ == "__main__":
    copy_blocks()
