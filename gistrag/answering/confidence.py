"""How likely an answer is right: a few signals, weighed as an adapter's calibration says.

The weights are a logistic regression on answers to questions about articles that the adapter was not trained on
(`gistrag.evaluation.calibration`). They lie in ``calibration.json`` beside the adapter and name it; for another
adapter, or none, an answer has no confidence.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from gistrag.answering.answer import Verdict
from gistrag.answering.evidence import Candidate, Head
from gistrag.answering.passages import Passage
from gistrag.kv.packed import Floats
from gistrag.model.hashing import folder_sha256
from gistrag.model.runtime import Trace

logger = logging.getLogger("gistrag")

FILE = "calibration.json"
SIGNALS = frozenset(
    ("least", "total", "refusal", "question", "attention", "answer", "verbatim", "meaning", "topic", "alone")
)
"""Names of the signals, see `signals`."""
MOST_LOG_ODDS = 20.0
LEAST_LOGPROB = -10.0
"""Below it a log-probability says nothing more."""


@dataclass(frozen=True)
class Again:
    """Weights for the most confident of several answers: of its log-odds, and of the agreement of the others."""

    best: float = 1.0
    agreement: float = 0.0
    bias: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """What makes a confidence of the signals of an answer, and a verdict of that.

    Attributes:
        adapter: sha256 of the adapter it was fitted for.
        heads: those whose attention finds the evidence.
        weights: of each signal of a reading; bias: added to their sum.
        again: what the best of several readings is worth, see `combined`.
        sure: an answer of at least this confidence is shown as sure; found: one of less than this is withheld.
        doubtful: an answer of less than this is read again.
        measured: figures of the fit; not interpreted.
    """

    adapter: str
    heads: tuple[Head, ...]
    weights: Mapping[str, float]
    bias: float
    again: Again
    sure: float
    found: float
    doubtful: float
    measured: Mapping[str, Any]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of `heads`."""
        return tuple(sorted({layer for layer, _ in self.heads}))

    def confidence(self, signals: Mapping[str, float]) -> float:
        """Return how likely the answer of one reading is right, 0 to 1."""
        return sigmoid(self.bias + sum(weight * signals[name] for name, weight in self.weights.items()))

    def combined(self, best: float, agreement: float) -> float:
        """Return how likely the most confident of several answers is right, 0 to 1.

        Args:
            best: its confidence alone; agreement: share of the other readings that gave the same answer.
        """
        return sigmoid(self.again.bias + self.again.best * logit(best) + self.again.agreement * agreement)

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
            heads = tuple((int(layer), int(head)) for layer, head in values["heads"])
            found = cls(**{**values, "heads": heads, "again": Again(**values["again"])})
            _ = found.confidence(dict.fromkeys(SIGNALS, 0.0))
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


def sigmoid(log_odds: float) -> float:
    """Return the probability of log-odds.

    >>> sigmoid(0.0)
    0.5
    """
    return 1 / (1 + math.exp(-max(-MOST_LOG_ODDS, min(MOST_LOG_ODDS, log_odds))))


def logit(probability: float) -> float:
    """Return the log-odds of a probability."""
    return math.log(max(probability, 1e-9) / max(1 - probability, 1e-9))


class TextEmbedder(Protocol):
    """What a similarity needs of an embedder."""

    def embed_query(self, question: str, /) -> Floats:
        """Return the vector of a question, ``(dim,)``, normalized."""

    def embed_documents(self, texts: Sequence[str], /) -> Sequence[Floats]:
        """Return the vectors of the windows of each text, ``(windows, dim)``."""

    def comparable(self, cosine: float, /) -> float:
        """Return a cosine on the scale of the default embedder."""


class Similarity:
    """How near texts are in meaning to a question, each embedded once."""

    def __init__(self, embedder: TextEmbedder, question: str) -> None:
        self._embedder, self._question = embedder, question
        self._known: dict[str, float] = {}

    @cached_property
    def _vector(self) -> Floats:
        return self._embedder.embed_query(self._question)

    def __call__(self, text: str) -> float:
        """Return the cosine of the question and the window of a text that is nearest to it, as `comparable`."""
        if text not in self._known:
            (windows,) = self._embedder.embed_documents([text])
            self._known[text] = self.comparable(float((windows @ self._vector).max()))
        return self._known[text]

    def comparable(self, cosine: float) -> float:
        """Return a cosine of the embedder on the scale of the one that confidence was fitted with."""
        return self._embedder.comparable(cosine)


def signals(
    trace: Trace, found: Sequence[Candidate], passages: Sequence[Passage], similarity: Similarity, *, refusal: int
) -> dict[str, float]:
    """Return what tells a right answer from a wrong one; every signal is a number of about -10 to 1.

    Args:
        trace: of the answer.
        found: the sentences of its passages, the likeliest evidence first.
        refusal: token id with which a refusal begins.
    """
    best = found[0] if found else None
    logprobs = [max(one, LEAST_LOGPROB) for one in trace.logprobs]
    opening = float(trace.opening[refusal]) if trace.opening is not None else LEAST_LOGPROB
    cosines = [similarity(one.text) if one.cosine is None else similarity.comparable(one.cosine) for one in passages]
    return {
        "least": min(logprobs, default=LEAST_LOGPROB),
        "total": max(sum(logprobs), LEAST_LOGPROB),
        "refusal": max(opening, LEAST_LOGPROB),
        "question": best.question if best else 0.0,
        "attention": best.attention if best else 0.0,
        "answer": best.answer if best else 0.0,
        "verbatim": float(best.is_verbatim) if best else 0.0,
        "meaning": similarity(best.text) if best else 0.0,
        "topic": max(cosines, default=0.0),
        "alone": float(len(passages) == 1),
    }
