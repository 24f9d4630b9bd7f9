"""Train the adapter that comes with gistrag on, with long answers and more to refuse, and decide whether it is better.

    setsid nohup python notebooks/bench/retrain.py squad.jsonl.gz --long clapnq-answerable.jsonl.gz \
        --long clapnq-unanswerable.jsonl.gz --work retrain/ --minutes 240 > retrain.log 2>&1 < /dev/null &

The run continues from the shipped adapter with the recipe ``continue`` at a low learning rate, which has decayed when
the minutes are over; checkpoints are two minutes apart at most, and the same command resumes. Then both adapters answer
development questions about held-out articles: others than the thousand with which the card's tables are made, and the
held-out half of CLAP-NQ. ``decision.json`` says which adapter to ship: the new one if, from gists of 4 tokens and from
text, it loses no more than half a point of F1, and gains in ROUGE-L of long answers or in refusals. After it is copied
into ``gistrag/adapters/``, ``calibrate.py`` fits its confidence anew, and ``results.py`` and ``believable.py`` measure.

Lists and summaries come from ``gistrag synthesize squad.jsonl.gz -o lists.jsonl --kinds list,summary --training-only``;
pass the file with ``--long`` too.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gistrag.evaluation import evaluate as evaluation
from gistrag.evaluation.cases import Plan, is_plain, sampled
from gistrag.evaluation.evaluate import Evaluation
from gistrag.evaluation.report import Figures
from gistrag.model.gist_model import GistModel
from gistrag.model.hub import find, find_adapter
from gistrag.qa.dataset import Context, gathered, read_contexts, split_by_article, write_contexts
from gistrag.settings import DEFAULT_EMBEDDER, DEFAULT_MODEL, HELD_OUT
from gistrag.training import session

CARD_QUESTIONS = 1000
"""Questions of seed 0 that the card's tables are made of; development questions are others."""
LOST_AT_MOST = 0.005
ARMS = ("text", "gist 4")
"""Readings that decide."""


def main() -> None:
    """Train, evaluate both adapters, and write the decision."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    given = arguments()
    files = [given.squad, *given.long]
    train(given, files)
    development = given.work / "development.jsonl"
    if not development.exists():
        write_contexts(development, development_contexts(given.squad, given.long, given.contexts))
    shipped = evaluated(given, development, "auto", given.work / "shipped")
    new = evaluated(given, development, str(given.work / "run" / "adapter"), given.work / "new")
    decision = decided(shipped, new)
    (given.work / "decision.json").write_text(json.dumps(decision, indent=1) + "\n", "utf-8")
    print(json.dumps(decision))


def arguments() -> argparse.Namespace:
    """Return what is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("squad", type=Path, help="SQuAD v1.1 train, a paragraph a line")
    parser.add_argument("--long", type=Path, action="append", default=[], help="CLAP-NQ, or lists and summaries")
    parser.add_argument("--work", type=Path, default=Path("retrain"))
    parser.add_argument("--minutes", type=float, default=240.0, help="of training")
    parser.add_argument("--recipe", default="continue", help="name, or a recipe.json")
    parser.add_argument("--questions", type=int, default=300, help="development questions with short answers")
    parser.add_argument("--long-questions", type=int, default=100, help="development questions with long answers")
    parser.add_argument("--contexts", type=int, default=2000, help="most contexts that are searched")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    return parser.parse_args()


def train(given: argparse.Namespace, files: list[Path]) -> None:
    """Continue from the shipped adapter until the minutes are over."""
    path = find(DEFAULT_MODEL).path
    model = GistModel.load(path, adapter=find_adapter("auto", path), device=given.device)
    recipe = replace(session.find_recipe(given.recipe), minutes=given.minutes, seed=given.seed)
    if model.device.type == "cuda":
        recipe = replace(recipe, batches=2, rows_together=32)
    recipe = session.with_adapter(model, recipe, held_out=HELD_OUT)
    learned, held = session.split(session.contexts_of(files), HELD_OUT)
    made_with = session.made_with(files, quantize="none", held_out=HELD_OUT)
    run = session.begun(model, learned, held, recipe, given.work / "run", made_with)
    if not run.is_over:
        session.trained(run, tell=logging.getLogger("gistrag").info)


def development_contexts(squad: Path, long: Sequence[Path], most: int) -> list[Context]:
    """Return held-out contexts: of SQuAD about *most*, without the card's questions, and all with marked evidence."""
    held = split_by_article(gathered(read_contexts(squad)[0]))[1]
    known = {(held[number].text, task) for number, task in sampled(held, CARD_QUESTIONS, 0, is_plain)}
    rest = [
        replace(context, tasks=tuple(task for task in context.tasks if (context.text, task) not in known))
        for context in held
    ]
    chosen = [context for context in rest if context.tasks][:: max(1, len(rest) // most)]
    others = session.contexts_of(long) if long else []
    marked = [one for one in split_by_article(others)[1] if any(task.evidence for task in one.tasks)]
    return [*chosen, *marked]


def evaluated(given: argparse.Namespace, file: Path, adapter: str, output: Path) -> Figures:
    """Return the summary of an adapter on the development questions."""
    about: dict[str, Any] = {"model": DEFAULT_MODEL, "adapter": adapter, "embedder": DEFAULT_EMBEDDER}
    settings, engine = evaluation.load(about, device=given.device)
    plan = Plan.of_suite("quick", questions=given.questions, seed=1, long=given.long_questions, whole=0)
    asked = Evaluation(file=file, output=output, plan=plan, arm_names=("text", "gist"), rates=(2, 4, 8, 16))
    return asked.run(evaluation.read(file), settings, engine)


def decided(shipped: Figures, new: Figures) -> dict[str, Any]:
    """Return which adapter to ship, and the figures that say so.

    >>> one = {"parts": {part: {arm: {"f1": {"value": 0.5}, "rouge_l": {"value": 0.2}, "refused": {"value": 0.4}}
    ...        for arm in ARMS} for part in ("questions", "long", "refusal")}}
    >>> decided(one, one)["ship"]
    'shipped'
    """
    asked = (("f1", "questions", "f1"), ("rouge_l", "long", "rouge_l"), ("refused", "refusal", "refused"))
    figures = {
        name: {arm: [float(one["parts"][part][arm][figure]["value"]) for one in (shipped, new)] for arm in ARMS}
        for name, part, figure in asked
    }
    loses = any(after < before - LOST_AT_MOST for before, after in figures["f1"].values())
    gains = any(after > before for name in ("rouge_l", "refused") for before, after in figures[name].values())
    return {"ship": "new" if gains and not loses else "shipped", "figures": figures, "order": ["shipped", "new"]}


if __name__ == "__main__":
    main()
