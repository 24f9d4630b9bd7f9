"""The frontier: what text and gists answer when both may fill the same cache slots.

Slots are what an answer costs in memory and in attention, whatever they stand for. Of the chunks that retrieval ranks,
every arm gets as many as fit its budget, so gists of four tokens bring four times as many as text::

    budget 512    text     chunk 1  chunk 2  chunk 3
                  gist 4   chunk 1  chunk 2  chunk 3  …  chunk 12

The best chunk stands last, as in the product. Where not even that one fits, its beginning is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from gistrag.compression.placements import gist_count
from gistrag.evaluation.cases import Case, Corpus, Passage, Plan, asked_plainly
from gistrag.evaluation.runner import Arm, Pair
from gistrag.model.gist_model import GistModel
from gistrag.qa.metrics import contains

BUDGETS = (128, 256, 512, 1024, 2048)


def frontier(corpus: Corpus, plan: Plan, model: GistModel, arms: Sequence[Arm], budgets: Sequence[int]) -> list[Pair]:
    """Return what every arm is asked at every budget, those of a question together.

    Args:
        arms: that give passages as text or as gists.
        budgets: slots for passages; prefix, question and answer, the same for all arms, come on top.
    """
    asked = [(f"{place}", *pair) for place, pair in enumerate(asked_plainly(corpus, plan))]
    asked.sort(key=lambda one: (corpus.contexts[one[1]].article, one[1]))
    shares = Shares(model)
    pairs: list[Pair] = []
    for name, number, task in asked:
        ranked = [corpus.chunks[chunk] for chunk in corpus.search(task.question, top_k=len(corpus.chunks))]
        gold = {corpus.chunks[chunk] for chunk in corpus.gold(number, task.answers)}
        for budget, arm in product(budgets, arms):
            taken = shares.of(ranked, budget, arm.tokens_per_gist if arm.give == "gists" else 1)
            has_beginning = taken[0] != ranked[0] and ranked[0] in gold and contains(taken[0].text, task.answers)
            about = {"kind": task.kind, "article": corpus.contexts[number].article, "budget": budget}
            about |= {"chunks": len(taken), "has_gold": has_beginning or not gold.isdisjoint(taken)}
            part, passages = f"budget {budget}", tuple(taken[::-1])
            case = Case(part, name, task.question, task.answers, passages, plan.max_new_tokens, about=about)
            pairs.append((case, arm))
    return pairs


class Shares:
    """How many chunks fit into how many slots of a model."""

    def __init__(self, model: GistModel) -> None:
        self._model = model
        self._tokens: dict[Passage, int] = {}

    def of(self, ranked: Sequence[Passage], budget: int, tokens_per_gist: int) -> list[Passage]:
        """Return the best passages up to the first that does not fit; at least the beginning of the very best."""
        taken, slots = 0, 0
        for passage in ranked:
            slots += gist_count(self.tokens(passage), tokens_per_gist)
            if slots > budget:
                break
            taken += 1
        return list(ranked[:taken]) or [beginning(one, budget * tokens_per_gist, self._model) for one in ranked[:1]]

    def tokens(self, passage: Passage) -> int:
        """Return the tokens of a passage as it stands in a prompt."""
        if passage not in self._tokens:
            self._tokens[passage] = len(self._model.encode_passage(passage.text, passage.heading))
        return self._tokens[passage]


def beginning(passage: Passage, tokens: int, model: GistModel) -> Passage:
    """Return as much of a passage from its beginning as takes at most *tokens* tokens in a prompt, one at least."""
    offsets = model.text_tokenizer.encode(passage.text, add_special_tokens=False).offsets
    count = len(offsets)
    while count > 1 and (over := len(model.encode_passage(passage.text, passage.heading)) - tokens) > 0:
        count = max(1, count - over)
        passage = replace(passage, text=passage.text[: offsets[count - 1][1]], tokens=count)
    return passage
