"""The program `gistrag`: every command under one name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated

import typer

from gistrag import __version__
from gistrag.cli import (
    backup,
    bench,
    build,
    chat,
    evaluate,
    exit_codes,
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
from gistrag.cli.exit_codes import application, completed, examples

VERBS: tuple[ModuleType, ...] = (
    build, query, chat, serve, mcp, inspect, verify, gc, backup, models, synthesize, train, evaluate, export, bench,
)  # fmt: skip
"""The module of each command; it holds a function of its name, and examples for its help."""

app = application(completes=True)
for _module in VERBS:
    _name = _module.__name__.rpartition(".")[2]
    app.command(_name, epilog=examples(*_module.EXAMPLES))(getattr(_module, _name))


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"gistrag {__version__}")
        raise typer.Exit


@app.callback(
    invoke_without_command=True,
    epilog=examples("gistrag build docs/", 'gistrag query "How long is a gist?"', "gistrag build --help"),
)
def program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Ask a folder of documents: each is compressed once into gist caches, which answer instead of its text."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    code = completed(app, program="gistrag")
    return exit_codes.run(app, argv, program="gistrag") if code is None else code


def run() -> None:
    """Run the program and end the process with its exit code."""
    sys.exit(main())
