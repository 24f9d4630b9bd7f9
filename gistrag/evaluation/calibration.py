"""Calibrating an adapter: the heads that find evidence, and the weights that make a confidence of signals.

Questions about articles that the adapter was not trained on are answered as the product answers them: from the best
passages together, then from each of them alone, and once more without those that hold the answer. What the fit sees is
what the product sees, by the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gistrag.answering.answer import Options, Usage
from gistrag.answering.confidence import Again, Calibration, Similarity, logit
from gistrag.answering.evidence import Head
from gistrag.answering.judge import Reading, agreeing, is_refusal
from gistrag.answering.passages import Passage, fit, in_prompt_order, select
from gistrag.answering.stream import AGAIN_PASSAGES
from gistrag.errors import UsageError
from gistrag.model.runtime import Trace
from gistrag.qa.metrics import contains, f1
from gistrag.rag import GistRAG
from gistrag.settings import Layout

TOP_K = 3
DEPTH = 10
RIGHT_F1 = 0.5
HEADS = 2
PROBES = 100
"""Questions that choose the heads; all layers are traced for them."""
QUESTIONS_MIN = 40
UNANSWERABLE = 0.1
"""Weight of a reading without the answer beside one with it."""
PRECISION, REFUSED, DOUBTFUL = 0.89, 0.7, 0.5
"""Of what is shown as sure, so much is right; so many unanswerable questions are refused; below this, read again."""
RIDGE, DIGITS = 1.0, 4


@dataclass(frozen=True)
class Question:
    """A question about an index, with the answers that count as right and the paragraph that holds them."""

    text: str
    answers: tuple[str, ...]
    paragraph: str


@dataclass(frozen=True)
class Outcome:
    """One reading of a question: its answer, what tells right from wrong ones, whether it is right, and its F1."""

    text: str
    signals: dict[str, float]
    is_right: bool
    f1: float


@dataclass(frozen=True)
class Asked:
    """The readings of a question from its best passages, and from the best without the answer.

    The first reading is of the passages together, the others are of each alone.
    """

    best: list[Outcome]
    without: list[Outcome]


def calibrate(
    rag: GistRAG,
    questions: Sequence[Question],
    *,
    adapter: str,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Calibration:
    """Return the calibration of the adapter that an index was made with.

    Args:
        rag: an index of articles that the adapter was not trained on, its gists made.
        questions: about these articles; 400 suffice.
        adapter: sha256 of the adapter.
        progress: called with the number of questions done, and of all.

    Raises:
        UsageError: too few questions.
    """
    if len(questions) < QUESTIONS_MIN:
        raise UsageError(f"a calibration takes at least {QUESTIONS_MIN} questions, got {len(questions)}")
    heads = choose_heads(rag, questions[:PROBES])
    asked = []
    for number, question in enumerate(questions, 1):
        asked.append(ask(rag, question, heads))
        progress(number, len(questions))
    return fitted(asked, heads, adapter)


def choose_heads(rag: GistRAG, questions: Sequence[Question]) -> tuple[Head, ...]:
    """Return the heads of one layer that look at the sentence with the answer most often, by right answers."""
    layers = range(_layers(rag))
    hits: dict[Head, list[bool]] = {}
    for question in questions:
        passages = _passages(rag, question.text)[:TOP_K]
        group = in_prompt_order(passages, is_whole_document=False)
        reading = _read(rag, question.text, group, layers, _layout(rag, question.text, passages))
        if not is_right(reading.text, question.answers):
            continue
        heads = len(reading.trace.attention[0][0])
        for head in ((layer, number) for layer in layers for number in range(heads)):
            found = max(reading.candidates([head]), key=lambda one: one.attention)
            hits.setdefault(head, []).append(holds(found.text, question))
    if not hits:
        raise UsageError("not one question was answered right, so nothing can be calibrated; train the adapter longer")
    shares = {head: float(np.mean(seen)) for head, seen in hits.items()}
    best = max(shares, key=lambda head: shares[head])
    beside = sorted((head for head in shares if head[0] == best[0]), key=lambda head: -shares[head])
    return tuple(beside[:HEADS])


def is_right(text: str, answers: Sequence[str]) -> bool:
    """Return whether an answer is right: by its words, or because it is part of a right answer or has one as a part.

    The answers of SQuAD are sometimes whole clauses.

    >>> is_right("22", ["was composed of 22 clubs"]), is_right("22 clubs", ["22"]), is_right("20 clubs", ["22"])
    (True, True, False)
    """
    parts = contains(text, answers) or any(contains(answer, [text]) for answer in answers)
    return parts or f1(text, answers) >= RIGHT_F1


def holds(sentence: str, question: Question) -> bool:
    """Return whether a sentence of the paragraph that answers a question holds the answer."""
    return contains(sentence, question.answers) and "".join(sentence.split()) in "".join(question.paragraph.split())


def ask(rag: GistRAG, question: Question, heads: Sequence[Head]) -> Asked:
    """Return the readings of a question, from passages with the answer and from those without."""
    passages = _passages(rag, question.text)
    without = [one for one in passages if not contains(one.text, question.answers)]
    return Asked(
        list(_outcomes(rag, question, passages[:TOP_K], heads)),
        list(_outcomes(rag, question, without[:TOP_K], heads, can_be_right=False)),
    )


def _outcomes(
    rag: GistRAG, question: Question, passages: Sequence[Passage], heads: Sequence[Head], *, can_be_right: bool = True
) -> Iterator[Outcome]:
    """Yield the reading of the passages together, then of each alone."""
    layers, layout = sorted({layer for layer, _ in heads}), _layout(rag, question.text, passages)
    similarity = Similarity(rag.engine.embedder, question.text)
    for group in ([in_prompt_order(passages, is_whole_document=False)] if passages else []) + [[p] for p in passages]:
        reading = _read(rag, question.text, group, layers, layout)
        text = reading.text
        answers = question.answers if can_be_right else ()
        signals = reading.signals(reading.candidates(heads), similarity)
        yield Outcome(text, signals, is_right(text, answers), f1(text, answers))


def _passages(rag: GistRAG, question: str) -> list[Passage]:
    """Return the best passages of an index, as gists."""
    with rag.store.snapshot():
        return select(rag.retrieve(question, top_k=DEPTH), rag.store, rag.runtime, Options(), Usage())


def _layout(rag: GistRAG, question: str, passages: Sequence[Passage]) -> Layout:
    """Return how the product lays out the gists of these passages; of each alone too, where it reads again."""
    usage, tokens = Usage(), len(rag.runtime.encode_question(question))
    fit(list(passages), rag.runtime, question_tokens=tokens, max_new_tokens=Options.max_new_tokens, usage=usage)
    return usage.layout


def _read(rag: GistRAG, question: str, passages: Sequence[Passage], layers: Sequence[int], layout: Layout) -> Reading:
    """Return a reading of the question to the end of its answer."""
    reading = Reading(rag.runtime, question, passages, layout, Trace(tuple(layers)))
    for _ in reading.steps(Options(max_new_tokens=48)):
        pass
    return reading


def _layers(rag: GistRAG) -> int:
    """Return the number of layers of the model."""
    return len(rag.store.gists.load(next(c.gist_key for c in rag.chunks() if c.gist_key)).counts)


# The fit


def fitted(asked: Sequence[Asked], heads: Sequence[Head], adapter: str) -> Calibration:
    """Return the calibration that fits the readings, with figures about these same readings."""
    readings = [(one, 1.0) for each in asked for one in each.best]
    readings += [(one, UNANSWERABLE) for each in asked for one in each.without]
    readings = [(one, weight) for one, weight in readings if not is_refusal(one.text)]
    names = sorted(readings[0][0].signals)
    slopes, bias = logistic(
        np.array([[one.signals[name] for name in names] for one, _ in readings]),
        np.array([one.is_right for one, _ in readings]),
        np.array([weight for _, weight in readings]),
    )
    calibration = Calibration(
        adapter=adapter,
        heads=tuple(heads),
        weights=dict(zip(names, slopes, strict=True)),
        bias=bias,
        again=Again(),
        sure=1.0,
        found=0.0,
        doubtful=DOUBTFUL,
        measured={},
    )
    return _with_thresholds(_with_again(calibration, asked), asked)


@dataclass(frozen=True)
class Shown:
    """What the product shows of a question: the answer, its confidence alone, how far other readings agree."""

    outcome: Outcome
    alone: float
    agreement: float
    readings: int

    def confidence(self, calibration: Calibration) -> float:
        """Return the confidence it is shown with."""
        if self.readings == 1 or not self.alone:
            return self.alone
        return calibration.combined(self.alone, self.agreement)


def shown(calibration: Calibration, outcomes: Sequence[Outcome]) -> Shown:
    """Return what the product shows, see `gistrag.answering.judge.most_confident`."""
    outcomes = outcomes[: 1 + AGAIN_PASSAGES]
    confidences = [0.0 if is_refusal(one.text) else calibration.confidence(one.signals) for one in outcomes]
    if confidences[0] >= calibration.doubtful or len(outcomes) < 3:
        return Shown(outcomes[0], confidences[0], 0.0, 1)
    best = int(np.argmax(confidences))
    agreement = agreeing(outcomes[best].text, [one.text for at, one in enumerate(outcomes) if at != best])
    return Shown(outcomes[best], confidences[best], agreement, len(outcomes))


def _with_again(calibration: Calibration, asked: Sequence[Asked]) -> Calibration:
    """Return the calibration with the weights for the best of several answers."""
    final = [(shown(calibration, each.best), 1.0) for each in asked if each.best]
    final += [(shown(calibration, each.without), UNANSWERABLE) for each in asked if each.without]
    final = [(one, weight) for one, weight in final if one.readings > 1 and one.alone]
    if not final:
        return calibration
    (best, agreement), bias = logistic(
        np.array([(logit(one.alone), one.agreement) for one, _ in final]),
        np.array([one.outcome.is_right for one, _ in final]),
        np.array([weight for _, weight in final]),
    )
    return replace(calibration, again=Again(best, agreement, bias))


def _with_thresholds(calibration: Calibration, asked: Sequence[Asked]) -> Calibration:
    """Return the calibration with its thresholds, and with figures about the readings they come from."""
    best = [shown(calibration, each.best) for each in asked if each.best]
    without = [shown(calibration, each.without) for each in asked if each.without]
    confidences = np.array([one.confidence(calibration) for one in best])
    right = np.array([one.outcome.is_right for one in best])
    order = np.argsort(-confidences)
    precise = np.nonzero(np.cumsum(right[order]) >= PRECISION * np.arange(1, len(order) + 1))[0]
    sure = float(confidences[order[precise[-1]]]) if len(precise) else 1.0
    found = float(np.quantile([one.confidence(calibration) for one in without], REFUSED)) if without else 0.0
    measured = {
        "questions": len(best),
        "right": round(float(right.mean()), 4),
        "f1_first": round(float(np.mean([each.best[0].f1 for each in asked if each.best])), 4),
        "f1": round(float(np.mean([one.outcome.f1 for one in best])), 4),
        "auroc": round(auroc(confidences, right), 4),
        "read_again": round(float(np.mean([one.readings > 1 for one in best])), 4),
        "sure": round(float((confidences >= sure).mean()), 4),
        "withheld": round(float((confidences < found).mean()), 4),
    }
    return replace(calibration, sure=round(sure, DIGITS), found=round(min(found, sure), DIGITS), measured=measured)


def logistic(
    signals: npt.NDArray[np.float64], right: npt.NDArray[np.bool_], weights: npt.NDArray[np.float64]
) -> tuple[list[float], float]:
    """Return the slopes and the bias of a logistic regression with a ridge penalty, by Newton's method.

    Args:
        signals: ``(n, signals)``; right: ``(n,)``; weights: of each row, ``(n,)``.

    >>> slopes, bias = logistic(np.array([[0.0], [1], [2], [3]]), np.array([0, 0, 1, 1]) == 1, np.ones(4))
    >>> round(-bias / slopes[0], 3)
    1.5
    """
    centre, scale = signals.mean(axis=0), np.maximum(signals.std(axis=0), 1e-6)
    rows = np.column_stack(((signals - centre) / scale, np.ones(len(signals))))
    penalty = np.diag([RIDGE] * signals.shape[1] + [0.0])
    found = np.zeros(rows.shape[1])
    for _ in range(50):
        likely = 1 / (1 + np.exp(-np.clip(rows @ found, -20, 20)))
        slope = rows.T @ (weights * (right - likely)) - penalty @ found
        curve = (rows * (weights * likely * (1 - likely))[:, None]).T @ rows + penalty + 1e-9 * np.eye(len(found))
        step = np.linalg.solve(curve, slope)
        found += step
        if np.abs(step).max() < 1e-8:
            break
    slopes = found[:-1] / scale
    return [round(float(one), DIGITS) for one in slopes], round(float(found[-1] - slopes @ centre), DIGITS)


def auroc(confidences: npt.NDArray[np.float64], right: npt.NDArray[np.bool_]) -> float:
    """Return the probability that a right answer has a higher confidence than a wrong one; equal ones count half.

    >>> auroc(np.array([0.9, 0.2, 0.4]), np.array([True, False, True]))
    1.0
    """
    yes, no = confidences[right], confidences[~right]
    if not len(yes) or not len(no):
        return math.nan
    return float(((yes[:, None] > no) + 0.5 * (yes[:, None] == no)).mean())


def calibration_error(confidences: npt.NDArray[np.float64], right: npt.NDArray[np.bool_], *, bins: int = 10) -> float:
    """Return the expected calibration error: how far confidence and share of right answers differ, 0 to 1.

    Bins hold equally many answers (Nixon et al. 2019, arXiv 1904.01685).

    >>> calibration_error(np.array([0.5, 0.5]), np.array([True, False]), bins=1)
    0.0
    """
    order = np.argsort(confidences)
    parts = [part for part in np.array_split(order, bins) if len(part)]
    gaps = [len(part) * abs(confidences[part].mean() - right[part].mean()) for part in parts]
    return float(sum(gaps) / len(order))
