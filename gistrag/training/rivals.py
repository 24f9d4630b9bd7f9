"""Questions beside passages of other articles that look like the answer and are not: what a reader has to refuse.

Retrieval brings such passages whenever the documents do not answer. A passage is a rival of a question where it shares
rare words with it, is of another article, and contains none of the answers.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from gistrag.qa.dataset import LONG_KINDS, REFUSAL, UNANSWERABLE, Context, Task
from gistrag.qa.metrics import normalized
from gistrag.qa.stop_words import STOP_WORDS

QUESTIONS_SHARE = 0.1
"""Questions that get a rival, as a share of the contexts."""

COMMON = 0.02
"""A word in more than this share of the contexts tells none of them apart."""

RARE_IN = 10
"""A word in no more contexts than this is rare, however few contexts there are."""


def rivals(contexts: Sequence[Context], *, seed: int, share: float = QUESTIONS_SHARE) -> list[Context]:
    """Return for some questions the context of another article that looks most like their answer, to be refused.

    Args:
        seed: of the questions that are drawn.
        share: of questions to contexts.
    """
    words = [frozenset(normalized(context.text).split()) - STOP_WORDS for context in contexts]
    counts = Counter(word for one in words for word in one)
    most = max(RARE_IN, COMMON * len(contexts))
    found_in: dict[str, list[int]] = defaultdict(list)
    for number, one in enumerate(words):
        for word in one:
            if counts[word] <= most:
                found_in[word].append(number)
    asked = [(context, task) for context in contexts for task in context.tasks if _can_be_refused(task)]
    drawn = random.Random(f"{seed} rivals").sample(asked, min(len(asked), math.ceil(share * len(contexts))))
    made = []
    for context, task in drawn:
        scores: Counter[int] = Counter()
        for word in set(normalized(task.question).split()):
            for number in found_in.get(word, ()):
                scores[number] += -math.log(counts[word] / len(contexts))  # type: ignore[assignment]
        rival = next((contexts[n] for n, _ in scores.most_common() if _is_rival(contexts[n], context, task)), None)
        if rival is not None:
            made.append(replace(rival, tasks=(Task(task.question, (REFUSAL,), UNANSWERABLE),)))
    return made


def _can_be_refused(task: Task) -> bool:
    return task.kind not in LONG_KINDS and task.kind != UNANSWERABLE


def _is_rival(other: Context, context: Context, task: Task) -> bool:
    text = other.text.lower()
    return other.article != context.article and not any(answer.lower() in text for answer in task.answers)
