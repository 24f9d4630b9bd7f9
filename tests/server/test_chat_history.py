"""The question in the chat history that a front-end sends."""

from __future__ import annotations

import pytest

from gistrag.server.chat_history import question_of


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
def test_the_last_question_with_those_it_refers_back_to(asked: list[str], expected: str) -> None:
    """A question that makes sense alone is asked alone; one that refers back brings at most two before it."""
    assert question_of(asked) == expected
