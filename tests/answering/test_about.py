"""Greetings and questions about the assistant: one sentence, and no search."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gistrag.answering.about import kind_of, reply
from gistrag.engine import Engine
from gistrag.index.retriever import Retriever
from gistrag.rag import GistRAG

DATA = Path(__file__).parents[1] / "data"
QUESTIONS = [
    json.loads(line)
    for name in ("breadth.jsonl", "questions.jsonl", "believable/questions.jsonl")
    for line in (DATA / name).read_text("utf-8").splitlines()
]


@pytest.fixture
def rag(tmp_path: Path, engine: Engine) -> Iterator[GistRAG]:
    """An index of two documents."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "bees.md").write_text("Bees gather nectar in spring and keep the honey in combs of wax.")
    (docs / "mills.md").write_text("The mill stands by the river and grinds the wheat of the valley.")
    with GistRAG.from_folder(docs, index=tmp_path / "index", engine=engine, gists="on demand") as rag:
        yield rag


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Hello", "greeting"),
        ("hi there!!", "greeting"),
        ("Good morning \N{WAVING HAND SIGN}", "greeting"),
        ("안녕하세요", "greeting"),
        ("Thanks a lot.", "thanks"),
        ("ok, thank you", "thanks"),
        ("Thanks, that helped.", "thanks"),
        ("Are you a human or a machine?", "about"),
        ("감사합니다!", "thanks"),
        ("Bye", "goodbye"),
        ("What can you do?", "about"),
        ("Hi, who are you?", "about"),
        ("help", "about"),
        ("무엇을 할 수 있나요?", "about"),
        ("Which documents do you have?", "documents"),
        ("List the documents, please", "documents"),
        ("How many files are in the index?", "documents"),
        ("어떤 문서가 있나요?", "documents"),
    ],
)
def test_a_message_that_is_nothing_else(message: str, expected: str) -> None:
    """Marks, capitals, a greeting in front and a "please" behind change nothing."""
    assert kind_of(message) == expected


@pytest.mark.parametrize(
    "message",
    [
        "",
        "?",
        "Hello, who holds the lock?",
        "What can you do when the pump leaks?",
        "Which documents do I need to apply?",
        "Which documents are there for a visa?",
        "What do you know about bees?",
        "Thanks to whom was the bridge saved?",
        "Help with the installation",
        "Who are you allowed to invite?",
        "hello " * 100,
        "안녕하세요, 연차는 며칠인가요?",
    ],
)
def test_a_question_about_documents_is_none(message: str) -> None:
    """A greeting in front of a question is not the message."""
    assert kind_of(message) is None


def test_no_written_question_is_taken_for_one() -> None:
    """Of all questions of the tests only those that were written as greetings are."""
    taken = [one["question"] for one in QUESTIONS if one.get("kind") != "greeting" and kind_of(one["question"])]

    assert taken == []


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        ([], "I answer questions from the documents of this index, but there are none in it yet."),
        (["a.md"], "I answer questions from the one document of this index: a.md."),
        (["a.md", "b.md"], "I answer questions from the 2 documents of this index: a.md and b.md."),
        (
            [f"{number:04}.md" for number in range(2000)],
            "I answer questions from the 2,000 documents of this index: 0000.md, 0001.md, 0002.md, 0003.md, 0004.md, "
            "0005.md, 0006.md, 0007.md, 0008.md, 0009.md, 0010.md, 0011.md and 1,988 more.",
        ),
    ],
)
def test_the_sentence_names_the_documents(paths: list[str], expected: str) -> None:
    """Their number, and as many names as fit a sentence."""
    assert reply("about", paths) == expected


def test_a_greeting_is_answered_in_its_language() -> None:
    """Korean in Korean, all others in English."""
    assert reply("thanks", ["a.md"], language="ko") == "천만에요! 이 색인의 문서 1개를 바탕으로 질문에 답합니다: a.md."
    assert reply("greeting", ["a.md"]).startswith("Hello! I answer questions from")


def test_nothing_is_searched_for_a_greeting(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer names the documents, rests on no passage, and nothing is generated."""

    def search(*given: Any, **options: Any) -> Any:
        raise AssertionError("searched")

    monkeypatch.setattr(Retriever, "search", search)
    monkeypatch.setattr(Retriever, "fit", search)
    answer = rag.query("Hello!", history=["Where is the mill?"])

    assert answer.text == rag.ready("Hello!").text
    assert answer.text.endswith("2 documents of this index: bees.md and mills.md.")
    assert (answer.sources, answer.searched, answer.usage.answer_tokens) == ((), "", 0)
    assert "".join(rag.stream("Thank you!")).startswith("You are welcome!")
    assert rag.ready("Where is the mill?") is None


def test_thanks_do_not_end_a_subject(rag: GistRAG) -> None:
    """A follow-up after them leans on the question before."""
    asked = ["Where does the mill stand?", "Thanks!", "안녕하세요"]

    assert rag.searched("And what does it do?", asked) == f"{asked[0]} And what does it do?"
