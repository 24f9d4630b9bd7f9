r"""How good answers are, and how sure that is.

Answers are compared as SQuAD compares them (Rajpurkar et al. 2016, arXiv 1606.05250): in lower case, without
punctuation and articles. Every figure is a ratio of two sums, so one bootstrap gives all intervals; where two arms
answered the same questions, they are drawn together, so what is hard for both widens nothing::

    mean F1      Σ F1 / Σ 1                 retention   Σ (reference right and arm right) / Σ reference right
    F1 kept      Σ F1 of the arm / Σ F1 of the reference

Nothing here knows a model, an arm or a file.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from gistrag.qa.stop_words import STOP_WORDS

DRAWS = 1000
CONFIDENCE = 0.95

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SAY = "(say|mention|state|specif|provide|contain|tell|answer|include|give|indicate|list|available|enough)"
_REFUSALS = re.compile(
    rf"(passages?|texts?|contexts?|information|answer)( \w+)? (do|does|did|is|are|was|were)( not|nt)( \w+)? {_SAY}"
    r"|i (do not|dont|cannot|cant) (know|answer|find|determine)"
    r"|not (mentioned|stated|specified|given|provided) in (passages?|texts?|contexts?)"
    r"|no (information|mention|answer)\b"
)


def normalized(text: str) -> str:
    """Return *text* in lower case, without punctuation, articles and needless white space.

    >>> normalized("The  U.S.A., a land")
    'usa land'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(output: str, answers: Iterable[str]) -> bool:
    """Return whether *output* is one of the answers."""
    return normalized(output) in map(normalized, answers)


def f1(output: str, answers: Iterable[str]) -> float:
    """Return how well the words of *output* agree with those of the answer they fit best, 0 to 1.

    >>> f1("in the town of Paris", ["Paris", "town of Paris"])
    0.8571428571428571
    """
    return max((_f1(normalized(output).split(), normalized(answer).split()) for answer in answers), default=0.0)


def _f1(output: Sequence[str], answer: Sequence[str]) -> float:
    if not output or not answer:
        return float(output == answer)
    common = (Counter(output) & Counter(answer)).total()
    return 2 * common / (len(output) + len(answer))


def contains(output: str, answers: Iterable[str]) -> bool:
    """Return whether one of the answers stands in *output*, as whole words.

    >>> contains("It is 19 km deep.", ["19 km"]), contains("It is 119 km deep.", ["19 km"])
    (True, False)
    """
    return any(_stands_in(normalized(answer), normalized(output)) for answer in answers if normalized(answer))


def _stands_in(words: str, text: str) -> bool:
    return f" {words} " in f" {text} "


def is_refusal(output: str) -> bool:
    """Return whether *output* tells that the passages hold no answer, in the words of an adapter or of a base model.

    >>> is_refusal("The passages do not say."), is_refusal("The text was not finished.")
    (True, False)
    """
    return bool(_REFUSALS.search(normalized(output)))


def hallucinated(output: str, passages: Iterable[str]) -> bool:
    """Return whether *output* claims something, and no passage says it in these words.

    It suits short answers: a whole sentence around the right word counts as hallucinated.
    """
    words = normalized(output)
    return bool(words) and not is_refusal(output) and not any(_stands_in(words, normalized(text)) for text in passages)


def rouge_l(output: str, answers: Iterable[str]) -> float:
    """Return ROUGE-L of *output* and the answer it fits best: F1 of the longest common subsequence of their words.

    Source: Lin 2004, ROUGE: a package for automatic evaluation of summaries; words as in `normalized`, no stemming.

    >>> rouge_l("the old mill grinds", ["the mill grinds wheat"])
    0.6666666666666666
    """
    words = normalized(output).split()
    return max((_rouge_l(words, normalized(answer).split()) for answer in answers), default=0.0)


def _rouge_l(output: Sequence[str], answer: Sequence[str]) -> float:
    if not output or not answer:
        return float(output == answer)
    longest = [0] * (len(answer) + 1)  # of the output so far, and the first n words of the answer
    for word in output:
        before = 0
        for place, other in enumerate(answer, 1):
            before, longest[place] = (
                longest[place],
                before + 1 if word == other else max(longest[place], longest[place - 1]),
            )
    return 2 * longest[-1] / (len(output) + len(answer))


def evidence_covered(output: str, evidence: Iterable[str]) -> float:
    """Return the share of the words that matter in marked sentences which *output* contains, 0 to 1.

    Words that matter are all but stop words. Each of *evidence* holds the sentences that one person marked; the one
    that *output* covers best counts.

    >>> evidence_covered("It grinds wheat.", ["The mill grinds wheat. It is old."])
    0.5
    """
    said = set(normalized(output).split())
    wanted = [set(normalized(sentences).split()) - STOP_WORDS for sentences in evidence]
    return max((len(words & said) / len(words) for words in wanted if words), default=0.0)


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap interval of `CONFIDENCE`, made from *count* questions."""

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0) -> Estimate | None:
    """Return the sum of one divided by the sum of the other, with the percentile interval of a paired bootstrap.

    Args:
        numerators: of each question.
        denominators: of the same questions.
        seed: of the draws; the same one draws the same questions for every figure.

    Returns:
        None where the denominators add up to nothing.
    """
    count = len(numerators)
    if len(denominators) != count:
        raise ValueError(f"expected as many denominators as numerators, got {len(denominators)} and {count}")
    if not sum(denominators):
        return None
    draws = _draws(count, seed)
    above, below = (np.asarray(values, float)[draws].sum(axis=1) for values in (numerators, denominators))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(above[below > 0] / below[below > 0], [tail, 1 - tail])
    return Estimate(sum(numerators) / sum(denominators), float(low), float(high), count)


@lru_cache(maxsize=8)
def _draws(count: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the numbers of resampled questions, ``(DRAWS, count)``."""
    return np.random.default_rng(seed).integers(count, size=(DRAWS, count))


def mean(values: Sequence[float], *, seed: int = 0) -> Estimate | None:
    """Return the mean with its interval, None of nothing."""
    return ratio(values, [1.0] * len(values), seed=seed)


def retention(reference_right: Sequence[bool], arm_right: Sequence[bool], *, seed: int = 0) -> Estimate | None:
    """Return the share of the questions the reference gets right that the arm gets right too.

    Returns:
        None where the reference gets none right.
    """
    both = [float(first and second) for first, second in zip(reference_right, arm_right, strict=True)]
    return ratio(both, [float(right) for right in reference_right], seed=seed)
