"""Follow-up questions: which of them are joined with what was asked before, and which stand alone."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gistrag.answering.answer import Options
from gistrag.answering.conversation import TURN_CHARACTERS, TURNS_MAX, Form, earlier, form_of, joined, leans
from gistrag.engine import Engine
from gistrag.errors import UsageError
from gistrag.index.retriever import Fit
from gistrag.rag import GistRAG
from gistrag.settings import DEFAULT_EMBEDDER

HOTEL = "What is paid for a hotel?"
COMPLETE = "How many bytes does a slot take in a gist file?"
TEXTS = {
    "mills.md": "# Mills\n\nThe mill stands by the river and grinds the wheat of the whole valley.",
    "bees.md": "# Bees\n\nBees gather nectar in spring and keep the honey in combs of wax for winter.",
}
ROOT = Path(__file__).parents[2]
BELIEVABLE = ROOT / "tests" / "data" / "believable"
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "notebooks" / "bench" / "follow_ups.py"))


@pytest.fixture(scope="module")
def rag(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[GistRAG]:
    """An index of two documents."""
    docs = tmp_path_factory.mktemp("docs")
    for name, text in TEXTS.items():
        (docs / name).write_text(text, "utf-8")
    with GistRAG.from_folder(docs, index=tmp_path_factory.mktemp("index"), engine=engine, gists="now") as rag:
        yield rag


def fits(**of: tuple[float, float]) -> Any:
    """Return how well questions fit, by their first word in lower case."""
    return lambda question: Fit(*of[question.split()[0].lower().strip("?")])


@pytest.mark.parametrize(
    "question",
    [
        "And in Zurich?",
        "And of lead?",
        "What about children?",
        "How about the second one?",
        "With which torque?",
        "How often does its password change?",
        "When are they deleted?",
        "What happens if it breaks?",
        "Which bolts hold it down?",
        "How long are they safe there?",
        "시간제 직원은요?",
        "그럼 E2는요?",
        "그건 얼마나 자주 해야 해요?",
    ],
)
def test_a_question_that_makes_no_sense_alone_leans(question: str) -> None:
    """Fragments, and pronouns without a referent."""
    assert form_of(question) == Form.LEANING


@pytest.mark.parametrize("question", ["Why?", "Where?", "How do I do that?", "And for how long?"])
def test_a_question_without_a_word_of_its_own_is_always_joined(question: str) -> None:
    """There is nothing that could be searched."""
    assert form_of(question) == Form.EMPTY
    assert leans(question, HOTEL, fits())


@pytest.mark.parametrize(
    "question",
    [
        "What is a gist?",
        "How many bytes does a slot take in a gist file?",
        "What does it cost to replace the third bearing of the bridge?",
        "How long does it take until all blocks of the store are compared?",
        "Is it allowed to bring a large dog into the main office building?",
        "남은 연차는 언제까지 쓸 수 있나요?",
    ],
)
def test_a_complete_question_does_not_lean(question: str) -> None:
    """Neither does an impersonal it."""
    assert form_of(question) == Form.COMPLETE


@pytest.mark.parametrize(
    "question",
    [
        "Who took the minutes?",
        "And who says when people may go back after a fire?",
        "Where do cooks go when they are ill?",
    ],
)
def test_scores_decide_about_the_others(question: str) -> None:
    """A short question, a leading "and", and a pronoun whose referent may stand in the question."""
    assert form_of(question) == Form.SHORT


@pytest.mark.parametrize(
    ("alone", "together", "expected"),
    [
        ((0.4, 4.0), (0.6, 14.0), True),  # found far better together
        ((0.4, 12.0), (0.6, 14.0), False),  # its words stand somewhere alone
        ((0.9, 7.0), (0.6, 14.0), False),  # alone it is nearer to a chunk
        ((0.0, 0.0), (0.6, 14.0), True),  # alone nothing is found
        ((0.0, 0.0), (0.0, 0.0), False),  # nothing is found at all
    ],
)
def test_a_leaning_form_is_joined_where_it_is_found_badly_alone(
    alone: tuple[float, float], together: tuple[float, float], expected: bool
) -> None:
    """By both scores."""
    assert leans("And in Zurich?", HOTEL, fits(**{"and": alone, "what": together})) == expected


def test_a_complete_question_is_not_even_searched() -> None:
    """Nothing is asked of the index."""
    assert not leans("What is a gist?", HOTEL, fits())


def test_a_chain_of_follow_ups_leads_back_to_its_subject() -> None:
    """Each is joined with all that the one before it meant, and a new subject begins a new chain."""

    def fit(question: str) -> Fit:
        return Fit(0.1 * len(question.split()), float(len(question)))

    asked = ["How thick is the base of the HP-40 pump?", "Which bolts hold it?", "With which torque?"]

    assert joined(asked[2], asked[:2], fit) == " ".join(asked)
    assert joined("Why?", [*asked, COMPLETE], fit) == f"{COMPLETE} Why?"


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], []),
        (["", " \n"], []),
        (["What is\n a gist?"], ["What is a gist?"]),
        ([f"Question {number}" for number in range(1000)], ["Question 997", "Question 998", "Question 999"]),
    ],
)
def test_the_last_questions_count(history: list[str], expected: list[str]) -> None:
    """Empty ones do not."""
    assert earlier(history) == expected
    assert len(earlier(history)) <= TURNS_MAX


def test_a_long_text_that_was_pasted_is_cut() -> None:
    """Its end counts, where the question stands."""
    (turn,) = earlier(["x" * 10**6 + " What is this?"])

    assert (len(turn), turn[-13:]) == (TURN_CHARACTERS, "What is this?")


@pytest.mark.parametrize("history", ["What is a gist?", [5], [None], None, 7, {"a": "b"}])
def test_a_history_is_a_list_of_texts(history: Any, rag: GistRAG) -> None:
    """Anything else is refused in one line."""
    for call in (lambda: Options(history=history), lambda: rag.searched("Why?", history)):
        with pytest.raises(UsageError, match=r"^history must be a list of earlier questions"):
            call()


def test_an_answer_says_what_was_searched(rag: GistRAG) -> None:
    """The question alone, or with the one it leans on; `retrieve` and `searched` follow the same rule."""
    mill, follow_up = "Where does the mill stand?", "And what does it do?"

    answer = rag.query(follow_up, history=[mill], top_k=1, max_new_tokens=2)

    assert answer.searched == rag.searched(follow_up, [mill]) == f"{mill} {follow_up}"
    assert [source.path for source in answer.sources] == ["mills.md"]
    assert [hit.chunk.path for hit in rag.retrieve(follow_up, history=[mill], top_k=1)] == ["mills.md"]
    assert rag.query(mill, max_new_tokens=2).searched == mill


def test_a_history_changes_no_complete_question(rag: GistRAG) -> None:
    """Sources and answer are those of the question alone."""
    question = "Where do bees keep the honey of the whole spring?"

    with_history = rag.query(question, history=["Where does the mill stand?"] * 1000, max_new_tokens=4)
    alone = rag.query(question, max_new_tokens=4)

    assert (with_history.text, with_history.sources) == (alone.text, alone.sources)
    assert with_history.searched == question


def test_a_follow_up_is_looked_for_within_its_scope(rag: GistRAG) -> None:
    """What other documents say decides nothing."""
    answer = rag.query("Why?", history=["Where do bees keep honey?"], scope="bees.md", max_new_tokens=2)

    assert {source.path for source in answer.sources} == {"bees.md"}


def test_an_index_without_documents_has_no_follow_ups(tmp_path: Path, engine: Engine) -> None:
    """It answers that it is empty."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("Bees.")
    with GistRAG.from_folder(tmp_path / "docs", index=tmp_path / "index", engine=engine) as rag:
        (tmp_path / "docs" / "a.md").unlink()
        rag.sync()

        assert rag.query("Why?", history=["Where is it?"]).text == "There are no documents in this index."


@pytest.mark.model
def test_the_written_dialogues_are_understood(tmp_path: Path) -> None:
    """Of the follow-ups at least 85 % find the evidence that the full question finds; of the others 98 % stay alone."""
    records = SCRIPT["lines"](BELIEVABLE / "dialogues.jsonl")
    made: dict[str, Any] = {"index": tmp_path / "index", "gists": "on demand", "embedder": DEFAULT_EMBEDDER}
    with GistRAG.from_folder(BELIEVABLE / "documents", **made) as rag:  # the rule was fitted to this embedder
        found = SCRIPT["summary"]([SCRIPT["measured"](rag, record) for record in records])

    assert found["leaning_found"] >= 0.85 * found["leaning"] > 0
    assert found["complete_untouched"] >= 0.98 * found["complete"] > 0
