"""The arms of an evaluation: the same cases, answered from different memories of the same passages.

=========================  ============================================================================
none                       nothing
full context               the article as text
text without adapter       the passages as text; the base model answers, in every other arm the adapter does
text                       the passages as text: the reference
uncompressed KV            the uncompressed KV cache of each passage, read alone (as TurboRAG, arXiv 2410.07590)
gist *r* without adapter   the same gists as below; the base model answers
gist *r*                   gists at a compression rate of *r* tokens per gist
hybrid *r*                 gists, and the best passage as text
=========================  ============================================================================

One text pass of a passage makes its gists at all rates and its uncompressed cache; one memory of text serves the
reader with the adapter and the one without. `gistrag.answering.assemble` makes every memory, as in the product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gistrag.answering.assemble import Content, assemble
from gistrag.compression.compress import BATCH_TOKENS
from gistrag.compression.making import gist_count
from gistrag.compression.placements import TextPass
from gistrag.errors import UsageError
from gistrag.evaluation.cases import LONG, Case
from gistrag.evaluation.corpus import Passage
from gistrag.kv.cache import GistCache, Memory, as_stored
from gistrag.kv.packed import stored_bytes
from gistrag.model.batching import batches_by_length
from gistrag.model.gist_model import GistModel
from gistrag.settings import MADE, KvCacheDtype, Layout, Placement

ARMS = ("none", "full", "without-adapter", "text", "kv", "gist-without-adapter", "gist", "hybrid")
"""Names of the arms to choose from; `arms` makes them."""

Row = dict[str, Any]
"""One answer: what was asked, given and generated, with its scores; see `gistrag.evaluation.runner.scored`."""
Give = Literal["nothing", "document", "text", "gists", "hybrid"]
Setting = tuple[Placement, int]
"""Placement and tokens per gist."""
Pair = tuple[Case, "Arm"]
Caches = Mapping[tuple[Passage, Setting], GistCache]


@dataclass(frozen=True)
class Arm:
    """A way to answer a case.

    Attributes:
        name: in rows and tables.
        give: how passages are given.
        placement, tokens_per_gist: of passages given as gists.
        has_adapter: whether the adapter reads question and answer.
    """

    name: str
    give: Give
    placement: Placement = "selected"
    tokens_per_gist: int = 1
    has_adapter: bool = True

    @property
    def setting(self) -> Setting:
        """How its gists are made."""
        return self.placement, self.tokens_per_gist

    def shares(self, case: Case) -> tuple[tuple[Passage, ...], tuple[Passage, ...]]:
        """Return the passages given as gists, and those read as text behind them."""
        split: dict[Give, tuple[tuple[Passage, ...], tuple[Passage, ...]]] = {
            "nothing": ((), ()),
            "document": ((), case.document),
            "text": ((), case.passages),
            "gists": (case.passages, ()),
            "hybrid": (case.passages[:-1], case.passages[-1:]),
        }
        return split[self.give]

    def takes(self, case: Case) -> bool:
        """Return whether it answers a case: parts beside the main questions are for arms that read the passages.

        The base without adapter answers long questions too.
        """
        if self.give == "hybrid" and len(case.passages) < 2:
            return False  # the same as text
        is_given = self.give not in ("nothing", "document")
        return case.part == "questions" or (is_given and (self.has_adapter or case.part == LONG))


def arms(
    names: Sequence[str], *, rates: Sequence[int], placement: Placement, main_rate: int, has_adapter: bool
) -> list[Arm]:
    """Return the arms of these names, in the order of a table.

    Args:
        names: some of `ARMS`.
        rates: tokens per gist of the gist arms.
        main_rate: tokens per gist of the hybrid arm.
        has_adapter: whether the model has one; without it, each arm ``without-adapter`` equals another and is left out.

    Raises:
        UsageError: no arm, an unknown arm, or a rate below 1.
    """
    if not names:
        raise UsageError("--arms names no arm; leave the option out for all of them")
    if unknown := sorted(set(names) - set(ARMS)):
        raise UsageError(f"--arms takes some of {', '.join(ARMS)}, got {', '.join(unknown)}")
    if min(rates, default=1) < 1:
        raise UsageError(f"--rates must be at least 1, got {min(rates)}")
    of_base = rates if has_adapter and placement not in MADE else ()  # an adapter made the others
    every = {
        "none": [Arm("none", "nothing")],
        "full": [Arm("full context", "document")],
        "without-adapter": [Arm("text without adapter", "text", has_adapter=False)] if has_adapter else [],
        "text": [Arm("text", "text")],
        "kv": [Arm("uncompressed KV", "gists")],
        "gist-without-adapter": [gist_arm(placement, rate, has_adapter=False) for rate in dict.fromkeys(of_base)],
        "gist": [gist_arm(placement, rate) for rate in dict.fromkeys(rates)],
        "hybrid": [Arm(f"hybrid {main_rate}", "hybrid", placement, main_rate)],
    }
    return [arm for name in ARMS if name in names for arm in every[name]]


def gist_arm(placement: Placement, tokens_per_gist: int, *, has_adapter: bool = True) -> Arm:
    """Return the arm that answers from gists alone."""
    name = f"gist {tokens_per_gist}" + ("" if has_adapter else " without adapter")
    return Arm(name, "gists", placement, tokens_per_gist, has_adapter)


class MemoryCache:
    """Makes the memories that cases are answered from; keeps token ids and the last memory until `clear`.

    Args:
        kv_cache_dtype: of the gist files that an answer would load.
    """

    def __init__(self, model: GistModel, kv_cache_dtype: KvCacheDtype = "auto") -> None:
        self.model = model
        self.kv_cache_dtype = kv_cache_dtype
        self._ids: dict[Passage, list[int]] = {}
        self._last: tuple[object, Memory] | None = None

    def clear(self) -> None:
        """Free what is kept."""
        self._ids.clear()
        self._last = None

    def encoded(self, passage: Passage) -> list[int]:
        """Return the token ids of a passage as it stands in the prompt."""
        if passage not in self._ids:
            self._ids[passage] = self.model.encode_passage(passage.text, passage.heading)
        return self._ids[passage]

    def caches(self, pairs: Sequence[Pair]) -> Caches:
        """Return all caches that the pairs need, as they come back from a gist file."""
        wanted = dict.fromkeys((passage, arm.setting) for case, arm in pairs for passage in arm.shares(case)[0])
        return {one: as_stored(cache, self.kv_cache_dtype) for one, cache in self.made(list(wanted)).items()}

    def made(self, wanted: Sequence[tuple[Passage, Setting]]) -> Caches:
        """Return new caches; every passage is read once for all its settings."""
        settings: dict[Passage, set[Setting]] = {}
        for passage, setting in wanted:
            settings.setdefault(passage, set()).add(setting)
        alike: dict[frozenset[Setting], list[Passage]] = {}
        for passage, its in settings.items():
            alike.setdefault(frozenset(its), []).append(passage)
        made: dict[tuple[Passage, Setting], GistCache] = {}
        for shared, passages in alike.items():
            for rows in batches_by_length([len(self.encoded(one)) for one in passages], budget=BATCH_TOKENS):
                made.update(self._compressed([passages[row] for row in rows], sorted(shared)))
        return made

    def _compressed(self, passages: Sequence[Passage], settings: Sequence[Setting]) -> Caches:
        text = TextPass(self.model, [self.encoded(passage) for passage in passages])
        return {
            (passage, setting): cache
            for setting in settings
            for passage, cache in zip(passages, text.compress(*setting), strict=True)
        }

    def memory(self, case: Case, arm: Arm, caches: Caches) -> Memory:
        """Return what a case is answered from; the last memory serves again where it is the same."""
        gists, texts = arm.shares(case)
        layout = self.layout(case, arm)
        key = arm.give, arm.setting, gists, texts, layout
        if self._last is None or self._last[0] != key:
            held: list[Content] = [caches[passage, arm.setting] for passage in gists]
            self._last = key, assemble(self.model, [*held, *map(self.encoded, texts)], layout=layout)
        return self._last[1]

    def slots(self, case: Case, arm: Arm) -> int:
        """Return the slots of a memory."""
        return self.model.prefix.gists + self._span(case, arm, "packed")

    def layout(self, case: Case, arm: Arm) -> Layout:
        """Return the layout of the gists: spread where they fit, as in the product."""
        return "spread" if self._span(case, arm, "spread") <= self._room(case) else "packed"

    def overflow(self, case: Case, arm: Arm) -> int:
        """Return by how many positions a case exceeds the model's context window, 0 where it fits."""
        return max(0, self._span(case, arm, "packed") - self._room(case))

    def _span(self, case: Case, arm: Arm, layout: Layout) -> int:
        """Return the positions that the passages take; known before any cache is made."""
        gists, texts = arm.shares(case)
        rate = arm.tokens_per_gist if layout == "packed" else 1
        as_gists = sum(gist_count(len(self.encoded(passage)), rate) for passage in gists)
        return as_gists + sum(len(self.encoded(passage)) for passage in texts)

    def _room(self, case: Case) -> int:
        """Return the positions that remain for passages."""
        question = len(self.model.encode_question(case.question))
        return self.model.window - self.model.prefix.gists - question - case.max_new_tokens

    def cost(self, case: Case, arm: Arm, caches: Caches) -> Row:
        """Return what the passages of a case take: slots in memory, tokens they stand for, bytes on disk."""
        gists, texts = arm.shares(case)
        held = [caches[passage, arm.setting] for passage in gists]
        text_tokens = sum(len(self.encoded(passage)) for passage in texts)
        return {
            "slots": sum(cache.gists for cache in held) + text_tokens,
            "source_tokens": sum(cache.source_tokens for cache in held) + text_tokens,
            "stored_bytes": sum(map(self._stored_bytes, held)) + sum(len(passage.text.encode()) for passage in texts),
        }

    def _stored_bytes(self, cache: GistCache) -> int:
        """Return the bytes of a cache in its file, without the file's header; a position takes 16 bits."""
        layers, both, kv_heads, _, head_dim = cache.kv.shape
        shape = (layers, both, kv_heads, cache.gists, head_dim)
        kv = stored_bytes(shape, self.kv_cache_dtype, itemsize=cache.kv.dtype.itemsize)
        return kv + 2 * int((cache.positions >= 0).sum())
