"""Lets a model answer the cases of an evaluation, arm by arm, and records every answer as it comes.

Prompt, order and decoding (greedy) are the same for all arms. Answers go to a `Journal`, so a stopped evaluation
resumes where it was.

`gistrag.evaluation.cases` decides what is asked; `gistrag.evaluation.report` says what the rows add up to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from gistrag.compression.making import gist_count
from gistrag.evaluation.arms import Arm, Caches, MemoryCache, Pair, Row, Setting
from gistrag.evaluation.cases import LONG, WHOLE, Case
from gistrag.evaluation.corpus import Passage
from gistrag.kv.cache import Memory
from gistrag.model.batching import batches_by_length
from gistrag.model.generation import generate_batch
from gistrag.qa.metrics import contains, evidence_covered, exact_match, f1, hallucinated, is_refusal, rouge_l
from gistrag.storage.jsonl import JsonLines

GROUP_BYTES = 1 << 29
"""Most bytes of passage caches that are held at a time."""
BATCH_BYTES = 1 << 28
"""Most bytes of keys and values of answers generated as one batch."""
BATCH_ROWS = 32


class Runner:
    """Lets a model answer cases, and does once what several arms share.

    Args:
        memories: makes what the cases are answered from; it holds the model.
    """

    def __init__(
        self, memories: MemoryCache, *, group_bytes: int = GROUP_BYTES, batch_bytes: int = BATCH_BYTES
    ) -> None:
        self._memories = memories
        self._model = memories.model
        self._group_bytes = group_bytes
        self._batch_slots = batch_bytes // self._model.kv_bytes_per_slot

    def rows(self, pairs: Sequence[Pair]) -> Iterator[Row]:
        """Yield the scored answer of each arm to its case; pairs that share passages should be near each other."""
        for group in self.groups(pairs):
            caches = self._memories.caches(group)
            alike: dict[object, list[Pair]] = {}
            for case, arm in group:
                alike.setdefault((arm.give, arm.setting), []).append((case, arm))
            for listed in alike.values():
                yield from self._answered(listed, caches)
            self._memories.clear()

    def groups(self, pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
        """Yield consecutive pairs whose caches fit into memory together; the pairs of a case stay together."""
        group: list[Pair] = []
        held: set[tuple[Passage, Setting]] = set()
        size = 0
        for case, arm in pairs:
            added = {(passage, arm.setting) for passage in arm.shares(case)[0]} - held
            slots = sum(_most_slots(passage, setting) for passage, setting in added)
            if group and case is not group[-1][0] and size + slots * self._model.kv_bytes_per_slot > self._group_bytes:
                yield group
                group, held, size = [], set(), 0
            group.append((case, arm))
            held |= added
            size += slots * self._model.kv_bytes_per_slot
        if group:
            yield group

    def _answered(self, pairs: Sequence[Pair], caches: Caches) -> Iterator[Row]:
        """Yield the rows of pairs whose passages are given alike: a memory is made once for all its arms.

        Cases of several parts may ask the same question about the same passages, and get the same answer.
        """
        jobs: dict[object, list[Pair]] = {}
        for case, arm in pairs:
            if overflow := self._memories.overflow(case, arm):
                yield _left_out(case, arm, overflow)
            else:
                jobs.setdefault((case.question, arm.shares(case), case.max_new_tokens), []).append((case, arm))
        listed = list(jobs.values())
        sizes = [self._memories.slots(*job[0]) + job[0][0].max_new_tokens for job in listed]
        for rows in batches_by_length(sizes, budget=self._batch_slots, rows_max=BATCH_ROWS):
            yield from self._batch([listed[row] for row in rows], caches)

    def _batch(self, jobs: Sequence[Sequence[Pair]], caches: Caches) -> Iterator[Row]:
        """Yield the rows of jobs that are answered as one batch, arm by arm."""
        memories = [self._memories.memory(*job[0], caches) for job in jobs]
        for arm in dict.fromkeys(arm for job in jobs for _, arm in job):
            held = [
                ([case for case, one in job if one == arm], memory) for job, memory in zip(jobs, memories, strict=True)
            ]
            asked = [(cases, memory) for cases, memory in held if cases]
            for (cases, _), generated in zip(asked, self._generated(asked, arm), strict=True):
                for case in cases:
                    yield {**scored(case, arm, generated), **self._memories.cost(case, arm, caches)}

    def _generated(self, asked: Sequence[tuple[Sequence[Case], Memory]], arm: Arm) -> Iterator[str]:
        """Yield what the arm generates, as one batch, for cases that are the same to it and share one memory."""
        cases, memories = [cases[0] for cases, _ in asked], [memory for _, memory in asked]
        prompts = [self._model.encode_question(case.question) for case in cases]
        longest = max(case.max_new_tokens for case in cases)
        with nullcontext(self._model) if arm.has_adapter else self._model.without_adapter() as model:
            tokens = generate_batch(model, memories, prompts, max_new_tokens=longest)
        for case, ids in zip(cases, tokens, strict=True):
            yield self._model.decode(ids[: case.max_new_tokens]).strip()


def _most_slots(passage: Passage, setting: Setting) -> int:
    """Return the most slots that the gists of a passage take in memory: all where a matched head may keep all."""
    placement, tokens_per_gist = setting
    return passage.tokens if placement == "matched" else gist_count(passage.tokens, tokens_per_gist)


def _identity(case: Case, arm: Arm) -> Row:
    return {"part": case.part, "name": case.name, "arm": arm.name, "question": case.question, **case.about}


def _left_out(case: Case, arm: Arm, overflow: int) -> Row:
    return {**_identity(case, arm), "left_out": f"{overflow} positions more than the model's context window"}


def scored(case: Case, arm: Arm, generated: str) -> Row:
    """Return the row of one answer: what was asked, given and generated, and how good that is."""
    gists, texts = arm.shares(case)
    given = ["\n".join((*passage.heading, passage.text)) for passage in (*gists, *texts)]
    has_answer = {"nothing": False, "document": True}.get(arm.give, case.about.get("has_gold", True))
    return {
        **_identity(case, arm),
        "has_answer": has_answer,
        "answers": list(case.answers),
        "passages": [passage_id(passage) for passage in case.passages],
        "generated": generated,
        "em": float(exact_match(generated, case.answers)),
        "f1": f1(generated, case.answers),
        "contains": contains(generated, case.answers),
        "refused": is_refusal(generated),
        "hallucinated": hallucinated(generated, given) if given and case.part not in (WHOLE, LONG) else None,
        **_scored_long(case, generated),
    }


def _scored_long(case: Case, generated: str) -> Row:
    """Return how good a long answer is, nothing of a case without evidence."""
    if not case.evidence:
        return {}
    return {"rouge_l": rouge_l(generated, case.answers), "evidence": evidence_covered(generated, case.evidence)}


def passage_id(passage: Passage) -> str:
    """Return the name of a passage in rows: the start of its hash."""
    return hashlib.sha256("\n".join((*passage.heading, passage.text)).encode()).hexdigest()[:12]


# Recording


Key = tuple[str, str, str]


def key_of(row: Row) -> Key:
    """Return which answer a row is: part, name and arm."""
    return row["part"], row["name"], row["arm"]


class Journal:
    """The rows of an evaluation, in a file that survives a kill; see `gistrag.storage.jsonl`.

    Attributes:
        rows: by part, name and arm.

    Raises:
        IndexLockedError: another evaluation writes the same file.
    """

    def __init__(self, path: Path) -> None:
        self._file = JsonLines(path, command="gistrag evaluate")
        self.rows: dict[Key, Row] = {}
        for row in self._file.records:
            with suppress(LookupError, TypeError):  # a line that is no row is skipped
                self.rows[key_of(row)] = row

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, row: Row) -> None:
        """Record a row; it is in the file when this returns."""
        self._file.append(row)
        self.rows[key_of(row)] = row


def pairs_of(cases: Sequence[Case], arms: Sequence[Arm]) -> list[Pair]:
    """Return every case with every arm that takes it."""
    return [(case, arm) for case in cases for arm in arms if arm.takes(case)]


def unanswered(pairs: Sequence[Pair], journal: Journal) -> list[Pair]:
    """Return the pairs without an answer."""
    return [(case, arm) for case, arm in pairs if (case.part, case.name, arm.name) not in journal.rows]


def answered(pairs: Sequence[Pair], journal: Journal) -> list[Row]:
    """Return the rows of these pairs that are answered, whatever else the journal holds."""
    keys = ((case.part, case.name, arm.name) for case, arm in pairs)
    return [journal.rows[key] for key in keys if key in journal.rows]
