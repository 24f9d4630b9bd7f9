"""Questions about whole documents: which they are, which document they mean, and the summary that answers them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from gistrag.answering.whole import asks_about, document_named, named_in
from gistrag.engine import Engine
from gistrag.index.schema import SUMMARY_ORDINAL
from gistrag.index.store import Store
from gistrag.rag import GistRAG

DATA = Path(__file__).parents[1] / "data"
BEES = """# Keeping bees

This guide is for beginners. It follows the year.

## Spring

Bees gather nectar in spring and need a second box by the end of April at the latest, so look at them every week.

## Winter

They keep the honey in combs of wax for winter, and nobody opens the hive before the first warm day of the next March.
"""
MILL = "The mill stands by the river and grinds the wheat of the whole valley."
TITLES = {"a/staff.md": "Staff handbook", "fire.md": "Fire", "leave.md": "Leave rules", "pay.md": "Pay rules"}


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A guide of several chunks and a document of one."""
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "bees.md").write_text(BEES, "utf-8")
    (folder / "mill.md").write_text(MILL, "utf-8")
    return folder


@pytest.fixture
def rag(docs: Path, engine: Engine) -> Iterator[GistRAG]:
    """An index of them."""
    with build(docs, engine) as rag:
        yield rag


def build(docs: Path, engine: Engine) -> GistRAG:
    return GistRAG.from_folder(docs, index=docs.parent / "index", engine=engine, gists="on demand", chunk_tokens=128)


def stored(index: Path) -> list[tuple[str, str]]:
    """Return path and title of the summaries that are stored, in the order of the paths."""
    with Store.open(index) as store:
        return store.database.execute(
            "SELECT path, title FROM summaries JOIN documents ON id = document_id ORDER BY path"
        )


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is this document about?", ""),
        ("What's this about?", ""),
        ("Please summarize this page in a few words.", ""),
        ("Can you give me a short overview?", ""),
        ("Which topics does it cover?", ""),
        ("What is covered here?", ""),
        ("What are the main points of this document?", ""),
        ("Who is this for?", ""),
        ("Who should read this?", ""),
        ("TL;DR", ""),
        ("Tell me what this file is about.", ""),
        ("Summarise the tenancy agreement", "tenancy agreement"),
        ("What is safety.md about?", "safety"),
        ("Which subjects are discussed in the minutes?", "minutes"),
        ("What does the staff handbook say in general?", "staff handbook"),
        ("이 문서는 무엇에 관한 것인가요?", ""),
        ("요약해 줘", ""),
        ("휴가 규정을 요약해 주세요.", "휴가 규정"),
    ],
)
def test_a_question_about_the_whole(question: str, expected: str) -> None:
    """What it calls the document is returned; nothing for "this document"."""
    assert named_in(question) == expected


@pytest.mark.parametrize(
    "question",
    [
        "What does the handbook say about leave?",
        "Which topics were rejected in the meeting?",
        "How many sections does the law have?",
        "What does verify check?",
        "What are the rules about dogs?",
        "Where is a summary of my leave shown?",
        "What is this document about and who wrote it, and when does the part on leave begin to hold for " + "us " * 40,
        "정규직 직원의 연차는 며칠인가요?",
        "",
    ],
)
def test_a_question_about_a_detail(question: str) -> None:
    """It is answered from chunks."""
    assert named_in(question) is None


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What will a reader take away from this?", True),
        ("Quick rundown, please", True),
        ("To whom is this text addressed?", True),
        ("Which matters does the staff handbook treat?", True),
        ("Which matters does the fire handbook treat?", False),
        ("What does the staff handbook say about leave?", False),
        ("What is the staff paid?", False),
        ("What kind of staff is there?", False),
        ("When is the overview of the handbook written?", False),
        ("Is there a summary?", False),
    ],
)
def test_other_words_for_it_within_a_scope(question: str, expected: bool) -> None:
    """A question of nothing but words about documents, and of the name of the one in scope, asks about the whole."""
    assert asks_about(question, "staff.md", "Staff handbook") == expected


def test_no_written_question_about_a_detail_is_taken_for_one() -> None:
    """Of the questions of the tests, none that would be answered from a summary is about a detail."""
    lines = (DATA / "believable" / "questions.jsonl").read_text("utf-8").splitlines()
    asked = [json.loads(line) for line in lines]

    assert [one["question"] for one in asked if named_in(one["question"]) == ""] == []
    assert [
        one["question"] for one in asked if one["document"] and asks_about(one["question"], one["document"], "")
    ] == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("staff handbook", "a/staff.md"),
        ("handbook", "a/staff.md"),
        ("staff", "a/staff.md"),
        ("leave rules", "leave.md"),
        ("leave policy", "leave.md"),
        ("rules", None),
        ("dogs", None),
        ("", None),
    ],
)
def test_a_document_is_known_by_its_title_or_file(name: str, expected: str | None) -> None:
    """A name that fits several, or none, means no document."""
    assert document_named(name, TITLES) == expected


def test_the_summary_answers(rag: GistRAG) -> None:
    """Within a scope and by name; the answer is the summary, which is its source."""
    scoped, named = rag.query("What is this document about?", scope="bees.md"), rag.query("Summarize the bees guide.")

    assert scoped.text == named.text == rag.ready("Summarize this.", scope="bees.md").text  # type: ignore[union-attr]
    assert scoped.text.startswith("Keeping bees\n\nThis guide is for beginners. It follows the year.\n\n- Spring: Bees")
    (source,) = scoped.sources
    (chunk,) = rag.chunks([source.chunk_id])
    assert (chunk.text, chunk.ordinal, chunk.path) == (scoped.text, SUMMARY_ORDINAL, "bees.md")
    assert (source.place, scoped.usage.answer_tokens) == ("bees.md, Keeping bees", 0)


def test_a_document_of_one_chunk_is_summarized_when_asked(rag: GistRAG) -> None:
    """Nothing is stored for it, and its summary can be opened all the same."""
    answer = rag.query("What is this about?", scope="mill.md")

    assert answer.text == f"mill\n\n{MILL}"
    assert [chunk.text for chunk in rag.chunks([answer.sources[0].chunk_id])] == [answer.text]
    assert stored(rag.folder) == [("bees.md", "Keeping bees")]


def test_retrieve_puts_the_summary_first(rag: GistRAG) -> None:
    """It takes no place from a chunk where a detail is asked for."""
    whole = [hit.chunk.ordinal for hit in rag.retrieve("What is the bees guide about?", top_k=2)]
    detail = [hit.chunk.ordinal for hit in rag.retrieve("When is a second box needed?", top_k=9)]

    assert (whole[0], len(whole)) == (SUMMARY_ORDINAL, 2)
    assert SUMMARY_ORDINAL not in detail


def test_summaries_count_as_no_chunks(rag: GistRAG) -> None:
    """Totals, listings and scopes are those of the chunks."""
    assert {chunk.ordinal for chunk in rag.chunks()} >= {0, 1}
    assert SUMMARY_ORDINAL not in {chunk.ordinal for chunk in rag.chunks()}
    assert rag.store.stats().chunks == len(rag.chunks()) == rag.store.count()


def test_which_document_is_meant(rag: GistRAG) -> None:
    """The one asked about before; without one the answer names the documents."""
    before = rag.query("Summarize this document.", history=["Where do bees gather nectar in spring?"])
    unclear = rag.query("What is this about?")

    assert before.text.startswith("Keeping bees")
    assert unclear.text == "I answer questions from the 2 documents of this index: bees.md and mill.md."


def test_the_rest_of_a_document_is_a_detail(rag: GistRAG) -> None:
    """A name that is no title is searched, and so is a question with filters."""
    assert rag.ready("Summarize the winter rules for horses.", scope="bees.md") is None
    assert rag.query("What is this about?", filters={"path": "bees.md"}, max_new_tokens=2).usage.answer_tokens > 0


def test_summaries_follow_their_documents(docs: Path, engine: Engine) -> None:
    """An edited, renamed, shortened or removed document; what did not change is left alone."""
    index = docs.parent / "index"
    build(docs, engine).close()
    (docs / "bees.md").rename(docs / "hives.md")
    build(docs, engine).close()
    assert stored(index) == [("hives.md", "Keeping bees")]

    (docs / "hives.md").write_text(BEES.replace("Keeping bees", "Bees for all"), "utf-8")
    build(docs, engine).close()
    assert stored(index) == [("hives.md", "Bees for all")]

    (docs / "hives.md").write_text(MILL, "utf-8")
    build(docs, engine).close()
    assert stored(index) == []

    (docs / "hives.md").write_text(BEES, "utf-8")
    build(docs, engine).close()
    (docs / "hives.md").unlink()
    build(docs, engine).close()
    assert stored(index) == []


def test_an_old_index_gains_summaries_at_its_next_build(docs: Path, engine: Engine) -> None:
    """Until then they are made when they are asked for, and nothing is written."""
    index = docs.parent / "index"
    build(docs, engine).close()
    with sqlite3.connect(index / "index.db") as database:
        database.execute("DROP TABLE summaries")
    database.close()

    with GistRAG.open(index, engine=engine) as rag:
        assert rag.query("What is this about?", scope="bees.md").text.startswith("Keeping bees")
        assert rag.query("What is the bees guide about?").text.startswith("Keeping bees")
    with Store.open(index) as store:
        assert not store.summaries.are_stored

    build(docs, engine).close()
    assert stored(index) == [("bees.md", "Keeping bees")]


def test_a_build_that_was_stopped_goes_on_with_the_summaries(
    docs: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents that were committed without theirs gain them at the next build."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gistrag.index.builder.summary_of", stop)
        with pytest.raises(KeyboardInterrupt):
            build(docs, engine)
    with Store.open(docs.parent / "index") as store:
        assert [row.path for row in store.documents()] == ["bees.md", "mill.md"]

    build(docs, engine).close()
    assert stored(docs.parent / "index") == [("bees.md", "Keeping bees")]


@pytest.mark.parametrize("column", ["text", "title", "made_from"])
def test_a_damaged_summary_is_made_again(docs: Path, engine: Engine, column: str) -> None:
    """A changed letter is noticed: the summary is made from the chunks."""
    index = docs.parent / "index"
    build(docs, engine).close()
    with sqlite3.connect(index / "index.db") as database:
        database.execute(f"UPDATE summaries SET {column} = 'Wasps'")
    database.close()

    with GistRAG.open(index, engine=engine) as rag:
        assert rag.query("What is this about?", scope="bees.md").text.startswith("Keeping bees")
