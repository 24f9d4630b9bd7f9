"""Writing training questions and answers about passages.

::

    passages ─ request ─→ teacher ─→ text ─ parse or polish ─→ filters ─→ records, a line each
                                                                  └─→ dropped, counted by reason

A question asks for a *detail*, the *theme* or an *inference*. A *long* record is a summary, an explanation or a list;
a *list* is always one, a line an item, and a *summary* is a few sentences. Their tasks name the topic, where a heading
tells it.
A planted fact needs no teacher. `gistrag.training.filters` decides what is kept.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tokenizers

from gistrag.documents.cutting import GuardedChunker
from gistrag.documents.discovery import Skipped, find, load
from gistrag.errors import DocumentError, UsageError
from gistrag.model.prompt import INSTRUCTION
from gistrag.progress import NoProgress, Progress
from gistrag.qa.dataset import LONG_KINDS, Context, read_contexts, split_by_article
from gistrag.qa.phrases import language_of
from gistrag.qa.planted_facts import PLANTED, plant
from gistrag.storage.jsonl import JsonLines
from gistrag.training.filters import SeenQuestions, is_known, pair_flaw, parse, polish, polish_list
from gistrag.training.teacher import Request, Teacher
from gistrag.training.wordings import ENGLISH, WORDINGS

Kind = Literal["detail", "theme", "inference", "long", "list", "summary", "probe"]
Record = dict[str, Any]
_Job = tuple["Passage", str]

BATCH = 16
"""Requests in a batch; a run that is killed repeats at most one batch."""

NEW_TOKENS = 96
"""Most tokens of a teacher's text."""

CLOSED_BOOK_TOKENS = 64
"""Most tokens of an answer without the document."""


@dataclass(frozen=True)
class Passage:
    """A piece of a source that questions are written about.

    Attributes:
        text: its characters.
        source: path of the document, or name of the article.
        start: position of the first character in the source.
        end: position behind the last one.
        heading: headings above it.
    """

    text: str
    source: str
    start: int
    end: int
    heading: tuple[str, ...] = ()

    def key(self, kind: str) -> str:
        """Return the name under which one kind of question about this passage is noted as done."""
        parts = (kind, self.source, self.start, self.end, self.text)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def passages_of_folder(
    folder: str | Path, tokenizer: tokenizers.Tokenizer, *, window: int
) -> tuple[list[Passage], list[Skipped]]:
    """Return the documents of *folder* in passages of at most *window* tokens, and the files that were skipped.

    Raises:
        UsageError: no such folder, or no readable document in it.
    """
    found, skipped, _ = find(folder)
    chunker = GuardedChunker(tokenizer, chunk_tokens=window)
    passages: list[Passage] = []
    for file in found:
        try:
            chunks = chunker.split(load(folder, file))
        except DocumentError as error:
            skipped.append(Skipped(path=file.path, sha256=file.sha256, reason=str(error)))
            continue
        passages += [Passage(chunk.text, file.path, chunk.start, chunk.end, chunk.heading) for chunk in chunks]
    if not passages:
        reasons = "".join(f"; {row.path}: {row.reason}" for row in skipped[:1])
        raise UsageError(f"expected readable documents in {folder}, found none{reasons}; check the folder")
    return passages, skipped


def passages_of_file(path: Path, *, training_only: bool = False) -> tuple[list[Passage], int]:
    """Return the contexts of a question file as passages, and how many lines could not be used.

    Args:
        path: see `gistrag.qa.dataset`.
        training_only: leave out the articles that are held out for evaluation.

    Raises:
        UsageError: the file cannot be read, or holds no usable line.
    """
    contexts, dropped = read_contexts(path)
    if training_only:
        contexts, _ = split_by_article(contexts)
    return [Passage(one.text, one.article, 0, len(one.text), one.heading) for one in contexts], dropped


def choose(passages: Sequence[Passage], limit: int | None, *, seed: int) -> list[Passage]:
    """Return at most *limit* passages, drawn with *seed*; a higher limit keeps those of a lower one."""
    if limit is None or limit >= len(passages):
        return list(passages)
    numbers = list(range(len(passages)))
    random.Random(seed).shuffle(numbers)
    return [passages[number] for number in sorted(numbers[:limit])]


TASKS = ENGLISH.tasks
LONG = ENGLISH.long


def request(kind: str, passage: Passage, randomness: random.Random) -> Request:
    """Return the request for one record, in the language of the passage."""
    said = WORDINGS[language_of(passage.text)]
    if kind == "long":
        return Request(randomness.choice(said.long), passage.text, passage.heading)
    if kind in said.topical:
        topic = passage.heading[-1] if passage.heading else said.no_topic
        task = randomness.choice(said.topical[kind]).format(topic)
        begin = "1." if kind == "list" else ""
        return Request(task, passage.text, passage.heading, rules=said.topical_rules[kind], begin=begin)
    task = said.tasks[kind].format(detail=randomness.choice(said.details)) + said.form
    return Request(task, passage.text, passage.heading, rules=f"{said.rules[kind]} {said.clear}", begin=said.begin)


def planted(passage: Passage, randomness: random.Random) -> Record:
    """Return the record of a fact planted into a passage."""
    context = plant(Context(passage.text, passage.source, (), passage.heading), randomness)
    (task,) = context.tasks
    return {**_record(passage, task.kind, task.question, task.answers[0]), "context": context.text}


def judged(passage: Passage, kind: str, task: str, text: str) -> tuple[Record | None, str]:
    """Return the record of a teacher's text, or None and the reason why it is dropped."""
    about = " ".join(passage.heading)
    if kind in LONG_KINDS:
        answer, reason = (polish_list if kind == "list" else polish)(text, passage.text, about)
        return (_record(passage, kind, task, answer), "") if answer else (None, reason)
    pair = parse(text)
    if pair is None:
        return None, "unreadable"
    reason = pair_flaw(kind, *pair, f"{about} {passage.text}")
    return (None, reason) if reason else (_record(passage, kind, *pair), "")


def _record(passage: Passage, kind: str, question: str, answer: str) -> Record:
    return {
        "instruction": INSTRUCTION,
        "context": passage.text,
        "gist_span": [passage.start, passage.end],
        "question": question,
        "answer": answer,
        "kind": kind,
        "source": passage.source,
        "heading": list(passage.heading),
    }


@dataclass
class Report:
    """Counts of a run.

    Attributes:
        written: records by kind.
        dropped: texts by reason.
        done_before: requests that an earlier run finished.
    """

    written: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    done_before: int = 0


class Ledger:
    """A file of records, and beside it ``NAME.state`` with the keys of the requests that are done.

    A run may be killed at any moment: what it wrote but did not note as done is written again, and dropped as a
    duplicate.

    Attributes:
        questions: the questions in the file.
    """

    def __init__(self, records: JsonLines, notes: JsonLines) -> None:
        self._records, self._notes = records, notes
        self._done = {key for keys in notes.records if isinstance(keys, list) for key in keys}
        self.questions = SeenQuestions()
        for record in records.records:
            with suppress(LookupError, TypeError, AttributeError):  # a line that somebody else wrote
                self.questions.is_new(record)

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Ledger]:
        """Hold the ledger at *path*, which no other process can write meanwhile.

        Raises:
            UsageError: a file that `gistrag synthesize` did not begin, or one that cannot be written.
            IndexLockedError: another process writes it.
        """
        state = path.with_name(f"{path.name}.state")
        is_there = path.is_file()
        if is_there and path.stat().st_size and not state.exists():
            raise UsageError(f"{path} was not written by gistrag synthesize; name another --output, or move it away")
        with JsonLines(path, command="gistrag synthesize") as records:
            if not is_there:
                state.unlink(missing_ok=True)
            with JsonLines(state, command="gistrag synthesize") as notes:
                yield cls(records, notes)

    def has(self, key: str) -> bool:
        """Return whether the request of this key is done."""
        return key in self._done

    def put(self, records: Sequence[Record], done: Sequence[str]) -> None:
        """Add records, and note the keys of the requests that are done.

        Raises:
            ResourceError: the disk is full.
        """
        self._records.append(*records)
        self._notes.append(list(done))
        self._done.update(done)


class Synthesis:
    """One run of `gistrag synthesize`.

    Args:
        ledger: gets the records.
        teacher: writes; None where only facts are planted.
        judge: answers without the document; a question it answers right is dropped. None where all are kept.
        seed: of wordings and planted facts; the same seed makes the same requests.
        progress: is called after every batch.

    Attributes:
        report: counts so far.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        teacher: Teacher | None,
        judge: Teacher | None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.report = Report()
        self._ledger, self._teacher, self._judge, self._seed = ledger, teacher, judge, seed
        self._progress = progress or NoProgress()

    def run(self, passages: Sequence[Passage], kinds: Sequence[str]) -> Report:
        """Write records of every kind about every passage, except those that are done, and return the counts."""
        jobs = [(passage, kind) for passage in passages for kind in kinds]
        ahead = [(passage, kind) for passage, kind in jobs if not self._ledger.has(passage.key(kind))]
        self.report.done_before = len(jobs) - len(ahead)
        self._progress.plan(chunks=len(ahead), tokens=0, gist_bytes=0)
        for start in range(0, len(ahead), BATCH):
            batch = ahead[start : start + BATCH]
            self._write(batch)
            self._progress.advance(chunks=len(batch), tokens=0)
        return self.report

    def _write(self, jobs: Sequence[_Job]) -> None:
        facts = [job for job in jobs if job[1] == PLANTED]
        records = [planted(passage, self._randomness(passage, kind)) for passage, kind in facts]
        written, done = self._ask([job for job in jobs if job[1] != PLANTED])
        kept = self._unknown(self._new([*records, *written]))
        self._ledger.put(kept, [passage.key(kind) for passage, kind in (*facts, *done)])
        self.report.written.update(record["kind"] for record in kept)

    def _ask(self, jobs: Sequence[_Job]) -> tuple[list[Record], list[_Job]]:
        """Return the records that the teacher's texts make, and the jobs that are done: all but the unanswered."""
        if self._teacher is None:
            return [], []
        requests = {job: request(job[1], job[0], self._randomness(*job)) for job in jobs}
        asked = [job for job in jobs if self._teacher.fits(requests[job], max_new_tokens=NEW_TOKENS)]
        self.report.dropped["too long"] += len(jobs) - len(asked)
        texts = self._teacher.write([requests[job] for job in asked], max_new_tokens=NEW_TOKENS) if asked else []
        records = []
        done = [job for job in jobs if job not in asked]
        for job, text in zip(asked, texts, strict=True):
            if text is None:
                self.report.dropped["unanswered"] += 1  # not done: the next run asks again
                continue
            done.append(job)
            record, reason = judged(*job, requests[job].task, text)
            if record is None:
                self.report.dropped[reason] += 1
            else:
                records.append(record)
        return records, done

    def _randomness(self, passage: Passage, kind: str) -> random.Random:
        return random.Random(f"{self._seed} {passage.key(kind)}")

    def _new(self, records: Sequence[Record]) -> list[Record]:
        new = [record for record in records if self._ledger.questions.is_new(record)]
        self.report.dropped["duplicate"] += len(records) - len(new)
        return new

    def _unknown(self, records: Sequence[Record]) -> list[Record]:
        """Return the records whose question cannot be answered without the document."""
        asked = [record for record in records if record["kind"] in TASKS]
        if not asked or self._judge is None:
            return list(records)
        answers = self._judge.write(
            [Request(record["question"]) for record in asked], max_new_tokens=CLOSED_BOOK_TOKENS
        )
        known = [
            record
            for record, text in zip(asked, answers, strict=True)
            if is_known(record["kind"], text or "", record["answer"])
        ]
        self.report.dropped["known"] += len(known)
        return [record for record in records if record not in known]
