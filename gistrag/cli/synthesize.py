"""`gistrag synthesize`: documents → questions and answers to train with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from gistrag.cli.exit_codes import PARTIAL
from gistrag.cli.options import BaseModel, Debug, Device, Json, Quantize, Quiet
from gistrag.cli.output import loading, print_json, progress_of, say
from gistrag.errors import ResourceError, UsageError
from gistrag.settings import DEFAULT_MODEL, IndexSettings

if TYPE_CHECKING:
    from gistrag.documents.discovery import Skipped
    from gistrag.model.gist_model import GistModel
    from gistrag.training.generate import Passage, Report
    from gistrag.training.teacher import Teacher

REASONS_SHOWN = 5
KEYS = ("GISTRAG_TEACHER_KEY", "OPENAI_API_KEY")


EXAMPLES = (
    "gistrag synthesize docs/ -o qa.jsonl",
    "gistrag synthesize docs/ -o qa.jsonl --base-url http://localhost:8000/v1 --teacher my-model",
    "gistrag synthesize docs/ -o planted.jsonl --kinds planted",
    "gistrag synthesize squad.jsonl.gz -o long.jsonl --kinds long --limit 500 --training-only",
)


def synthesize(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A folder of documents, or a file of contexts.", exists=True)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Output JSONL file; an existing one is resumed.")
    ],
    kinds: Annotated[
        str,
        typer.Option(metavar="KINDS", help="Some of detail, theme, inference, long, list, summary and planted."),
    ] = "detail,theme,inference",
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Most passages, drawn at random; default all.")
    ] = None,
    window: Annotated[
        int, typer.Option(min=16, metavar="N", help="Most tokens of a passage.")
    ] = IndexSettings.chunk_tokens,
    training_only: Annotated[
        bool, typer.Option("--training-only", help="Leave out the articles that are held out for evaluation.")
    ] = False,
    base_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="OpenAI-compatible endpoint of the teacher; default: the base model writes."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(metavar="NAME", help="Model name at the endpoint.")] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.1, metavar="S", help="Most seconds for one answer of the endpoint.")
    ] = 120.0,
    retries: Annotated[int, typer.Option(min=0, metavar="N", help="Further attempts after a failed request.")] = 4,
    model: BaseModel = DEFAULT_MODEL,
    quantize: Quantize = "none",
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed of passages, wordings and planted facts.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 3 if a file was skipped or a request got no answer.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Write training questions and answers about documents.

    Answers that their passage does not support are dropped, and questions that the base model answers without the
    passage. The same command resumes where it stopped, and repeats the requests that got no answer. The key of an
    endpoint is taken from GISTRAG_TEACHER_KEY or OPENAI_API_KEY.
    """
    started_s = time.monotonic()
    wanted = kinds_from(kinds)
    base = cache(lambda: _load(model, quantize, device))
    remote = endpoint(base_url, teacher, timeout_s=timeout_s, retries=retries)
    read = partial(passages_of, source, base, window=window, training_only=training_only)
    report, skipped = written(read, output, wanted, base=base, remote=remote, limit=limit, seed=seed)
    done = summary(output, report, skipped, seconds=time.monotonic() - started_s)
    if as_json:
        print_json(done)
    else:
        say(*lines(done))
    require_answers(report)
    return PARTIAL if strict and (skipped or report.dropped["unanswered"]) else 0


def written(
    read: Callable[[], tuple[list[Passage], list[Skipped]]],
    output: Path,
    kinds: Sequence[str],
    *,
    base: Callable[[], GistModel],
    remote: Teacher | None,
    limit: int | None,
    seed: int,
) -> tuple[Report, list[Skipped]]:
    """Write questions of these kinds, show the progress, and return the counts and the files that were skipped.

    Args:
        read: returns the passages, once the output is held.
        base: loads the base model, which judges, and writes where *remote* is None.
    """
    from gistrag.qa.planted_facts import PLANTED
    from gistrag.training.generate import TASKS, Ledger, Synthesis, choose

    with Ledger.opened(output) as ledger, progress_of("writing", "texts") as progress:
        passages, skipped = read()
        writer = None if kinds == [PLANTED] else remote or _local(base)
        judge = _local(base) if TASKS.keys() & kinds else None
        run = Synthesis(ledger, teacher=writer, judge=judge, seed=seed, progress=progress)
        return run.run(choose(passages, limit, seed=seed), kinds), skipped


def kinds_from(listed: str) -> list[str]:
    """Return the kinds of a list with commas, as records name them.

    Raises:
        UsageError: none, or one that does not exist.

    >>> kinds_from("long, planted")
    ['long', 'probe']
    """
    from gistrag.qa.planted_facts import PLANTED
    from gistrag.training.generate import Kind

    names = {**{kind: kind for kind in get_args(Kind)}, "planted": PLANTED}
    given = list(dict.fromkeys(kind.strip() for kind in listed.split(",") if kind.strip()))
    if not given or not names.keys() >= set(given):
        known = ", ".join(kind for kind in names if kind != PLANTED)
        raise UsageError(f"--kinds takes some of {known}, separated by commas, got {listed!r}")
    return list(dict.fromkeys(names[kind] for kind in given))


def _load(name: str, quantize: Literal["none", "nf4"], device: str | None) -> GistModel:
    with loading():
        from gistrag.model.gist_model import GistModel
        from gistrag.model.hub import find

        return GistModel.load(find(name).path, quantize=quantize, device=device)


def _local(base: Callable[[], GistModel]) -> Teacher:
    from gistrag.training.teacher import LocalTeacher

    return LocalTeacher(base())


def endpoint(base_url: str | None, name: str | None, *, timeout_s: float, retries: int) -> Teacher | None:
    """Return the endpoint as a teacher, None if none is named.

    Raises:
        UsageError: an address without a name or the reverse, an address that is none, or no openai package.
    """
    from gistrag.training.teacher import EndpointTeacher

    if base_url is None and name is None:
        return None
    if base_url is None or name is None:
        raise UsageError("--base-url and --teacher go together; leave both out and the base model writes")
    key = next((os.environ[variable] for variable in KEYS if os.environ.get(variable)), None)
    return EndpointTeacher(base_url, name, key=key, timeout_s=timeout_s, retries=retries)


def passages_of(
    source: Path, base: Callable[[], GistModel], *, window: int, training_only: bool
) -> tuple[list[Passage], list[Skipped]]:
    """Return the passages of a folder of documents or of a file of contexts, and the files that were skipped."""
    from gistrag.training.generate import passages_of_file, passages_of_folder

    if source.is_dir():
        return passages_of_folder(source, base().text_tokenizer, window=window)
    passages, dropped = passages_of_file(source, training_only=training_only)
    if dropped:
        say(f"skipped {dropped:,} lines of {source}: not JSON, or without context, question or answer")
    return passages, []


def summary(output: Path, report: Report, skipped: Sequence[Skipped], *, seconds: float) -> dict[str, Any]:
    """Return the counts of a run for programs."""
    return {
        "output": str(output),
        "written": dict(sorted(report.written.items())),
        "dropped": dict(sorted((+report.dropped).items())),
        "done_before": report.done_before,
        "skipped": [{"path": row.path, "reason": row.reason} for row in skipped],
        "seconds": round(seconds, 3),
    }


def lines(done: dict[str, Any]) -> list[str]:
    """Return the counts of a run for people."""
    shown = [f"skipped {row['path']}: {row['reason']}" for row in done["skipped"][:REASONS_SHOWN]]
    if len(done["skipped"]) > REASONS_SHOWN:
        shown.append(f"… and {len(done['skipped']) - REASONS_SHOWN:,} more files")
    if done["done_before"]:
        shown.append(f"done before: {done['done_before']:,}")
    shown += [f"dropped: {_counts(done['dropped'])}"] if done["dropped"] else []
    return [*shown, f"{done['output']}: {_counts(done['written']) or 'nothing'} written in {done['seconds']:.1f} s"]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def require_answers(report: Report) -> None:
    """Return if the teacher answered any request, or got none.

    Raises:
        ResourceError: it answered none of its requests.
    """
    unanswered = report.dropped["unanswered"]
    if unanswered and unanswered == report.dropped.total() and not report.written:
        raise ResourceError(
            f"the teacher answered none of {unanswered:,} requests; "
            "start it, or check --base-url, and run the same command again"
        )
