"""Questions about contexts: what is trained on and what is evaluated with.

JSON lines of three kinds are read, told apart by their keys, and SQuAD as it is published, one JSON object::

    {"title": …, "context": …, "qas": [{"question": …, "answers": […]}]}                     SQuAD, a paragraph a line
    {"context": …, "question": …, "answer": …, "kind": …, "source": …, "heading": […]}       one question a line
    {"input": …, "passages": [{"title": …, "text": …}], "output": [{"answer": …, "selected_sentences": […]}]}  CLAP-NQ
    {"data": [{"title": …, "paragraphs": [{"context": …, "qas": […]}]}]}                     SQuAD 1.1 and 2.0

An answer is a string, or an object with a ``text`` or several, as SQuAD and its rows on the hub have them. A question
without an answer, as in SQuAD 2.0, is left out; in CLAP-NQ (Rosenthal et al. 2024, arXiv 2404.02103) it has `REFUSAL`
as its answer, because somebody read the passage and found none.

Contexts with the same title or source are of one article; training and evaluation are split by article, never by
question. CLAP-NQ has few documents: half of them are held out, whatever share a training asks for.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from gistrag.errors import UsageError
from gistrag.qa.phrases import REFUSAL as REFUSAL
from gistrag.settings import HELD_OUT
from gistrag.storage import files

UNANSWERABLE = "refusal"
"""Kind of a question with that answer."""

LONG_KINDS = frozenset({"long", "list", "summary"})
"""Kinds of questions whose answers are sentences or lists."""

CLAP_HELD_OUT = 0.5
"""Share of the documents of CLAP-NQ that nothing is trained on."""


@dataclass(frozen=True)
class Task:
    """A question and the answers that count as right; kind says what it asks for.

    Attributes:
        evidence: for each answer the sentences of the passage that support it, a line each; () where none are marked.
    """

    question: str
    answers: tuple[str, ...]
    kind: str = "detail"
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """A passage and the questions it answers.

    Attributes:
        held_out: least share of the articles of its file that is kept out of training.
    """

    text: str
    article: str
    tasks: tuple[Task, ...] = ()
    heading: tuple[str, ...] = ()
    held_out: float = 0.0


def gathered(contexts: Iterable[Context]) -> list[Context]:
    """Return the contexts with the questions about the same text of the same article put together."""
    known: dict[tuple[str, str], Context] = {}
    for context in contexts:
        key = context.article, context.text
        known[key] = replace(known[key], tasks=known[key].tasks + context.tasks) if key in known else context
    return list(known.values())


def read_contexts(path: Path) -> tuple[list[Context], int]:
    """Return the contexts of a file, and how many lines, or paragraphs of an article, had to be left out.

    Questions about the same context are gathered. A line that is no JSON, has no context, no question or no answer is
    left out.

    Raises:
        UsageError: the file cannot be read, or holds no usable line.
    """
    try:
        parsed = [_parsed(record) for record in _records(path)]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    contexts = gathered(context for context in parsed if context is not None)
    if not contexts:
        raise UsageError(f"expected lines of SQuAD or question records in {path}, found none that can be used")
    return contexts, parsed.count(None)


def _records(path: Path) -> Iterator[Any]:
    """Yield what the lines of a file hold, None for one that is no JSON; of a published SQuAD, its paragraphs."""
    with path.open("rb") as file:
        data = gzip.decompress(file.read()) if path.suffix == ".gz" else file.read()
    text = data.decode("utf-8-sig")
    whole = _json(text)
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        yield from _paragraphs(whole["data"])
    else:
        yield from (_json(line) for line in text.split("\n") if line.strip())


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _paragraphs(articles: Iterable[Any]) -> Iterator[Any]:
    """Yield the paragraphs of articles, each with the title of its article; None for an article that is none."""
    for article in articles:
        try:
            yield from [{**paragraph, "title": article.get("title", "")} for paragraph in article["paragraphs"]]
        except (KeyError, TypeError, AttributeError):
            yield None


def _parsed(values: Any) -> Context | None:
    try:
        if "passages" in values:
            return _parsed_clap(values)
        text = values["context"].strip()
        if "qas" in values:
            tasks = tuple(Task(qa["question"].strip(), _answers(qa["answers"])) for qa in values["qas"])
            article, heading = str(values.get("title", "")), tuple(_strings([values.get("title", "")]))
            heading = tuple(unquote(word).replace("_", " ") for word in heading)
        else:
            answers = _answers(values.get("answers") or values["answer"])
            kind, evidence = str(values.get("kind", "detail")), _strings(values.get("evidence", []))
            tasks = (Task(values["question"].strip(), answers, kind, evidence),)
            article = str(values.get("source", values.get("title", "")))
            heading = _strings(values.get("heading", []))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    tasks = tuple(task for task in tasks if task.question and task.answers)
    return Context(text, article, tasks, heading) if text and tasks else None


def _parsed_clap(values: Any) -> Context | None:
    """Return the context of a line of CLAP-NQ, whose question has a long answer or none."""
    passage, *_ = values["passages"]
    title, question = str(passage["title"]), values["input"].strip()
    given = [one for one in values["output"] if one["answer"].strip()]
    answers = tuple(_joined(one["answer"]) for one in given)
    evidence = tuple("\n".join(map(_joined, one["selected_sentences"])) for one in given)
    task = Task(question, answers, "long", evidence) if answers else Task(question, (REFUSAL,), UNANSWERABLE)
    text = _joined(passage["text"])
    return Context(text, title, (task,), (title,), CLAP_HELD_OUT) if text and question else None


_SPACED = (
    (re.compile(r"``\s*|\s*''"), '"'),
    (re.compile(r" +(?=[,.;:?!%)\]]|n't\b|'(?:s|re|ve|ll|d|m)\b)|(?<=[(\[$]) +"), ""),
    (re.compile(r"(?<=\w) - (?=\w)"), "-"),
)


def _joined(text: str) -> str:
    """Return text of which every word and mark stood apart, as it is written.

    >>> _joined("A `` double coat '' , with one - year old hairs ( soft ) : it sheds , too .")
    'A "double coat", with one-year old hairs (soft): it sheds, too.'
    """
    for pattern, mark in _SPACED:
        text = pattern.sub(mark, text)
    return " ".join(text.split())


def _answers(value: Any) -> tuple[str, ...]:
    """Return the answers in a string, in an object's ``text``, or in a list of either."""
    if isinstance(value, dict):
        return _answers(value.get("text", ""))
    if isinstance(value, str):
        return _strings([value])
    return _strings(answer for each in value for answer in _answers(each))


def _strings(values: Iterable[Any]) -> tuple[str, ...]:
    """Return the different strings among *values*, without white space around them."""
    return tuple(dict.fromkeys(value.strip() for value in values if isinstance(value, str) and value.strip()))


def unsupported(contexts: Iterable[Context]) -> int:
    """Return how many questions for a detail have no answer that stands in their context.

    >>> unsupported([Context("It is red.", "", (Task("Which colour?", ("Red",)), Task("How old?", ("nine",))))])
    1
    """
    return sum(
        task.kind == "detail" and not any(answer.lower() in context.text.lower() for answer in task.answers)
        for context in contexts
        for task in context.tasks
    )


def split_by_article(contexts: Iterable[Context], *, held_out: float = HELD_OUT) -> tuple[list[Context], list[Context]]:
    """Return the contexts to train on and those held out: about a share of the articles, always the same ones.

    A context that names a larger share than *held_out* is split by its own.

    >>> train, held = split_by_article([Context("…", f"article {n}") for n in range(100)])
    >>> len(train), len(held)
    (91, 9)
    """
    sides: tuple[list[Context], list[Context]] = ([], [])
    for context in contexts:
        share = int.from_bytes(hashlib.sha256(context.article.encode()).digest()[:4]) / 2**32
        sides[share < max(held_out, context.held_out)].append(context)
    return sides


def write_contexts(path: Path, contexts: Iterable[Context]) -> None:
    """Write contexts as question records, a line each, which `read_contexts` reads.

    Raises:
        ResourceError: the disk is full.
    """
    records = (
        {
            "context": context.text,
            "question": task.question,
            "answers": task.answers,
            "kind": task.kind,
            "evidence": task.evidence,
            "source": context.article,
            "heading": context.heading,
        }
        for context in contexts
        for task in context.tasks
    )
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    files.write_atomic(path, "".join(lines).encode())
