"""What gists in 8 and 4 bits cost: the same questions from the same gists as they are, in int8 and in int4.

    python notebooks/bench/storage.py squad.jsonl.gz --questions 100 --rates 2,4 --output storage/

Every passage is compressed once, and its gists are brought back from each kind of file. The questions are those of
`gistrag evaluate --held-out`. A run that was stopped goes on. Prints F1 with intervals, the difference to gists as they
are question by question, and the bytes for each token of text at rates 2, 4, 8 and 16; the same as JSON last.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from gistrag.cases import Plan, cases, indexed
from gistrag.cases import planted as with_probes
from gistrag.catalog import find, find_adapter
from gistrag.compression import gist_count
from gistrag.embedder import Embedder
from gistrag.evaluation import Arm, Examiner, Journal, Memories, Pair, as_stored, gist_arm, rows_of, unanswered
from gistrag.metrics import mean
from gistrag.model import GistModel
from gistrag.quantisation import stored_bytes
from gistrag.settings import DEFAULT_EMBEDDER, DEFAULT_MODEL, AdapterSettings, KvCacheDtype
from gistrag.tasks import read_contexts, split_by_article

KINDS: tuple[KvCacheDtype, ...] = ("auto", "int8", "int4")
RATES = (2, 4, 8, 16)
TOGETHER = 10
"""Questions that are asked of every kind before the next ones, so that a run that was stopped can be compared."""


class Stored(Memories):
    """Memories of gists that are kept as they are and given as a file of another kind would give them."""

    def __init__(self, model: GistModel, kind: KvCacheDtype, folder: Path) -> None:
        super().__init__(model, folder=folder)
        self._kind = kind

    def caches(self, pairs: Sequence[Pair]) -> Mapping[Any, Any]:
        """Return the caches that the pairs need."""
        return {one: as_stored(cache, self._kind) for one, cache in super().caches(pairs).items()}


def main() -> None:
    """Ask, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--rates", default="2,4")
    parser.add_argument("--adapter", default="auto")
    parser.add_argument("--output", type=Path, default=Path("storage"))
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    base = find(DEFAULT_MODEL).path
    adapter = find_adapter(given.adapter, base)
    placement = AdapterSettings.read(adapter).index_placement if adapter else "selected"
    model, embedder = GistModel.load(base, adapter=adapter), Embedder(find(DEFAULT_EMBEDDER).path)
    nothing = {"probes": 0, "unanswerable": 0, "passkey": 0, "orders": 0, "whole": 0}
    plan = Plan(questions=given.questions, top_k=(3,), oracle=False, **nothing)
    contexts = split_by_article(read_contexts(given.file)[0])[1]
    (given.output / "gists").mkdir(parents=True, exist_ok=True)
    with (
        indexed(
            given.output / "corpus",
            with_probes(contexts, plan),
            embedder,
            tokenizer=model.text_tokenizer,
            chunk_tokens=256,
        ) as corpus,
        Journal(given.output / "rows.jsonl") as journal,
    ):
        asked = cases(corpus, [], plan, document_tokens=1)
        rates = [int(rate) for rate in given.rates.split(",")]
        arms = {kind: [named(gist_arm(placement, rate), kind) for rate in rates] for kind in KINDS}
        for start, kind in product(range(0, len(asked), TOGETHER), KINDS):
            pairs = [(case, arm) for case in asked[start : start + TOGETHER] for arm in arms[kind]]
            examiner = Examiner(model, group_bytes=1 << 26)
            examiner._memories = Stored(model, kind, given.output / "gists")
            for row in examiner.rows(unanswered(pairs, journal)):
                journal.add(row)
            logging.info("%s: %d of %d questions", kind, min(start + TOGETHER, len(asked)), len(asked))
        everything = [(case, arm) for case in asked for listed in arms.values() for arm in listed]
        found = figures(rows_of(everything, journal))
        lengths = [len(model.encode_passage(one.text, one.heading)) for one in corpus.chunks.values()]
    sizes = {kind: bytes_per_token(model, kind, lengths, per_head=placement == "selected") for kind in KINDS}
    for arm, values in found.items():
        print(f"{arm:<12} F1 {values['f1']}   less than as they are {values['lost']}")
    for kind, by_rate in sizes.items():
        print(f"{kind:<6}", "  ".join(f"{rate}: {size:,.0f} B/token" for rate, size in by_rate.items()))
    print(json.dumps({"questions": len(asked), "figures": found, "bytes_per_source_token": sizes}, default=vars))


def named(arm: Arm, kind: str) -> Arm:
    """Return an arm under a name that tells the kind of its files."""
    return Arm(f"{arm.name} {kind}", arm.give, arm.placement, arm.tokens_per_gist)


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return F1 and EM of each arm, and what F1 loses to the same gists as they are."""
    by_arm: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["name"]] = row
    found = {}
    for arm, answers in by_arm.items():
        exact = by_arm[f"{arm.rpartition(' ')[0]} auto"]
        both = [(row, exact[name]) for name, row in answers.items() if name in exact]
        found[arm] = {
            "f1": mean([row["f1"] for row, _ in both]),
            "em": mean([row["em"] for row, _ in both]),
            "lost": mean([other["f1"] - row["f1"] for row, other in both]),
            "same_words": statistics.mean(row["said"] == other["said"] for row, other in both),
        }
    return found


def bytes_per_token(
    model: GistModel, kind: KvCacheDtype, lengths: Sequence[int], *, per_head: bool
) -> dict[int, float]:
    """Return what the chunks of the corpus would take in files of a kind, positions counted and headers not."""
    heads = model.layers * model.kv_heads if per_head else 1
    sizes = {}
    for rate in RATES:
        total = 0
        for length in lengths:
            count = gist_count(length, rate)
            shape = (model.layers, 2, model.kv_heads, count, model.head_dim)
            total += stored_bytes(shape, kind, itemsize=model.dtype.itemsize) + 2 * heads * count
        sizes[rate] = total / sum(lengths)
    return sizes


if __name__ == "__main__":
    main()
