"""How fast gists are made, as a share of the rate of reading, and what the ways of making them answer.

    python notebooks/bench/making.py squad.jsonl.gz --articles 44 > making.json
    ATEN_CPU_CAPABILITY=avx2 python notebooks/bench/making.py squad.jsonl.gz

For every version of matched gists (`gistrag.compression.making.MAKINGS`) and every compression rate: tokens a second,
and their share of those of one forward pass over the same chunks, interleaved in one run. With ``--articles``: F1 of
questions about as many held-out articles, each answered from the gists of three paragraphs in int8, and the F1 that the
newest version gains on the others, question by question, with its 95 % bootstrap interval. JSON on standard output.

This script uses internal modules of gistrag, which change without notice.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gistrag.answering.assemble import assemble
from gistrag.compression.compress import compress
from gistrag.compression.making import MAKINGS
from gistrag.evaluation.speed import machine, medians
from gistrag.kv.cache import as_stored
from gistrag.model.generation import generate_batch
from gistrag.model.gist_model import GistModel
from gistrag.model.hub import find, find_adapter
from gistrag.qa.dataset import Context, read_contexts, split_by_article
from gistrag.qa.metrics import f1, mean
from gistrag.settings import DEFAULT_MODEL, GistSettings

CHUNKS, CHUNK_TOKENS = 8, 256
PARAGRAPHS, QUESTIONS = 3, 2
"""Paragraphs of an article, and questions about each."""
NEW_TOKENS = 24

Figures = dict[str, Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--articles", type=int, default=0)
    parser.add_argument("--rates", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    path = find(DEFAULT_MODEL).path
    model = GistModel.load(path, adapter=find_adapter("auto", path))
    _, held_out = split_by_article(read_contexts(given.file)[0])
    ways = {f"making {version}, {rate} tokens per gist": GistSettings(tokens_per_gist=rate, making=version)
            for rate in given.rates for version in MAKINGS["matched"]}  # fmt: skip
    figures: Figures = {
        "machine": {**machine(model), "simd": torch.backends.cpu.get_cpu_capability()},
        "speed": speed(model, held_out, ways, given.repeats),
    }
    if given.articles:
        figures["quality"] = quality(model, held_out, ways, given.articles)
    print(json.dumps(figures, indent=1))


# Speed


def speed(model: GistModel, contexts: Sequence[Context], ways: dict[str, GistSettings], repeats: int) -> Figures:
    """Return medians of tokens a second of reading and of every way of making gists, and its share of reading."""
    text = model.encode("\n\n".join(context.text for context in contexts[: 4 * CHUNKS]))
    chunks = [text[begin : begin + CHUNK_TOKENS] for begin in range(0, CHUNKS * CHUNK_TOKENS, CHUNK_TOKENS)]
    work: dict[str, Callable[[], object]] = {"reading": lambda: _read(model, chunks)}
    for name, settings in ways.items():
        work[name] = lambda settings=settings: compress(model, chunks, settings)  # type: ignore[misc]
    samples = []
    for _ in range(repeats + 1):
        taken = {}
        for name, run in work.items():
            started_s = time.perf_counter()
            run()
            taken[name] = CHUNKS * CHUNK_TOKENS / (time.perf_counter() - started_s)
        samples.append(taken)
    rates = medians(samples[1:])  # the first is to warm up
    shares = {name: rate / rates["reading"] for name, rate in rates.items() if name != "reading"}
    return {"chunks": [len(chunk) for chunk in chunks], "tokens_per_s": rates, "share_of_reading": shares}


def _read(model: GistModel, chunks: Sequence[Sequence[int]]) -> None:
    """Run one forward pass over the chunks, up to the logits of their last tokens."""
    hidden = model.read(batch=len(chunks)).feed(torch.tensor(chunks), positions=torch.arange(CHUNK_TOKENS))
    model.logits(hidden[:, -1])


# Quality


def quality(model: GistModel, contexts: Sequence[Context], ways: dict[str, GistSettings], articles: int) -> Figures:
    """Return F1 of every way, and what the newest version gains on each other of the same rate."""
    scores: dict[str, list[float]] = {name: [] for name in ways}
    for paragraphs in chosen(contexts, articles):
        chunks = [model.encode_passage(context.text, context.heading) for context in paragraphs]
        tasks = [task for context in paragraphs for task in context.tasks[:QUESTIONS]]
        for name, settings in ways.items():
            caches = [as_stored(cache, "int8") for cache in compress(model, chunks, settings)]
            memory = assemble(model, caches)
            prompts = [model.encode_question(task.question) for task in tasks]
            answers = generate_batch(model, [memory] * len(prompts), prompts, max_new_tokens=NEW_TOKENS)
            scores[name] += [f1(model.decode(ids).strip(), task.answers)
                             for ids, task in zip(answers, tasks, strict=True)]  # fmt: skip
        print(f"{len(next(iter(scores.values())))} questions", file=sys.stderr)
    newest = {settings.tokens_per_gist: name for name, settings in reversed(ways.items())}
    gains = {
        name: vars(
            mean([new - old for new, old in zip(scores[newest[way.tokens_per_gist]], scores[name], strict=True)])
        )
        for name, way in ways.items()
        if name != newest[way.tokens_per_gist]
    }
    return {"f1": {name: vars(mean(listed)) for name, listed in scores.items()}, "newest_gains_on": gains}


def chosen(contexts: Sequence[Context], articles: int) -> list[list[Context]]:
    """Return three paragraphs with questions of each of some articles, always the same ones."""
    of_article: dict[str, list[Context]] = {}
    for context in contexts:
        if len(context.tasks) >= QUESTIONS:
            of_article.setdefault(context.article, []).append(context)
    randomness = random.Random(0)
    usable = sorted(name for name, found in of_article.items() if len(found) >= PARAGRAPHS)
    names = randomness.sample(usable, min(articles, len(usable)))
    return [randomness.sample(of_article[name], PARAGRAPHS) for name in names]


if __name__ == "__main__":
    main()
