"""Several answers at once: rows of a batch that grow side by side, each saying what it would say alone.

`Together.generate` keeps the contract of `gistrag.model.generation.generate`: a generator of tokens, closed to end
the work.
A question joins when it is asked and leaves when it is answered; nobody waits for a batch to fill. Whoever needs a
token that is not there makes the whole batch step, so a thread that takes turns among answers steps once a round::

    row 1   · · · · · m m m q q q a a a      m memory  q question  a answer  · padding, never looked at
    row 2   m m m m m m m m q q q a a a      all rows end at the same column

A row is read alone up to its first token, which therefore waits for no other. Rows of very different length would
cost more padding than they save, and step apart. One thread only: a model is read by one at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gistrag.kv.cache import Memory, side_by_side
from gistrag.model.generation import pick, require_room
from gistrag.model.gist_model import GistModel, Reading

PADDING_MAX = 2048
"""Padded slots a step may carry: on a CPU they then cost about as much as the step they save."""


@dataclass(eq=False, kw_only=True)
class _Row:
    """An answer in the making.

    Attributes:
        slots, position: cache slots it fills, and the position its last token will be read at.
        room: tokens it may still say.
        said: tokens that nobody has taken yet; last: the newest of them.
    """

    slots: int
    position: int
    room: int
    temperature: float
    randomness: torch.Generator
    stop_ids: frozenset[int]
    last: int = 0
    said: deque[int] = field(default_factory=deque)

    def say(self, scores: Tensor) -> None:
        """Say the next token by its scores ``(1, vocabulary)``, or end."""
        token = int(pick(scores, self.temperature, self.randomness))
        if token in self.stop_ids:
            self.room = 0
        else:
            self.said.append(token)
            self.last, self.room = token, self.room - 1


class Together:
    """Answers of one model that grow side by side."""

    def __init__(self) -> None:
        self._batches: list[_Batch] = []

    def generate(
        self,
        model: GistModel,
        memory: Memory,
        ids: Sequence[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yield the token ids of the answer to the prompt *ids*; as `generation.generate`, but beside others.

        Raises:
            ContextOverflowError: memory and prompt leave no position for an answer.
        """
        begin = memory.next_position
        require_room(model, begin + len(ids))
        reading = model.read(memory)
        hidden = reading.feed(torch.tensor([list(ids)]), positions=begin + torch.arange(len(ids)), role="answers")
        row = _Row(
            slots=reading.slots,
            position=begin + len(ids),
            room=min(max_new_tokens, model.window - begin - len(ids)),
            temperature=temperature,
            randomness=torch.Generator(model.device).manual_seed(seed),
            stop_ids=model.stop_ids,
        )
        row.say(model.logits(hidden[:, -1]).float())
        yield from row.said
        row.said.clear()
        if row.room:
            yield from self._beside_others(row, reading, model)

    def _beside_others(self, row: _Row, reading: Reading, model: GistModel) -> Iterator[int]:
        """Yield what a row says from its second token on, letting its batch step whenever there is nothing to take."""
        batch = next((batch for batch in self._batches if batch.has_place(row)), None) or _Batch(model)
        if batch not in self._batches:
            self._batches.append(batch)
        batch.join(row, reading)
        try:
            while row.said or row.room:
                if not row.said:
                    batch.step()
                if row.said:
                    yield row.said.popleft()
        finally:
            batch.rows.remove(row)
            self._batches = [batch for batch in self._batches if batch.rows]


class _Batch:
    """Rows that step together.

    Attributes:
        rows: who is in it; takes effect with the next step.
    """

    def __init__(self, model: GistModel) -> None:
        self.rows: list[_Row] = []
        self._model = model
        self._arrived: dict[_Row, Reading] = {}
        self._seated: list[_Row] = []
        self._reading: Reading | None = None
        self._visible = torch.empty(0, 0, dtype=torch.bool)  # (batch, slots)

    def has_place(self, row: _Row) -> bool:
        """Return whether *row* would not bring too much padding."""
        slots = [one.slots for one in (*self.rows, row)]
        return len(slots) * max(slots) - sum(slots) <= PADDING_MAX

    def join(self, row: _Row, reading: Reading) -> None:
        """Take in a row that was read alone so far."""
        self.rows.append(row)
        self._arrived[row] = reading

    def step(self) -> None:
        """Let every row that has not ended read its last token and say the next."""
        reading = self._seat([row for row in self.rows if row.room])
        rows = self._seated
        ids = torch.tensor([[row.last] for row in rows])
        positions = torch.tensor([[row.position] for row in rows])
        self._visible = torch.cat((self._visible, torch.ones(len(rows), 1, dtype=torch.bool)), dim=1)
        mask = self._visible[:, None] if len(rows) > 1 else None  # (batch, 1, slots + 1)
        hidden = reading.feed(ids, positions=positions, mask=mask, role="answers")
        for row, scores in zip(rows, self._model.logits(hidden[:, -1]).float(), strict=True):
            row.slots, row.position = row.slots + 1, row.position + 1
            row.say(scores[None])

    def _seat(self, rows: list[_Row]) -> Reading:
        """Return the reading of exactly these rows, made anew where somebody came, left or ended."""
        if self._reading is None or rows != self._seated:
            if len(rows) == 1 and rows[0] in self._arrived:  # alone it goes on as it is, and nothing is copied
                self._reading = self._arrived[rows[0]]
                self._visible = torch.ones(1, rows[0].slots, dtype=torch.bool)
                self._arrived.clear()
            else:
                memories = self._memories()
                behind = side_by_side([memories[row] for row in rows])
                self._visible, self._reading = behind.real, self._model.read_behind(behind)
            self._seated = rows
        return self._reading

    def _memories(self) -> dict[_Row, Memory]:
        """Return what each row has read, of those seated and those that have just arrived."""
        memories = {row: reading.memory(row.position) for row, reading in self._arrived.items()}
        self._arrived.clear()
        if self._reading is not None:
            for at, row in enumerate(self._seated):
                memories[row] = self._reading.memory(row.position, row=at, slots=row.slots)
        return memories
