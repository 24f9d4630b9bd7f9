"""The written questions over other texts than encyclopaedia paragraphs: every record is what it claims to be.

None of them was trained on, so they also tell whether the adapter that comes with gistrag is worth its place.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import HashEmbedder, byte_tokenizer

from gistrag.answering.conversation import Form, form_of
from gistrag.cli.main import main as run_command
from gistrag.evaluation.cases import Plan, cases, split_whole
from gistrag.evaluation.corpus import indexed
from gistrag.model.prompt import REFUSAL
from gistrag.qa.dataset import read_contexts
from gistrag.qa.metrics import contains

FILE = Path(__file__).parents[1] / "data" / "breadth.jsonl"
RECORDS: list[dict[str, Any]] = [json.loads(line) for line in FILE.read_text("utf-8").splitlines()]
REFUSED = [record for record in RECORDS if record["kind"] == "unanswerable"]
ANSWERED = [record for record in RECORDS if record not in REFUSED]


def plain(text: str) -> str:
    return " ".join(text.lower().split())


@pytest.mark.parametrize("record", ANSWERED, ids=lambda record: record["question"])
def test_the_answer_stands_in_the_context(record: dict[str, Any]) -> None:
    """The first accepted answer can be pointed at, and is not given away by the question."""
    assert record["answer"] == record["answers"][0]
    assert plain(record["answer"]) in plain(record["context"])
    assert not contains(record["question"], [record["answer"]])
    assert len(set(record["answers"])) == len(record["answers"])


def test_nothing_is_asked_twice() -> None:
    """A question stands once, and a text has one source."""
    assert [] == [
        question for question, count in Counter(plain(one["question"]) for one in RECORDS).items() if count > 1
    ]
    assert 1 == max(Counter(context for context, _ in {(one["context"], one["source"]) for one in RECORDS}).values())


def test_there_is_enough_of_every_kind() -> None:
    """At least two hundred questions, of every sort of text and in every way of asking."""
    sorts = Counter(record["source"].partition("/")[0] for record in RECORDS)
    kinds = Counter(record["kind"] for record in RECORDS)

    assert len(ANSWERED) >= 200
    assert min(sorts[sort] for sort in ("technical", "handbook", "tables", "code", "report", "python", "whole")) >= 20
    assert min(kinds[kind] for kind in ("number", "identifier", "person", "date", "reason", "condition")) >= 9
    assert min(kinds[kind] for kind in ("turns", "whole", "unanswerable")) >= 8


def test_second_questions_lean_on_the_first() -> None:
    """A conversation comes to one question, by its form and, where that leaves it open, by what is found."""
    talks = [record for record in RECORDS if "turns" in record]

    assert Counter(record["kind"] for record in talks) == {"turns": len(talks)}
    assert [record["question"] for record in talks] == [" ".join(record["turns"]) for record in talks]
    assert all(len(record["turns"]) > 1 and form_of(record["turns"][-1]) != Form.COMPLETE for record in talks)


def test_what_nothing_says_is_refused() -> None:
    """The answer to a question without one is the sentence that adapters learn."""
    assert {(REFUSAL,)} == {tuple(record["answers"]) for record in REFUSED}


def test_all_of_them_are_asked(tmp_path: Path) -> None:
    """No line is left out by the reader, and each becomes a case of its part."""
    contexts, left_out = read_contexts(FILE)
    chunked, wholes = split_whole(contexts)
    plan = Plan.of_suite("quick", questions=1000)
    with indexed(
        tmp_path / "corpus", chunked, HashEmbedder(), tokenizer=byte_tokenizer().backend_tokenizer, chunk_tokens=4000
    ) as corpus:
        asked = cases(corpus, wholes, plan, document_tokens=1)

    parts = Counter(case.part for case in asked if case.name.isdigit() or case.name.startswith("given "))
    assert 0 == left_out
    assert sum(record["kind"] == "whole" for record in RECORDS) == parts["whole"]
    assert len(ANSWERED) - parts["whole"] == parts["questions"]
    assert len(REFUSED) == sum(case.name.startswith("given ") for case in asked)


@pytest.mark.model
def test_the_adapter_is_better_than_none(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """With the adapter, the answers from the same gists are better by more than chance, and no worse than from text."""
    sorts = ("technical", "handbook", "report")
    asked = [one for one in ANSWERED if one["kind"] != "turns" and one["source"].split("/")[0] in sorts][::3][:36]
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps(record) + "\n" for record in asked), "utf-8")
    found: dict[tuple[str, str], list[float]] = {}
    for adapter in ("auto", "none"):
        folder = tmp_path / adapter
        options = ["--adapter", adapter, "--arms", "text,gist", "--rates", "4", "--suite", "quick", "--quiet"]
        assert run_command(["evaluate", str(few), "--output", str(folder), *options]) == 0
        rows = map(json.loads, (folder / "rows.jsonl").read_text("utf-8").splitlines())
        for row in sorted(rows, key=lambda row: row["name"]):
            if row["part"] == "questions":
                found.setdefault((adapter, row["arm"]), []).append(row["f1"])
    means = ", ".join(f"{arm} with adapter {name} {statistics.mean(f1):.2f}" for (name, arm), f1 in found.items())
    record_property("report", f"F1 of {len(found['auto', 'text'])} written questions: {means}")
    gain = [more - less for more, less in zip(found["auto", "gist 4"], found["none", "gist 4"], strict=True)]
    assert len(gain) >= 30
    assert statistics.mean(gain) > 1.96 * statistics.stdev(gain) / len(gain) ** 0.5
    assert statistics.mean(found["auto", "gist 4"]) >= 0.75 * statistics.mean(found["auto", "text"])
