r"""How good answers are, and how sure that is.

Answers are compared as SQuAD compares them (Rajpurkar et al. 2016, arXiv 1606.05250): in lower case, without
punctuation and articles. Where Korean, Chinese or Japanese is written, letters and marks are those of Unicode, and F1
is of characters, as KorQuAD has it (Lim et al. 2019, arXiv 1909.07005): particles are written without a space, so a
right word seldom equals a word of the answer.

Every figure is a ratio of two sums, so one bootstrap gives all intervals; where two arms answered the same questions,
they are drawn together, so what is hard for both widens nothing::

    mean F1      Σ F1 / Σ 1                 retention   Σ (reference right and arm right) / Σ reference right
    F1 kept      Σ F1 of the arm / Σ F1 of the reference

Nothing here knows a model, an arm or a file.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from gistrag.qa.korean import ENDED, stem
from gistrag.qa.stop_words import STOP_WORDS

DRAWS = 1000
CONFIDENCE = 0.95

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WRITTEN_TOGETHER = re.compile("[\u1100-\u11ff\u3040-\u30ff\u3131-\u318e\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff]")
_SAY = "(say|mention|state|specif|provide|contain|tell|answer|include|give|indicate|list|available|enough)"
_REFUSALS = re.compile(
    rf"(passages?|texts?|contexts?|information|answer)( \w+)? (do|does|did|is|are|was|were)( not|nt)( \w+)? {_SAY}"
    r"|i (do not|dont|cannot|cant) (know|answer|find|determine)"
    r"|not (mentioned|stated|specified|given|provided) in (passages?|texts?|contexts?)"
    r"|no (information|mention|answer)\b"
    r"|(글|본문|문서|지문|구절|문맥|내용|정보)\S{0,3}( \S+){0,4} "
    r"((나와|언급되어|명시되어|적혀|쓰여|포함되어|나타나|제공되어) ?있지 ?않|(언급|명시|제공|포함)되지 않)"
    r"|답(을|은)? ?찾을 수 없|^(정확히 |잘 )?(알 수 없|모르겠|모릅니다)"
    r"|(정보|내용|언급|답)(가|이|은|는)? 없(습니다|어요|다$)"
)


def normalized(text: str) -> str:
    """Return *text* in lower case, without punctuation, articles and needless white space.

    >>> normalized("The  U.S.A., a land"), normalized("『한빛』은 ５명!")
    ('usa land', '한빛은 5명')
    """
    if not _WRITTEN_TOGETHER.search(text):
        return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(one for one in folded if unicodedata.category(one)[0] not in "PS").split())


def exact_match(output: str, answers: Iterable[str]) -> bool:
    """Return whether *output* is one of the answers."""
    return normalized(output) in map(normalized, answers)


def f1(output: str, answers: Iterable[str]) -> float:
    """Return how well the words of *output* agree with those of the answer they fit best, 0 to 1.

    Where either is in Korean, Chinese or Japanese, characters count instead of words.

    >>> f1("in the town of Paris", ["Paris", "town of Paris"]), f1("8만 원을", ["8만원"])
    (0.8571428571428571, 0.8571428571428571)
    """
    return max((_f1(*_compared(normalized(output), normalized(answer))) for answer in answers), default=0.0)


def _compared(output: str, answer: str) -> tuple[Sequence[str], Sequence[str]]:
    """Return the words of both, or their characters."""
    if _WRITTEN_TOGETHER.search(f"{output}{answer}"):
        return "".join(output.split()), "".join(answer.split())
    return output.split(), answer.split()


def _f1(output: Sequence[str], answer: Sequence[str]) -> float:
    if not output or not answer:
        return float(output == answer)
    common = (Counter(output) & Counter(answer)).total()
    return 2 * common / (len(output) + len(answer))


def contains(output: str, answers: Iterable[str]) -> bool:
    """Return whether one of the answers stands in *output*, as whole words; a Korean word may have a particle.

    >>> contains("It is 19 km deep.", ["19 km"]), contains("It is 119 km deep.", ["19 km"])
    (True, False)
    >>> contains("15일입니다.", ["15일"]), contains("3만 원", ["3"])
    (True, False)
    """
    return any(_stands_in(normalized(answer), normalized(output)) for answer in answers if normalized(answer))


def _stands_in(words: str, text: str) -> bool:
    if _WRITTEN_TOGETHER.search(text):
        return bool(re.search(rf"(?<!\w){re.escape(words)}{ENDED}", text))
    return f" {words} " in f" {text} "


def _stems(text: str) -> list[str]:
    """Return the words of a text, Korean ones without their particles."""
    return [stem(word) for word in normalized(text).split()]


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
    words = _without_particle(normalized(output))
    return bool(words) and not is_refusal(output) and not any(_stands_in(words, normalized(text)) for text in passages)


def _without_particle(words: str) -> str:
    """Return words without the particles of the last one."""
    before, space, last = words.rpartition(" ")
    return f"{before}{space}{stem(last)}"


def rouge_l(output: str, answers: Iterable[str]) -> float:
    """Return ROUGE-L of *output* and the answer it fits best: F1 of the longest common subsequence of their words.

    Source: Lin 2004, ROUGE: a package for automatic evaluation of summaries; words as in `normalized`, no stemming.

    >>> rouge_l("the old mill grinds", ["the mill grinds wheat"])
    0.6666666666666666
    """
    words = _stems(output)
    return max((_rouge_l(words, _stems(answer)) for answer in answers), default=0.0)


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
    said = set(_stems(output))
    wanted = [set(_stems(sentences)) - STOP_WORDS for sentences in evidence]
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
