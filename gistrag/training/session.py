"""A training run from files and settings: what `gistrag train` and `gistrag adapt` have in common.

::

    files ─ contexts_of, split ─→ contexts to learn from, contexts held out
    base model ─ with_adapter ─→ model and recipe ─ begun ─→ Run ─ figures ─→ what a step logged
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gistrag.errors import UsageError
from gistrag.model.gist_model import GistModel
from gistrag.model.hashing import file_sha256
from gistrag.progress import megabytes
from gistrag.qa.dataset import Context, gathered, read_contexts, split_by_article, unsupported
from gistrag.training.checkpoints import Run, draw
from gistrag.training.recipe import RECIPES, Recipe
from gistrag.training.rivals import rivals
from gistrag.training.sampler import Batch, Sampler
from gistrag.training.trainer import Trainer

logger = logging.getLogger("gistrag")

VALIDATION_BATCHES = 3
VALIDATION_CONTEXTS = 200


def find_recipe(name: str) -> Recipe:
    """Return the recipe of a name or file.

    Raises:
        UsageError: neither is there.
    """
    if name in RECIPES:
        return RECIPES[name]
    if not Path(name).is_file():
        raise UsageError(f"no recipe {name!r}: expected one of {', '.join(RECIPES)}, or a recipe.json of a run")
    return Recipe.from_json(Path(name).read_text("utf-8"))


def contexts_of(paths: Sequence[Path]) -> list[Context]:
    """Return the contexts of all files, and log how many lines were skipped.

    Raises:
        UsageError: a file cannot be read, or holds no usable line.
    """
    contexts: list[Context] = []
    for path in paths:
        found, dropped = read_contexts(path)
        contexts += found
        if dropped:
            logger.info(
                "skipped %s lines of %s: not JSON, or without context, question or answer", f"{dropped:,}", path
            )
    if count := unsupported(contexts):
        logger.info("%s answers are not in their context; they are used all the same", f"{count:,}")
    return gathered(contexts)


def split(contexts: Sequence[Context], held_out: float) -> tuple[list[Context], list[Context]]:
    """Return the contexts to learn from and those held out, and log their numbers."""
    learned, held = split_by_article(contexts, held_out=held_out)
    questions = sum(len(context.tasks) for context in learned)
    logger.info(
        "%s questions about %s contexts, %s contexts held out", f"{questions:,}", f"{len(learned):,}", f"{len(held):,}"
    )
    return learned, held


def fitting_share(contexts: Sequence[Context], share: float) -> float:
    """Return *share*, or the first of its doubles that holds an article out and leaves one; 0 where none does.

    >>> fitting_share([Context("…", f"article {n}") for n in range(100)], 0.1)
    0.1
    >>> fitting_share([Context("…", f"article {n}") for n in (3, 4, 5)], 0.1), fitting_share([Context("…", "a")], 0.1)
    (0.4, 0.0)
    """
    while share < 1:
        if all(split_by_article(contexts, held_out=share)):
            return share
        share *= 2
    return 0.0


def with_adapter(model: GistModel, recipe: Recipe, *, held_out: float, rank: int | None = None) -> Recipe:
    """Give a model a new adapter for a recipe, or get the one it has ready for it, and return the recipe with its rank.

    Args:
        model: loaded; changed in place.
        held_out: share of the articles that it will not see. One that was trained before keeps the smaller share.
        rank: that the caller asked for, None for any.

    Raises:
        UsageError: the adapter that is there has another rank, or no learned gists.
    """
    settings: dict[str, Any] = {
        "placement": recipe.placement,
        "index_placement": recipe.placement,
        "rates": tuple(sorted(recipe.mixture.rates)),
        "held_out": held_out,
    }
    if (adapter := model.adapter) is None:
        gists = -(-recipe.mixture.chunk_tokens // min(recipe.mixture.rates))
        model.new_adapter(
            rank=recipe.rank, gists=gists, seed=recipe.seed, recipe=json.loads(recipe.to_json()), **settings
        )
        return recipe
    if rank not in (None, adapter.rank):
        raise UsageError(f"{adapter.folder} has rank {adapter.rank}, but --rank {rank} was requested; leave --rank out")
    if (recipe.placement == "learned") != (adapter.settings.placement == "learned"):
        raise UsageError(
            f"{adapter.folder} has no learned gists; start with --adapter none, or name another --placement"
        )
    recipe = replace(recipe, rank=adapter.rank)
    settings |= {"recipe": json.loads(recipe.to_json()), "held_out": min(adapter.settings.held_out, held_out)}
    adapter.settings = replace(adapter.settings, **settings)
    return recipe


def made_with(paths: Sequence[Path], *, quantize: str, held_out: float) -> dict[str, str]:
    """Return what decides the result of a run besides its recipe, its base model and its first adapter."""
    data = " ".join(file_sha256(path)[:16] for path in paths)
    return {"quantize": quantize, "held_out": f"{held_out:g}", "data": data}


def begun(
    model: GistModel,
    learned: Sequence[Context],
    held: Sequence[Context],
    recipe: Recipe,
    output: Path,
    made_with: Mapping[str, str],
) -> Run:
    """Return the run in a folder, at its last checkpoint if it has one.

    Args:
        model: as from `with_adapter`.
        learned, held: as from `split`.

    Raises:
        UsageError: nothing to learn from, or the folder holds another run.
    """
    if not learned:
        raise UsageError("expected contexts to learn from, but all were held out; lower --held-out")
    sampler = Sampler(model, _with_rivals(learned, recipe), recipe.mixture, seed=recipe.seed)
    start = model.adapter.identity if model.adapter else ""
    made = {**made_with, "base": model.weights, "adapter": start or "none"}
    return Run(output, Trainer(model, sampler, recipe), _validation(model, held, recipe), made)


def _with_rivals(learned: Sequence[Context], recipe: Recipe) -> list[Context]:
    """Return the contexts, and where the recipe has a share for them, questions beside passages to be refused."""
    return [*learned, *(rivals(learned, seed=recipe.seed) if recipe.mixture.unanswerable else ())]


def _validation(model: GistModel, held: Sequence[Context], recipe: Recipe) -> dict[str, list[Batch]]:
    """Return a few batches of held-out contexts, as text and as gists of each rate; they are always the same."""
    if not held:
        return {}
    few = random.Random(0).sample(held, min(len(held), VALIDATION_CONTEXTS))
    plain = replace(recipe.mixture, chunks=(0.0, 0.0, 1.0), without_gold=0.0, planted=0.0, as_text=0.0)
    made = {}
    for name, mixture in (
        ("text", replace(plain, as_text=1.0)),
        *((f"gists at {rate}", replace(plain, rates={rate: 1.0})) for rate in sorted(recipe.mixture.rates)),
    ):
        sampler = Sampler(model, few, mixture, seed=1, is_varied=False)
        made[name] = [sampler.batch(step) for step in range(min(VALIDATION_BATCHES, sampler.steps_per_epoch))]
    return made


Told = Callable[[str], None]


def trained(run: Run, *, minutes: float | None = None, tell: Told, save_every_s: float = 120.0) -> dict[str, Any]:
    """Train until the recipe ends or the time is up, and return the figures of this part of the run.

    Args:
        minutes: of this part; None for all that the recipe has.
        tell: gets a line every ten steps.
        save_every_s: seconds between checkpoints.
    """
    began_s = time.monotonic()
    record: dict[str, Any] = {}
    tokens = 0

    def is_over() -> bool:
        return minutes is not None and time.monotonic() - began_s >= 60 * minutes

    for count, record in enumerate(run.steps(stop=is_over, save_every_s=save_every_s), 1):
        tokens += record["tokens"]
        if not run.is_main:
            continue
        if count == 1 and (peak := run.gpu_peak_bytes()) is not None:
            logger.info("the first step used at most %s of GPU memory", megabytes(peak))
        if count % 10 == 0 or "event" in record or "validation text" in record:
            tell(_line(record, run, tokens / (time.monotonic() - began_s)))
    if run.is_main:
        draw(run.folder)
    took_s = time.monotonic() - began_s
    held_out = {name: value for name, value in record.items() if name.startswith("validation ")}
    return {"step": run.step, "steps": run.total_steps, "seconds": round(took_s, 1),
            "tokens_per_s": round(tokens / max(took_s, 1e-9), 1), "gpu_peak_bytes": run.gpu_peak_bytes(),
            **held_out}  # fmt: skip


def _line(record: dict[str, Any], run: Run, tokens_per_s: float) -> str:
    """Return the line that people see of a step."""
    left_s = (run.total_steps - record["step"]) * record["tokens"] / tokens_per_s
    if (of_budget_s := run.seconds_left()) is not None:
        left_s = min(left_s, of_budget_s)
    line = (
        f"step {record['step']:,} of {run.total_steps:,}: loss {record['answer']:.2f}, {tokens_per_s:,.0f} tokens/s, "
    )
    held_out = [f"{name} {value:.2f}" for name, value in record.items() if name.startswith("validation ")]
    return line + "; ".join([f"{left_s / 60:,.0f} min left", *held_out, *filter(None, [record.get("event")])])


def steps_of(tokens: int, model: GistModel, learned: Sequence[Context], recipe: Recipe) -> int:
    """Return after how many steps a run has learned from about so many tokens of text, questions and answers."""
    sampler = Sampler(model, learned, recipe.mixture, seed=recipe.seed)
    drawn = [sampler.batch(number).tokens for number in range(min(_SAMPLED, sampler.steps_per_epoch))]
    return max(1, round(tokens * len(drawn) / (sum(drawn) * recipe.batches)))


_SAMPLED = 8
"""Batches that tell how many tokens a step has."""
