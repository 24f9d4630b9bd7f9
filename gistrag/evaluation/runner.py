"""The arms of an evaluation: the same cases, answered from different memories of the same passages.

==============  ===================================================================
none            nothing
full context    the article as text
text untuned    the passages as text; the base model answers, every other arm has the adapter
text            the passages as text: the reference
full KV         the full cache of each passage, read alone (as TurboRAG, arXiv 2410.07590)
gist *r*        gists that stand for *r* tokens each
hybrid *r*      gists, and the best passage as text
==============  ===================================================================

Prompt, order and decoding (greedy) are the same for all. One text pass of a passage makes its gists at all rates and
its full cache; one memory of text serves the tuned and the untuned reader. Answers are written to a `Journal` as they
come, so an evaluation that is stopped goes on where it was.

What is asked is settled in `gistrag.evaluation.cases`; what the rows add up to is in `gistrag.evaluation.report`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from gistrag.compression.compress import BATCH_TOKENS
from gistrag.compression.placements import TextPass, gist_count
from gistrag.errors import UsageError
from gistrag.evaluation.cases import WHOLE, Case, Passage
from gistrag.kv import gist_file
from gistrag.kv.cache import GistCache, Layout, Memory, as_stored, concatenate
from gistrag.kv.quantization import stored_bytes
from gistrag.model.generation import generate_batch, read_text
from gistrag.model.gist_model import GistModel
from gistrag.qa.metrics import contains, exact_match, f1, hallucinated, is_refusal
from gistrag.settings import KvCacheDtype, Placement
from gistrag.storage import files

ARMS = ("none", "full", "untuned", "text", "kv", "gist", "hybrid")
"""What can be asked for; `arms` makes them."""

Row = dict[str, Any]
Give = Literal["nothing", "document", "text", "gists", "hybrid"]
Dial = tuple[Placement, int]
Pair = tuple[Case, "Arm"]
Caches = Mapping[tuple[Passage, Dial], GistCache]

GROUP_BYTES = 1 << 29
"""Caches of passages that are kept at a time."""
BATCH_BYTES = 1 << 28
"""Keys and values of the answers computed side by side."""
BATCH_ROWS = 32
SWEEP_MOST = 64


@dataclass(frozen=True)
class Arm:
    """A way to answer a case.

    Attributes:
        name: in rows and tables; give: how passages are given.
        placement, tokens_per_gist: of those given as gists.
        is_tuned: whether the adapter reads question and answer.
    """

    name: str
    give: Give
    placement: Placement = "selected"
    tokens_per_gist: int = 1
    is_tuned: bool = True

    @property
    def dial(self) -> Dial:
        """What its gists are made with."""
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
        """Return whether it answers a case: beside the main questions only tuned arms that read the passages do."""
        if self.give == "hybrid" and len(case.passages) < 2:
            return False  # that is text
        return case.part == "questions" or (self.is_tuned and self.give not in ("nothing", "document"))


def arms(
    names: Sequence[str], *, rates: Sequence[int], placement: Placement, main_rate: int, has_adapter: bool
) -> list[Arm]:
    """Return the arms that were asked for, in the order of a table.

    Args:
        names: some of `ARMS`.
        rates: tokens per gist of the gist arms; main_rate: of the hybrid one.
        has_adapter: without one, the untuned arm would be the text arm again and is left out.

    Raises:
        UsageError: an unknown arm, or a rate below 1.
    """
    if unknown := sorted(set(names) - set(ARMS)):
        raise UsageError(f"--arms are some of {', '.join(ARMS)}, got {', '.join(unknown)}")
    if min(rates, default=1) < 1:
        raise UsageError(f"--rates must be at least 1, got {min(rates)}")
    every = {
        "none": [Arm("none", "nothing")],
        "full": [Arm("full context", "document")],
        "untuned": [Arm("text untuned", "text", is_tuned=False)] if has_adapter else [],
        "text": [Arm("text", "text")],
        "kv": [Arm("full KV", "gists")],
        "gist": [gist_arm(placement, rate) for rate in dict.fromkeys(rates)],
        "hybrid": [Arm(f"hybrid {main_rate}", "hybrid", placement, main_rate)],
    }
    return [arm for name in ARMS if name in names for arm in every[name]]


def gist_arm(placement: Placement, tokens_per_gist: int) -> Arm:
    """Return the arm that answers from gists alone."""
    return Arm(f"gist {tokens_per_gist}", "gists", placement, tokens_per_gist)


class Memories:
    """Makes what cases are answered from. The tokens of passages and the last memory are kept until `forget`.

    Args:
        kv_cache_dtype: of the gist files that an answer would be made from.
        folder: where gists are kept that are asked for again after `forget`; None to make them again.
    """

    def __init__(self, model: GistModel, kv_cache_dtype: KvCacheDtype = "auto", *, folder: Path | None = None) -> None:
        self._model, self._kv_cache_dtype, self._folder = model, kv_cache_dtype, folder
        self._ids: dict[Passage, list[int]] = {}
        self._last: tuple[object, Memory] | None = None

    def forget(self) -> None:
        """Free what is kept."""
        self._ids.clear()
        self._last = None

    def encoded(self, passage: Passage) -> list[int]:
        """Return the tokens of a passage as it stands in the prompt."""
        if passage not in self._ids:
            self._ids[passage] = self._model.encode_passage(passage.text, passage.heading)
        return self._ids[passage]

    def reading(self, arm: Arm) -> tuple[Give, Dial, bool]:
        """Return what memories of an arm depend on besides the case; the last is whether no adapter may read them."""
        adapter = self._model.adapter
        return arm.give, arm.dial, not arm.is_tuned and adapter is not None and adapter.acts_on("text")

    def caches(self, pairs: Sequence[Pair]) -> Caches:
        """Return all caches that the pairs need; every passage is read once for all its dials."""
        wanted = dict.fromkeys((passage, arm.dial) for case, arm in pairs for passage in arm.shares(case)[0])
        kept = {one: path for one in wanted if (path := self._path(*one)) and path.exists()}
        made = self._made([one for one in wanted if one not in kept])
        for one, cache in made.items():
            if path := self._path(*one):
                data = gist_file.encode(cache, key="", fingerprint="", kv_cache_dtype=self._kv_cache_dtype)
                files.write_atomic(path, data)
        return {
            **{one: as_stored(cache, self._kv_cache_dtype) for one, cache in made.items()},
            **{one: self._read(path) for one, path in kept.items()},
        }

    def _path(self, passage: Passage, dial: Dial) -> Path | None:
        return self._folder and self._folder / f"{_number(passage)}-{dial[0]}-{dial[1]}.safetensors"

    def _read(self, path: Path) -> GistCache:
        return gist_file.decode(path.read_bytes(), path, key="", fingerprint="").to(self._model.device)

    def _made(self, wanted: Sequence[tuple[Passage, Dial]]) -> dict[tuple[Passage, Dial], GistCache]:
        """Return new caches."""
        dials: dict[Passage, set[Dial]] = {}
        for passage, dial in wanted:
            dials.setdefault(passage, set()).add(dial)
        alike: dict[frozenset[Dial], list[Passage]] = {}
        for passage, its in dials.items():
            alike.setdefault(frozenset(its), []).append(passage)
        made: dict[tuple[Passage, Dial], GistCache] = {}
        for shared, passages in alike.items():
            for rows in batches([len(self.encoded(passage)) for passage in passages], BATCH_TOKENS):
                made.update(self._compressed([passages[row] for row in rows], sorted(shared)))
        return made

    def _compressed(self, passages: Sequence[Passage], dials: Sequence[Dial]) -> Caches:
        text = TextPass(self._model, [self.encoded(passage) for passage in passages])
        return {
            (passage, dial): cache
            for dial in dials
            for passage, cache in zip(passages, text.compress(*dial), strict=True)
        }

    def memory(self, case: Case, arm: Arm, caches: Caches) -> Memory:
        """Return what a case is answered from; the memory made before serves again where it is the same."""
        gists, texts = arm.shares(case)
        reading, layout = self.reading(arm), self.layout(case, arm)
        key = reading, gists, texts, layout
        if self._last is None or self._last[0] != key:
            held = [caches[passage, arm.dial] for passage in gists]
            ids = list(chain.from_iterable(map(self.encoded, texts)))
            with self._model.without_adapter() if reading[2] else nullcontext(self._model) as model:
                begin = concatenate([model.prefix, *held], model.rope, layout=layout)
                self._last = key, read_text(model, begin, ids)
        return self._last[1]

    def slots(self, case: Case, arm: Arm) -> int:
        """Return the slots of a memory."""
        return self._model.prefix.gists + self._span(case, arm, "packed")

    def layout(self, case: Case, arm: Arm) -> Layout:
        """Return how gists stand in the prompt: spread where they fit, as in the product."""
        return "spread" if self._span(case, arm, "spread") <= self._room(case) else "packed"

    def overflow(self, case: Case, arm: Arm) -> int:
        """Return by how many positions a case is too long for the window of the model, 0 where it fits."""
        return max(0, self._span(case, arm, "packed") - self._room(case))

    def _span(self, case: Case, arm: Arm, layout: Layout) -> int:
        gists, texts = arm.shares(case)
        rate = arm.tokens_per_gist if layout == "packed" else 1
        as_gists = sum(gist_count(len(self.encoded(passage)), rate) for passage in gists)
        return as_gists + sum(len(self.encoded(passage)) for passage in texts)

    def _room(self, case: Case) -> int:
        """Return the positions that are left for passages."""
        question = len(self._model.encode_question(case.question))
        return self._model.window - self._model.prefix.gists - question - case.max_new_tokens

    def cost(self, case: Case, arm: Arm, caches: Caches) -> Row:
        """Return what the passages of a case take: slots in memory, tokens they stand for, bytes on disk."""
        gists, texts = arm.shares(case)
        held = [caches[passage, arm.dial] for passage in gists]
        text_tokens = sum(len(self.encoded(passage)) for passage in texts)
        return {
            "slots": sum(cache.gists for cache in held) + text_tokens,
            "source_tokens": sum(cache.source_tokens for cache in held) + text_tokens,
            "stored_bytes": sum(map(self._stored_bytes, held)) + sum(len(passage.text.encode()) for passage in texts),
        }

    def _stored_bytes(self, cache: GistCache) -> int:
        """Return what a cache takes in its file, but for the file's header: positions are kept in 16 bits."""
        layers, both, kv_heads, _, head_dim = cache.kv.shape
        shape = (layers, both, kv_heads, cache.gists, head_dim)
        kv = stored_bytes(shape, self._kv_cache_dtype, itemsize=cache.kv.dtype.itemsize)
        return kv + 2 * int((cache.positions >= 0).sum())


class Examiner:
    """Lets a model answer cases, arm by arm, doing once what the arms share; *folder* as for `Memories`."""

    def __init__(
        self,
        model: GistModel,
        *,
        kv_cache_dtype: KvCacheDtype = "auto",
        folder: Path | None = None,
        group_bytes: int = GROUP_BYTES,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        self._model = model
        self._memories = Memories(model, kv_cache_dtype, folder=folder)
        self._group_bytes = group_bytes
        self._batch_slots = batch_bytes // model.kv_bytes_per_slot

    def rows(self, pairs: Sequence[Pair]) -> Iterator[Row]:
        """Yield what each arm says to its case, with scores; pairs that share passages should be near each other."""
        for group in self._groups(pairs):
            caches = self._memories.caches(group)
            readings: dict[object, list[Pair]] = {}
            for case, arm in group:
                readings.setdefault(self._memories.reading(arm), []).append((case, arm))
            for alike in readings.values():
                yield from self._answered(alike, caches)
            self._memories.forget()

    def _groups(self, pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
        """Yield consecutive pairs whose caches fit into memory together; the pairs of a case stay together."""
        group: list[Pair] = []
        held: set[tuple[Passage, Dial]] = set()
        size = 0
        for case, arm in pairs:
            added = {(passage, arm.dial) for passage in arm.shares(case)[0]} - held
            slots = sum(_widest(passage, dial) for passage, dial in added)
            if group and case is not group[-1][0] and size + slots * self._model.kv_bytes_per_slot > self._group_bytes:
                yield group
                group, held, size = [], set(), 0
            group.append((case, arm))
            held |= added
            size += slots * self._model.kv_bytes_per_slot
        if group:
            yield group

    def _answered(self, pairs: Sequence[Pair], caches: Caches) -> Iterator[Row]:
        """Yield the rows of pairs that read alike: a memory is made once for all arms that answer from it.

        Cases of several parts may be the same question on the same passages, and get the same answer.
        """
        jobs: dict[object, list[Pair]] = {}
        for case, arm in pairs:
            if need := self._memories.overflow(case, arm):
                yield _left_out(case, arm, need)
            else:
                jobs.setdefault((case.question, arm.shares(case), case.max_new_tokens), []).append((case, arm))
        listed = list(jobs.values())
        sizes = [self._memories.slots(*job[0]) + job[0][0].max_new_tokens for job in listed]
        for rows in batches(sizes, self._batch_slots, most=BATCH_ROWS):
            batch = [listed[row] for row in rows]
            memories = [self._memories.memory(*job[0], caches) for job in batch]
            for arm in dict.fromkeys(arm for job in batch for _, arm in job):
                held = [
                    ([case for case, one in job if one == arm], memory)
                    for job, memory in zip(batch, memories, strict=True)
                ]
                asked = [(cases, memory) for cases, memory in held if cases]
                for (cases, _), said in zip(asked, self._said(asked, arm), strict=True):
                    for case in cases:
                        yield {**scored(case, arm, said), **self._memories.cost(case, arm, caches)}

    def _said(self, asked: Sequence[tuple[Sequence[Case], Memory]], arm: Arm) -> Iterator[str]:
        """Yield what the arm says, side by side, to cases that are the same to it and have one memory."""
        cases, memories = [cases[0] for cases, _ in asked], [memory for _, memory in asked]
        prompts = [self._model.encode_question(case.question) for case in cases]
        longest = max(case.max_new_tokens for case in cases)
        with nullcontext(self._model) if arm.is_tuned else self._model.without_adapter() as model:
            tokens = generate_batch(model, memories, prompts, max_new_tokens=longest)
        for case, ids in zip(cases, tokens, strict=True):
            yield self._model.decode(ids[: case.max_new_tokens]).strip()


def _widest(passage: Passage, dial: Dial) -> int:
    """Return the most slots that the gists of a passage take in memory: matched ones where a head keeps all."""
    placement, tokens_per_gist = dial
    return passage.tokens if placement == "matched" else gist_count(passage.tokens, tokens_per_gist)


def batches(sizes: Sequence[int], budget: int, *, most: int | None = None) -> Iterator[list[int]]:
    """Yield row numbers in groups of similar size, each at most *budget* with padding and at most *most* rows.

    >>> list(batches([5, 1, 4], 9))
    [[1, 2], [0]]
    """
    group: list[int] = []
    for row in sorted(range(len(sizes)), key=lambda row: sizes[row]):
        if group and (sizes[row] * (len(group) + 1) > budget or len(group) == most):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _identity(case: Case, arm: Arm) -> Row:
    return {"part": case.part, "name": case.name, "arm": arm.name, "question": case.question, **case.about}


def _left_out(case: Case, arm: Arm, need: int) -> Row:
    return {**_identity(case, arm), "left_out": f"{need} positions more than the window of the model"}


def scored(case: Case, arm: Arm, said: str) -> Row:
    """Return the row of one answer: what was asked, given and said, and how good that is."""
    gists, texts = arm.shares(case)
    given = ["\n".join((*passage.heading, passage.text)) for passage in (*gists, *texts)]
    has_answer = {"nothing": False, "document": True}.get(arm.give, case.about.get("has_gold", True))
    return {
        **_identity(case, arm),
        "has_answer": has_answer,
        "answers": list(case.answers),
        "passages": [_number(passage) for passage in case.passages],
        "said": said,
        "em": float(exact_match(said, case.answers)),
        "f1": f1(said, case.answers),
        "contains": contains(said, case.answers),
        "refused": is_refusal(said),
        "hallucinated": hallucinated(said, given) if given and case.part != WHOLE else None,
    }


def _number(passage: Passage) -> str:
    """Return what a row calls a passage."""
    return hashlib.sha256("\n".join((*passage.heading, passage.text)).encode()).hexdigest()[:12]


# Keeping


Key = tuple[str, str, str]


def key_of(row: Row) -> Key:
    """Return which answer a row is: part, name and arm."""
    return row["part"], row["name"], row["arm"]


class Journal:
    """The rows of an evaluation in a file that only grows; a line that was cut off by a kill is dropped.

    Attributes:
        rows: by part, name and arm.
    """

    def __init__(self, path: Path) -> None:
        self.rows: dict[Key, Row] = {}
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            with suppress(ValueError, LookupError, TypeError):
                row = json.loads(line)
                self.rows[key_of(row)] = row
        self._file = path.open("ab")
        self._file.truncate(len(whole))

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, row: Row) -> None:
        """Keep a row, in the file when this returns."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.rows[key_of(row)] = row


def missing(cases: Sequence[Case], arms: Sequence[Arm], journal: Journal) -> list[Pair]:
    """Return what every arm that takes a case has still to answer."""
    return unanswered([(case, arm) for case in cases for arm in arms if arm.takes(case)], journal)


def unanswered(pairs: Sequence[Pair], journal: Journal) -> list[Pair]:
    """Return those of the pairs that are still to be answered."""
    return [(case, arm) for case, arm in pairs if (case.part, case.name, arm.name) not in journal.rows]


def answered(cases: Sequence[Case], arms: Sequence[Arm], journal: Journal) -> list[Row]:
    """Return the rows of these cases and arms, whatever else the journal holds."""
    return rows_of([(case, arm) for case in cases for arm in arms], journal)


def rows_of(pairs: Sequence[Pair], journal: Journal) -> list[Row]:
    """Return the rows of these pairs, as far as they are answered."""
    keys = ((case.part, case.name, arm.name) for case, arm in pairs)
    return [journal.rows[key] for key in keys if key in journal.rows]


# Sweeping


def largest(keeps: Callable[[int], bool], *, most: int = SWEEP_MOST) -> int | None:
    """Return the largest number from 1 to *most* for which *keeps* holds, by bisection; None where it never does.

    *keeps* is taken to hold up to some number and not beyond.

    >>> largest(lambda rate: rate <= 11)
    11
    """
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        if keeps(middle):
            low = middle
        else:
            high = middle
    return low or None
