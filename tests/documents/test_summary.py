"""What a document is about, taken from its own words."""

from __future__ import annotations

import pytest

from gistrag.documents.summary import SECTIONS_MAX, summarize

RULES = """# Staff rules

These rules hold for everybody. They were agreed in May.

## Leave

Everybody has 25 days. Ask early.

### Abroad

Ask the embassy.

## Pay

- on the last day
- by transfer

## Sizes

| grade | size |
|---|---|
| A | 3 |
| B | 4 |
"""


def test_title_lead_and_the_first_sentence_of_each_section() -> None:
    """A list gives its items, a table its first column; deeper sections are part of those above."""
    expected = """Staff rules

These rules hold for everybody. They were agreed in May.

- Leave: Everybody has 25 days.
- Pay: on the last day; by transfer
- Sizes: grade: A, B"""

    assert summarize(RULES, "rules.md").text == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "notes"),
        ("\n \n", "notes"),
        ("One. Two. Three.", "notes\n\nOne. Two. Three."),
        ("One.\n\nTwo. More.\n\nThree.", "notes\n\nOne.\n\n- Two.\n- Three."),
        ("# Only a title", "Only a title"),
        ("# Bees\n\nThey fly.\n\nThey sting. It hurts.", "Bees\n\nThey fly.\n\n- They sting."),
        ("| a | b |\n|---|---|\n| 1 | 2 |\n| 1 | 3 |", "notes\n\na: 1"),
        ("```\n# no heading\n```", "notes\n\n# no heading"),
        (
            "# 휴가\n\n## 연차\n\n18일이다. 신청한다.\n\n## 병가\n\n10일이다.",
            "휴가\n\n- 연차: 18일이다. 신청한다.\n- 병가: 10일이다.",
        ),
        (
            "# A\n\n## B\n\n```\nmake\n```\n\nIt builds.\n\n## C\n\n[See](x.md) it.",
            "A\n\n- B: It builds.\n- C: See it.",
        ),
    ],
)
def test_documents_of_every_shape(text: str, expected: str) -> None:
    """Without a heading the file gives the title; code is passed over where there is prose."""
    assert summarize(text, "a/notes.txt").text == expected


def test_marks_are_no_headings_in_plain_text() -> None:
    """A comment of a program is none."""
    assert summarize("# a comment\n\nx = 1", "run.py", has_headings=False).title == "run"


def test_a_few_sections_are_told_at_more_length() -> None:
    """The first sentences of their paragraphs, so that a document of one section is more than its first sentence."""
    summary = summarize("# A\n\n## B\n\nOne. 1.\n\nTwo. 2.\n\nThree. 3.", "a.md")

    assert summary.sections == (("B", "One. 1. Two. 2. Three. 3."),)


def test_a_huge_document_has_a_short_summary() -> None:
    """So many sections are told, of as many more the heading stands there, and every line is cut at a word."""
    text = "# Big\n\n" + "".join(f"## Part {number}\n\n{'word ' * 5000}.\n\n" for number in range(500))

    summary = summarize(text, "big.md")

    assert len(summary.sections) == 2 * SECTIONS_MAX
    assert [bool(line) for _, line in summary.sections] == [True] * SECTIONS_MAX + [False] * SECTIONS_MAX
    assert len(summary.text) < 6000
    assert summary.sections[0][1].endswith("word…")


def test_the_same_text_has_the_same_summary() -> None:
    """Nothing in it depends on chance."""
    assert summarize(RULES, "rules.md") == summarize(RULES, "rules.md")
