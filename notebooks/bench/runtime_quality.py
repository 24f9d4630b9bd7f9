"""What the CPU runtime costs in quality: the same questions, the same index, answered by each runtime.

    python notebooks/bench/runtime_quality.py squad.jsonl.gz --folder scratch --output runtime_quality.json

The documents are articles that the shipped adapter was not trained on. `torch` is the reference; `cpu` has the 8-bit
weights that it ships with, `cpu float32` the same graph with the weights as they are. Where torch computes in 16 bits
(AVX-512), set ATEN_CPU_CAPABILITY=avx2, so that it computes in float32 too.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gistrag import Engine, GistRAG
from gistrag.model.cpu_conversion import open_cpu_runtime
from gistrag.model.hub import find, find_adapter
from gistrag.qa.dataset import Context, read_contexts, split_by_article
from gistrag.qa.metrics import exact_match, f1
from gistrag.settings import IndexSettings, Mode

RUNTIMES = ("torch", "cpu", "cpu float32")
MODES: tuple[Mode, ...] = ("gist", "text")


def write_articles(contexts: Sequence[Context], folder: Path, articles: int) -> list[Context]:
    """Write some articles as text files, and return their paragraphs."""
    titles = sorted({context.article for context in contexts})[:articles]
    chosen = [context for context in contexts if context.article in titles]
    folder.mkdir(parents=True, exist_ok=True)
    for number, title in enumerate(titles):
        text = "\n\n".join(context.text for context in chosen if context.article == title)
        (folder / f"{number:02}.txt").write_text(text, "utf-8")
    return chosen


def asked(contexts: Sequence[Context], count: int) -> list[tuple[str, list[str]]]:
    """Return questions drawn from the paragraphs, with their right answers."""
    tasks = [(task.question, list(task.answers)) for context in contexts for task in context.tasks if task.answers]
    return random.Random(0).sample(tasks, min(count, len(tasks)))


def engine_of(name: str, settings: IndexSettings, embedder: Any) -> Engine:
    """Return an engine that answers with one of `RUNTIMES`."""
    if name == "cpu float32":
        model = find(settings.model).path
        return Engine(open_cpu_runtime(model, find_adapter(settings.adapter, model), weights="float32"), embedder)
    return Engine.load(settings, device="cpu", runtime="torch" if name == "torch" else "cpu")


def answers(index: Path, engine: Engine, questions: Sequence[str], mode: Mode) -> Iterator[str]:
    """Yield the answer to each question."""
    with GistRAG.open(index, engine=engine) as rag:
        for question in questions:
            yield rag.query(question, mode=mode, max_new_tokens=32).text


def interval(differences: Sequence[float]) -> list[float]:
    """Return the 95 % bootstrap interval of a mean, in points."""
    values, randomness = np.array(differences), np.random.default_rng(0)
    means = randomness.choice(values, (2000, len(values))).mean(axis=1)
    return [round(100 * float(bound), 2) for bound in np.quantile(means, (0.025, 0.975))]


def main() -> None:
    """Build, ask, compare, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder of documents, index and answers")
    parser.add_argument("--articles", type=int, default=6)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    contexts, _ = read_contexts(given.file)
    chosen = write_articles(split_by_article(contexts)[1], given.folder / "docs", given.articles)
    pairs = asked(chosen, given.questions)
    rag = GistRAG.from_folder(given.folder / "docs", index=given.folder / "index", device="cpu")
    settings, embedder = rag.store.settings, rag.engine.embedder
    rag.close()
    summary: dict[str, Any] = {"questions": len(pairs), "articles": given.articles, "top_k": 3, "modes": {}}
    for mode in given.modes:
        found = {}
        for name in RUNTIMES:
            engine = engine_of(name, settings, embedder)
            found[name] = list(answers(given.folder / "index", engine, [question for question, _ in pairs], mode))
        summary["modes"][mode] = compared(found, [right for _, right in pairs])
        print(json.dumps(summary["modes"][mode], indent=1), flush=True)
    if given.output:
        given.output.write_text(json.dumps(summary, indent=1) + "\n", "utf-8")


def compared(found: dict[str, list[str]], right: Sequence[list[str]]) -> dict[str, Any]:
    """Return scores of each runtime, and what it shares with torch."""
    scores = {name: [f1(text, gold) for text, gold in zip(texts, right, strict=True)] for name, texts in found.items()}
    return {
        name: {
            "f1": round(100 * float(np.mean(scores[name])), 2),
            "em": round(100 * float(np.mean([exact_match(*pair) for pair in zip(texts, right, strict=True)])), 2),
            "same_as_torch": round(
                100 * float(np.mean([a == b for a, b in zip(texts, found["torch"], strict=True)])), 2
            ),
            "f1_minus_torch": interval([a - b for a, b in zip(scores[name], scores["torch"], strict=True)]),
        }
        for name, texts in found.items()
    }


if __name__ == "__main__":
    main()
