"""What commands print: results to standard output, everything else to standard error."""

from __future__ import annotations

import gc
import io
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gistrag.answering.quoting import harmless, quote
from gistrag.answering.wording import places, words
from gistrag.errors import UsageError
from gistrag.progress import NoProgress, Progress, TerminalProgress
from gistrag.qa.phrases import Phrase, phrase
from gistrag.terminal import json_line, visible

if TYPE_CHECKING:
    from gistrag.answering.answer import Answer
    from gistrag.answering.stream import Stream

logger = logging.getLogger("gistrag")


def open_streams() -> None:
    """Open the standard streams that the process was started without, and let no odd character end the program.

    Otherwise the next file that is opened would be standard output, and receive what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115  to the end
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def say(*lines: str) -> None:
    """Print lines to standard error, unless ``--quiet`` was given."""
    if logger.isEnabledFor(logging.INFO):
        sys.stderr.write("".join(f"{visible(line)}\n" for line in lines))
        sys.stderr.flush()


def tell(*lines: str) -> None:
    """Print lines to standard output; what would break a line or steer a terminal is spelled out."""
    print("\n".join(visible(line) for line in lines), flush=True)


def tell_text(text: str) -> None:
    """Print a text of several lines to standard output."""
    print(visible(text, keep="\n\t"), flush=True)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on a terminal what the program is doing."""
    from rich.console import Console

    console = Console(stderr=True, quiet=not logger.isEnabledFor(logging.INFO))
    with console.status(f"{what}…"):
        yield


@contextmanager
def loading() -> Iterator[None]:
    """Show that the models are being loaded; garbage collection pauses, which makes the imports a fifth faster."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        with waiting("loading the models"):
            yield
    finally:
        if is_enabled:
            gc.enable()


def progress_of(doing: str = "compressing", unit: str = "chunks") -> AbstractContextManager[Progress]:
    """Return what shows how far some work is, nothing under ``--quiet``; see `gistrag.progress.TerminalProgress`."""
    return TerminalProgress(doing, unit) if logger.isEnabledFor(logging.INFO) else nullcontext(NoProgress())


def require_output(path: Path) -> None:
    """Return if an output folder exists or can be made; called before anything is computed.

    Raises:
        UsageError: it cannot be written to.
    """
    try:
        there = next(one for one in (path, *path.absolute().parents) if one.exists())
    except OSError as error:
        raise UsageError(f"cannot write to {path}: {error.strerror}; name another --output") from error
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "is not writable" if there.is_dir() else "is a file"
        raise UsageError(f"cannot write to {path}: {there} {why}; name another --output")


def print_json(value: Mapping[str, Any]) -> None:
    """Print *value* as one line of JSON."""
    print(json_line(value), flush=True)


def counted(suffixes: Mapping[str, int]) -> str:
    """Return how many files were left out, by suffix.

    >>> counted({".png": 1200, ".zip": 3, "": 2})
    '1,200 .png, 3 .zip, 2 without a suffix'
    """
    return ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in suffixes.items())


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, to_stderr: bool = False) -> None:
    """Print rows under headers, numbers aligned right; not on a terminal, each row stays on one line."""
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

    return escape(f"{cell:,}" if isinstance(cell, int) else visible(str(cell)))


def print_pieces(pieces: Iterator[str]) -> None:
    """Print an answer while it is generated, and end its line."""
    has_begun = False
    for piece in pieces:
        sys.stdout.write(visible(piece if has_begun else piece.lstrip(), keep="\n\t"))
        sys.stdout.flush()
        has_begun = has_begun or bool(piece.strip())
    print(flush=True)


def print_answer(stream: Stream) -> None:
    """Print an answer while it is generated; how sure it is, its sources and its costs follow on standard error.

    An answer that is known to be unsure when its first piece comes stands below its evidence.
    """
    first = next(stream, "")
    is_said = stream.answer.verdict == "unsure"
    if is_said:
        say_evidence(stream.answer)
    print_pieces(chain([first], stream))
    if not is_said:
        say_evidence(stream.answer)
    say(*source_lines(stream.answer), cost_line(stream.answer))


def say_evidence(answer: Answer) -> None:
    """Print how sure an answer is and the sentence that carries it, the words of the answer bold on a terminal."""
    from rich.console import Console
    from rich.text import Text

    before, quoted, after = evidence_line(answer)
    shown = Text(quoted)
    for start, end in places(words(answer.withheld or answer.text), quoted):
        shown.stylize("bold", start, end)
    console = Console(stderr=True, quiet=not logger.isEnabledFor(logging.INFO), highlight=False)
    if before or quoted:
        console.print(Text.assemble("  ", before, shown, after), soft_wrap=True)
    if answer.unsupported and answer.verdict != "not found":
        say(f"  {phrase('unsupported', answer.language)} {', '.join(answer.unsupported)}")


def evidence_line(answer: Answer) -> tuple[str, str, str]:
    """Return how sure an answer is, the sentence that carries it, and what closes the line; all "" if nothing is known.

    A refusal quotes nothing, unless an answer was withheld that is probably wrong. Its words are in the language of the
    question.
    """
    percent = f" ({answer.confidence:.0%})" if answer.confidence else ""
    names: dict[str | None, Phrase] = {"answered": "sure", "unsure": "unsure", "not found": "not found"}
    name = "guessed" if answer.withheld else names.get(answer.verdict)
    before = phrase(name, answer.language).format(percent=percent, guess=harmless(answer.withheld)) if name else ""
    if answer.evidence is None or name == "not found":
        return before, "", ""
    mark = "" if answer.verdict == "not found" else answer.marked.removeprefix(answer.text)
    return f'{before} {phrase("evidence", answer.language)} "'.lstrip(), quote(answer), f'"{mark}'


def source_lines(answer: Answer) -> list[str]:
    """Return one line for each source of an answer, that of the quoted evidence marked."""
    is_quoted = bool(quote(answer))
    return [
        f"{'*' if is_quoted and source.evidence else ' '} {number}. {harmless(source.place)}"
        for number, source in enumerate(answer.sources, 1)
    ]


def cost_line(answer: Answer) -> str:
    """Return the timings and costs of an answer in one line."""
    timings, usage = answer.timings, answer.usage
    parts = [f"first token {timings.ttft_s:.2f} s, answer {timings.total_s:.2f} s"]
    if usage.gist_slots:
        parts.append(f"{usage.gist_slots:,} gist slots for {usage.source_tokens:,} tokens")
    if usage.text_tokens:
        parts.append(f"{usage.text_tokens:,} tokens read as text")
    if usage.dropped_chunks:
        parts.append(f"{usage.dropped_chunks} chunks left out, the context window is full")
    if usage.readings > 1:
        parts.append(f"read {usage.readings} times")
    if usage.missing_chunks and answer.sources:
        parts.append(f"the index has only {len(answer.sources)} such chunks")
    if usage.text_pending:
        parts.append(f"{usage.text_pending} gists still to be made")
    if usage.text_fallbacks:
        parts.append(f"{usage.text_fallbacks} gists could not be used; run gistrag verify")
    return "; ".join(parts)
