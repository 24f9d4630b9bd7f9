"""What a chat front-end says, as a question that documents can answer.

A front-end sends the whole conversation each time, and passages are found for one question: the last one, behind those
that it leans on ("And what does it check?"). In the same shape front-ends send chores of their own, such as naming a
conversation; those are told apart and answered without reading anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from gistrag.index.retriever import STOP_WORDS

FOLLOW_UPS_MAX = 3
TITLE_CHARACTERS = 60

# Words that mean something said before, as far as English goes.
REFERRING = frozenset({"he", "her", "him", "his", "it", "its", "she", "their", "them", "these", "they", "those"})
LINKING = frozenset({"also", "and", "but", "or", "so", "then"})


def question_of(asked: Sequence[str]) -> str:
    """Return the question that a user's messages come to: the last one, behind those it leans on.

    >>> question_of(["What is a gist?", "What does verify do?", "And what does it check?"])
    'What does verify do? And what does it check?'
    >>> question_of(["What is a gist?", "Who holds the lock?"])
    'Who holds the lock?'
    """
    recent = list(asked[-FOLLOW_UPS_MAX:])
    begin = len(recent) - 1
    while begin > 0 and leans(recent[begin]):
        begin -= 1
    return " ".join(recent[begin:])


def leans(question: str) -> bool:
    """Return whether a question cannot be understood without the one before.

    >>> [leans(question) for question in ("Why?", "How long is it?", "And a chunk?", "How long is a gist?")]
    [True, True, True, False]
    """
    words = re.findall(r"\w+", question.lower())
    return bool(REFERRING & set(words) or LINKING & set(words[:1])) or set(words) <= STOP_WORDS


def chore(message: str) -> str | None:
    """Return the answer to a chore of a front-end, None where a user asks something.

    Open WebUI has a conversation named, tagged and continued by prompts that begin with ``### Task:`` and quote it. A
    small model that answers from passages has nothing to say to them, so the answer is the plainest one that fits.
    """
    told, quote, history = message.partition("<chat_history>")
    if not (quote and message.lstrip().startswith("### Task:")):
        return None
    answers = {"follow_ups": [], "tags": ["General"], "queries": [], "title": title(history)}
    for key, value in answers.items():
        if f'"{key}"' in told:
            return json.dumps({key: value}, ensure_ascii=False)
    return title(history) if "title" in told.lower() else ""


def title(history: str) -> str:
    r"""Return how the user began a quoted conversation, in a line.

    >>> title("USER: How long is a gist?\nASSISTANT: Two tokens.")
    'How long is a gist'
    """
    begun = re.search(r"USER:\s*(.+)", history)
    words = " ".join(begun[1].split()) if begun else "Conversation"
    short = words if len(words) <= TITLE_CHARACTERS else words[:TITLE_CHARACTERS].rsplit(" ", 1)[0] + "…"
    return short.rstrip("?.! ")
