"""`gistrag train`: questions about contexts → an adapter."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gistrag.cli.options import BaseModel, Debug, Device, Json, Quantize, Quiet
from gistrag.cli.output import loading, print_json, require_output, say
from gistrag.errors import UsageError
from gistrag.progress import megabytes
from gistrag.qa.dataset import Context, gathered, read_contexts, split_by_article, unsupported
from gistrag.settings import DEFAULT_MODEL, HELD_OUT, Placement

if TYPE_CHECKING:
    from gistrag.model.gist_model import GistModel
    from gistrag.training.checkpoints import Run
    from gistrag.training.recipe import Recipe
    from gistrag.training.sampler import Batch, Sampler

VALIDATION_BATCHES = 3


EXAMPLES = (
    "gistrag synthesize docs/ -o qa.jsonl && gistrag train qa.jsonl -o run/",
    "gistrag train squad.jsonl.gz long.jsonl -o run/ --recipe smollm2",
    "gistrag train qa.jsonl --model meta-llama/Meta-Llama-3-8B-Instruct --quantize nf4 --recipe 24gb",
    "torchrun --nproc-per-node 2 -m gistrag train qa.jsonl -o run/",
    "gistrag build docs/ --adapter run/adapter",
)


def train(
    data: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Question records or SQuAD in JSONL, also .gz.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Run folder; resumed if it exists.")
    ] = Path("run"),
    recipe: Annotated[
        str, typer.Option(metavar="NAME", help="smollm2, 24gb, or the recipe.json of a run.")
    ] = "smollm2",
    model: BaseModel = DEFAULT_MODEL,
    adapter: Annotated[
        str, typer.Option(metavar="ADAPTER", help="Adapter to start from: folder, name, auto or none.")
    ] = "none",
    quantize: Quantize = "none",
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Optimizer steps.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, metavar="M", help="Stop after M minutes; the same command resumes.")
    ] = None,
    rate: Annotated[float | None, typer.Option(metavar="LR", help="Learning rate of the adapter.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, metavar="N", help="Rank of the adapter.")] = None,
    placement: Annotated[
        Placement | None,
        typer.Option(metavar="PLACEMENT", help="Where a chunk's gists come from; default of the recipe."),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Random seed.")] = None,
    held_out: Annotated[
        float, typer.Option(min=0, max=0.9, metavar="SHARE", help="Share of the articles kept for validation.")
    ] = HELD_OUT,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Train an adapter that answers from gists.

    The base model stays as it is. A run can be interrupted at any moment: the same command resumes at its last
    checkpoint.
    """
    given: dict[str, Any] = {
        "steps": steps, "rate": rate, "rank": rank, "placement": placement, "seed": seed,
    }  # fmt: skip
    chosen = replace(find_recipe(recipe), **{name: value for name, value in given.items() if value is not None})
    learned, validation = _contexts(data, held_out)
    require_output(output)
    with loading():
        loaded, chosen = _load(model, adapter, quantize, device, chosen, rank)
    made_with = {"quantize": quantize, "held_out": f"{held_out:g}", "data": _data_sha256(data)}
    _note_held_out(loaded, held_out)
    run = _run(loaded, learned, validation, chosen, output, made_with)
    done = _train(run, minutes, as_json=as_json)
    if run.is_main:
        print_json({"output": str(output), "adapter": str(output / "adapter"), **done})
    return 0


def find_recipe(name: str) -> Recipe:
    """Return the recipe of a name or file.

    Raises:
        UsageError: neither is there.
    """
    from gistrag.training.recipe import RECIPES, Recipe

    if name in RECIPES:
        return RECIPES[name]
    if not Path(name).is_file():
        raise UsageError(f"no recipe {name!r}: expected one of {', '.join(RECIPES)}, or a recipe.json of a run")
    return Recipe.from_json(Path(name).read_text("utf-8"))


def _contexts(paths: Sequence[Path], held_out: float) -> tuple[list[Context], list[Context]]:
    """Return the contexts to learn from and those to validate with, and print how many lines were skipped."""
    contexts: list[Context] = []
    for path in paths:
        found, dropped = read_contexts(path)
        contexts += found
        if dropped:
            say(f"skipped {dropped:,} lines of {path}: not JSON, or without context, question or answer")
    if count := unsupported(contexts):
        say(f"{count:,} answers are not in their context; they are used all the same")
    learned, validation = split_by_article(gathered(contexts), held_out=held_out)
    questions = sum(len(context.tasks) for context in learned)
    say(f"{questions:,} questions about {len(learned):,} contexts, {len(validation):,} contexts held out")
    return learned, validation


def _data_sha256(paths: Sequence[Path]) -> str:
    from gistrag.model.hashing import file_sha256

    return " ".join(file_sha256(path)[:16] for path in paths)


def _load(
    model: str, adapter: str, quantize: Any, device: str | None, recipe: Recipe, rank: int | None
) -> tuple[GistModel, Recipe]:
    """Return the model with the adapter to train, and the recipe with the rank of that adapter.

    Raises:
        UsageError: the adapter to start from has another rank, or no learned gists.
    """
    from gistrag.model.gist_model import GistModel
    from gistrag.model.hub import find, find_adapter
    from gistrag.training.trainer import local_device

    path = find(model).path
    found = find_adapter(adapter, path)
    loaded = GistModel.load(path, adapter=found, quantize=quantize, device=device or local_device())
    if loaded.adapter is not None:
        has = loaded.adapter.rank
        if rank not in (None, has):
            raise UsageError(f"{adapter} has rank {has}, but --rank {rank} was requested; leave --rank out")
        if recipe.placement == "learned" != loaded.adapter.settings.placement:
            raise UsageError(f"{adapter} has no learned gists; start with --adapter none, or name another --placement")
        recipe = replace(recipe, rank=has)
    settings: dict[str, Any] = {
        "placement": recipe.placement,
        "index_placement": recipe.placement,
        "rates": tuple(sorted(recipe.mixture.rates)),
        "recipe": json.loads(recipe.to_json()),
    }
    if loaded.adapter is None:
        gists = -(-recipe.mixture.chunk_tokens // min(recipe.mixture.rates))
        loaded.new_adapter(rank=recipe.rank, gists=gists, seed=recipe.seed, **settings)
    else:
        loaded.adapter.settings = replace(loaded.adapter.settings, **settings)
    return loaded, recipe


def _note_held_out(model: GistModel, share: float) -> None:
    """Record the share of articles that the adapter never saw, in an earlier training included."""
    if model.adapter is not None:
        before = model.adapter.settings.held_out if model.adapter.folder else share
        model.adapter.settings = replace(model.adapter.settings, held_out=min(before, share))


def _run(
    model: GistModel,
    learned: Sequence[Context],
    held: Sequence[Context],
    recipe: Recipe,
    output: Path,
    made_with: dict[str, str],
) -> Run:
    from gistrag.training.checkpoints import Run
    from gistrag.training.sampler import Sampler
    from gistrag.training.trainer import Trainer

    if not learned:
        raise UsageError("expected contexts to learn from, but all were held out; lower --held-out")
    sampler = Sampler(model, learned, recipe.mixture, seed=recipe.seed)
    start = model.adapter.identity if model.adapter else ""
    made_with = {**made_with, "base": model.weights, "adapter": start or "none"}
    return Run(output, Trainer(model, sampler, recipe), _validation(model, held, recipe), made_with)


def _validation(model: GistModel, held: Sequence[Context], recipe: Recipe) -> dict[str, list[Batch]]:
    """Return a few batches of held-out contexts, as text and as gists of each rate; they are always the same."""
    from gistrag.training.sampler import Sampler

    if not held:
        return {}
    few = random.Random(0).sample(held, min(len(held), 200))
    plain = replace(recipe.mixture, chunks=(0.0, 0.0, 1.0), without_gold=0.0, planted=0.0, as_text=0.0)
    made = {}
    for name, mixture in (
        ("text", replace(plain, as_text=1.0)),
        *((f"gists at {rate}", replace(plain, rates={rate: 1.0})) for rate in sorted(recipe.mixture.rates)),
    ):
        sampler: Sampler = Sampler(model, few, mixture, seed=1, is_varied=False)
        made[name] = [sampler.batch(step) for step in range(min(VALIDATION_BATCHES, sampler.steps_per_epoch))]
    return made


def _train(run: Run, minutes: float | None, *, as_json: bool) -> dict[str, Any]:
    """Train until the recipe ends or the time is up, and return the figures of the run."""
    from gistrag.training.checkpoints import draw

    began_s = time.monotonic()
    record: dict[str, Any] = {}
    tokens = count = 0

    def is_over() -> bool:
        return minutes is not None and time.monotonic() - began_s >= 60 * minutes

    for record in run.steps(stop=is_over):
        tokens, count = tokens + record["tokens"], count + 1
        if run.is_main and count == 1 and (peak := run.gpu_peak_bytes()) is not None:
            say(f"the first step used at most {megabytes(peak)} of GPU memory")
        if run.is_main and not as_json and (count % 10 == 0 or "event" in record or "validation text" in record):
            say(_line(record, run.total_steps, tokens / (time.monotonic() - began_s)))
    if run.is_main:
        draw(run.folder)
    took_s = time.monotonic() - began_s
    held_out = {name: value for name, value in record.items() if name.startswith("validation ")}
    return {"step": run.step, "steps": run.total_steps, "seconds": round(took_s, 1),
            "tokens_per_s": round(tokens / max(took_s, 1e-9), 1), "gpu_peak_bytes": run.gpu_peak_bytes(),
            **held_out}  # fmt: skip


def _line(record: dict[str, Any], total: int, tokens_per_s: float) -> str:
    """Return the line that people see of a step."""
    left_s = (total - record["step"]) * record["tokens"] / tokens_per_s
    line = f"step {record['step']:,} of {total:,}: loss {record['answer']:.2f}, {tokens_per_s:,.0f} tokens/s, "
    held_out = [f"{name} {value:.2f}" for name, value in record.items() if name.startswith("validation ")]
    return line + "; ".join([f"{left_s / 60:,.0f} min left", *held_out, *filter(None, [record.get("event")])])
