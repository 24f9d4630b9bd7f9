"""`gistrag evaluate`: how much of the quality of text RAG gists keep, on questions with known answers.

Options and output; `gistrag.evaluation.evaluate` does the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gistrag.cli.options import EMBEDDER, BaseModel, Debug, Device, Json, Quantize, Quiet
from gistrag.cli.output import loading, print_json, print_table, progress_of, require_output, say, waiting
from gistrag.errors import UsageError
from gistrag.progress import shown
from gistrag.settings import DEFAULT_EMBEDDER, DEFAULT_MODEL

if TYPE_CHECKING:
    from gistrag.evaluation.arms import Row

EXAMPLES = (
    "gistrag evaluate squad.jsonl.gz --held-out --questions 500 --seed 0",
    "gistrag evaluate qa.jsonl --adapter run/adapter --output run/evaluation",
    "gistrag evaluate qa.jsonl --suite quick --questions 50 --arms text,gist --rates 4",
)


def evaluate(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Questions: SQuAD or question records in JSONL, also .gz.")
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="FOLDER", help="Output folder; an evaluation in it is resumed.")
    ] = Path("evaluation"),
    suite: Annotated[
        Literal["quick", "full"],
        typer.Option(
            "--suite",
            help="quick asks the questions; full adds planted facts, passkeys, other numbers and orders of chunks, "
            "and measures time.",
        ),
    ] = "full",
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Ask only about articles that gistrag train held out.")
    ] = False,
    questions: Annotated[
        int,
        typer.Option("--questions", metavar="N", help="Number of questions; of long ones at most 100."),
    ] = 500,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Random seed.")] = 0,
    arms: Annotated[
        str,
        typer.Option(
            "--arms",
            metavar="A,B",
            help="Some of none, full, without-adapter, text, kv, gist-without-adapter, gist, hybrid.",
        ),
    ] = "none,full,without-adapter,text,kv,gist,hybrid",
    rates: Annotated[
        str, typer.Option("--rates", metavar="R,S", help="Compression rates of the gist arms, in tokens per gist.")
    ] = "2,4,8,16",
    top_k: Annotated[
        str | None,
        typer.Option("--top-k", metavar="K,L", help="Numbers of chunks to answer from; 3 or else the first is main."),
    ] = None,
    model: BaseModel = DEFAULT_MODEL,
    adapter: Annotated[
        str, typer.Option("--adapter", metavar="ADAPTER", help="Adapter: folder, name, auto or none.")
    ] = "auto",
    embedder: Annotated[str, EMBEDDER] = DEFAULT_EMBEDDER,
    quantize: Quantize = "none",
    kv_cache_dtype: Annotated[
        Literal["auto", "int8"],
        typer.Option("--kv-cache-dtype", help="Number format of the gists, as in gistrag build."),
    ] = "int8",
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare answers from gists with answers from text, on questions with known answers.

    A stopped evaluation resumes where it was. With --json the last line on standard output is the summary.
    """
    with waiting("reading"):
        from gistrag.evaluation import evaluate as evaluation
        from gistrag.evaluation.cases import Plan

        long = min(max(questions, 0), Plan.long)
        plan = Plan.of_suite(suite, questions=questions, long=long, seed=seed, top_k=_top_k(top_k))
        asked = evaluation.Evaluation(
            file=file,
            output=output,
            plan=plan,
            arm_names=_names(arms),
            rates=_numbers(rates, "rates"),
            is_held_out=held_out,
        )
        contexts = evaluation.read(file)
    require_output(output)
    given = {
        "model": model,
        "adapter": adapter,
        "embedder": embedder,
        "quantize": quantize,
        "kv_cache_dtype": kv_cache_dtype,
    }
    with loading():
        settings, engine = evaluation.load(given, device=device)
    summary = asked.run(contexts, settings, engine, watch=_watched)
    _print(summary, output, as_json=as_json)


def _names(line: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in line.split(",") if name.strip())


def _numbers(line: str, option: str) -> tuple[int, ...]:
    """Return the integers of a list, each once.

    Raises:
        UsageError: something else in it, or nothing.

    >>> _numbers("2,4, 8", "rates")
    (2, 4, 8)
    """
    with suppress(ValueError):
        if numbers := tuple(dict.fromkeys(map(int, _names(line)))):
            return numbers
    raise UsageError(f"--{option} takes integers separated by commas, such as 2,4; got {line!r}")


def _top_k(line: str | None) -> tuple[int, ...] | None:
    """Return numbers of chunks, the main one first: 3 if it is among them.

    >>> _top_k("1,3,5")
    (3, 1, 5)
    """
    return None if line is None else tuple(sorted(_numbers(line, "top-k"), key=lambda k: k != 3))


def _print(summary: dict[str, Any], output: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(summary)
        return
    from gistrag.evaluation.report import long_table, main_table

    for headers, rows in (main_table(summary), long_table(summary)):
        if rows:
            print_table(headers, rows)
    say(*summary["notes"], f"{output}: rows.jsonl, summary.json, table.md, figures/")


def _watched(rows: Iterator[Row], total: int) -> Iterator[Row]:
    with progress_of("answering", "answers") as progress:
        yield from shown(rows, progress, total=total)
