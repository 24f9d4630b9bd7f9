"""`gistrag adapt`: a base model → an adapter that reads gists, with its calibration, its figures and its card.

It is `gistrag synthesize`, `gistrag train` and `gistrag evaluate` one after the other, with defaults that suit one
evening. Every part resumes, so the same command goes on wherever it was stopped::

    run/questions.jsonl   written about --folder
    run/checkpoint-…      of the training, and run/adapter/
    run/calibration/      the index that the calibration asked
    run/evaluation-…      answers of the adapter and of the untrained base, after so many steps
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gistrag.cli import synthesize
from gistrag.cli.exit_codes import is_out_of_memory
from gistrag.cli.options import EMBEDDER, Debug, Device, Json, Quantize, Quiet
from gistrag.cli.output import loading, print_json, print_table, progress_of, require_output, say
from gistrag.errors import ResourceError, UsageError
from gistrag.progress import shown
from gistrag.settings import DEFAULT_EMBEDDER, HELD_OUT, IndexSettings

if TYPE_CHECKING:
    from gistrag.evaluation.adapting import Gain
    from gistrag.evaluation.arms import Row
    from gistrag.evaluation.card import Making
    from gistrag.evaluation.report import Figures
    from gistrag.model.gist_model import GistModel
    from gistrag.qa.dataset import Context
    from gistrag.training.recipe import Recipe
    from gistrag.training.teacher import Teacher

GPU_MINUTES, CPU_MINUTES = 60.0, 480.0
GPU_BATCHES, GPU_ROWS = 2, 32
TOKENS = 12_000_000
KINDS = ("detail", "theme", "inference", "list", "summary")
QUESTIONS_FILE = "questions.jsonl"

EXAMPLES = (
    "gistrag adapt smollm2-135m-instruct --questions squad.jsonl.gz -o adapted/",
    "gistrag adapt Qwen/Qwen2.5-0.5B-Instruct --questions squad.jsonl.gz --minutes 60 --device cuda",
    "gistrag adapt models/base --folder docs/ --base-url http://localhost:8000/v1 --teacher my-model",
    "gistrag build docs/ --model Qwen/Qwen2.5-0.5B-Instruct --adapter adapted/adapter",
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command was asked for, as its options say."""

    model: str
    questions: tuple[Path, ...]
    folder: Path | None
    output: Path
    recipe: str
    minutes: float | None
    tokens: int
    rows: int | None
    seed: int
    evaluate: int
    calibrate: int
    limit: int
    license: str
    embedder: str
    quantize: Literal["none", "nf4"]
    device: str | None

    @property
    def index(self) -> dict[str, Any]:
        """Settings of an index that is made with the adapter."""
        return {
            "model": self.model,
            "adapter": str(self.output / "adapter"),
            "embedder": self.embedder,
            "quantize": self.quantize,
        }


def adapt(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Base model: hub id, folder or catalogue name.")],
    questions: Annotated[
        list[Path] | None,
        typer.Option("--questions", metavar="FILE", help="SQuAD, CLAP-NQ or question records; repeatable."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", metavar="DOCS", help="Documents that questions are written about.", exists=True),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Run folder; resumed if it exists.")
    ] = Path("adapted"),
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes", min=0.01, metavar="M", help="Most minutes of training; default 60 on a GPU, else 480."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, metavar="N", help="Most tokens to learn from.")] = TOKENS,
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="NAME", help="adapt, another recipe, or the recipe.json of a run.")
    ] = "adapt",
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, metavar="N", help="Most rows in a forward pass; fewer take less memory."),
    ] = None,
    evaluate: Annotated[
        int,
        typer.Option("--evaluate", min=0, metavar="N", help="Held-out questions for adapter and base; 0 for none."),
    ] = 200,
    calibrate: Annotated[
        int,
        typer.Option("--calibrate", min=0, metavar="N", help="Questions that the confidence is fitted to; 0 for none."),
    ] = 200,
    limit: Annotated[
        int, typer.Option("--limit", min=1, metavar="N", help="Most passages of --folder to write about.")
    ] = 400,
    base_url: Annotated[
        str | None,
        typer.Option("--base-url", metavar="URL", help="OpenAI-compatible endpoint that writes; default: the base."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="NAME", help="Model name at the endpoint.")
    ] = None,
    license: Annotated[
        str, typer.Option("--license", metavar="WORDS", help="License of the questions, for the card.")
    ] = "",
    embedder: Annotated[str, EMBEDDER] = DEFAULT_EMBEDDER,
    quantize: Quantize = "none",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Random seed.")] = 0,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Train an adapter for a base model, from a file of questions or a folder of documents, and say what it gained.

    The same command resumes after a stop at any moment. With --json the last line on standard output is the summary.
    """
    if not questions and folder is None:
        raise UsageError("no questions to learn from; name --questions FILE, such as SQuAD, or --folder DOCS")
    asked = Asked(
        model=model, questions=tuple(questions or ()), folder=folder, output=output, recipe=recipe, minutes=minutes,
        tokens=tokens, rows=rows, seed=seed, evaluate=evaluate, calibrate=calibrate, limit=limit, license=license,
        embedder=embedder, quantize=quantize, device=device,
    )  # fmt: skip
    remote = synthesize.endpoint(base_url, teacher, timeout_s=120.0, retries=4)
    require_output(output)
    began_s = time.monotonic()
    with _enough_memory(asked):
        done, gains = _adapted(asked, remote)
    done |= {"gains": [asdict(one) for one in gains], "seconds": round(time.monotonic() - began_s, 1)}
    if as_json:
        print_json(done)
    else:
        _print(done, gains)
    return 0


def _adapted(asked: Asked, remote: Teacher | None) -> tuple[dict[str, Any], list[Gain]]:
    """Do all parts one after the other, and return the summary, and what was gained."""
    from gistrag.evaluation import adapting, card
    from gistrag.training import session

    base = cache(lambda: _base(asked))
    base()  # a family that is not supported is refused before anything is made
    files = [*asked.questions, *_written(asked, base, remote)]
    if asked.folder:
        base.cache_clear()  # one in 4 bits that has read on a CPU cannot be trained
    contexts = session.contexts_of(files)
    share = session.fitting_share(contexts, HELD_OUT)
    learned, held = session.split(contexts, share)
    making = _trained(asked, base, learned, held, files, share)
    calibration = None
    adapter = asked.output / "adapter"
    held, others = adapting.apart(held)
    if asked.calibrate:
        say(f"calibrating with at most {asked.calibrate:,} questions")
        calibration = adapting.calibrated(
            others, asked.output / "calibration", adapter, asked.index, questions=asked.calibrate,
            device=asked.device, progress=_each_tenth,
        )  # fmt: skip
    making = replace(making, calibration=calibration.measured if calibration else {})
    summary, gains = _evaluated(asked, held, making.steps)
    card.write(adapter, card.card(making, gains, summary), making)
    return {
        "output": str(asked.output), "adapter": str(adapter), "steps": making.steps, "tokens": making.tokens,
        "training_seconds": round(making.seconds, 1), "calibration": dict(making.calibration),
    }, gains  # fmt: skip


def _base(asked: Asked) -> GistModel:
    with loading():
        from gistrag.model.gist_model import GistModel
        from gistrag.model.hub import find

        return GistModel.load(find(asked.model).path, quantize=asked.quantize, device=asked.device)


def _written(asked: Asked, base: Any, remote: Teacher | None) -> list[Path]:
    """Return the file of questions about the documents, which are written where they are missing; [] without documents.

    Raises:
        UsageError: not one question could be written.
    """
    if asked.folder is None:
        return []
    output = asked.output / QUESTIONS_FILE
    output.parent.mkdir(parents=True, exist_ok=True)
    read = partial(synthesize.passages_of, asked.folder, base, window=IndexSettings.chunk_tokens, training_only=False)
    report, _ = synthesize.written(read, output, KINDS, base=base, remote=remote, limit=asked.limit, seed=asked.seed)
    synthesize.require_answers(report)
    if not output.stat().st_size:
        raise UsageError(
            f"no question about {asked.folder} was kept; name --questions FILE, or a --teacher that writes"
        )
    return [output]


def _trained(
    asked: Asked, base: Any, learned: Sequence[Context], held: Sequence[Context], files: Sequence[Path], share: float
) -> Making:
    """Train until the budget is spent, where it is not yet, and return how the adapter was made."""
    from gistrag.evaluation.card import Making
    from gistrag.evaluation.speed import machine
    from gistrag.model.hashing import file_sha256
    from gistrag.model.hub import CATALOG
    from gistrag.training import session
    from gistrag.training.checkpoints import read_log

    model = base()
    chosen = session.with_adapter(model, _recipe(asked, model), held_out=share)
    chosen = replace(chosen, steps=session.steps_of(asked.tokens, model, learned, chosen))
    made_with = session.made_with(files, quantize=asked.quantize, held_out=share)
    run = session.begun(model, learned, held, chosen, asked.output, made_with)
    if not run.is_over:
        of_time = "" if chosen.minutes is None else f" or {chosen.minutes:g} minutes"
        say(f"training for at most {chosen.steps:,} steps{of_time}")
        session.trained(run, tell=say, save_every_s=min(120.0, 6.0 * (chosen.minutes or 20.0)))
    records = read_log(asked.output)
    about, sha256 = machine(model), model.weights
    entry = next((one for one in CATALOG if one.sha256 == sha256), None)
    del run, model
    base.cache_clear()
    _free()
    return Making(
        base=Path(asked.model).name if Path(asked.model).exists() else asked.model,
        base_sha256=sha256,
        data={path.name: file_sha256(path) for path in files},
        license=asked.license,
        base_license=entry.license if entry else "",
        notice=entry.terms.notice if entry and entry.terms else "",
        steps=len(records),
        tokens=sum(record["tokens"] for record in records),
        seconds=sum(record["seconds"] for record in records),
        machine=about,
        calibration={},
    )


def _recipe(asked: Asked, model: GistModel) -> Recipe:
    """Return the recipe, its budget set: bigger batches on a GPU, and less time."""
    from gistrag.training.session import find_recipe

    recipe = replace(find_recipe(asked.recipe), seed=asked.seed)
    is_gpu = model.device.type != "cpu"
    if is_gpu and asked.recipe == "adapt":
        recipe = replace(recipe, batches=GPU_BATCHES, rows_together=GPU_ROWS)
    minutes = asked.minutes or (GPU_MINUTES if is_gpu else CPU_MINUTES)
    return replace(recipe, minutes=minutes, rows_together=asked.rows or recipe.rows_together)


def _free() -> None:
    """Give the memory of models that nobody holds any more back to the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _evaluated(asked: Asked, held: Sequence[Context], steps: int) -> tuple[Figures | None, list[Gain]]:
    """Return the summary of the evaluation and what was gained, None and [] where nothing can be asked."""
    from gistrag.evaluation import adapting

    if not asked.evaluate:
        return None, []
    if not held:
        say("nothing is evaluated, because all questions are about one article")
        return None, []
    output = asked.output / f"evaluation-{steps:06d}"
    return adapting.compared(held, output, asked.index, questions=asked.evaluate, device=asked.device, watch=_watched)


def _watched(rows: Iterator[Row], total: int) -> Iterator[Row]:
    with progress_of("answering", "answers") as progress:
        yield from shown(rows, progress, total=total)


def _each_tenth(done: int, total: int) -> None:
    if done % max(1, total // 10) == 0:
        say(f"calibration: {done:,} of {total:,} questions")


@contextmanager
def _enough_memory(asked: Asked) -> Iterator[None]:
    """Say what takes less memory where there is too little.

    Raises:
        ResourceError: memory ran out; what was done so far stays.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fewer = max(1, (asked.rows or 8) // 2)
        raise ResourceError(
            f"not enough memory; run the same command with --rows {fewer}, it goes on at the last checkpoint, or start "
            "again with --quantize nf4 or a smaller model"
        ) from error


def _print(done: dict[str, Any], gains: Sequence[Gain]) -> None:
    """Print what was gained, and how to use the adapter."""
    from gistrag.evaluation.card import GAIN_HEADERS, gain_rows

    if gains:
        print_table(GAIN_HEADERS, gain_rows(gains))
    say(f"{done['adapter']}: {done['steps']:,} steps, {done['tokens']:,} tokens, "
        f"{done['training_seconds'] / 60:.1f} minutes; use it with --adapter {done['adapter']}")  # fmt: skip
