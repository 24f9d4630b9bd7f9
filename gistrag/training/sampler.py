"""Training examples: which chunks stand together, what is asked about them, and where every token stands.

A batch is a few contexts, each compressed once. Every context is the gold one of its own row and a distractor in other
rows, so the expensive part is shared::

    contexts   c0  c1  c2  c3  …                       compressed once each
    row 0      [c3 c0 c1]  question answer | question answer | continue …
    row 1      [c1]        question answer | question answer
    row 2      [c0 c3]     question refusal            without gold

All questions of a row start at the same position behind its memory, and none sees another. Everything is drawn from
the seed and the number of the step, so a run that goes on after a stop sees what it would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gistrag.model.gist_model import GistModel
from gistrag.model.prompt import CONTINUE
from gistrag.qa.dataset import LONG_KINDS, REFUSAL, UNANSWERABLE, Context, Task
from gistrag.qa.planted_facts import is_planted, plant
from gistrag.settings import Layout

IGNORED = -100
SPECIAL_KINDS = LONG_KINDS | {UNANSWERABLE}
"""Kinds of questions that have a share of their own."""


# Shares and sizes that every recipe has in common.
HYBRID = 0.08
"""Share of rows with one chunk as text and the rest as gists."""

PACKED = 0.15
"""Share of rows in the packed layout."""

HEADING = 0.5
"""Share of contexts that show their heading."""

SHUFFLED = 0.3
"""Share of rows whose distractors may come from any article of the batch."""

GAP = 24
"""Most unused positions between two chunks of a row."""

CUE, CONTINUED = 8, 24
"""Tokens that a continuation task quotes from a chunk, and tokens it then asks for."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How examples are mixed. Shares are probabilities.

    Attributes:
        rates: tokens per gist, and the share of steps at each.
        chunks: shares of rows with 1, 2, … chunks.
        contexts: contexts of a batch.
        chunk_tokens: most tokens of a chunk; a longer context is cut there.
        question_tokens: most tokens of all questions and answers of a row.
        without_gold: share of rows without the chunk that answers; they learn the refusal sentence.
        as_text: share of rows with all chunks as text.
        planted: share of contexts with a planted fact, see `gistrag.qa.planted_facts`.
        long: share of contexts that are replaced by one with a long answer, a list or a summary, where there are any.
        unanswerable: the same for contexts that look like the answer to a question and do not hold it, from the data
            and from `gistrag.training.rivals`.
    """

    rates: dict[int, float] = field(default_factory=lambda: {2: 0.35, 4: 0.4, 8: 0.15, 16: 0.1})
    chunks: tuple[float, ...] = (0.2, 0.2, 0.35, 0.15, 0.1)
    contexts: int = 8
    chunk_tokens: int = 320
    question_tokens: int = 136
    without_gold: float = 0.08
    as_text: float = 0.12
    planted: float = 0.2
    long: float = 0.12
    unanswerable: float = 0.0


@dataclass(frozen=True)
class Row:
    """One memory and all that is asked of it.

    Attributes:
        chunks: numbers of the batch's chunks, in prompt order.
        gold: number of the chunk that the questions are about, -1 where the row is without it.
        as_text: the chunks that are given as text.
        gaps: unused positions behind each chunk.
        layout: how positions are given to the chunks, see `gistrag.kv.cache.concatenate`.
        ids: ``(n,)`` tokens of all questions and answers.
        positions: ``(n,)``, counted from the end of the memory.
        labels: ``(n,)`` next tokens, `IGNORED` where nothing is learned.
        segments: ``(n,)`` numbers of the questions.
        is_continuation: ``(n,)`` bool, true in continuation tasks.
    """

    chunks: tuple[int, ...]
    gold: int
    as_text: frozenset[int]
    gaps: tuple[int, ...]
    layout: Layout
    ids: Tensor
    positions: Tensor
    labels: Tensor
    segments: Tensor
    is_continuation: Tensor


@dataclass(frozen=True)
class Batch:
    """What one step learns from: the token ids of its chunks, the rate, and the rows."""

    chunks: list[list[int]]
    tokens_per_gist: int
    rows: list[Row]

    @property
    def tokens(self) -> int:
        """Tokens of text, questions and answers."""
        return sum(map(len, self.chunks)) + sum(len(row.ids) for row in self.rows)


def merged(batches: Sequence[Batch]) -> Batch:
    """Return batches as one, whose rows stand beside those of their own batch only, at the rate of the first."""
    chunks: list[list[int]] = []
    rows: list[Row] = []
    for batch in batches:
        begin = len(chunks)
        chunks += batch.chunks
        rows += [_moved(row, begin) for row in batch.rows]
    return Batch(chunks, batches[0].tokens_per_gist, rows)


def _moved(row: Row, begin: int) -> Row:
    """Return a row whose chunks are numbered from *begin* on."""
    return replace(
        row,
        chunks=tuple(begin + number for number in row.chunks),
        gold=row.gold if row.gold < 0 else begin + row.gold,
        as_text=frozenset(begin + number for number in row.as_text),
    )


class Sampler:
    """Batches of contexts; a batch has contexts of similar length from two articles.

    Args:
        model: encodes the contexts.
        contexts: to draw from, with their tasks.
        mixture: how examples are mixed.
        seed: the same seed and step give the same batch.
        is_varied: mix in long answers, continuation tasks, hybrid rows, packed rows and gaps. Validation does without.

    Attributes:
        steps_per_epoch: batches until every context was the gold one once.
        tokens: approximate number of tokens of all contexts.
    """

    def __init__(
        self,
        model: GistModel,
        contexts: Sequence[Context],
        mixture: Mixture,
        *,
        seed: int,
        is_varied: bool = True,
    ) -> None:
        self._model, self._mixture, self._seed, self._is_varied = model, mixture, seed, is_varied
        self._contexts = _with_tasks(contexts, lambda task: task.kind not in SPECIAL_KINDS)
        self._long = _with_tasks(contexts, lambda task: task.kind in LONG_KINDS)
        self._unanswerable = _with_tasks(contexts, lambda task: task.kind == UNANSWERABLE)
        if not self._contexts:
            self._contexts, self._long, self._unanswerable = [*self._long, *self._unanswerable], [], []
        self._articles: dict[str, list[int]] = {}
        for number, context in enumerate(self._contexts):
            self._articles.setdefault(context.article, []).append(number)
        self._current: tuple[int, list[list[int]]] | None = None
        self.steps_per_epoch = len(self._epoch(0))
        self.tokens = sum(min(len(context.text) // 4, mixture.chunk_tokens) for context in contexts)

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        randomness = random.Random(f"{self._seed} {step}")
        mixture = self._mixture
        drawn = [self._drawn(number, randomness) for number in self._epoch(epoch)[place]]
        contexts = [self._prepared(context, randomness) for context in drawn]
        rate = randomness.choices(list(mixture.rates), list(mixture.rates.values()))[0]
        chunks = [self._model.encode_passage(c.text, c.heading)[: mixture.chunk_tokens] for c in contexts]
        contexts = [self._as_shown(*pair) for pair in zip(contexts, chunks, strict=True)]
        rows = [self._row(contexts, chunks, gold, randomness) for gold in range(len(contexts))]
        return Batch(chunks, rate, [row for row in rows if row is not None])

    def _epoch(self, epoch: int) -> list[list[int]]:
        """Return the context numbers of every batch of an epoch: two groups from different articles each."""
        if self._current is None or self._current[0] != epoch:
            self._current = epoch, self._draw(random.Random(f"{self._seed} epoch {epoch}"))
        return self._current[1]

    def _drawn(self, number: int, randomness: random.Random) -> Context:
        """Return a context, or in some cases one with a long answer, or without an answer, instead."""
        mixture = self._mixture
        for pool, share in ((self._long, mixture.long), (self._unanswerable, mixture.unanswerable)):
            if pool and randomness.random() < share and self._is_varied:
                return randomness.choice(pool)
        return self._contexts[number]

    def _draw(self, randomness: random.Random) -> list[list[int]]:
        lengths = [len(context.text) * randomness.uniform(0.85, 1.15) for context in self._contexts]
        half = max(1, self._mixture.contexts // 2)
        groups = []
        for numbers in self._articles.values():
            ordered = sorted(numbers, key=lengths.__getitem__)
            count = -(-len(ordered) // half)
            cuts = [part * len(ordered) // count for part in range(count + 1)]
            groups += [ordered[start:end] for start, end in pairwise(cuts)]
        groups.sort(key=lambda group: sum(lengths[number] for number in group) / len(group))
        batches = [[*first, *second] for first, second in zip(groups[::2], groups[1::2], strict=False)]
        if len(groups) % 2:
            batches[-1:] = [[*(batches[-1] if batches else []), *groups[-1]]]
        randomness.shuffle(batches)
        return batches

    def _prepared(self, context: Context, randomness: random.Random) -> Context:
        if randomness.random() < self._mixture.planted:
            context = plant(context, randomness)
        return context if randomness.random() < HEADING else replace(context, heading=())

    def _as_shown(self, context: Context, chunk: Sequence[int]) -> Context:
        """Return a context with the text that its chunk kept, without questions whose answer was cut off."""
        if len(chunk) < self._mixture.chunk_tokens:
            return context
        shown = self._model.decode(chunk)
        tasks = [task for task in context.tasks if _holds(shown, task) or not _holds(context.text, task)]
        return replace(context, text=shown, tasks=tuple(tasks))

    def _row(
        self, contexts: Sequence[Context], chunks: Sequence[list[int]], gold: int, randomness: random.Random
    ) -> Row | None:
        """Return the row of the *gold* context, None where no question of it is left."""
        chosen, has_gold = self._chosen(contexts, gold, randomness)
        as_text = self._as_text(chosen, randomness)
        tasks = _in_random_order(contexts[gold].tasks, randomness)
        if not has_gold:
            tasks = _refused(tasks, " ".join(contexts[number].text for number in chosen))
        asked = _Asked(self._model, self._mixture.question_tokens)
        for task in tasks[:1]:
            asked.ask(task)
        if self._is_varied:
            asked.go_on(chunks[randomness.choice(chosen)], randomness)
        for task in tasks[1:]:
            asked.ask(task)
        if not asked.ids:
            return None
        gaps = tuple(randomness.randint(0, GAP if self._is_varied else 0) for _ in chosen)
        is_packed = randomness.random() < PACKED and self._is_varied
        layout: Layout = "packed" if is_packed else "spread"
        return Row(tuple(chosen), gold if has_gold else -1, as_text, gaps, layout, *asked.tensors())

    def _chosen(self, contexts: Sequence[Context], gold: int, randomness: random.Random) -> tuple[list[int], bool]:
        """Return the chunks of a row in prompt order, and whether the gold one is among them."""
        shares = self._mixture.chunks
        count = min(randomness.choices(range(1, len(shares) + 1), shares)[0], len(contexts))
        others = [number for number in range(len(contexts)) if number != gold]
        # neighbours of the same article are the hard negatives
        others.sort(key=lambda number: (contexts[number].article != contexts[gold].article, randomness.random()))
        if len(others) > count and randomness.random() < SHUFFLED:
            randomness.shuffle(others)
        has_gold = len(others) == 0 or randomness.random() >= self._mixture.without_gold
        chosen = [gold, *others[: count - 1]] if has_gold else others[:count]
        randomness.shuffle(chosen)
        return chosen, has_gold

    def _as_text(self, chosen: Sequence[int], randomness: random.Random) -> frozenset[int]:
        """Return which chunks of a row are given as text."""
        draw = randomness.random() - self._mixture.as_text
        if draw < 0:
            return frozenset(chosen)
        if self._is_varied and draw < HYBRID and len(chosen) > 1:
            return frozenset({randomness.choice(chosen)})
        return frozenset()


def _in_random_order(tasks: Sequence[Task], randomness: random.Random) -> list[Task]:
    """Return tasks in random order: planted facts first, then at most one with a long answer, then the rest."""
    shuffled = randomness.sample(tasks, len(tasks))
    planted = [task for task in shuffled if is_planted(task)]
    long = [task for task in shuffled if task.kind in LONG_KINDS][:1]
    return [*planted, *long, *(task for task in shuffled if task.kind not in LONG_KINDS and task not in planted)]


def _refused(tasks: Sequence[Task], shown: str) -> list[Task]:
    """Return at most two tasks that *shown* does not answer, with the refusal as their answer."""
    return [
        Task(task.question, (REFUSAL,), UNANSWERABLE)
        for task in tasks
        if task.kind not in LONG_KINDS and not any(answer.lower() in shown.lower() for answer in task.answers)
    ][:2]


def _with_tasks(contexts: Sequence[Context], wanted: Callable[[Task], bool]) -> list[Context]:
    """Return the contexts that have such tasks, with those alone."""
    kept = [replace(context, tasks=tuple(filter(wanted, context.tasks))) for context in contexts]
    return [context for context in kept if context.tasks]


def _holds(text: str, task: Task) -> bool:
    return any(answer in text for answer in task.answers)


class _Asked:
    """Questions and answers one after the other, each starting at position 0."""

    def __init__(self, model: GistModel, room: int) -> None:
        self._model, self._room = model, room
        self.ids: list[int] = []
        self._positions: list[int] = []
        self._labels: list[int] = []
        self._segments: list[int] = []
        self._continuation: list[bool] = []

    def ask(self, task: Task) -> None:
        """Add a question with its first answer, if there is room."""
        self._add(
            self._model.encode_question(task.question),
            [*self._model.encode(task.answers[0]), self._model.end_id],
            False,
        )

    def go_on(self, chunk: Sequence[int], randomness: random.Random) -> None:
        """Add the task to continue a chunk from a random place, if the chunk is long enough."""
        if len(chunk) < 2 * CUE:
            return
        start = randomness.randint(0, max(0, len(chunk) - CUE - CONTINUED))
        cue = self._model.decode(chunk[start : start + CUE]).strip()
        answer = list(chunk[start + CUE : start + CUE + CONTINUED])
        self._add(self._model.encode_question(CONTINUE.format(cue)), answer, True)

    def _add(self, question: list[int], answer: list[int], is_continuation: bool) -> None:
        ids = [*question, *answer][:-1]  # the last token is only predicted
        if self.ids and len(self.ids) + len(ids) > self._room:
            return
        labels = [IGNORED] * (len(question) - 1) + answer
        self._segments += [max(self._segments, default=-1) + 1] * len(ids)
        self.ids += ids
        self._positions += range(len(ids))
        self._labels += labels
        self._continuation += [is_continuation] * len(ids)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the fields of a `Row`."""
        numbers = (self.ids, self._positions, self._labels, self._segments)
        ids, positions, labels, segments = (torch.tensor(values) for values in numbers)
        return ids, positions, labels, segments, torch.tensor(self._continuation)


@dataclass(frozen=True)
class QuestionBatch:
    """The questions of several rows as one batch, padded on the right; every tensor is ``(batch, n)``."""

    ids: Tensor
    positions: Tensor
    labels: Tensor
    segments: Tensor
    is_continuation: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row]) -> QuestionBatch:
        """Return the questions of *rows*."""
        padding = {"ids": 0, "positions": 0, "labels": IGNORED, "segments": -1, "is_continuation": 0}
        return cls(
            *(pad_sequence([getattr(row, name) for row in rows], True, value) for name, value in padding.items())
        )

    def where(self, chosen: Tensor) -> QuestionBatch:
        """Return the questions of the chosen rows, ``(batch,)`` bool, without padding that all of them have."""
        rows = [getattr(self, each.name)[chosen] for each in fields(self)]
        longest = int((rows[3] >= 0).sum(dim=1).max())
        return QuestionBatch(*(row[:, :longest] for row in rows))

    def mask(self, visible: Tensor) -> Tensor:
        """Return what each token attends to, ``(batch, n, slots + n)`` bool: the memory, and its own question so far.

        Args:
            visible: ``(batch, slots)`` bool, slots of the memory that are no padding.
        """
        count = self.ids.shape[1]
        same = self.segments[:, :, None] == self.segments[:, None, :]
        own = same & torch.ones(count, count, dtype=torch.bool).tril()
        return torch.cat((visible[:, None].expand(-1, count, -1), own), dim=2)
