"""How likely an answer is right: a few signals, weighed as an adapter's calibration says.

The weights are a logistic regression on answers to questions about the articles the adapter was trained on
(`gistrag.training.calibration`). They lie in ``calibration.json`` beside the adapter and name it; for another adapter,
or none, an answer has no confidence.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gistrag.answering.answer import Verdict
from gistrag.answering.evidence import Candidate, Head
from gistrag.model.hashing import folder_sha256
from gistrag.model.runtime import Trace

logger = logging.getLogger("gistrag")

FILE = "calibration.json"
LEAST_LOGPROB = -10.0
"""Below it a log-probability says nothing more."""


@dataclass(frozen=True)
class Calibration:
    """What makes a confidence of the signals of an answer, and a verdict of that.

    Attributes:
        adapter: sha256 of the adapter it was fitted for.
        heads: those whose attention finds the evidence.
        weights: of each signal; bias: added to their sum.
        sure: an answer of at least this confidence is shown as sure; found: one of less than this is withheld.
        measured: figures of the fit; not interpreted.
    """

    adapter: str
    heads: tuple[Head, ...]
    weights: Mapping[str, float]
    bias: float
    sure: float
    found: float
    measured: Mapping[str, Any]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of `heads`."""
        return tuple(sorted({layer for layer, _ in self.heads}))

    def confidence(self, signals: Mapping[str, float]) -> float:
        """Return how likely an answer is right, 0 to 1."""
        total = self.bias + sum(weight * signals[name] for name, weight in self.weights.items())
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, total))))

    def verdict(self, confidence: float) -> Verdict:
        """Return what an answer of this confidence is shown as."""
        return "answered" if confidence >= self.sure else "unsure" if confidence >= self.found else "not found"

    def write(self, folder: Path) -> None:
        """Write the calibration into the folder of its adapter."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Calibration | None:
        """Return the calibration in the folder of an adapter, None where it is missing or of another adapter."""
        try:
            values = json.loads((folder / FILE).read_text("utf-8"))
            found = cls(**{**values, "heads": tuple((int(layer), int(head)) for layer, head in values["heads"])})
            _ = found.confidence(dict.fromkeys(found.weights, 0.0))
        except FileNotFoundError:
            logger.info("the adapter in %s has no calibration, so answers have no confidence", folder)
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("answers have no confidence: %s cannot be read (%s)", folder / FILE, error)
            return None
        if found.adapter != folder_sha256(folder):
            logger.warning("answers have no confidence: %s is of another adapter", folder / FILE)
            return None
        return found


def signals(trace: Trace, found: Sequence[Candidate], refusal: int) -> dict[str, float]:
    """Return what tells a right answer from a wrong one; every signal is a number of about -10 to 1.

    Args:
        trace: of the answer.
        found: the sentences of its passages, the likeliest evidence first.
        refusal: token id with which a refusal begins.
    """
    best = found[0] if found else None
    rest = found[1].score if len(found) > 1 else 0.0
    logprobs = [max(one, LEAST_LOGPROB) for one in trace.logprobs]
    opening = float(trace.opening[refusal]) if trace.opening is not None else LEAST_LOGPROB
    return {
        "first": logprobs[0] if logprobs else LEAST_LOGPROB,
        "least": min(logprobs, default=LEAST_LOGPROB),
        "total": max(sum(logprobs), LEAST_LOGPROB),
        "refusal": max(opening, LEAST_LOGPROB),
        "length": math.log(1 + len(logprobs)),
        "attention": best.attention if best else 0.0,
        "answer": best.answer if best else 0.0,
        "verbatim": float(best.is_verbatim) if best else 0.0,
        "question": best.question if best else 0.0,
        "lead": best.score - rest if best else 0.0,
    }
