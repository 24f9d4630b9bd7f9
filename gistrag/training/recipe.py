"""Recipes: every setting that decides what a training run makes, besides its data and its base model.

A setting is a field where two shipped recipes differ or a user has a reason to choose, and a constant elsewhere. A
recipe is saved as ``recipe.json`` beside the run it made, and a later run may start from that file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gistrag.errors import UsageError
from gistrag.settings import MADE, Placement
from gistrag.training import sampler
from gistrag.training.sampler import Mixture

WARMUP_STEPS, WARMUP_SHARE = 40, 0.2
"""Most steps, and largest share of a run, until the learning rate is full."""

VECTOR_RATE = 5.0
"""Learning rate of the gist vectors, as a multiple of the adapter's."""

GRADIENT_NORM = 1.0
"""Greatest norm of the gradient; a longer one is scaled down to it."""

FREE = ("steps", "minutes", "rows_together")
"""Settings that may change when a run is resumed: it can be made longer, and take less memory."""

CONTINUATION_END = 0.2
"""Share of its weight that the continuation loss still has at the end of a run."""

# What a recipe.json of version 0.1 holds besides today's fields. Each is a constant now.
_FIXED = {"warmup": WARMUP_STEPS, "clip": GRADIENT_NORM, "decay": 0.0, "tokens_per_gist": 4, "everywhere": False}
_FIXED_MIXTURE = {
    "hybrid": sampler.HYBRID, "packed": sampler.PACKED, "gap": sampler.GAP, "heading": sampler.HEADING,
    "continued": sampler.CONTINUED, "rivals": 0.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much the further losses count beside the cross-entropy of the answers.

    Attributes:
        distillation: weight of the KL divergence to the teacher; 0 saves the teacher's forward pass.
        continuation: weight of continuing a chunk from its gists.
        teacher_from: share of the run after which the teacher is used; before, the student is too far from it to gain.
    """

    distillation: float = 0.5
    continuation: float = 0.5
    teacher_from: float = 0.5

    def at(self, progress: float) -> LossWeights:
        """Return the weights at *progress*, from 0 at the start of a run to 1 at its end.

        >>> LossWeights().at(0.0)
        LossWeights(distillation=0.0, continuation=0.5, teacher_from=0.5)
        >>> LossWeights().at(0.5).distillation
        0.5
        """
        return LossWeights(
            distillation=self.distillation if progress >= self.teacher_from else 0.0,
            continuation=self.continuation * (1 - (1 - CONTINUATION_END) * progress),
            teacher_from=self.teacher_from,
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a training run.

    Attributes:
        steps: optimizer steps, at most.
        minutes: of training steps, at most; the learning rate has decayed by whichever ends first. None for no limit.
        rank: rank of the adapter.
        rate: learning rate of the adapter; that of the gist vectors is `VECTOR_RATE` times as high.
        loss_weights: weights of the further losses.
        batches: batches of the sampler in one step; a GPU is idle with one.
        rows_together: most rows in one forward pass; fewer take less memory and give the same gradient.
        placement: where gists come from.
        seed: random seed.
        mixture: how examples are mixed.
    """

    steps: int = 1000
    minutes: float | None = None
    rank: int = 32
    rate: float = 1e-3
    loss_weights: LossWeights = field(default_factory=LossWeights)
    batches: int = 1
    rows_together: int = 8
    placement: Placement = "anchored"
    seed: int = 0
    mixture: Mixture = field(default_factory=Mixture)

    @property
    def warmup_steps(self) -> int:
        """Return after how many steps the learning rate is full.

        >>> Recipe(steps=3000).warmup_steps, Recipe(steps=30).warmup_steps, Recipe(steps=1).warmup_steps
        (40, 6, 1)
        """
        return min(WARMUP_STEPS, math.ceil(WARMUP_SHARE * self.steps))

    def to_json(self) -> str:
        """Return the recipe as one line of JSON with sorted keys."""
        return json.dumps(self._flat(), sort_keys=True)

    @classmethod
    def from_json(cls, line: str) -> Recipe:
        """Return the recipe saved by `to_json`, also by that of an earlier version.

        Raises:
            UsageError: no recipe, or one with another value for what is a constant now.
        """
        try:
            values: dict[str, Any] = dict(json.loads(line))
            mixture: dict[str, Any] = dict(values.pop("mixture"))
            _drop_constants(values, _FIXED)
            _drop_constants(mixture, _FIXED_MIXTURE)
            _drop_vector_rate(values)
            if "probes" in mixture:  # the field's name until 0.1
                mixture["planted"] = mixture.pop("probes")
            mixture["rates"] = {int(rate): share for rate, share in mixture["rates"].items()}
            mixture["chunks"] = tuple(mixture["chunks"])
            weights = {name: values.pop(name) for name in LossWeights.__dataclass_fields__ if name in values}
            return cls(**values, loss_weights=LossWeights(**weights), mixture=Mixture(**mixture))
        except UsageError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"expected a training recipe in JSON, found something else: {error}") from error

    def differs(self, other: Recipe) -> list[str]:
        """Return the settings in which two recipes differ, but for `FREE`."""
        mine, theirs = self._flat(), other._flat()
        return [name for name in mine if name not in FREE and mine[name] != theirs[name]]

    def _flat(self) -> dict[str, Any]:
        """Return the settings by name, those of `loss_weights` among them."""
        values = asdict(self)
        return {**values.pop("loss_weights"), **values}


def _drop_constants(values: dict[str, Any], constants: Mapping[str, Any]) -> None:
    """Remove the settings that are constants now.

    Raises:
        UsageError: one of them has another value.
    """
    for name, constant in constants.items():
        if (found := values.pop(name, constant)) != constant:
            raise UsageError(f"the recipe sets {name} to {found!r}, but this version fixes it at {constant!r}")


def _drop_vector_rate(values: dict[str, Any]) -> None:
    """Remove the learning rate of gist vectors, which follows from the adapter's.

    Raises:
        UsageError: it does not follow from it, and the placement has gist vectors to train.
    """
    found = values.pop("vector_rate", None)
    if found is None or values.get("placement", Recipe.placement) not in MADE:
        return
    expected = VECTOR_RATE * values.get("rate", Recipe.rate)
    if not math.isclose(found, expected):
        raise UsageError(f"the recipe sets vector_rate to {found!r}, but this version fixes it at {expected!r}")


RECIPES = {
    "smollm2": Recipe(
        steps=600,
        loss_weights=LossWeights(distillation=0.7, continuation=0.2, teacher_from=0.3),
        placement="matched",
        mixture=Mixture(rates={2: 0.1, 4: 0.35, 8: 0.3, 16: 0.25}, chunks=(0.15, 0.15, 0.5, 0.12, 0.08)),
    ),
    "adapt": Recipe(
        steps=4000,
        loss_weights=LossWeights(distillation=0.7, continuation=0.2, teacher_from=0.3),
        placement="matched",
        mixture=Mixture(
            rates={2: 0.1, 4: 0.35, 8: 0.3, 16: 0.25},
            chunks=(0.15, 0.15, 0.5, 0.12, 0.08),
            question_tokens=160,
            without_gold=0.1,
            long=0.15,
            unanswerable=0.06,
        ),
    ),
    "continue": Recipe(
        steps=4000,
        rate=2e-4,
        loss_weights=LossWeights(distillation=0.7, continuation=0.1, teacher_from=0.0),
        placement="matched",
        mixture=Mixture(
            rates={2: 0.15, 4: 0.35, 8: 0.25, 16: 0.25},
            chunks=(0.1, 0.1, 0.5, 0.15, 0.15),
            question_tokens=192,
            without_gold=0.12,
            as_text=0.2,
            planted=0.3,
            long=0.2,
            unanswerable=0.1,
        ),
    ),
    "24gb": Recipe(
        steps=3000,
        rank=16,
        rate=2e-4,
        placement="matched",
        rows_together=1,
        mixture=Mixture(contexts=4, chunk_tokens=384, question_tokens=256),
    ),
}
