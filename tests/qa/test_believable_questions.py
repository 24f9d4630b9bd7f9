"""The written questions of ``tests/data/believable/``: what each record promises about its document."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "data" / "believable"
DOCUMENTS = {path.name: path.read_text("utf-8") for path in sorted((FOLDER / "documents").iterdir())}
YES_OR_NO = ("yes", "no", "네", "아니요")  # these stand in no document; the evidence gives the reason


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text("utf-8").splitlines()]


DIALOGUES = records("dialogues.jsonl")


def is_korean(text: str) -> bool:
    return re.search("[가-힣]", text) is not None


def begins_with_yes_or_no(answer: str) -> bool:
    return answer.lower().split(",")[0] in YES_OR_NO


@pytest.mark.parametrize("record", DIALOGUES, ids=lambda record: str(record["full"]))
def test_the_evidence_carries_the_answer_word_for_word(record: dict[str, Any]) -> None:
    """The evidence stands in the document, and the first answer in the evidence, unless it is a yes or a no."""
    first = record["answers"][0]

    assert record["evidence"] in DOCUMENTS[record["document"]]
    assert first in record["evidence"] or begins_with_yes_or_no(first)


def test_every_document_has_questions_and_headings() -> None:
    """A document without a question, or without several sections, tests nothing."""
    asked = {record["document"] for record in DIALOGUES}
    sections = {name: len(re.findall(r"^(?:## |[A-Z]+$)", text, re.MULTILINE)) for name, text in DOCUMENTS.items()}

    assert asked == set(DOCUMENTS)
    assert [name for name, count in sections.items() if count < 3] == []
    assert 14 <= len(DOCUMENTS) <= 18


def test_dialogues_lean_or_only_look_like_it() -> None:
    """There are enough of both sorts, in both languages, of two to four turns each."""
    leans = Counter(record["leans"] for record in DIALOGUES)
    korean = [record for record in DIALOGUES if is_korean(record["full"])]

    assert leans[True] >= 36
    assert leans[False] >= 28
    assert len(korean) >= 6
    assert {len(record["turns"]) for record in DIALOGUES} <= {2, 3, 4}


def test_a_question_that_does_not_lean_is_complete() -> None:
    """Its last turn is the question in full; the last turn of one that leans is not."""
    wrong = [record["full"] for record in DIALOGUES if (record["turns"][-1] != record["full"]) != record["leans"]]

    assert wrong == []


def test_no_question_is_asked_twice() -> None:
    """A question that stands twice would count twice."""
    asked = Counter(record["full"] for record in DIALOGUES)

    assert [question for question, times in asked.items() if times > 1] == []
