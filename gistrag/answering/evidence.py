"""The sentence that an answer rests on.

Two things point at it: where a few heads of the model looked while it answered, and the words of the answer and of the
question. A gist keeps the position of its token in the chunk, so a look at a slot is a look at characters::

    slots of a head   prefix | gists of one passage | gists of the next | tokens read as text | question …
    token                      0  3  4  9             1  2  7             0 1 2 3 …
    sentence                   0  0  1  1             0  0  2             0 0 0 1 …
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gistrag.answering.passages import Passage
from gistrag.answering.wording import share_of_words, stands_in, words
from gistrag.documents.sentences import Span, sentences
from gistrag.kv.packed import Floats, Gists, Integers, PackedGists
from gistrag.model.prompt import passage_text
from gistrag.model.runtime import AnyRuntime, Trace

Head = tuple[int, int]
"""A layer, and one of its query heads."""


@dataclass(frozen=True)
class Candidate:
    """A sentence of a passage, and what points at it.

    Attributes:
        passage: number of the passage.
        span: start and end in the text of the passage; text: what stands there.
        attention: share of the looks at all sentences, 0 to 1.
        answer: share of the words of the answer that stand in it; question: the same of the question.
        is_verbatim: whether the answer stands in it word for word.
    """

    passage: int
    span: Span
    text: str
    attention: float
    answer: float
    question: float
    is_verbatim: bool

    @property
    def score(self) -> float:
        """How likely it carries the answer, compared with the others."""
        return 2.0 * self.attention + self.is_verbatim + self.answer + 0.5 * self.question


class SentenceMap:
    """The sentences of a passage, and the sentence of each of its tokens."""

    def __init__(self, runtime: AnyRuntime, passage: Passage) -> None:
        self._runtime, self._passage = runtime, passage
        self.spans = sentences(passage.text)

    @cached_property
    def of_token(self) -> Integers:
        """The number of the sentence of each token, ``(n,)``; that of no sentence is the number of sentences."""
        text = self._passage.text
        read = passage_text(text, self._passage.source.heading)
        shift = len(text) - len(text.lstrip()) - read.index(text.strip())
        encoding = self._runtime.text_tokenizer.encode(read, add_special_tokens=False)
        middles = np.array([(start + end) // 2 + shift for start, end in encoding.offsets])
        numbers = np.searchsorted([start for start, _ in self.spans], middles, side="right") - 1
        return np.where((numbers < 0) | (middles < 0), len(self.spans), numbers)


def candidates(
    runtime: AnyRuntime, question: str, answer: str, passages: Sequence[Passage], trace: Trace, heads: Sequence[Head]
) -> list[Candidate]:
    """Return every sentence of the passages with what points at it, the likeliest first.

    Args:
        passages: in the order of the prompt; trace: of the answer, from a memory of these.
        heads: whose attention counts; none of them: words alone.
    """
    maps = [SentenceMap(runtime, passage) for passage in passages]
    shares = attention_shares(passages, maps, trace, heads)
    asked, said = words(question), words(answer)
    found = []
    for number, (passage, sentence_map, shares_of) in enumerate(zip(passages, maps, shares, strict=True)):
        for span, share in zip(sentence_map.spans, shares_of, strict=True):
            text = passage.text[slice(*span)]
            by_words = (share_of_words(said, text), share_of_words(asked, text), stands_in(answer, text))
            found.append(Candidate(number, span, text, share, *by_words))
    return sorted(found, key=lambda one: -one.score)


def attention_shares(
    passages: Sequence[Passage], maps: Sequence[SentenceMap], trace: Trace, heads: Sequence[Head]
) -> list[list[float]]:
    """Return the share of the looks at each sentence of each passage; all of them add up to 1, or to 0."""
    totals = [np.zeros(len(one.spans) + 1, np.float32) for one in maps]
    steps = trace.attention[:-1] or trace.attention  # the last one looked for the end of the answer
    for layer, head in heads if steps else ():
        looks = np.mean([step[layer][head] for step in steps], axis=0)
        for number, tokens, of_slots in _by_passage(passages, looks, layer, head, len(steps[0][layer])):
            numbers = maps[number].of_token[tokens]
            totals[number] += np.bincount(numbers, weights=of_slots, minlength=len(totals[number]))
    whole = float(sum(total[:-1].sum() for total in totals)) or 1.0
    return [[float(share) / whole for share in total[:-1]] for total in totals]


def _by_passage(
    passages: Sequence[Passage], looks: Floats, layer: int, head: int, heads: int
) -> Iterator[tuple[int, Integers, Floats]]:
    """Yield the number of each passage, the tokens that a head keeps of it, and how much it looked at each.

    Args:
        looks: ``(slots,)``, all of the memory; heads: query heads of a layer.
    """
    contents = [one.content for one in passages]
    kept = [(at, _kept(one, layer, head, heads)) for at, one in enumerate(contents) if isinstance(one, Gists)]
    kept += [(at, np.arange(len(one))) for at, one in enumerate(contents) if not isinstance(one, Gists)]
    begin = len(looks) - sum(len(tokens) for _, tokens in kept)  # behind the shared prefix
    for number, tokens in kept:
        yield number, tokens, looks[begin : begin + len(tokens)]
        begin += len(tokens)


def _kept(gists: Gists, layer: int, head: int, heads: int) -> Integers:
    """Return the tokens of a chunk that the key-value head of a query head keeps, ``(kept,)``."""
    packed: PackedGists = gists if isinstance(gists, PackedGists) else gists.packed()  # type: ignore[attr-defined]
    kv_heads = packed.counts.shape[1]
    at = layer * kv_heads + head // (heads // kv_heads)
    counts = packed.counts.ravel()
    begin = int(counts[:at].sum())
    return packed.positions[begin : begin + int(counts[at])]
