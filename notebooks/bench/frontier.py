"""What text and gists answer when both may fill the same number of cache slots.

    python notebooks/bench/frontier.py squad.jsonl.gz --output evaluation/frontier

Slots are what an answer costs in memory and in attention, whatever they stand for. Of the chunks in the order of
retrieval, every arm gets as many as fit its budget, so gists of four tokens bring four times as many chunks as text::

    budget 512    text     chunk 1  chunk 2  chunk 3
                  gist 4   chunk 1  chunk 2  chunk 3  …  chunk 12

The best chunk stands last, as in the product. Where not even that one fits, its beginning is given. Prefix, question
and answer come on top of the budget. The output folder is like that of `gistrag evaluate`, and a stopped run resumes.

This script uses internal modules of gistrag, which change without notice.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

from gistrag.compression.making import gist_count
from gistrag.evaluation import evaluate, provenance
from gistrag.evaluation.arms import Arm, Caches, MemoryCache, Pair, Row, Setting, arms
from gistrag.evaluation.cases import Case, Plan, main_questions
from gistrag.evaluation.corpus import Corpus, Passage, indexed
from gistrag.evaluation.report import REFERENCE, timed
from gistrag.evaluation.runner import Journal, Runner, answered, passage_id, unanswered
from gistrag.evaluation.speed import Stopwatch
from gistrag.kv import gist_file
from gistrag.kv.cache import GistCache
from gistrag.model.gist_model import GistModel
from gistrag.qa.metrics import contains, mean
from gistrag.settings import DEFAULT_EMBEDDER, DEFAULT_MODEL
from gistrag.storage import files

BUDGETS = (128, 256, 512, 1024, 2048)
RATES = (2, 4, 8, 16)
TIMED_QUESTIONS = 3

Figures = dict[str, Any]


def main() -> None:
    """Evaluate what is not evaluated yet, and write ``summary.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, default=Path("evaluation/frontier"))
    parser.add_argument("--questions", type=int, default=100)
    given = parser.parse_args()

    plan = Plan.of_suite("quick", questions=given.questions, repeats=1)
    settings, engine = evaluate.load(
        {"model": DEFAULT_MODEL, "adapter": "auto", "embedder": DEFAULT_EMBEDDER, "kv_cache_dtype": "auto"}
    )
    model = engine.model
    contexts = evaluate.held_out(evaluate.read(given.file), model, given.file)
    made_with = provenance.made_with(given.file, plan, settings, engine, is_held_out=True)
    provenance.prepare(given.output, made_with)
    chosen = arms(("text", "gist"), rates=RATES, placement=settings.placement, main_rate=1, has_adapter=False)
    tokenizer, corpus_folder = model.text_tokenizer, given.output / "corpus"
    with indexed(
        corpus_folder, contexts, engine.embedder, tokenizer=tokenizer, chunk_tokens=settings.chunk_tokens
    ) as corpus:
        pairs = frontier(corpus, plan, model, chosen, BUDGETS)
    gists = given.output / "gists"
    files.make_folder(gists)
    with Journal(given.output / "rows.jsonl") as journal:
        for row in Runner(MemoriesOnDisk(model, gists)).rows(unanswered(pairs, journal)):
            journal.add(row)
        rows = answered(pairs, journal)
    shutil.rmtree(gists)
    figures = frontier_figures(rows, list(timings(model, pairs, repeats=plan.repeats)))
    summary = json.dumps({"made_with": made_with, "frontier": figures}, indent=1, ensure_ascii=False)
    (given.output / "summary.json").write_text(summary + "\n", "utf-8")


# What is asked


def frontier(corpus: Corpus, plan: Plan, model: GistModel, arms: Sequence[Arm], budgets: Sequence[int]) -> list[Pair]:
    """Return what every arm is asked at every budget, the pairs of a question together.

    Args:
        arms: that give passages as text or as gists.
        budgets: slots for passages.
    """
    shares = Shares(model)
    pairs: list[Pair] = []
    for name, number, task in main_questions(corpus, plan):
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
    """Return the longest beginning of a passage that takes at most *tokens* tokens in a prompt, at least one token."""
    offsets = model.text_tokenizer.encode(passage.text, add_special_tokens=False).offsets
    count = len(offsets)
    while count > 1 and (over := len(model.encode_passage(passage.text, passage.heading)) - tokens) > 0:
        count = max(1, count - over)
        passage = replace(passage, text=passage.text[: offsets[count - 1][1]], tokens=count)
    return passage


# Answering


class MemoriesOnDisk(MemoryCache):
    """Keeps every cache in a folder, because many questions need the same chunks and making gists takes longest."""

    def __init__(self, model: GistModel, folder: Path) -> None:
        super().__init__(model)
        self._folder = folder

    def made(self, wanted: Sequence[tuple[Passage, Setting]]) -> Caches:
        """Return the caches from the folder, after making those that are missing."""
        for one, cache in super().made([one for one in wanted if not self._path(*one).exists()]).items():
            files.write_atomic(self._path(*one), gist_file.encode(cache, key="", fingerprint="", kv_cache_dtype="auto"))
        return {one: self._read(self._path(*one)) for one in wanted}

    def _read(self, path: Path) -> Any:
        return GistCache.unpacked(gist_file.decode(path.read_bytes(), path, key="", fingerprint=""))

    def _path(self, passage: Passage, setting: Setting) -> Path:
        return self._folder / f"{passage_id(passage)}-{setting[0]}-{setting[1]}.safetensors"


def timings(model: GistModel, pairs: Sequence[Pair], *, repeats: int) -> Iterator[Row]:
    """Yield interleaved measurements of the arms of a few questions at every budget."""
    few = [pair for pair in pairs if int(pair[0].name) < TIMED_QUESTIONS]
    with Stopwatch(model) as stopwatch:
        for (budget, _), listed in groupby(few, key=lambda pair: (pair[0].about["budget"], pair[0].name)):
            yield from stopwatch.interleaved(f"{budget}", list(listed), repeats=repeats)


# Figures


def frontier_figures(rows: Iterable[Row], samples: Sequence[Row]) -> dict[str, dict[str, Figures]]:
    """Return the figures of every arm at every budget; ``f1_more`` is the gain over text, question by question."""
    by_budget: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if "left_out" not in row:
            by_budget.setdefault(f"{row['budget']}", {}).setdefault(row["arm"], {})[row["name"]] = row
    speed = timed(samples)
    return {
        budget: {
            arm: _filled(answers, arms.get(REFERENCE, {}))
            | {"ttft_s": speed.get(budget, {}).get(arm, {}).get("ttft_s")}
            for arm, answers in arms.items()
        }
        for budget, arms in by_budget.items()
    }


def _filled(answers: Mapping[str, Row], reference: Mapping[str, Row]) -> Figures:
    """Return the quality of an arm, and what stands in its slots."""
    rows = list(answers.values())
    shares = {name: _mean(row[name] for row in rows) for name in ("em", "f1", "contains", "has_gold")}
    more = _mean(row["f1"] - reference[name]["f1"] for name, row in answers.items() if name in reference)
    held = {name: statistics.mean(row[name] for row in rows) for name in ("chunks", "slots", "source_tokens")}
    return {"count": len(rows), **shares, "f1_more": more, **held}


def _mean(values: Iterable[float]) -> Figures | None:
    found = mean([float(value) for value in values])
    return vars(found) if found else None


if __name__ == "__main__":
    main()
