"""Conversations as chat front-ends send them, and the chores among them."""

from __future__ import annotations

import json

import pytest

from gistrag.server.chat_history import chore, question_of

HISTORY = "<chat_history>\nUSER: How long is a gist?\nASSISTANT: It stands for two tokens.\n</chat_history>"
# as Open WebUI words them, shortened
TITLE = "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.\n### Output:\n"
TAGS = "### Task:\nGenerate 1-3 broad tags categorizing the main themes of the chat history.\n### Output:\n"
NEXT = "### Task:\nSuggest 3-5 relevant follow-up questions that the user might naturally ask next.\n### Output:\n"
QUERY = "### Task:\nAnalyze the chat history to determine the necessity of generating search queries.\n### Output:\n"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["Who holds the lock?"], "Who holds the lock?"),
        (["Who holds the lock?", "How long is a gist?"], "How long is a gist?"),
        (["What is a gist?", "How long is it?"], "What is a gist? How long is it?"),
        (["Who?", "What is a gist?", "And a chunk?", "Why?"], "What is a gist? And a chunk? Why?"),
        (["a lock", "it", "it", "it", "it"], "it it it"),
    ],
)
def test_the_last_question_with_what_it_leans_on(asked: list[str], expected: str) -> None:
    """A question that stands alone is taken alone; one that refers back brings at most two before it."""
    assert expected == question_of(asked)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (TITLE + 'JSON format: { "title": "your concise title here" }\n' + HISTORY, {"title": "How long is a gist"}),
        (TAGS + 'JSON format: { "tags": ["tag1", "tag2"] }\n' + HISTORY, {"tags": ["General"]}),
        (NEXT + 'JSON format: { "follow_ups": ["Question 1?"] }\n' + HISTORY, {"follow_ups": []}),
        (QUERY + '{ "queries": ["query1", "query2"] }\n' + HISTORY, {"queries": []}),
    ],
)
def test_chores_are_answered_in_their_form(message: str, expected: object) -> None:
    """What Open WebUI asks on the side gets JSON it can read."""
    answer = chore(message)

    assert answer is not None
    assert expected == json.loads(answer)


def test_a_chore_that_wants_plain_text() -> None:
    """A title may be asked for without JSON; anything else is answered by nothing."""
    assert "How long is a gist" == chore(TITLE + "Return ONLY the title text, nothing else.\n" + HISTORY)
    assert "" == chore("### Task:\nDraw the scene.\n" + HISTORY)


def test_a_long_title_ends_at_a_word() -> None:
    """A title is one line of at most sixty characters, whatever was asked."""
    answer = chore(TITLE + '"title"\n<chat_history>\nUSER: ' + "many words " * 20 + "\n</chat_history>")

    assert answer is not None
    assert "many words " * 5 + "many…" == json.loads(answer)["title"]


@pytest.mark.parametrize("question", ["How long is a gist?", "### Task: what does verify check?", "<chat_history>"])
def test_questions_are_no_chores(question: str) -> None:
    """A question is never taken for a chore, however it begins."""
    assert chore(question) is None
