"""Answers that grow side by side say what they would say alone, whoever comes and goes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from support.tiny_models import tiny_model

from gistrag.compression.compress import compress
from gistrag.errors import ContextOverflowError
from gistrag.kv.cache import Memory, concatenate
from gistrag.model import continuous_batching
from gistrag.model.continuous_batching import Together
from gistrag.model.generation import generate
from gistrag.model.gist_model import GistModel, Reading

TEXTS = (b"a chunk to answer from", b"and another one, somewhat longer than the first", b"short")


def memories(model: GistModel) -> list[Memory]:
    """Return memories of different lengths."""
    caches = list(compress(model, [list(text) for text in TEXTS], tokens_per_gist=2))
    return [concatenate([model.prefix, *caches[:count]], model.rope) for count in range(len(caches) + 1)]


def prompt(number: int) -> list[int]:
    """Return a question, a longer one for a higher number."""
    return list(b"what does it say? " * (1 + number % 3))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every step made, as they are made."""
    made: list[int] = []
    feed = Reading.feed

    def counted(self: Reading, ids: torch.Tensor, **options: object) -> torch.Tensor:
        if ids.shape[1] == 1:
            made.append(len(ids))
        return feed(self, ids, **options)

    monkeypatch.setattr(Reading, "feed", counted)
    return made


@pytest.mark.parametrize("seed", range(3))
def test_side_by_side_is_alone(any_model: GistModel, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve answers that begin, go on, are left and end in random order have the tokens of `generate`."""
    monkeypatch.setitem(any_model.__dict__, "stop_ids", frozenset(range(0, 256, 16)))
    dice, batch, known = random.Random(seed), Together(), memories(any_model)
    asked = [
        (
            known[number % 4],
            prompt(number),
            {"max_new_tokens": dice.randint(1, 24), "temperature": 0.7 * (number % 2), "seed": number},
        )
        for number in range(12)
    ]
    expected = [list(generate(any_model, memory, ids, **options)) for memory, ids, options in asked]
    left_at = {number: dice.randint(0, 5) for number in (2, 7)}

    said: list[list[int]] = [[] for _ in asked]
    waiting = list(enumerate(batch.generate(any_model, memory, ids, **options) for memory, ids, options in asked))
    active: list[tuple[int, Iterator[int]]] = []
    while waiting or active:
        if waiting and (not active or dice.random() < 0.3):
            active.append(waiting.pop(0))
        number, answer = dice.choice(active)
        token = next(answer, None) if len(said[number]) != left_at.get(number) else None
        if token is None:
            answer.close()
            active.remove((number, answer))
        else:
            said[number].append(token)

    assert [one[: left_at.get(number)] for number, one in enumerate(expected)] == said
    assert [] == batch._batches


def test_rows_step_together(model: GistModel, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of each row waits for nobody; twelve more, of three rows, take six steps as rows come and end."""
    monkeypatch.setitem(model.__dict__, "stop_ids", frozenset())
    batch, memory = Together(), memories(model)[1]
    answers = [batch.generate(model, memory, prompt(number), max_new_tokens=5) for number in range(3)]

    assert 3 == len([next(answer) for answer in answers])
    assert [] == steps
    for _ in range(4):
        for answer in answers:
            next(answer)
    assert [1, 2, 3, 3, 2, 1] == steps


def test_rows_of_very_different_length_step_apart(
    model: GistModel, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where padding would cost more than it saves there are two batches."""
    monkeypatch.setitem(model.__dict__, "stop_ids", frozenset())
    monkeypatch.setattr(continuous_batching, "PADDING_MAX", 8)
    batch, known = Together(), memories(model)
    answers = [batch.generate(model, memory, prompt(0), max_new_tokens=8) for memory in (known[0], known[0], known[3])]

    for _ in range(8):
        for answer in answers:
            next(answer)

    assert {1, 2} == set(steps)


def test_window_too_small(model: GistModel) -> None:
    """A memory that fills the window is refused with both numbers."""
    memory = Memory(memories(model)[0].kv, model.window)

    with pytest.raises(ContextOverflowError, match=f"take {model.window + 18} positions.*has {model.window}"):
        next(Together().generate(model, memory, prompt(0)))


@pytest.mark.model
def test_side_by_side_with_the_default_model(default_model: GistModel) -> None:
    """The real model, in bf16, gives sentences beside others that begin as those it gives alone."""
    text = default_model.encode_passage("The harbour of Anlaby has three cranes. The oldest crane was built in 1911.")
    memory = concatenate(
        [default_model.prefix, *compress(default_model, [text], tokens_per_gist=1)], default_model.rope
    )
    questions = ("How many cranes are there?", "When was the oldest built?")
    asked = [default_model.encode_question(question) for question in questions]
    expected = [list(generate(default_model, memory, ids, max_new_tokens=6)) for ids in asked]

    batch = Together()
    answers = [batch.generate(default_model, memory, ids, max_new_tokens=6) for ids in asked]
    rounds = [[next(answer, None) for answer in answers] for _ in range(6)]

    said = [[token for token in one if token is not None] for one in zip(*rounds, strict=True)]
    assert expected == said


def test_tiny_models_are_exact() -> None:
    """The tests above compare in float64, where equality is not luck."""
    assert torch.float64 == tiny_model().dtype
