"""Planted facts: where they stand, and how their tasks are told from others."""

from __future__ import annotations

import random

import pytest

from gistrag.qa.dataset import Context, Task
from gistrag.qa.planted_facts import FACTS, is_planted, plant

CONTEXT = Context("First sentence. Second one. The third.", "a", (Task("q", ("a",)),))


@pytest.mark.parametrize("kind", sorted(FACTS))
def test_a_planted_fact_stands_in_the_text(kind: str) -> None:
    """Its answer is in the context exactly once, and the rest of the text is still there."""
    planted = plant(CONTEXT, random.Random(3), kind)

    (answer,) = planted.tasks[-1].answers
    assert planted.text.count(answer) == 1
    assert all(sentence in planted.text for sentence in ("First sentence", "Second one", "The third."))


def test_only_the_task_of_a_planted_fact_is_one() -> None:
    """The tasks a context had before stay, and are not taken for planted facts."""
    planted = plant(CONTEXT, random.Random(3))

    assert [is_planted(task) for task in planted.tasks] == [False, True]


def test_the_same_randomness_plants_the_same_fact() -> None:
    """A run that resumes sees the facts it would have seen."""
    first, again = (plant(CONTEXT, random.Random(3)) for _ in range(2))

    assert first == again
