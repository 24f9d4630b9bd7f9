"""The Korean questions of ``tests/data/korean.jsonl``: what each record promises about its document."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
DOCUMENTS = {path.name: path.read_text("utf-8") for path in sorted((DATA / "korean").iterdir())}
RECORDS: list[dict[str, Any]] = [
    json.loads(line) for line in (DATA / "korean.jsonl").read_text("utf-8").splitlines()
]  # fmt: skip
ENGLISH = {"gorse-radio-manual.md", "pellworth-minutes.md"}


def is_korean(text: str) -> bool:
    return re.search("[가-힣]", text) is not None


def pairs(text: str) -> set[str]:
    """Return the Korean words of a text by their first two letters, which hardly an ending changes."""
    return {word[:2] for word in re.findall("[가-힣]{2,}", text)}


def test_there_are_enough_documents_and_questions() -> None:
    """Twelve Korean documents and 120 questions give a figure to rely on; every document is asked about."""
    assert {name for name, text in DOCUMENTS.items() if not is_korean(text)} == ENGLISH
    assert len(DOCUMENTS) - len(ENGLISH) >= 12
    assert len(RECORDS) >= 120
    assert {record["document"] for record in RECORDS} == set(DOCUMENTS)


def test_forty_questions_cross_the_languages() -> None:
    """They are asked in English about Korean text, or in Korean about English text, and no others are."""
    crossing = [record for record in RECORDS if is_korean(record["question"]) == (record["document"] in ENGLISH)]

    assert len(crossing) >= 40
    assert {record["kind"] for record in crossing} == {"cross"}
    assert Counter(is_korean(record["question"]) for record in crossing).keys() == {True, False}
    assert len(crossing) == sum(record["kind"] == "cross" for record in RECORDS)


def test_the_evidence_stands_once_in_its_document() -> None:
    """Word for word, and at one place only, so a passage either holds it or not."""
    wrong = [one["question"] for one in RECORDS if DOCUMENTS[one["document"]].count(one["evidence"]) != 1]

    assert wrong == []


def test_the_first_answer_stands_in_the_evidence() -> None:
    """The other answers are other ways to say it."""
    assert [one["question"] for one in RECORDS if one["answers"][0] not in one["evidence"]] == []


def test_no_document_answers_in_place_of_another() -> None:
    """No evidence stands in a second document."""
    wrong = [
        one["question"] for one in RECORDS if sum(one["evidence"] in document for document in DOCUMENTS.values()) != 1
    ]

    assert wrong == []


def test_nothing_is_asked_twice() -> None:
    """Neither a question nor an answer of one stands there twice."""
    times = Counter(record["question"].lower() for record in RECORDS)

    assert [question for question, count in times.items() if count > 1] == []
    assert [one["question"] for one in RECORDS if len(set(one["answers"])) < len(one["answers"])] == []


def test_paraphrases_use_other_words() -> None:
    """Of the Korean words of a question, at most two begin as one of its evidence does."""
    kept = {one["question"]: pairs(one["question"]) & pairs(one["evidence"]) for one in RECORDS}
    paraphrases = [one["question"] for one in RECORDS if one["kind"] == "paraphrase"]

    assert len(paraphrases) >= 12
    assert {question: kept[question] for question in paraphrases if len(kept[question]) > 2} == {}


def test_texts_are_composed() -> None:
    """A letter is one character (NFC), as in files that people write on most systems."""
    texts = [*DOCUMENTS.values(), *(json.dumps(record, ensure_ascii=False) for record in RECORDS)]

    assert [text for text in texts if unicodedata.normalize("NFC", text) != text] == []


def test_the_page_about_them_counts_them() -> None:
    """The table of korean.md holds the number of questions of each kind."""
    page = (DATA / "korean.md").read_text("utf-8")
    told = Counter({kind: int(count) for kind, count in re.findall(r"^\| ([a-z-]+) \|.*\| (\d+) \|$", page, re.M)})

    assert told == Counter(record["kind"] for record in RECORDS)
