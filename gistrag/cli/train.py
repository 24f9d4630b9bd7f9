"""`gistrag train`: questions about contexts → an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gistrag.cli.options import BaseModel, Debug, Device, Json, Quantize, Quiet
from gistrag.cli.output import loading, print_json, require_output, say, waiting
from gistrag.settings import DEFAULT_MODEL, HELD_OUT, Placement

if TYPE_CHECKING:
    from gistrag.model.gist_model import GistModel

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
        str, typer.Option(metavar="NAME", help="smollm2, adapt, continue, 24gb, or the recipe.json of a run.")
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
    with waiting("reading"):
        from gistrag.training import session
    named = {name: value for name, value in given.items() if value is not None}
    chosen = replace(session.find_recipe(recipe), **named)
    learned, validation = session.split(session.contexts_of(data), held_out)
    require_output(output)
    with loading():
        loaded = _load(model, adapter, quantize, device)
    chosen = session.with_adapter(loaded, chosen, held_out=held_out, rank=rank)
    made_with = session.made_with(data, quantize=quantize, held_out=held_out)
    run = session.begun(loaded, learned, validation, chosen, output, made_with)
    done = session.trained(run, minutes=minutes, tell=_unsaid if as_json else say)
    if run.is_main:
        print_json({"output": str(output), "adapter": str(output / "adapter"), **done})
    return 0


def _unsaid(line: str) -> None:
    """Print nothing of a step."""


def _load(model: str, adapter: str, quantize: Any, device: str | None) -> GistModel:
    from gistrag.model.gist_model import GistModel
    from gistrag.model.hub import find, find_adapter
    from gistrag.training.trainer import local_device

    path = find(model).path
    return GistModel.load(path, adapter=find_adapter(adapter, path), quantize=quantize, device=device or local_device())
