"""Questions about contexts: the formats, and the split by article."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from gistrag.errors import UsageError
from gistrag.qa.dataset import REFUSAL, Context, Task, read_contexts, split_by_article, write_contexts

SQUAD = {
    "title": "Water_mill",
    "context": "The mill has nine wheels.\u2028It is old.",
    "qas": [{"question": " How many wheels? ", "answers": ["nine", "nine", " nine wheels"]}],
}
RECORD = {
    "context": "The port closes at six.",
    "question": "When?",
    "answer": "at six",
    "kind": "theme",
    "source": "a.md",
}


def write(path: Path, *lines: object) -> Path:
    """Write lines, as JSON unless they are text."""
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines), "utf-8")
    return path


def test_squad_lines_are_read(tmp_path: Path) -> None:
    """A paragraph with its questions; answers are stripped and named once; the title is the heading."""
    contexts, dropped = read_contexts(write(tmp_path / "squad.jsonl", json.dumps(SQUAD, ensure_ascii=False)))

    task = Task("How many wheels?", ("nine", "nine wheels"))
    assert contexts == [Context(SQUAD["context"], "Water_mill", (task,), ("Water mill",))]
    assert dropped == 0


def test_squad_as_it_is_published_is_read(tmp_path: Path) -> None:
    """One object with articles, of version 1.1 or 2.0; what has no answer is left out, and so is rubbish."""
    asked = {"question": "How many wheels?", "answers": [{"text": "nine", "answer_start": 13}], "id": "1"}
    impossible = {"question": "Who built it?", "answers": [], "is_impossible": True, "id": "2"}
    paragraphs = [{"context": SQUAD["context"], "qas": [asked, impossible]}, {"context": "", "qas": []}, 7]
    articles = [{"title": "Water_mill", "paragraphs": paragraphs[:2]}, {"title": "No"}, {"paragraphs": paragraphs[2:]}]
    path = tmp_path / "train-v2.0.json"
    path.write_text(json.dumps({"version": "v2.0", "data": articles}, indent=1), "utf-8-sig")

    contexts, dropped = read_contexts(path)

    task = Task("How many wheels?", ("nine",))
    assert contexts == [Context(SQUAD["context"], "Water_mill", (task,), ("Water mill",))]
    assert dropped == 3


def test_rows_of_the_hub_are_read(tmp_path: Path) -> None:
    """A line a question, whose answers are one object with several texts."""
    row = {"context": "It closes at six.", "question": "When?", "answers": {"text": ["six"], "answer_start": [13]}}

    contexts, dropped = read_contexts(write(tmp_path / "rows.jsonl", {**row, "title": "Port"}))

    assert contexts == [Context("It closes at six.", "Port", (Task("When?", ("six",)),))]
    assert dropped == 0


def test_records_about_one_context_are_gathered(tmp_path: Path) -> None:
    """Two records of a context give one context with two questions."""
    other = {**RECORD, "question": "What closes?", "answers": ["the port", "port"], "heading": ["Harbour", "Hours"]}

    contexts, _ = read_contexts(write(tmp_path / "qa.jsonl", RECORD, other))

    assert [(t.question, t.kind) for t in contexts[0].tasks] == [("When?", "theme"), ("What closes?", "theme")]
    assert contexts[0].tasks[1].answers == ("the port", "port")


def test_a_gz_file_is_read_as_it_is(tmp_path: Path) -> None:
    """Packed files need no unpacking."""
    path = tmp_path / "squad.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(SQUAD).encode()))

    assert len(read_contexts(path)[0]) == 1


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        "3",
        {**RECORD, "context": " "},
        {**RECORD, "question": ""},
        {**RECORD, "answer": "", "answers": []},
        {**RECORD, "context": None},
        {"context": "x", "qas": [{"question": "q", "answers": []}]},
        {"context": "x", "qas": "rubbish"},
        {"question": "q", "answer": "a"},
    ],
)
def test_a_line_that_cannot_be_used_is_left_out_and_counted(tmp_path: Path, line: object) -> None:
    """Malformed lines do not end a run, and are not kept quiet either."""
    contexts, dropped = read_contexts(write(tmp_path / "qa.jsonl", line, RECORD))

    assert len(contexts) == 1
    assert dropped == 1


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\xff\xfe", b"\x1f\x8b not gzip"])
def test_a_file_without_a_usable_line_is_refused(tmp_path: Path, content: bytes) -> None:
    """One line says what was expected."""
    path = tmp_path / ("x.gz" if content.startswith(b"\x1f") else "x.jsonl")
    path.write_bytes(content)

    with pytest.raises(UsageError, match=r"x\.(jsonl|gz)"):
        read_contexts(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """So is one that is not there."""
    with pytest.raises(UsageError, match="cannot read"):
        read_contexts(tmp_path / "none.jsonl")


def test_articles_are_never_split() -> None:
    """All contexts of an article are on one side, the same one whatever else there is."""
    contexts = [Context(f"text {n}", f"article {n % 40}") for n in range(200)]

    train, held = split_by_article(contexts)

    articles = [{context.article for context in side} for side in (train, held)]
    assert not articles[0] & articles[1]
    assert articles[1]
    assert split_by_article(contexts[::-1])[1] == held[::-1]


# CLAP-NQ

CLAP = {
    "id": "1",
    "input": "how does a mill work",
    "passages": [
        {
            "title": "Water mill",
            "text": "A mill ( of wood ) turns a `` wheel '' . It grinds the wheat .",
            "sentences": ["A mill ( of wood ) turns a `` wheel '' .", "It grinds the wheat ."],
        }
    ],
    "output": [
        {"answer": "It turns a wheel .", "selected_sentences": ["A mill ( of wood ) turns a `` wheel '' ."]},
        {"answer": "", "selected_sentences": []},
    ],
}


def test_clap_nq_is_read(tmp_path: Path) -> None:
    """A long answer comes with the sentences that support it, all written as people write."""
    contexts, dropped = read_contexts(write(tmp_path / "clap.jsonl", CLAP))

    evidence = 'A mill (of wood) turns a "wheel".'
    task = Task("how does a mill work", ("It turns a wheel.",), "long", (evidence,))
    text = f"{evidence} It grinds the wheat."
    assert contexts == [Context(text, "Water mill", (task,), ("Water mill",), held_out=0.5)]
    assert dropped == 0


def test_clap_nq_without_an_answer_is_a_refusal(tmp_path: Path) -> None:
    """Somebody read the passage and found no answer: the right answer is to say so."""
    contexts, _ = read_contexts(write(tmp_path / "clap.jsonl", {**CLAP, "output": [{"answer": ""}]}))

    assert contexts[0].tasks == (Task("how does a mill work", (REFUSAL,), "refusal"),)


def test_half_of_clap_nq_is_held_out_whatever_is_asked_for() -> None:
    """A training with a smaller share still never sees that half, and one with a larger share holds out more."""
    contexts = [Context("…", f"article {number}", held_out=0.5) for number in range(200)]

    sizes = [len(split_by_article(contexts, held_out=share)[1]) for share in (0.0, 0.1, 0.5, 0.8)]

    assert sizes[0] == sizes[1] == sizes[2] == pytest.approx(100, abs=15)
    assert sizes[3] > sizes[2]


def test_written_contexts_are_read_again(tmp_path: Path) -> None:
    """Questions, answers, evidence, headings and articles survive a file of records."""
    tasks = (Task("How?", ("It turns.", "By turning."), "long", ("It turns.",)), Task("Who?", (REFUSAL,), "refusal"))
    contexts = [Context("It turns.", "Mill", tasks, ("Mill",)), Context("It is.", "Port", (Task("What?", ("it",)),))]

    write_contexts(tmp_path / "qa.jsonl", contexts)

    assert read_contexts(tmp_path / "qa.jsonl") == (contexts, 0)
