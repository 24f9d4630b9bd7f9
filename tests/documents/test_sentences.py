"""Sentences: where one ends, whatever the text is."""

from __future__ import annotations

import itertools

import pytest

from gistrag.documents.sentences import sentences


def cut(text: str) -> list[str]:
    """Return the sentences of a text."""
    return [text[start:end] for start, end in sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Dr. Lee met J. R. Fox at 3 p.m. It rained.", ["Dr. Lee met J. R. Fox at 3 p.m.", "It rained."]),
        ("Dr. Lee met J. R. Fox in St. Ives. It rained.", ["Dr. Lee met J. R. Fox in St. Ives.", "It rained."]),
        ("It takes 3.5 kg (ca. 8 lb.) of flour. Mix it.", ["It takes 3.5 kg (ca. 8 lb.) of flour.", "Mix it."]),
        ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
        ("연차는 15일입니다. 병가는 10일입니다.", ["연차는 15일입니다.", "병가는 10일입니다."]),
        ("반차는 몇 시간인가요? 네 시간이에요! 끝.", ["반차는 몇 시간인가요?", "네 시간이에요!", "끝."]),
        ("회의를 마쳤습니다.다음은 4월이다.", ["회의를 마쳤습니다.", "다음은 4월이다."]),
        ("2026. 1. 13. 화요일에 만났다. 끝.", ["2026. 1. 13. 화요일에 만났다.", "끝."]),
        ("(주)한울은 3.5퍼센트를 준다. www.한울.kr 참고.", ["(주)한울은 3.5퍼센트를 준다.", "www.한울.kr 참고."]),
        ("It began in 2024. 12 people came.", ["It began in 2024.", "12 people came."]),
        ("首都は東京です。人口は多い。", ["首都は東京です。", "人口は多い。"]),
        ("# A\nStaff get 25\ndays. We\nreceive 20.\n\n## B", ["# A", "Staff get 25\ndays.", "We\nreceive 20.", "## B"]),
        ("- one\n- two\n  goes on\n1. three", ["- one", "- two\n  goes on", "1. three"]),
        ("| a | b |\n|---|---|\n| 1. Yes | 2 |\nAfter it.", ["| a | b |", "|---|---|", "| 1. Yes | 2 |", "After it."]),
        ("Port: 80\nUser: me\nHost: a long name", ["Port: 80", "User: me", "Host: a long name"]),
        ("a\r\n\r\nb", ["a", "b"]),
        ("no mark at the end", ["no mark at the end"]),
        ("", []),
        (" \n\n ", []),
    ],
)  # fmt: skip
def test_a_sentence_ends_where_a_reader_ends_it(text: str, expected: list[str]) -> None:
    """At its mark, a blank line, a heading, an item, a row, or a line that was not wrapped."""
    assert cut(text) == expected


def test_every_word_is_in_one_sentence() -> None:
    """Sentences neither overlap nor leave anything but white space out."""
    text = "A b. C\nd e\n\n* f. G\n```\nh = 1\ni()\n```\n. . .\n\tj"
    spans = sentences(text)

    assert "".join(text.split()) == "".join("".join(text[start:end] for start, end in spans).split())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_a_long_text_takes_no_quadratic_time() -> None:
    """A paragraph of 20,000 lines is cut within a second."""
    assert len(sentences("word and word\n" * 20_000)) >= 1
