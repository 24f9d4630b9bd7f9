"""What commands print: results to standard output, everything else to standard error."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gistrag.errors import UsageError
from gistrag.progress import NoProgress, Progress, TerminalProgress

if TYPE_CHECKING:
    from gistrag.answering.answer import Answer

logger = logging.getLogger("gistrag")


def say(*lines: str) -> None:
    """Print lines to standard error, unless ``--quiet`` was given."""
    if logger.isEnabledFor(logging.INFO):
        sys.stderr.write("".join(f"{line}\n" for line in lines))
        sys.stderr.flush()


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
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


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

    return escape(f"{cell:,}" if isinstance(cell, int) else str(cell))


def print_pieces(pieces: Iterator[str]) -> None:
    """Print an answer while it is generated, and end its line."""
    has_begun = False
    for piece in pieces:
        sys.stdout.write(piece if has_begun else piece.lstrip())
        sys.stdout.flush()
        has_begun = has_begun or bool(piece.strip())
    print(flush=True)


QUOTE_CHARACTERS = 320


def say_about(answer: Answer) -> None:
    """Print what stands under an answer: its evidence, its sources, its costs."""
    from rich.console import Console
    from rich.text import Text

    if line := evidence_line(answer):
        console = Console(stderr=True, quiet=not logger.isEnabledFor(logging.INFO), highlight=False)
        shown = Text(line)
        if console.is_terminal:
            shown.highlight_words(sorted(set(re.findall(r"\w{2,}", answer.text)), key=len, reverse=True), "bold")
        console.print(shown, soft_wrap=True)
    if answer.unsupported:
        say(f"  in no passage: {', '.join(answer.unsupported)}")
    say(*source_lines(answer), cost_line(answer))


def evidence_line(answer: Answer) -> str:
    """Return how sure an answer is and the sentence that carries it, "" where nothing is known."""
    sure = f" ({answer.confidence:.0%})" if answer.confidence else ""
    quoted = f'"{quote(answer)}"' if answer.evidence else ""
    match answer.verdict:
        case "answered":
            return f"  sure{sure}: {quoted}"
        case "unsure":
            return f"  not sure{sure}. The passage says: {quoted}"
        case "not found" if answer.withheld:
            return f"  the model guessed {answer.withheld!r}{sure}, from: {quoted}"
        case "not found":
            return ""
    return f"  {quoted}" if quoted else ""


def quote(answer: Answer) -> str:
    """Return the evidence in one line, cut around the answer where it is long."""
    text = " ".join(answer.evidence.text.split()) if answer.evidence else ""
    if len(text) <= QUOTE_CHARACTERS:
        return text
    at = max(0, text.lower().find((answer.withheld or answer.text).lower()))
    begin = max(0, min(at - QUOTE_CHARACTERS // 3, len(text) - QUOTE_CHARACTERS))
    end = begin + QUOTE_CHARACTERS
    return ("…" if begin else "") + text[begin:end].strip() + ("…" if end < len(text) else "")


def source_lines(answer: Answer) -> list[str]:
    """Return one line for each source of an answer, that with the evidence marked."""
    return [
        f"{' *'[bool(source.evidence)]} {number}. {source.place}" for number, source in enumerate(answer.sources, 1)
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
    if usage.missing_chunks and answer.sources:
        parts.append(f"the index has only {len(answer.sources)} such chunks")
    if usage.text_pending:
        parts.append(f"{usage.text_pending} gists still to be made")
    if usage.text_fallbacks:
        parts.append(f"{usage.text_fallbacks} gists damaged or missing; run gistrag verify")
    return "; ".join(parts)
