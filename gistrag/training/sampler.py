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
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from gistrag.kv.cache import Layout
from gistrag.model.gist_model import GistModel
from gistrag.model.prompt import CONTINUE, REFUSAL
from gistrag.qa.dataset import Context, Task
from gistrag.qa.planted_facts import plant

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How examples are mixed; shares are probabilities.

    Attributes:
        rates: tokens per gist and how often each is drawn, one per step.
        chunks: how often a row has 1, 2, … chunks.
        contexts: in a batch; chunk_tokens: longer contexts are cut there.
        without_gold: rows whose answer is the refusal sentence.
        as_text: rows whose chunks are all given as text; hybrid: rows with one chunk as text, the rest as gists.
        packed: rows in the packed layout; gap: most extra positions between two chunks.
        probes: contexts with a planted fact; heading: contexts that show their heading.
        long: contexts taken from those with a long answer, where there are any.
        rivals: articles whose contexts stand beside those that retrieval would take for them, see `rivals_of`; others
            stand beside those of their length, which is quicker.
        question_tokens: most tokens of all questions and answers of a row.
        continued: tokens to go on with in a continuation task, 0 for none.
    """

    rates: dict[int, float] = field(default_factory=lambda: {2: 0.35, 4: 0.4, 8: 0.15, 16: 0.1})
    chunks: tuple[float, ...] = (0.2, 0.2, 0.35, 0.15, 0.1)
    contexts: int = 8
    chunk_tokens: int = 320
    without_gold: float = 0.08
    as_text: float = 0.12
    hybrid: float = 0.08
    packed: float = 0.15
    gap: int = 24
    probes: float = 0.2
    heading: float = 0.5
    long: float = 0.12
    rivals: float = 0.0
    question_tokens: int = 136
    continued: int = 24


@dataclass(frozen=True)
class Row:
    """One memory and all that is asked of it.

    Attributes:
        chunks: numbers of the batch's chunks, in prompt order; gold: the one the questions are about.
        as_text: those of them given as text; gaps: extra positions behind each.
        ids, positions, labels, segments: ``(n,)`` each; positions count from the end of the memory, labels are
            `IGNORED` where nothing is learned, segments number the questions.
        is_continuation: ``(n,)`` bool, labels of continuation tasks.
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
    """Batches of contexts: rivals, or neighbours in length, of the same article stand together.

    Args:
        contexts: to draw from, with their tasks.
        seed: the same seed and step give the same batch.

    Attributes:
        steps_per_epoch: until every context was gold once; tokens: of all contexts, about.
    """

    def __init__(self, model: GistModel, contexts: Sequence[Context], mixture: Mixture, *, seed: int) -> None:
        self._model, self._mixture, self._seed = model, mixture, seed
        self._contexts = _with_tasks(contexts, lambda task: task.kind != "long")
        self._long = _with_tasks(contexts, lambda task: task.kind == "long")
        if not self._contexts:
            self._contexts, self._long = self._long, []
        self._half = max(1, mixture.contexts // 2)
        self._articles: dict[str, list[int]] = {}
        for number, context in enumerate(self._contexts):
            self._articles.setdefault(context.article, []).append(number)
        self._rivals: dict[int, list[int]] = {}
        for numbers in self._articles.values() if mixture.rivals else ():
            ranked = rivals_of([self._contexts[number] for number in numbers])
            self._rivals |= {numbers[one]: [numbers[other] for other in others] for one, others in enumerate(ranked)}
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
        """Return a context, or now and then one with a long answer in its place."""
        if self._long and randomness.random() < self._mixture.long:
            return randomness.choice(self._long)
        return self._contexts[number]

    def _draw(self, randomness: random.Random) -> list[list[int]]:
        lengths = [len(context.text) * randomness.uniform(0.85, 1.15) for context in self._contexts]
        groups = []
        for numbers in self._articles.values():
            if self._rivals and randomness.random() < self._mixture.rivals:
                groups += self._beside_rivals(numbers, randomness)
                continue
            numbers = sorted(numbers, key=lengths.__getitem__)
            parts = -(-len(numbers) // self._half)
            groups += [
                numbers[part * len(numbers) // parts : (part + 1) * len(numbers) // parts] for part in range(parts)
            ]
        groups.sort(key=lambda group: sum(lengths[number] for number in group) / len(group))
        batches = [[*first, *second] for first, second in zip(groups[::2], groups[1::2], strict=False)]
        if len(groups) % 2:
            batches[-1:] = [[*(batches[-1] if batches else []), *groups[-1]]]
        randomness.shuffle(batches)
        return batches

    def _beside_rivals(self, numbers: Sequence[int], randomness: random.Random) -> list[list[int]]:
        """Return contexts of an article in groups: one at random and its first rivals of those that are left."""
        left, groups = dict.fromkeys(randomness.sample(numbers, len(numbers))), []
        while left:
            first = next(iter(left))
            rivals = [number for number in self._rivals[first] if number in left]
            groups.append([first, *rivals[: self._half - 1]])
            for number in groups[-1]:
                del left[number]
        return groups

    def _prepared(self, context: Context, randomness: random.Random) -> Context:
        mixture = self._mixture
        if randomness.random() < mixture.probes:
            context = plant(context, randomness)
        return context if randomness.random() < mixture.heading else replace(context, heading=())

    def _as_shown(self, context: Context, chunk: Sequence[int]) -> Context:
        """Return a context with what is left of its text in a chunk, without questions whose answer was cut off."""
        if len(chunk) < self._mixture.chunk_tokens:
            return context
        shown = self._model.decode(chunk)
        tasks = [task for task in context.tasks if _holds(shown, task) or not _holds(context.text, task)]
        return replace(context, text=shown, tasks=tuple(tasks))

    def _row(
        self, contexts: Sequence[Context], chunks: Sequence[list[int]], gold: int, randomness: random.Random
    ) -> Row | None:
        mixture = self._mixture
        count = min(randomness.choices(range(1, len(mixture.chunks) + 1), mixture.chunks)[0], len(contexts))
        others = [number for number in range(len(contexts)) if number != gold]
        # neighbours of the same article are the hard negatives
        others.sort(key=lambda number: (contexts[number].article != contexts[gold].article, randomness.random()))
        if len(others) > count and randomness.random() < 0.3:
            randomness.shuffle(others)
        has_gold = len(others) == 0 or randomness.random() >= mixture.without_gold
        chosen = [gold, *others[: count - 1]] if has_gold else others[:count]
        randomness.shuffle(chosen)
        shown = " ".join(contexts[number].text for number in chosen)
        draw = randomness.random()
        if draw < mixture.as_text:
            as_text = frozenset(chosen)
        elif draw < mixture.as_text + mixture.hybrid and len(chosen) > 1:
            as_text = frozenset({randomness.choice(chosen)})
        else:
            as_text = frozenset()
        tasks = self._tasks(contexts[gold], randomness)
        if not has_gold:
            tasks = [
                Task(task.question, (REFUSAL,), "refusal")
                for task in tasks
                if task.kind != "long" and not any(answer.lower() in shown.lower() for answer in task.answers)
            ][:2]
        packed = _Packed(self._model, mixture.question_tokens)
        for task in tasks[:1]:
            packed.ask(task)
        if mixture.continued:
            packed.go_on(chunks[randomness.choice(chosen)], mixture.continued, randomness)
        for task in tasks[1:]:
            packed.ask(task)
        if not packed.ids:
            return None
        gaps = tuple(randomness.randint(0, mixture.gap) for _ in chosen)
        layout: Layout = "packed" if randomness.random() < mixture.packed else "spread"
        return Row(tuple(chosen), gold if has_gold else -1, as_text, gaps, layout, *packed.tensors())

    def _tasks(self, context: Context, randomness: random.Random) -> list[Task]:
        """Return the questions of a context in random order, at most one long one, which goes first."""
        tasks = randomness.sample(context.tasks, len(context.tasks))
        long = [task for task in tasks if task.kind == "long"][:1]
        probes = [task for task in tasks if task.kind.startswith("probe")]
        return [*probes, *long, *(task for task in tasks if task.kind != "long" and task not in probes)]


def rivals_of(contexts: Sequence[Context]) -> list[list[int]]:
    """Return for each context the numbers of the others, those first that hold most of what its questions ask for.

    These are what retrieval finds beside it: passages that look right and are not.

    >>> mill, bees, sails = Context("The mill grinds.", ""), Context("Bees hum.", ""), Context("A mill has sails.", "")
    >>> rivals_of([replace(mill, tasks=(Task("What does the mill do?", ("It grinds.",)),)), bees, sails])[0]
    [2, 1]
    """
    weigh = TfidfVectorizer(analyzer=_words, sublinear_tf=True)
    texts = weigh.fit_transform([context.text for context in contexts])
    asked = weigh.transform([" ".join(task.question for task in context.tasks) for context in contexts])
    likeness = (asked @ texts.T).toarray()
    ranked = (-likeness).argsort(axis=1, kind="stable").tolist()
    return [[other for other in others if other != one] for one, others in enumerate(ranked)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower()) or [""]


def _with_tasks(contexts: Sequence[Context], wanted: Callable[[Task], bool]) -> list[Context]:
    """Return the contexts that have such tasks, with those alone."""
    kept = [replace(context, tasks=tuple(filter(wanted, context.tasks))) for context in contexts]
    return [context for context in kept if context.tasks]


def _holds(text: str, task: Task) -> bool:
    return any(answer in text for answer in task.answers)


class _Packed:
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

    def go_on(self, chunk: Sequence[int], count: int, randomness: random.Random) -> None:
        """Add the task to continue a chunk from a random place."""
        cue = 8
        if len(chunk) < cue + 8:
            return
        start = randomness.randint(0, max(0, len(chunk) - cue - count))
        told = self._model.decode(chunk[start : start + cue]).strip()
        answer = list(chunk[start + cue : start + cue + count])
        self._add(self._model.encode_question(CONTINUE.format(told)), answer, True)

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
class Questions:
    """The questions of several rows side by side, padded on the right; all ``(batch, n)``."""

    ids: Tensor
    positions: Tensor
    labels: Tensor
    segments: Tensor
    is_continuation: Tensor

    def where(self, chosen: Tensor) -> Questions:
        """Return the questions of the chosen rows, ``(batch,)`` bool, padded no further than they need."""
        rows = [getattr(self, each.name)[chosen] for each in fields(self)]
        longest = int((rows[3] >= 0).sum(dim=1).max())
        return Questions(*(row[:, :longest] for row in rows))

    def mask(self, visible: Tensor) -> Tensor:
        """Return who looks where, ``(batch, n, slots + n)`` bool: the memory, and what stands before in the question.

        Args:
            visible: ``(batch, slots)`` bool, slots of the memory that are no padding.
        """
        count = self.ids.shape[1]
        same = self.segments[:, :, None] == self.segments[:, None, :]
        own = same & torch.ones(count, count, dtype=torch.bool).tril()
        return torch.cat((visible[:, None].expand(-1, count, -1), own), dim=2)


def side_by_side(rows: Sequence[Row]) -> Questions:
    """Return the questions of *rows* as one padded batch."""

    def padded(name: str, value: int) -> Tensor:
        tensors = [getattr(row, name) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    return Questions(
        padded("ids", 0),
        padded("positions", 0),
        padded("labels", IGNORED),
        padded("segments", -1),
        padded("is_continuation", 0),
    )
