"""Recipes: saved and loaded, also those of an earlier version."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gistrag.errors import UsageError
from gistrag.training.recipe import RECIPES, LossWeights, Recipe
from gistrag.training.sampler import Mixture

# What `to_json` of version 0.1 wrote for the recipe smollm2.
OLD = (
    '{"batches": 1, "clip": 1.0, "continuation": 0.2, "decay": 0.0, "distillation": 0.7, "everywhere": false, '
    '"mixture": {"as_text": 0.12, "chunk_tokens": 320, "chunks": [0.15, 0.15, 0.5, 0.12, 0.08], "contexts": 8, '
    '"continued": 24, "gap": 24, "heading": 0.5, "hybrid": 0.08, "long": 0.12, "packed": 0.15, "probes": 0.2, '
    '"question_tokens": 136, "rates": {"16": 0.25, "2": 0.1, "4": 0.35, "8": 0.3}, "rivals": 0.0, '
    '"without_gold": 0.08}, "placement": "matched", "rank": 32, "rate": 0.001, "rows_together": 8, "seed": 0, '
    '"steps": 600, "teacher_from": 0.3, "tokens_per_gist": 4, "vector_rate": 0.005, "warmup": 40}'
)


def old(**changes: Any) -> str:
    """Return the recipe of version 0.1 with other settings, those of its mixture among them."""
    values = json.loads(OLD)
    for name, value in changes.items():
        (values["mixture"] if name in values["mixture"] else values)[name] = value
    return json.dumps(values)


def test_a_recipe_survives_json() -> None:
    """Every field comes back as it was."""
    recipe = Recipe(
        steps=7, rate=3e-4, loss_weights=LossWeights(distillation=0.1), mixture=Mixture(rates={3: 1.0}, planted=0.7)
    )

    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_recipe_of_version_0_1_loads() -> None:
    """Settings that are constants now are passed over where they have that value."""
    assert Recipe.from_json(OLD) == RECIPES["smollm2"]


def test_the_rate_of_gist_vectors_is_passed_over_where_none_are_trained() -> None:
    """Version 0.1 kept it when `--rate` changed the other; matched gists have no vectors."""
    assert Recipe.from_json(old(rate=8e-4)).rate == 8e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": 2.0}, "sets clip to 2.0, but this version fixes it at 1.0"),
        ({"everywhere": True}, "sets everywhere to True, but this version fixes it at False"),
        ({"rivals": 0.6}, "sets rivals to 0.6, but this version fixes it at 0.0"),
        ({"gap": 0}, "sets gap to 0, but this version fixes it at 24"),
        ({"placement": "anchored", "rate": 1e-2}, "sets vector_rate to 0.005, but this version fixes it at 0.05"),
        ({"colour": "red"}, "expected a training recipe"),
    ],
)
def test_another_value_for_a_constant_is_refused(changes: dict[str, Any], message: str) -> None:
    """The line names the setting and both values."""
    with pytest.raises(UsageError, match=message):
        Recipe.from_json(old(**changes))


@pytest.mark.parametrize("line", ["[]", "no json", "{}", "3", '{"mixture": 3}'])
def test_what_is_no_recipe_is_refused(line: str) -> None:
    """One line says what was expected."""
    with pytest.raises(UsageError, match="expected a training recipe"):
        Recipe.from_json(line)


def test_recipes_that_differ_name_the_settings() -> None:
    """What changes nothing learned so far is left out: a run can be made longer."""
    mine, other = Recipe(), Recipe(steps=5, rate=2e-3, loss_weights=LossWeights(distillation=0.1))

    assert mine.differs(other) == ["distillation", "rate"]


def test_the_teacher_starts_late_and_continuation_fades() -> None:
    """Both follow the progress of the run."""
    weights = LossWeights(distillation=0.7, continuation=0.5, teacher_from=0.3)

    assert [weights.at(progress).distillation for progress in (0.0, 0.29, 0.3, 1.0)] == [0.0, 0.0, 0.7, 0.7]
    assert [weights.at(progress).continuation for progress in (0.0, 0.5, 1.0)] == pytest.approx([0.5, 0.3, 0.1])
