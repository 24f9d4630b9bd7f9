"""What a base model reads without an adapter: text, uncompressed caches, and gists of 2 and 4 tokens.

    python notebooks/bench/untrained.py squad.jsonl.gz --output untrained.json

English: questions about articles that no adapter of this project was trained on, each with its paragraph and two
others of the article. Korean: the written questions of ``tests/data/believable``, each with the section that answers
it and two others. The right passage stands at a place that differs from question to question. The prompt is the
product's, without worked examples; gists are made by torch and kept as they are, and the CPU runtime answers with
8-bit weights. Figures are written after every group of passages, so that a run that is stopped has some.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gistrag.answering.assemble import Content, assemble, fitting_layout
from gistrag.compression.placements import TextPass
from gistrag.model.cpu_conversion import open_cpu_runtime
from gistrag.model.cpu_runtime import CpuRuntime
from gistrag.model.generation import generate
from gistrag.model.gist_model import GistModel
from gistrag.model.hub import find
from gistrag.qa.dataset import read_contexts, split_by_article
from gistrag.qa.metrics import contains, exact_match, f1, mean

ARMS = {"text": None, "full caches": 1, "gists of 2": 2, "gists of 4": 4}
BELIEVABLE = Path(__file__).parents[2] / "tests" / "data" / "believable"
NEW_TOKENS = 32


@dataclass(frozen=True)
class Group:
    """Passages, and questions about one of them with their answers."""

    language: str
    passages: list[str]
    asked: list[tuple[str, tuple[str, ...]]]


def english(path: Path, articles: int, questions: int) -> Iterator[Group]:
    """Yield a group for each of some held-out articles."""
    _, held_out = split_by_article(read_contexts(path)[0])
    titles = sorted({context.article for context in held_out})
    chance = random.Random(28)
    for title in chance.sample(titles, articles):
        mine = [context for context in held_out if context.article == title and len(context.tasks) >= questions]
        right, *others = chance.sample(mine, 3)
        asked = [(task.question, task.answers) for task in chance.sample(list(right.tasks), questions)]
        passages = [right.text, *(one.text for one in others)]
        chance.shuffle(passages)
        yield Group("English", passages, asked)


def korean() -> Iterator[Group]:
    """Yield a group for each written question in Korean."""
    chance = random.Random(28)
    for name, key in (("questions", "question"), ("dialogues", "full")):
        for line in (BELIEVABLE / f"{name}.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            if not row.get("answers") or not re.search("[가-힣]", row[key]):
                continue
            text = (BELIEVABLE / "documents" / row["document"]).read_text("utf-8")
            sections = [section.strip() for section in re.split(r"\n(?=#)", text) if len(section.split()) > 8]
            right = next((section for section in sections if row["evidence"] in section), None)
            if right:
                passages = [right, *chance.sample([one for one in sections if one != right], 2)]
                chance.shuffle(passages)
                yield Group("Korean", passages, [(row[key], tuple(row["answers"]))])


def memories(model: GistModel, passages: Sequence[str]) -> dict[str, list[Content]]:
    """Return the passages as each arm reads them."""
    ids = [model.encode_passage(passage) for passage in passages]
    text = TextPass(model, ids)
    return {arm: list(ids) if rate is None else [one.packed() for one in text.compress("matched", rate)]
            for arm, rate in ARMS.items()}  # fmt: skip


def answered(runtime: CpuRuntime, passages: Sequence[Content], question: str) -> str:
    """Return the answer to a question behind passages, in the layout that the product would choose."""
    prompt = runtime.encode_question(question)
    room = runtime.reach - runtime.prefix_slots - len(prompt) - NEW_TOKENS
    memory = assemble(runtime, passages, layout=fitting_layout(passages, room))
    return runtime.decode(list(generate(runtime, memory, prompt, max_new_tokens=NEW_TOKENS))).strip()


def main() -> None:
    """Ask every question of every model in every arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m-instruct", "gemma3-270m"])
    parser.add_argument("--articles", type=int, default=20)
    parser.add_argument("--each", type=int, default=3, help="questions an article")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    paths = {name: find(name).path for name in args.models}
    loaded = {name: (GistModel.load(path, device="cpu"), open_cpu_runtime(path, None)) for name, path in paths.items()}
    groups = [*english(args.questions, args.articles, args.each), *korean()]
    random.Random(1).shuffle(groups)  # so that a run that is stopped has asked in both languages
    rows: list[dict[str, Any]] = []
    for group in groups:
        for name, (model, runtime) in loaded.items():
            with torch.no_grad():
                arms = memories(model, group.passages)
            for question, answers in group.asked:
                for arm, passages in arms.items():
                    said = answered(runtime, passages, question)
                    rows.append({"model": name, "language": group.language, "arm": arm, "question": question,
                                 "answer": said, "f1": f1(said, answers), "exact": exact_match(said, answers),
                                 "contains": contains(said, answers)})  # fmt: skip
        args.output.write_text(
            json.dumps({"figures": figures(rows), "rows": rows}, indent=1, ensure_ascii=False) + "\n"
        )
        print(len(rows), flush=True)


def figures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean of every measure with its interval, for each model, language and arm."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["language"], row["arm"]].append(row)
    found = []
    for (name, language, arm), mine in sorted(groups.items()):
        measured: dict[str, Any] = {"model": name, "language": language, "arm": arm, "questions": len(mine)}
        for measure in ("f1", "exact", "contains"):
            estimate = mean([float(row[measure]) for row in mine])
            if estimate:
                measured[measure] = [round(100 * each, 1) for each in (estimate.value, estimate.low, estimate.high)]
        found.append(measured)
    return found


if __name__ == "__main__":
    main()
