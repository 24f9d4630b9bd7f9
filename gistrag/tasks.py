"""Questions about contexts: what is trained on and what is evaluated with.

Two formats of JSON lines are read, told apart by their keys::

    {"title": …, "context": …, "qas": [{"question": …, "answers": […]}]}                     SQuAD, a paragraph a line
    {"context": …, "question": …, "answer": …, "kind": …, "source": …, "heading": […]}       one question a line

Contexts with the same title or source are of one article; training and evaluation are split by article, never by
question.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from gistrag.errors import UsageError


@dataclass(frozen=True)
class Task:
    """A question and the answers that count as right; kind says what it asks for."""

    question: str
    answers: tuple[str, ...]
    kind: str = "detail"


@dataclass(frozen=True)
class Context:
    """A passage and the questions it answers."""

    text: str
    article: str
    tasks: tuple[Task, ...] = ()
    heading: tuple[str, ...] = ()


def gathered(contexts: Iterable[Context]) -> list[Context]:
    """Return the contexts with the questions about the same text of the same article put together."""
    known: dict[tuple[str, str], Context] = {}
    for context in contexts:
        key = context.article, context.text
        known[key] = replace(known[key], tasks=known[key].tasks + context.tasks) if key in known else context
    return list(known.values())


def read_contexts(path: Path) -> tuple[list[Context], int]:
    """Return the contexts of a file of either format, and how many lines had to be left out.

    Questions about the same context are gathered. A line that is no JSON, has no context, no question or no answer is
    left out.

    Raises:
        UsageError: the file cannot be read, or holds no usable line.
    """
    try:
        parsed = [_parsed(line) for line in _lines(path)]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    contexts = gathered(context for context in parsed if context is not None)
    if not contexts:
        raise UsageError(f"expected lines of SQuAD or question records in {path}, found none that can be used")
    return contexts, parsed.count(None)


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        data = gzip.decompress(file.read()) if path.suffix == ".gz" else file.read()
    yield from (line for line in data.decode("utf-8").split("\n") if line.strip())


def _parsed(line: str) -> Context | None:
    try:
        values: dict[str, Any] = json.loads(line)
        text = values["context"].strip()
        if "qas" in values:
            tasks = tuple(Task(qa["question"].strip(), _strings(qa["answers"])) for qa in values["qas"])
            article, heading = str(values.get("title", "")), tuple(_strings([values.get("title", "")]))
            heading = tuple(unquote(word).replace("_", " ") for word in heading)
        else:
            answers = _strings(values.get("answers") or [values["answer"]])
            tasks = (Task(values["question"].strip(), answers, str(values.get("kind", "detail"))),)
            article, heading = str(values.get("source", "")), _strings(values.get("heading", []))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    tasks = tuple(task for task in tasks if task.question and task.answers)
    return Context(text, article, tasks, heading) if text and tasks else None


def _strings(values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value.strip() for value in values if isinstance(value, str) and value.strip()))


def split_by_article(contexts: Iterable[Context], *, held_out: float = 0.1) -> tuple[list[Context], list[Context]]:
    """Return the contexts to train on and those held out: about a share of the articles, always the same ones.

    >>> train, held = split_by_article([Context("…", f"article {n}") for n in range(100)])
    >>> len(train), len(held)
    (91, 9)
    """
    sides: tuple[list[Context], list[Context]] = ([], [])
    for context in contexts:
        share = int.from_bytes(hashlib.sha256(context.article.encode()).digest()[:4]) / 2**32
        sides[share < held_out].append(context)
    return sides


FIRST = ("Adela", "Tomas", "Irene", "Yusuf", "Mei", "Carlos", "Hanna", "Pavel", "Leila", "Oscar", "Ngozi", "Ravi")
LAST = ("Novak", "Brandt", "Okafor", "Demir", "Tanaka", "Ibarra", "Haddad", "Eze", "Menon", "Visser", "Mori", "Olsen")
MONTHS = ("January", "March", "April", "May", "June", "August", "September", "October", "November", "December")
PLACES = ("archive", "pump station", "reading room", "garden", "cooling plant", "ferry desk", "seed bank", "print shop")
SIDES = ("north", "old", "second", "river", "upper", "blue", "west", "royal", "small", "harbour")
PROBES = {
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


def plant(context: Context, randomness: random.Random, kind: str | None = None) -> Context:
    """Return the context with a made-up fact planted between two of its sentences, and the question for it.

    Args:
        kind: one of `PROBES`; drawn when None.
    """
    kind = kind or randomness.choice(sorted(PROBES))
    thing = f"{randomness.choice(SIDES)} {randomness.choice(PLACES)}"
    statement, question = randomness.choice(PROBES[kind])
    value = _value(kind, randomness)
    sentences = context.text.split(". ")
    sentences.insert(randomness.randint(0, len(sentences) - 1), statement.format(thing=thing, value=value).rstrip("."))
    task = Task(question.format(thing=thing), (value,), f"probe {kind}")
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
