"""The program `gistrag`: every command under one name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from gistrag import __version__
from gistrag.cli import (
    backup,
    bench,
    build,
    chat,
    command,
    evaluate,
    export,
    gc,
    inspect,
    mcp,
    models,
    query,
    serve,
    synthesize,
    train,
    verify,
)

VERBS = (
    build, query, chat, serve, mcp, inspect, verify, gc, backup, models, synthesize, train, evaluate, export, bench,
)  # fmt: skip

app = command.application(completes=True)
for _verb in VERBS:
    app.registered_commands += _verb.app.registered_commands


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"gistrag {__version__}")
        raise typer.Exit


@app.callback(
    invoke_without_command=True,
    epilog=command.examples("gistrag build docs/", 'gistrag query "How long is a gist?"', "gistrag build --help"),
)
def program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """Ask a folder of documents: each is compressed once into gist caches, which answer instead of its text."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    code = command.completed(app, program="gistrag")
    return command.run(app, argv, program="gistrag") if code is None else code


def run() -> None:
    """Run the program and end the process with its exit code."""
    sys.exit(main())
