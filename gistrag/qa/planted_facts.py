"""Planted facts: made-up names, dates, numbers and codes put into a passage, each with the question it answers.

No model knows a planted fact, so its answer can only come from the passage, and a wrong digit is a wrong answer. Such
details are what compression loses first.
"""

from __future__ import annotations

import random
from dataclasses import replace

from gistrag.qa.dataset import Context, Task

PLANTED = "probe"
"""How the kind of such a question begins in files of records and evaluations, as in ``probe date``."""

FIRST = ("Adela", "Tomas", "Irene", "Yusuf", "Mei", "Carlos", "Hanna", "Pavel", "Leila", "Oscar", "Ngozi", "Ravi")
LAST = ("Novak", "Brandt", "Okafor", "Demir", "Tanaka", "Ibarra", "Haddad", "Eze", "Menon", "Visser", "Mori", "Olsen")
MONTHS = ("January", "March", "April", "May", "June", "August", "September", "October", "November", "December")
PLACES = ("archive", "pump station", "reading room", "garden", "cooling plant", "ferry desk", "seed bank", "print shop")
SIDES = ("north", "old", "second", "river", "upper", "blue", "west", "royal", "small", "harbour")
FACTS = {
    "name": (
        ("The {thing} is run by {value}.", "Who runs the {thing}?"),
        ("{value} is responsible for the {thing}.", "Who is responsible for the {thing}?"),
        ("The key to the {thing} was given to {value}.", "Who was given the key to the {thing}?"),
    ),
    "date": (
        ("The {thing} was opened on {value}.", "When was the {thing} opened?"),
        ("The contract for the {thing} ends on {value}.", "When does the contract for the {thing} end?"),
        ("The {thing} was last inspected on {value}.", "When was the {thing} last inspected?"),
    ),
    "number": (
        ("The {thing} has a budget of {value} dollars.", "How many dollars is the budget of the {thing}?"),
        ("The {thing} weighs {value} kilograms.", "How many kilograms does the {thing} weigh?"),
        ("Last year {value} people visited the {thing}.", "How many people visited the {thing} last year?"),
    ),
    "identifier": (
        ("The access code of the {thing} is {value}.", "What is the access code of the {thing}?"),
        ("The {thing} is registered as {value}.", "Under which identifier is the {thing} registered?"),
        ("The serial number of the {thing} is {value}.", "What is the serial number of the {thing}?"),
    ),
}


def is_planted(task: Task) -> bool:
    """Return whether a task asks for a planted fact.

    >>> is_planted(Task("When?", ("1 May 1960",), f"{PLANTED} date")), is_planted(Task("When?", ("1960",), "detail"))
    (True, False)
    """
    return task.kind.split(" ")[0] == PLANTED


def plant(context: Context, randomness: random.Random, kind: str | None = None) -> Context:
    """Return the context with a made-up fact between two of its sentences, and with the question for it.

    Args:
        context: stays as it is.
        randomness: decides the fact, its wording and its place.
        kind: one of `FACTS`; drawn when None.
    """
    kind = kind or randomness.choice(sorted(FACTS))
    thing = f"{randomness.choice(SIDES)} {randomness.choice(PLACES)}"
    statement, question = randomness.choice(FACTS[kind])
    value = _value(kind, randomness)
    sentences = context.text.split(". ")
    sentences.insert(randomness.randint(0, len(sentences) - 1), statement.format(thing=thing, value=value).rstrip("."))
    task = Task(question.format(thing=thing), (value,), f"{PLANTED} {kind}")
    return replace(context, text=". ".join(sentences), tasks=(*context.tasks, task))


def _value(kind: str, randomness: random.Random) -> str:
    if kind == "name":
        return f"{randomness.choice(FIRST)} {randomness.choice(LAST)}"
    if kind == "date":
        return f"{randomness.randint(1, 28)} {randomness.choice(MONTHS)} {randomness.randint(1950, 2025)}"
    if kind == "number":
        return f"{randomness.randint(11, 99_999):,}"
    letters = "".join(randomness.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(2))
    return f"{letters}-{randomness.randint(100, 9999)}"
