"""How a command ends: every error becomes one line on standard error and an exit code.

A command is a function with typer's annotations that returns its exit code. `run` calls it::

    0 done   2 usage or refused   3 partial, under --strict   4 index unusable   5 resources   6 locked
    1 an unforeseen error         130 interrupted             141 the reader of the output has ended

Nothing here loads a tensor library.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
import typer.main

from gistrag.errors import GistRAGError
from gistrag.terminal import visible

logger = logging.getLogger("gistrag")

MISSING = 2
PARTIAL = 3
DAMAGED = 4
LOCKED = 6
INTERRUPTED = 130
READER_GONE = 141
INSIST_S = 3.0
RESUMED = {"build", "synthesize", "train", "evaluate", "adapt"}
"""Commands that resume where they stopped."""


def examples(*lines: str) -> str:
    """Return the end of a help text: command lines to copy."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in lines)))  # \b: these lines stay as they are


def run(app: typer.Typer, argv: Sequence[str] | None, *, program: str) -> int:
    """Run an application and return its exit code.

    Args:
        app: with one command or several.
        argv: arguments without the program's name; None for those of the process.
        program: its name, for messages.
    """
    verb: str | None = None
    with _messages(), _terminable():
        try:
            command = typer.main.get_command(app)
            with command.make_context(program, list(sys.argv[1:] if argv is None else argv)) as context:
                try:
                    code: int | None = command.invoke(context)
                finally:
                    verb = context.invoked_subcommand
            sys.stdout.flush()
            return code or 0
        except BaseException as error:
            return _explained(error, verb)


def completed(app: typer.Typer, *, program: str) -> int | None:
    """Answer a shell that completes a line, and return the exit code; None where no shell asks.

    After ``--install-completion`` a shell runs the program with the variable ``_GISTRAG_COMPLETE``.
    """
    variable = f"_{program.upper()}_COMPLETE"
    if not (instruction := os.environ.get(variable)):
        return None
    from typer.completion import shell_complete

    return shell_complete(typer.main.get_command(app), {}, program, variable, instruction)


def _explained(error: BaseException, verb: str | None) -> int:
    """Print in one line what went wrong with a command, and return the exit code."""
    code, line = _verdict(error, verb)
    if line:
        logger.error(" ".join(line.split()), exc_info=error if logger.isEnabledFor(logging.DEBUG) else None)
    return code


def _verdict(error: BaseException, verb: str | None) -> tuple[int, str]:
    """Return the exit code for an error and the line that explains it."""
    match error:
        case typer.Exit():
            return error.exit_code, ""
        case GistRAGError():
            return error.exit_code, str(error)
        case KeyboardInterrupt() | SystemExit(code=130) | typer.Abort():
            return INTERRUPTED, "interrupted" + ("; run the same command again to resume" if verb in RESUMED else "")
        case SystemExit(code=0):  # typer installed shell completion
            return 0, ""
        case SystemExit():  # rich met a closed pipe
            return READER_GONE, ""
        case BrokenPipeError():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end of the process
            return READER_GONE, ""
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return 5, f"no space left on the disk ({error}); free some space and run the same command again"
        case OSError(errno=errno.EMFILE | errno.ENFILE):
            return 5, f"{error}; close some, or raise the limit with `ulimit -n`"
        case _ if hasattr(error, "format_message"):  # typer's usage errors, whose class has moved between releases
            return 2, _usage(error)
        case _ if is_out_of_memory(error):
            return 5, f"not enough memory ({error}); free some memory, use a smaller model, or lower --top-k"
    return 1, f"{type(error).__name__}: {error}; run with --debug for the traceback"


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    message: str = error.format_message().rstrip(".")
    if context is None:
        return message
    link = " See" if message.endswith("?") else "; see"
    return f"{message}{link} {context.command_path} --help"


_MEMORY_IS_FULL = ("out of memory", "allocate memory", "memory allocation", "can't start new thread", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that main memory or that of a GPU is full, or hides one that does.

    Every library has a class of its own for it; that of a library in Rust is no `Exception`.
    """
    message = str(error).lower()
    hidden = error.__cause__ or error.__context__
    return (
        isinstance(error, MemoryError)
        or any(words in message for words in _MEMORY_IS_FULL)
        or (type(error).__name__ == "PanicException" and "resource temporarily unavailable" in message)  # no thread
        or (isinstance(error, SystemError) and isinstance(hidden, MemoryError))
    )


class _Line(logging.Formatter):
    """Formats a message as one line, whatever a document, a file or a client put into it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # the name in the standard library
        return visible(super().formatMessage(record))


@contextmanager
def _messages() -> Iterator[None]:
    """Print the log messages of the library to standard error, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line("gistrag: %(message)s"))
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
    """End at SIGTERM as cleanly as at Ctrl-C."""
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
    signal.setitimer(signal.ITIMER_REAL, INSIST_S)  # an import or a destructor can swallow the exception
    raise SystemExit(INTERRUPTED)  # no KeyboardInterrupt, which a chat survives
