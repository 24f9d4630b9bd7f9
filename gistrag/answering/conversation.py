"""What a question of a conversation means: itself, or itself behind the questions it leans on.

A follow-up such as "And in Zurich?" finds nothing when it is searched alone. It is joined with what was asked before if
its form leans, and if it is found badly alone: what the two searches find for the joined question is nearer, and holds
far more of its words.

The form is read from a few words of English and Korean; in other languages a short question may lean, and the scores
decide. No model is asked: that would take a second, and a small model invents.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from enum import IntEnum

from gistrag.answering.about import kind_of
from gistrag.index.retriever import Fit
from gistrag.qa.stop_words import STOP_WORDS

TURNS_MAX = 3
"""Earlier questions that count; what lies further back is another subject."""
TURN_CHARACTERS = 400
"""How much of an earlier question counts, from its end."""
SHORT_WORDS = 3
LEANING_MOST, SHORT_MOST = 0.65, 0.4
"""How well a question may be found alone and still be joined: its share of the BM25 that joining gives, less what it
gains in cosine. Chosen on `notebooks/bench/dialogues.jsonl`."""
NAMES = 3
"""So many words before a pronoun name something that it may stand for."""

FitOf = Callable[[str], Fit]
"""Returns how well the best chunks fit a question."""


class Form(IntEnum):
    """How strongly the form of a question leans on what was asked before."""

    COMPLETE = 0
    SHORT = 1
    LEANING = 2
    EMPTY = 3


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


PRONOUNS = _set("he her hers him his it its she that their theirs them these they this those")
POINTING = _set("that these this those")
LINKS = _set("also and but or so then")
CLAUSES = _set("after and although because before but if or since so unless until when where while")
VERBS = _set("am are be been can could did do does had has have is may might must shall should was were will would")
ASKING = _set("how what when where which who whom whose why")
PREPOSITIONS = _set("about above after at before below by during for from in of on since to under until with")
LIGHT = VERBS | _set(
    "else exactly far get gets go goes happen happens just long lot make many mean means much need often please really "
    "same soon still tell thing things too use"
)
IMPERSONAL = re.compile(  # what does it cost to, how long does it take until, what does it mean when
    r"\bit (?=(?:(?:\w+ ){0,3}?(?:to|whether)|(?:\w+ ){1,3}?(?:that|if|when|until|for)) \w+ \w+)"
)
KOREAN_PRONOUN = re.compile(
    r"(?:그|이|저)(?:것|거|건|게|걸|곳|때|들|분|녀|런|럼|러면|렇)?(?:은|는|을|를|의|에|도|로|과|와)?|거기\w*|여기\w*"
)
KOREAN_FRAGMENT = re.compile(r"\w+(?:은|는|도|에서|까지|부터|이|의)요")
DEFINITION = re.compile(r"(?:what|who|where) (?:is|are|was|were|does) |(?:define|explain|describe) ")


def joined(question: str, history: Sequence[str], fit: FitOf) -> str:
    """Return what to search for a question: itself, or behind those of the earlier questions that it leans on.

    Args:
        history: earlier questions of the same user, oldest first; greetings and empty ones are left out.
    """
    turns = [*earlier(history), question]
    meant = turns[0]
    for turn in turns[1:]:
        meant = f"{meant} {turn}" if leans(turn, meant, fit) else turn
    return meant


def earlier(history: Sequence[str]) -> list[str]:
    """Return the earlier questions that count, each in one line; greetings and thanks do not.

    >>> earlier(["What is a gist?", "Thanks!", "How long is it?"])
    ['What is a gist?', 'How long is it?']
    """
    filled = [" ".join(turn.split()) for turn in history if turn.strip() and not kind_of(turn)]
    return [turn[-TURN_CHARACTERS:] for turn in filled[-TURNS_MAX:]]


def leans(question: str, before: str, fit: FitOf) -> bool:
    """Return whether a question has to be joined with what was asked before it."""
    form = form_of(question)
    if form in (Form.COMPLETE, Form.EMPTY):
        return form == Form.EMPTY
    alone, together, previous = fit(question), fit(f"{before} {question}"), fit(before)
    share = alone.keyword / together.keyword if together.keyword else 1.0
    nearer = together.dense - alone.dense
    if form == Form.LEANING:
        return share - nearer < LEANING_MOST
    adds = together.keyword - previous.keyword > alone.keyword / 2  # the best chunk holds words of both
    return adds and nearer > 0 and share - nearer < SHORT_MOST


def form_of(question: str) -> Form:
    """Return how strongly the form of a question leans.

    >>> [form_of(question).name for question in ("And in Zurich?", "Who took the minutes?", "What is a gist?")]
    ['LEANING', 'SHORT', 'COMPLETE']
    """
    plain = IMPERSONAL.sub("", " ".join(question.lower().split()))
    words = re.findall(r"[\w']+", plain)
    content = [word for word in words if word not in STOP_WORDS | LIGHT | LINKS]
    if not content:
        return Form.EMPTY
    if _is_fragment(words, content) or _has_free_pronoun(words):
        return Form.LEANING
    if len(content) == 1 and DEFINITION.match(plain) and not PRONOUNS.intersection(words):
        return Form.COMPLETE
    has_sign = words[0] in LINKS or PRONOUNS.intersection(words)
    return Form.SHORT if has_sign or len(content) <= SHORT_WORDS else Form.COMPLETE


def _is_fragment(words: Sequence[str], content: Sequence[str]) -> bool:
    """Return whether a question is no sentence: "And in Zurich?", "What about children?", "시간제 직원은요?"."""
    if len(content) > SHORT_WORDS:
        return False
    if KOREAN_FRAGMENT.fullmatch(words[-1]) or (words[0] in ("what", "how") and words[1:2] in (["about"], ["if"])):
        return True
    if VERBS.intersection(words):
        return False
    is_led = words[0] in PREPOSITIONS or (words[0] in LINKS and not ASKING.intersection(words[1:2]))
    return is_led or (words[0] in ASKING and len(words) <= SHORT_WORDS and len(content) <= 1)


def _has_free_pronoun(words: Sequence[str]) -> bool:
    """Return whether a pronoun stands in the first clause, or behind one that names nothing it could stand for."""
    named = 0
    in_first = True
    for at, word in enumerate(words):
        if at and word in CLAUSES:
            in_first = False
        if word in POINTING and at + 1 < len(words) and words[at + 1] not in STOP_WORDS | LIGHT:
            continue  # this policy, these days
        if KOREAN_PRONOUN.fullmatch(word) or (word in PRONOUNS and (in_first or not named)):
            return named < (1 if word == "that" else NAMES)
        named += word not in STOP_WORDS | LIGHT | LINKS | ASKING
    return bool(words[-1] == "there" and len(words) > 1)
