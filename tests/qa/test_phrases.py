"""The sentences of answers: which language a question is answered in, and that every sentence has both."""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import Formatter

import pytest

from gistrag.qa.phrases import PHRASES, language_of, phrase

KOREAN = [
    json.loads(line)["question"]
    for line in (Path(__file__).parents[1] / "data" / "korean.jsonl").read_text("utf-8").splitlines()
]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("연차는 며칠인가요?", "ko"),
        ("DH-16의 E3 error 뜻은?", "ko"),
        ("API key 어디 있어?", "ko"),
        ("하늘", "ko"),
        ("ㅋㅋ", "ko"),
        ("Who is 국나래?", "en"),
        ("What does 갈대섬 mean?", "en"),
        ("휴가가 the same 인가요? 몰라서요", "ko"),
        ("Wie viele Tage?", "en"),
        ("有給休暇は何日ですか", "en"),
        ("42?", "en"),
        ("", "en"),
    ],
)
def test_the_language_of_a_question(question: str, expected: str) -> None:
    """Hangul is Korean, also between names of products; an English sentence that names something Korean is English."""
    assert language_of(question) == expected


@pytest.mark.parametrize("question", KOREAN)
def test_written_questions_are_told_apart(question: str) -> None:
    """Those in Hangul are Korean, those without are English."""
    assert language_of(question) == ("ko" if re.search("[가-힣]", question) else "en")


@pytest.mark.parametrize("name", sorted(PHRASES))
def test_both_languages_say_the_same(name: str) -> None:
    """A sentence has the same places to fill in both; the Korean one has Hangul, the English one has none."""
    english, korean = PHRASES[name]  # type: ignore[index]
    places = [sorted(field for _, field, _, _ in Formatter().parse(text) if field) for text in (english, korean)]

    assert places[0] == places[1]
    assert re.search("[가-힣]", korean)
    assert not re.search("[가-힣]", english)
    assert (phrase(name, "en"), phrase(name, "ko")) == (english, korean)  # type: ignore[arg-type]
