"""What a terminal shows beside an answer: the sentence that carries it, how sure it is, and its sources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from gistrag.answering import quoting
from gistrag.answering.answer import Answer, Evidence, Source
from gistrag.cli import output

EVIDENCE = Evidence(7, 30, "Trainees get 20 days.", ("Staff", "Leave"), None, True)
OTHER = Source("pay.md", None, ("Pay",), 0, 9, 1.0, "words", 2, False)
CARRIER = replace(OTHER, path="leave.md", evidence=EVIDENCE)
SURE = Answer("20 days", (CARRIER, OTHER), confidence=0.914, verdict="answered")


class Told(Iterator[str]):
    """An answer that comes in pieces; what is thought of it is known from the first piece on, or after the last."""

    def __init__(self, answer: Answer, *, is_known_at_once: bool) -> None:
        self._pieces = iter(answer.text.partition(" "))
        self._whole = answer
        self.answer = answer if is_known_at_once else Answer("")

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration:
            self.answer = self._whole
            raise


@pytest.fixture(autouse=True)
def _shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="gistrag")


def said(answer: Answer, capsys: pytest.CaptureFixture[str], *, is_known_at_once: bool = True) -> list[str]:
    """Return the lines on standard error, but the last, that of the costs."""
    stream: Any = Told(answer, is_known_at_once=is_known_at_once)
    output.print_answer(stream)
    captured = capsys.readouterr()
    assert captured.out == f"{answer.text}\n"
    return captured.err.splitlines()[:-1]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (SURE, 'Sure (91%). The passage says: "Trainees get 20 days." [1]'),
        (
            replace(SURE, confidence=0.43, verdict="unsure"),
            'Not sure (43%). The passage says: "Trainees get 20 days." [1]',
        ),
        (replace(SURE, confidence=None, verdict=None), 'The passage says: "Trainees get 20 days." [1]'),
    ],
)
@pytest.mark.parametrize("is_known_at_once", [True, False])
def test_the_sentence_and_how_sure(
    answer: Answer, expected: str, is_known_at_once: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence is quoted and its source is marked; standard output holds the bare answer, and no colour."""
    lines = said(answer, capsys, is_known_at_once=is_known_at_once)

    assert lines == [f"  {expected}", "* 1. leave.md, Staff > Leave", "  2. pay.md, Pay"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, '확실함 (91%). 본문: "Trainees get 20 days." [1]'),
        ({"confidence": 0.43, "verdict": "unsure"}, '확실하지 않음 (43%). 본문: "Trainees get 20 days." [1]'),
        ({"verdict": "not found"}, "찾지 못함."),
        ({"verdict": "not found", "withheld": "9일"}, "찾지 못함. 모델의 짐작은 '9일' (91%). 본문: \"Trainees"),
    ],
)
def test_a_korean_question_is_told_in_korean(
    changes: dict[str, Any], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """How sure the answer is has the language of the question, as a refusal has."""
    assert said(replace(SURE, language="ko", **changes), capsys)[0].startswith(f"  {expected}")


def test_a_refusal_quotes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """What is not found has no evidence, whatever the model looked at; a guess that was withheld is told as one."""
    refusal = replace(SURE, text="No.", confidence=0.0, verdict="not found", unsupported=("5",))
    guess = replace(refusal, confidence=0.1, withheld="20 days\x1b[31m")

    assert said(refusal, capsys)[:2] == ["  Not found.", "  1. leave.md, Staff > Leave"]
    expected = "  Not found. The model guessed '20 days [31m' (10%). The passage says: \"Trainees get 20 days.\""
    assert said(guess, capsys)[:2] == [expected, "* 1. leave.md, Staff > Leave"]


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("It takes\n  20 days.", "It takes 20 days."),
        ("<b>20</b> [bold]days[/bold]", "<b>20</b> [bold]days[/bold]"),
        ("\x1b[31m20\x07\u202e days", "[31m20 days"),
        ("החופשה היא 20 ימים", "החופשה היא 20 ימים"),
        ("", ""),
    ],
)
def test_a_sentence_is_shown_as_it_is(sentence: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Characters that steer a terminal become spaces; markup and any script stay as they are."""
    carrier = replace(CARRIER, evidence=replace(EVIDENCE, text=sentence))

    assert said(replace(SURE, sources=(carrier,)), capsys)[0] == f'  Sure (91%). The passage says: "{expected}" [1]'


@pytest.mark.parametrize("side", ["so on ", "가나 ", "x"])
def test_a_long_sentence_is_cut_around_the_answer(side: str) -> None:
    """Of 2,000 characters those around the words of the answer are shown, wherever they stand."""
    for before, after in ((300, 30), (30, 300), (0, 300), (300, 0)):
        sentence = f"{side * before} the 20 days {side * after}"
        answer = replace(SURE, sources=(replace(CARRIER, evidence=replace(EVIDENCE, text=sentence)),))

        shown = quoting.quote(answer)
        assert "20 days" in shown
        assert len(shown) <= quoting.QUOTE_CHARACTERS + 2


def test_a_long_sentence_is_cut_where_most_of_the_answer_stands() -> None:
    """A word of the answer that stands alone elsewhere does not hide the others."""
    sentence = f"Many days pass {'so on ' * 200} the 20 days {'so on ' * 100} 20"
    answer = replace(SURE, sources=(replace(CARRIER, evidence=replace(EVIDENCE, text=sentence)),))

    assert "the 20 days" in quoting.quote(answer)


def test_a_citation_steers_no_terminal() -> None:
    """Neither does the name of a file, nor a heading of a document."""
    source = replace(CARRIER, path="a\x1b[31m\nb.md", evidence=replace(EVIDENCE, heading=("Le\u202eave",)))

    assert output.source_lines(replace(SURE, sources=(source,))) == ["* 1. a [31m b.md, Le ave"]


def test_what_stands_in_no_passage_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers and names without a passage stand on a line of their own; markup and colours in them do nothing."""
    lines = said(replace(SURE, verdict="unsure", unsupported=("[red]Lee", "1990")), capsys)

    assert lines[1] == "  In no passage: [red]Lee, 1990"


def test_an_answer_without_sources(capsys: pytest.CaptureFixture[str]) -> None:
    """Without evidence nothing is quoted, and no line stands for it."""
    assert said(Answer("There are no documents."), capsys) == []


def test_words_of_the_answer_are_bold_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal gets the words of the answer in bold, and nothing else."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)

    assert "Trainees get \x1b[1m20\x1b[0m \x1b[1mdays\x1b[0m." in said(SURE, capsys)[0]


def test_quiet_prints_the_answer_alone(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """With --quiet standard error stays empty."""
    caplog.set_level("ERROR", logger="gistrag")

    assert said(SURE, capsys) == []
