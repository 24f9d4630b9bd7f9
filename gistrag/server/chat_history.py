"""The question in a chat history.

A chat front-end sends the whole history with each request, but retrieval takes one question: the last one, preceded by
those it refers back to ("And what does it check?").
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gistrag.qa.stop_words import STOP_WORDS

FOLLOW_UPS_MAX = 3

# English words that refer to an earlier question.
REFERRING = frozenset({"he", "her", "him", "his", "it", "its", "she", "their", "them", "these", "they", "those"})
LINKING = frozenset({"also", "and", "but", "or", "so", "then"})


def question_of(asked: Sequence[str]) -> str:
    """Return the question that a user's messages amount to: the last one, after those it refers back to.

    >>> question_of(["What is a gist?", "What does verify do?", "And what does it check?"])
    'What does verify do? And what does it check?'
    >>> question_of(["What is a gist?", "Who holds the lock?"])
    'Who holds the lock?'
    """
    recent = list(asked[-FOLLOW_UPS_MAX:])
    begin = len(recent) - 1
    while begin > 0 and refers_back(recent[begin]):
        begin -= 1
    return " ".join(recent[begin:])


def refers_back(question: str) -> bool:
    """Return whether a question makes no sense without the one before it.

    >>> [refers_back(question) for question in ("Why?", "How long is it?", "And a chunk?", "How long is a gist?")]
    [True, True, True, False]
    """
    words = re.findall(r"\w+", question.lower())
    return bool(REFERRING & set(words) or LINKING & set(words[:1])) or set(words) <= STOP_WORDS
