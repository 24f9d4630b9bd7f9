"""`gistrag synthesize`: documents → questions and answers to train with."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from gistrag.cli import command
from gistrag.errors import ResourceError, UsageError
from gistrag.progress import NoProgress, Progress
from gistrag.settings import DEFAULT_MODEL, IndexSettings

if TYPE_CHECKING:
    import rich.progress

    from gistrag.documents.discovery import Skipped
    from gistrag.model.gist_model import GistModel
    from gistrag.training.generate import Passage, Report
    from gistrag.training.teacher import Teacher

PARTIAL = 3
REASONS_SHOWN = 5
INTERVAL_S = 10.0
KEYS = ("GISTRAG_TEACHER_KEY", "OPENAI_API_KEY")

app = command.application()


@app.command(
    "synthesize",
    epilog=command.examples(
        "gistrag synthesize docs/ -o qa.jsonl",
        "gistrag synthesize docs/ -o qa.jsonl --base-url http://localhost:8000/v1 --teacher my-model",
        "gistrag synthesize docs/ -o probes.jsonl --kinds probe",
        "gistrag synthesize squad.jsonl.gz -o long.jsonl --kinds long --limit 500 --training-only",
    ),
)
def synthesize(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A folder of documents, or a file of contexts.", exists=True)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="JSON lines; one that was begun is gone on with.")
    ],
    kinds: Annotated[
        str, typer.Option(metavar="KINDS", help="Of detail, theme, inference, long and probe, with commas between.")
    ] = "detail,theme,inference",
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="So many passages, drawn by the seed; else all.")
    ] = None,
    window: Annotated[
        int, typer.Option(min=16, metavar="N", help="Most tokens of a passage of a document.")
    ] = IndexSettings.chunk_tokens,
    training_only: Annotated[
        bool, typer.Option("--training-only", help="Leave out articles of a file that are held out for evaluation.")
    ] = False,
    base_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Of an OpenAI-compatible endpoint; else the base model writes.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(metavar="NAME", help="Model of the endpoint.")] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.1, metavar="S", help="For an answer of the endpoint.")
    ] = 120.0,
    retries: Annotated[int, typer.Option(min=0, metavar="N", help="Further attempts where one fails.")] = 4,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Base model: hub id, folder or catalogue name.")
    ] = DEFAULT_MODEL,
    quantize: Annotated[
        Literal["none", "nf4"], typer.Option(help="Whether the base model is loaded in 4 bits.")
    ] = "none",
    seed: Annotated[int, typer.Option(metavar="N", help="Of passages, phrasings and planted facts.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with code 3 if a file was skipped or a request not answered.")
    ] = False,
    device: command.Device = None,
    as_json: command.Json = False,
    quiet: command.Quiet = False,
    debug: command.Debug = False,
) -> int:
    """Write training questions about documents.

    What a passage does not say is dropped, and what the base model knows without it. The same command goes on
    where it stopped, and asks again what was not answered. The key of an endpoint is taken from
    GISTRAG_TEACHER_KEY or OPENAI_API_KEY.
    """
    from gistrag.training.generate import TASKS, Ledger, Synthesis, choose

    started_s = time.monotonic()
    wanted = kinds_from(kinds)
    base = cache(lambda: _load(model, quantize, device))
    remote = _endpoint(base_url, teacher, timeout_s=timeout_s, retries=retries)
    with Ledger.opened(output) as ledger, _watching(is_quiet=quiet) as progress:
        passages, skipped = _passages(source, base, window=window, training_only=training_only)
        writer = None if wanted == ["probe"] else remote or _local(base)
        judge = _local(base) if TASKS.keys() & wanted else None
        run = Synthesis(ledger, teacher=writer, judge=judge, seed=seed, progress=progress)
        report = run.run(choose(passages, limit, seed=seed), wanted)
    done = summary(output, report, skipped, seconds=time.monotonic() - started_s)
    if as_json:
        command.print_json(done)
    else:
        command.say(*lines(done))
    _require_answers(report)
    return PARTIAL if strict and (skipped or report.dropped["unanswered"]) else 0


def kinds_from(listed: str) -> list[str]:
    """Return the kinds of a list with commas.

    Raises:
        UsageError: none, or one that does not exist.

    >>> kinds_from("long, probe")
    ['long', 'probe']
    """
    from gistrag.training.generate import Kind

    kinds = list(dict.fromkeys(kind.strip() for kind in listed.split(",") if kind.strip()))
    unknown = [kind for kind in kinds if kind not in get_args(Kind)]
    if unknown or not kinds:
        raise UsageError(f"--kinds takes some of {', '.join(get_args(Kind))}, with commas between, got {listed!r}")
    return kinds


def _load(name: str, quantize: Literal["none", "nf4"], device: str | None) -> GistModel:
    with command.loading():
        from gistrag.model.gist_model import GistModel
        from gistrag.model.hub import find

        return GistModel.load(find(name).path, quantize=quantize, device=device)


def _local(base: Callable[[], GistModel]) -> Teacher:
    from gistrag.training.teacher import LocalTeacher

    return LocalTeacher(base())


def _endpoint(base_url: str | None, name: str | None, *, timeout_s: float, retries: int) -> Teacher | None:
    """Return the endpoint as a teacher, None where none is named.

    Raises:
        UsageError: only one of address and name, or no address.
    """
    from gistrag.training.teacher import EndpointTeacher

    if base_url is None and name is None:
        return None
    if base_url is None or name is None:
        raise UsageError("an endpoint needs both, --base-url and --teacher; without either the base model writes")
    key = next((os.environ[variable] for variable in KEYS if os.environ.get(variable)), None)
    return EndpointTeacher(base_url, name, key=key, timeout_s=timeout_s, retries=retries)


def _passages(
    source: Path, base: Callable[[], GistModel], *, window: int, training_only: bool
) -> tuple[list[Passage], list[Skipped]]:
    from gistrag.training.generate import passages_of_file, passages_of_folder

    if source.is_dir():
        return passages_of_folder(source, base().text_tokenizer, window=window)
    passages, dropped = passages_of_file(source, training_only=training_only)
    if dropped:
        command.say(f"{dropped:,} lines of {source} left out: not JSON, or without context, question or answer")
    return passages, []


def summary(output: Path, report: Report, skipped: Sequence[Skipped], *, seconds: float) -> dict[str, Any]:
    """Return what a run did."""
    return {
        "output": str(output),
        "written": dict(sorted(report.written.items())),
        "dropped": dict(sorted((+report.dropped).items())),
        "done_before": report.done_before,
        "skipped": [{"path": row.path, "reason": row.reason} for row in skipped],
        "seconds": round(seconds, 3),
    }


def lines(done: dict[str, Any]) -> list[str]:
    """Return a summary for people."""
    told = [f"skipped {row['path']}: {row['reason']}" for row in done["skipped"][:REASONS_SHOWN]]
    if len(done["skipped"]) > REASONS_SHOWN:
        told.append(f"… and {len(done['skipped']) - REASONS_SHOWN:,} more files")
    if done["done_before"]:
        told.append(f"done before: {done['done_before']:,}")
    told += [f"dropped: {_counts(done['dropped'])}"] if done["dropped"] else []
    return [*told, f"{done['output']}: {_counts(done['written']) or 'nothing'} written in {done['seconds']:.1f} s"]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _require_answers(report: Report) -> None:
    """Return if the teacher answered at all, or was not asked.

    Raises:
        ResourceError: it was asked, and answered nothing.
    """
    unanswered = report.dropped["unanswered"]
    if unanswered and unanswered == report.dropped.total() and not report.written:
        raise ResourceError(
            f"expected a teacher that answers, got no answer to any of {unanswered:,} requests; "
            "bring it up, or check --base-url, and run the same command again"
        )


class _Watch:
    """Tells how many texts are done: a bar on a terminal, elsewhere a plain line now and then."""

    def __init__(self, bar: rich.progress.Progress) -> None:
        self._bar = bar
        self._count = self._done = 0
        self._started_s = self._spoke_s = time.monotonic()

    def plan(self, *, chunks: int, tokens: int, gist_bytes: int) -> None:
        """Say how many texts are ahead."""
        self._count = chunks
        self._started_s = self._spoke_s = time.monotonic()
        command.say(f"{chunks:,} texts to write")
        self._bar.add_task("", total=chunks)

    def advance(self, *, chunks: int, tokens: int) -> None:
        """Move the bar, or print a line when it is time for one."""
        self._done += chunks
        now_s = time.monotonic()
        self._bar.advance(self._bar.task_ids[0], chunks)
        if self._bar.disable and now_s - self._spoke_s >= INTERVAL_S:
            self._spoke_s = now_s
            left_s = (now_s - self._started_s) / self._done * (self._count - self._done)
            command.say(f"{self._done:,} of {self._count:,} texts, {left_s:,.0f} s left")


@contextmanager
def _watching(*, is_quiet: bool) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    if is_quiet:
        yield NoProgress()
        return
    columns = (TextColumn("writing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        yield _Watch(bar)


def main(argv: Sequence[str] | None = None) -> int:
    """Write questions and return the exit code."""
    return command.run(app, argv, program="gistrag synthesize")


if __name__ == "__main__":
    sys.exit(main())
