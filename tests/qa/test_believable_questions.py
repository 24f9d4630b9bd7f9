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
PAGES = {f"docs/{path.name}": path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
YES_OR_NO = frozenset({"yes", "no", "네", "아니요"})  # these stand in no document; the evidence gives the reason
ANSWERED = (
    *("number", "name", "date", "table", "near-identical", "condition", "yes-no", "list", "misspelt", "reason", "how"),
    "paraphrase",
)


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text("utf-8").splitlines()]


QUESTIONS, DIALOGUES, WHOLE = (records(f"{name}.jsonl") for name in ("questions", "dialogues", "whole"))
CARRIED = [record for record in (*QUESTIONS, *DIALOGUES) if record["evidence"] is not None]


def asked(record: dict[str, Any]) -> str:
    return str(record["full"] if "full" in record else record["question"])


def is_korean(record: dict[str, Any]) -> bool:
    return re.search("[가-힣]", asked(record)) is not None


def says_yes_or_no(answer: str) -> bool:
    return answer.lower().split(",")[0] in YES_OR_NO


def begins_a_word(phrase: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(phrase)}", text, re.IGNORECASE) is not None


def test_the_evidence_stands_once_in_its_document_word_for_word() -> None:
    """A sentence or row is what an answer is shown with, so it can be found, and at one place only."""
    wrong = [asked(record) for record in CARRIED if DOCUMENTS[record["document"]].count(record["evidence"]) != 1]

    assert wrong == []


def test_the_first_answer_stands_in_the_evidence() -> None:
    """It does word for word, unless it is a yes or a no."""
    firsts = [(record["answers"][0], record) for record in CARRIED]
    wrong = [asked(record) for first, record in firsts if first not in record["evidence"] and not says_yes_or_no(first)]

    assert wrong == []


def test_a_yes_no_question_is_answered_by_yes_or_no() -> None:
    """All its answers begin so, and a reader that always says the same is wrong for a third of them at least."""
    records = [record for record in QUESTIONS if record["kind"] == "yes-no"]
    yes = sum(record["answers"][0] in {"Yes", "네"} for record in records)

    assert [asked(one) for one in records if not all(map(says_yes_or_no, one["answers"]))] == []
    assert len(records) / 3 <= yes <= len(records) * 2 / 3


def test_each_item_of_a_list_stands_in_the_evidence() -> None:
    """Questions of the kind list, and only they, name their items one by one."""
    lists = [record for record in QUESTIONS if "items" in record]
    bare = [record["evidence"].replace("`", "") for record in lists]

    assert {record["kind"] for record in lists} == {"list"}
    assert sum(record["kind"] == "list" for record in QUESTIONS) == len(lists)
    assert [
        one["items"] for one, text in zip(lists, bare, strict=True) if any(i not in text for i in one["items"])
    ] == []


def test_there_are_enough_questions_of_each_kind() -> None:
    """A kind with a handful of questions gives no figure to rely on."""
    kinds = Counter(record["kind"] for record in QUESTIONS)
    enough = {**dict.fromkeys(ANSWERED, 12), "unanswerable": 30, "greeting": 8}

    assert set(kinds) == set(enough)
    assert {kind: count for kind, count in kinds.items() if count < enough[kind]} == {}
    assert sum(is_korean(record) for record in QUESTIONS if record["kind"] in ANSWERED) >= 12


def test_a_question_without_an_answer_has_no_evidence() -> None:
    """Ten of them at least ask for a value of something beside what the document has values of."""
    without = [record for record in QUESTIONS if record["kind"] not in ANSWERED]

    assert [asked(record) for record in without if record["answers"] or record["evidence"] is not None] == []
    assert [asked(record) for record in without if (record["kind"] == "greeting") != (record["document"] is None)] == []
    assert sum(record.get("neighbour", False) for record in without) >= 10


def test_dialogues_lean_or_only_look_like_it() -> None:
    """There are enough of both sorts, some in Korean, of two to four turns each."""
    leans = Counter(record["leans"] for record in DIALOGUES)

    assert leans[True] >= 36
    assert leans[False] >= 28
    assert sum(map(is_korean, DIALOGUES)) >= 6
    assert {len(record["turns"]) for record in DIALOGUES} <= {2, 3, 4}


def test_a_question_that_does_not_lean_is_complete() -> None:
    """Its last turn is the question in full; the last turn of one that leans is not."""
    wrong = [record["full"] for record in DIALOGUES if (record["turns"][-1] != record["full"]) != record["leans"]]

    assert wrong == []


def test_key_points_stand_in_the_document() -> None:
    """At least one phrase of each point begins a word there, so a summary of it can contain the point."""
    texts = {**DOCUMENTS, **PAGES}
    points = [(record["document"], point) for record in WHOLE for point in record["points"]]

    assert [(name, point) for name, point in points if not any(begins_a_word(one, texts[name]) for one in point)] == []


def test_questions_about_whole_documents_have_three_to_six_points() -> None:
    """There are enough of them, about these documents and about pages of the manual."""
    assert len(WHOLE) >= 42
    assert [record for record in WHOLE if not 3 <= len(record["points"]) <= 6] == []
    assert {record["kind"] for record in WHOLE} == {"about", "summary", "audience", "topics"}
    assert sum(record["document"] in PAGES for record in WHOLE) >= 10
    assert sum(map(is_korean, WHOLE)) >= 4


@pytest.mark.parametrize("records", [QUESTIONS, DIALOGUES, WHOLE], ids=["questions", "dialogues", "whole"])
def test_nothing_is_asked_twice(records: list[dict[str, Any]]) -> None:
    """A question that stands twice would count twice; of another document it is another one."""
    times = Counter((record["document"], asked(record).lower()) for record in records)

    assert [question for question, count in times.items() if count > 1] == []


def test_every_document_has_questions_and_sections() -> None:
    """A document without a question, or without several sections, tests nothing."""
    sections = {name: len(re.findall(r"^(?:## |[A-Z]+$)", text, re.MULTILINE)) for name, text in DOCUMENTS.items()}

    assert 14 <= len(DOCUMENTS) <= 18
    assert [name for name, count in sections.items() if count < 3] == []
    for records in (QUESTIONS, DIALOGUES, WHOLE):
        assert {record["document"] for record in records} >= set(DOCUMENTS)


def test_the_page_about_them_counts_them() -> None:
    """The tables of README.md hold the number of records of each kind."""
    page = (FOLDER / "README.md").read_text("utf-8")
    told = Counter(
        {kind: int(count) for kind, count in re.findall(r"^\| ([a-z -]+?) \|.*\| (\d+) \|$", page, re.MULTILINE)}
    )

    assert told == Counter(record["kind"] for record in (*QUESTIONS, *DIALOGUES, *WHOLE))
