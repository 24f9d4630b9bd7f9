"""Calibrating an adapter: heads, weights and thresholds from readings."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from gistrag.answering.judge import REFUSAL
from gistrag.engine import Engine
from gistrag.errors import UsageError
from gistrag.evaluation.calibration import (
    PRECISION,
    Asked,
    Outcome,
    Question,
    auroc,
    calibrate,
    calibration_error,
    fitted,
    holds,
    logistic,
    shown,
)
from gistrag.rag import GistRAG


def outcome(random: np.random.Generator, *, skill: float, alone: bool = False) -> Outcome:
    """Return a reading whose one signal tells how likely its answer is right."""
    level = float(random.normal())
    is_right = bool(random.random() < 1 / (1 + math.exp(-(2 * level + skill))))
    return Outcome(f"answer {random.integers(4)}", {"level": level, "alone": float(alone)}, is_right, float(is_right))


def readings(count: int = 600, seed: int = 0) -> list[Asked]:
    """Return readings of questions, where single passages answer a little worse."""
    random = np.random.default_rng(seed)
    return [
        Asked(
            [outcome(random, skill=0.5), *(outcome(random, skill=-0.5, alone=True) for _ in range(3))],
            [Outcome("wrong", {"level": float(random.normal(-1)), "alone": 0.0}, False, 0.0)],
        )
        for _ in range(count)
    ]


def test_a_confidence_is_how_often_answers_are_right() -> None:
    """On other readings of the same kind, to a few percent, and right answers have the higher ones."""
    calibration = fitted(readings(), ((1, 0),), "a")

    found = [shown(calibration, each.best) for each in readings(seed=1)]
    confidences = np.array([one.confidence(calibration) for one in found])
    right = np.array([one.outcome.is_right for one in found])
    assert calibration_error(confidences, right) < 0.06
    assert auroc(confidences, right) > 0.7
    assert right[confidences >= calibration.sure].mean() > PRECISION - 0.05
    assert 0 < calibration.found <= calibration.sure < 1


def test_the_best_of_several_readings_is_right_more_often() -> None:
    """Which is what the second reading is for; a refusal is never the best where anything else is."""
    calibration = fitted(readings(), ((1, 0),), "a")
    again = shown(
        calibration,
        [
            Outcome(REFUSAL, {}, False, 0.0),
            Outcome("x", {"level": 0.0, "alone": 1.0}, True, 1.0),
            Outcome(REFUSAL, {}, False, 0.0),
        ],
    )

    assert calibration.measured["f1"] > calibration.measured["f1_first"]
    assert again.outcome.text == "x"
    assert again.readings == 3


def test_unanswerable_questions_are_withheld() -> None:
    """About as many as asked for, of those the threshold was set on."""
    asked = readings()
    calibration = fitted(asked, ((1, 0),), "a")

    withheld = [shown(calibration, each.without).confidence(calibration) < calibration.found for each in asked]

    assert np.mean(withheld) == pytest.approx(0.7, abs=0.02)


def test_logistic_regression_finds_the_slopes() -> None:
    """Of data that was made with known ones."""
    random = np.random.default_rng(0)
    signals = random.normal(size=(20_000, 2)) * [1.0, 5.0] + [3.0, 0.0]
    right = random.random(20_000) < 1 / (1 + np.exp(-(1.5 * signals[:, 0] - 0.2 * signals[:, 1] - 4.0)))

    slopes, bias = logistic(signals, right, np.ones(20_000))

    assert slopes == pytest.approx([1.5, -0.2], abs=0.05)
    assert bias == pytest.approx(-4.0, abs=0.2)


def test_figures_of_a_calibration() -> None:
    """AUROC of equal confidences is a half; an error of 0 means that confidence is the share of right answers."""
    assert auroc(np.array([0.5, 0.5]), np.array([True, False])) == 0.5
    assert math.isnan(auroc(np.array([0.5]), np.array([True])))
    assert calibration_error(np.array([0.9] * 10), np.array([True] * 4 + [False] * 6), bins=1) == pytest.approx(0.5)


def test_the_sentence_with_the_answer() -> None:
    """It has to be a sentence of the paragraph that answers, whatever its line ends are."""
    question = Question("When?", ("1991",), "It was built in 1991 by hand. It fell.")

    assert holds("It was built\nin 1991 by hand.", question)
    assert not holds("Another was built in 1991.", question)
    assert not holds("It fell.", question)


def test_too_little_to_calibrate_with(tmp_path: Path, engine: Engine) -> None:
    """Too few questions, or a model that answers none of them right."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("The mill stands by the river and grinds the wheat of the valley.")
    question = Question("Where does the mill stand?", ("by the river",), "The mill stands by the river.")
    with GistRAG.from_folder(tmp_path / "docs", index=tmp_path / "index", engine=engine, gists="now") as rag:
        with pytest.raises(UsageError, match="at least 40 questions, got 1"):
            calibrate(rag, [question], adapter="a")
        with pytest.raises(UsageError, match="train the adapter longer"):
            calibrate(rag, [question] * 40, adapter="a")
