"""What all commands share: their common options, where output goes, and how an error ends a program.

A command is a function with typer's annotations that returns its exit code. `run` calls it and turns whatever goes
wrong into one line on standard error and a code::

    0 done   2 usage or refused   3 partial, under --strict   4 index unusable   5 resources   6 locked
    1 an error nobody foresaw     130 interrupted             141 the reader of our output is gone

Results go to standard output, everything else to standard error. Nothing here loads a tensor library.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.main

from gistrag.errors import GistRAGError, UsageError
from gistrag.settings import Mode

if TYPE_CHECKING:
    from gistrag.answering.answer import Answer

logger = logging.getLogger("gistrag")

INTERRUPTED = 130
READER_GONE = 141
INSIST_S = 3.0
INDEX = Path("index")


def _silence(is_given: bool) -> bool:
    if is_given:
        logger.setLevel(logging.ERROR)
    return is_given


def _explain_all(is_given: bool) -> bool:
    if is_given:
        logger.setLevel(logging.DEBUG)
    return is_given


# Quiet and Debug act through their callbacks: they set the level of the logger, which `say` and `run` go by.
Index = Annotated[Path, typer.Option("--index", metavar="FOLDER", help="Folder of the index.")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="Where the model computes, such as cpu or cuda:0.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", callback=_silence, help="Print results and errors only.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_explain_all, help="Show the traceback of an error.")]
TopK = Annotated[int, typer.Option("--top-k", min=1, metavar="N", help="Chunks to answer from.")]
AnswerMode = Annotated[
    Mode,
    typer.Option(
        "--mode", help="gist loads gist caches, text reads text, hybrid the best chunk, auto those of low fidelity."
    ),
]
Scope = Annotated[
    str | None, typer.Option("--scope", metavar="PATH", help="One document, taken whole instead of the best chunks.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Where an answer is cut.")]
RerankerName = Annotated[
    str | None,
    typer.Option("--reranker", metavar="MODEL", help="Cross-encoder to sort the chunks by: hub id or folder."),
]


def application(*, completes: bool = False) -> typer.Typer:
    """Return an empty typer application that leaves errors to `run`.

    Args:
        completes: it can teach a shell to complete its commands, see `completed`.
    """
    return typer.Typer(add_completion=completes, pretty_exceptions_enable=False, rich_markup_mode=None)


def examples(*lines: str) -> str:
    """Return the end of a help text: command lines to copy."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))  # \b: these lines stay as they are


def run(app: typer.Typer, argv: Sequence[str] | None, *, program: str) -> int:
    """Run an application and return its exit code.

    Args:
        app: with one command or several.
        argv: arguments without the program's name; None for those of the process.
        program: how it is called, for messages.
    """
    with _messages(), _terminable():
        try:
            command = typer.main.get_command(app)
            with command.make_context(program, list(sys.argv[1:] if argv is None else argv)) as context:
                code: int | None = command.invoke(context)
            sys.stdout.flush()
            return code or 0
        except BaseException as error:
            return _explained(error)


def completed(app: typer.Typer, *, program: str) -> int | None:
    """Answer a shell that completes a line, and return the exit code; None where no shell asks.

    A shell that was taught with ``--install-completion`` runs the program with a variable set.
    """
    variable = f"_{program.upper()}_COMPLETE"
    if not (instruction := os.environ.get(variable)):
        return None
    from typer.completion import shell_complete

    return shell_complete(typer.main.get_command(app), {}, program, variable, instruction)


def say(*lines: str) -> None:
    """Tell people something on standard error, unless they want it quiet."""
    if logger.isEnabledFor(logging.INFO):
        sys.stderr.write("".join(f"{line}\n" for line in lines))
        sys.stderr.flush()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on a terminal that something takes its time."""
    from rich.console import Console

    console = Console(stderr=True, quiet=not logger.isEnabledFor(logging.INFO))
    with console.status(f"{what}…"):
        yield


@contextmanager
def loading() -> Iterator[None]:
    """Show that the models are loaded, and look for no garbage meanwhile: imports make none, and are a fifth faster."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        with waiting("loading the models"):
            yield
    finally:
        if is_enabled:
            gc.enable()


def require_output(path: Path) -> None:
    """Return if a folder for output is there, or can be made, before anything is computed for it.

    Raises:
        UsageError: neither.
    """
    try:
        there = next(one for one in (path, *path.absolute().parents) if one.exists())
    except OSError as error:
        raise UsageError(f"cannot write to {path}: {error.strerror}; name another --output") from error
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "may not be written to" if there.is_dir() else "is a file"
        raise UsageError(f"cannot write to {path}: {there} {why}; name another --output")


def print_json(value: Mapping[str, Any]) -> None:
    """Print *value* as one line of JSON."""
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, to_stderr: bool = False) -> None:
    """Print rows under headers; numbers to the right, and every row on one line where nobody watches."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*headers, box=None, pad_edge=False, header_style="bold")
    for column, cells in zip(table.columns, zip(*rows, strict=True), strict=False):
        column.justify = "right" if all(re.match(r"-?[\d.]", str(cell) or "0") for cell in cells) else "left"
    for row in rows:
        table.add_row(*(_plain(cell) for cell in row))
    console = Console(stderr=to_stderr)
    if not console.is_terminal:
        console = Console(stderr=to_stderr, width=10_000)
    console.print(table)


def _plain(cell: object) -> str:
    from rich.markup import escape

    return escape(f"{cell:,}" if isinstance(cell, int) else str(cell))


def print_pieces(pieces: Iterator[str]) -> None:
    """Print an answer as it comes, and end its line."""
    has_begun = False
    for piece in pieces:
        sys.stdout.write(piece if has_begun else piece.lstrip())
        sys.stdout.flush()
        has_begun = has_begun or bool(piece.strip())
    print(flush=True)


def source_lines(answer: Answer) -> list[str]:
    """Return one line for each source of an answer."""
    return [f"  {number}. {source.place}" for number, source in enumerate(answer.sources, 1)]


def cost_line(answer: Answer) -> str:
    """Return in one line what an answer took."""
    timings, usage = answer.timings, answer.usage
    parts = [f"first token {timings.ttft_s:.2f} s, answer {timings.total_s:.2f} s"]
    if usage.gist_slots:
        parts.append(f"{usage.gist_slots:,} gist slots for {usage.source_tokens:,} tokens")
    if usage.text_tokens:
        parts.append(f"{usage.text_tokens:,} tokens read as text")
    if usage.dropped_chunks:
        parts.append(f"{usage.dropped_chunks} chunks left out, the window is full")
    if usage.missing_chunks and answer.sources:
        parts.append(f"{len(answer.sources)} chunks are all there is")
    if usage.text_fallbacks:
        parts.append(f"{usage.text_fallbacks} gists damaged or missing, see gistrag verify")
    return "; ".join(parts)


def _explained(error: BaseException) -> int:
    """Say in one line what went wrong and return the exit code for it."""
    code, line = _verdict(error)
    if line:
        logger.error(" ".join(line.split()), exc_info=error if logger.isEnabledFor(logging.DEBUG) else None)
    return code


def _verdict(error: BaseException) -> tuple[int, str]:
    """Return the exit code for an error and the line that explains it."""
    match error:
        case typer.Exit():
            return error.exit_code, ""
        case GistRAGError():
            return error.exit_code, str(error)
        case KeyboardInterrupt() | SystemExit(code=130) | typer.Abort():
            return INTERRUPTED, "interrupted; a build that is run again goes on where it stopped"
        case SystemExit(code=0):  # how typer ends when it has taught a shell
            return 0, ""
        case SystemExit():  # how rich takes it when the reader is gone
            return READER_GONE, ""
        case BrokenPipeError():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of the process
            return READER_GONE, ""
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return 5, f"no space left on the disk ({error}); free some and run the same command again"
        case _ if hasattr(error, "format_message"):  # typer's usage errors, whose class has moved between releases
            return 2, _usage(error)
        case _ if _is_out_of_memory(error):
            return 5, f"not enough memory ({error}); free some, use a smaller model, or ask for fewer chunks"
    return 1, f"{type(error).__name__}: {error}; run with --debug for the traceback"


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    told = error.format_message().rstrip(".")
    return f"{told}; see {context.command_path} --help" if context else told


def _is_out_of_memory(error: BaseException) -> bool:
    told = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in told or "allocate memory" in told)
    )


@contextmanager
def _messages() -> Iterator[None]:
    """Let what the library logs reach standard error, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("gistrag: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def _terminable() -> Iterator[None]:
    """End at SIGTERM as at Ctrl-C: cleanly, from wherever the work is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in former.items():
            signal.signal(number, handler)


def _end(number: int, frame: object) -> NoReturn:
    signal.setitimer(signal.ITIMER_REAL, INSIST_S)  # what is raised inside an import or a destructor can get lost
    raise SystemExit(INTERRUPTED)  # no KeyboardInterrupt: a chat survives that
