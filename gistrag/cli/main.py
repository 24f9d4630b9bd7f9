"""The program `gistrag`: every command under one name."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from itertools import chain
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gistrag import __version__
from gistrag.cli import (
    adapt,
    backup,
    bench,
    build,
    chat,
    evaluate,
    exit_codes,
    export,
    gc,
    import_,
    inspect,
    mcp,
    models,
    query,
    search,
    serve,
    synthesize,
    train,
    verify,
)
from gistrag.cli.exit_codes import completed, examples
from gistrag.cli.output import open_streams

PROGRAM = "gistrag"
GROUPS: dict[str, tuple[ModuleType, ...]] = {
    "Use": (build, query, search, chat, serve),
    "Look after": (inspect, verify, gc, backup, export, import_, models),
    "Agents and research": (mcp, adapt, synthesize, train, evaluate, bench),
}
"""Modules of the commands, under the headings of the help; each holds a function of its name, and EXAMPLES."""


def _verb(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2].rstrip("_")  # a word of Python has one behind it


class _Grouped(TyperGroup):
    """Lists the commands under headings, and answers a bare question with the command that asks it."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, self.commands))
        for title, modules in GROUPS.items():
            listed = [self.commands[_verb(module)] for module in modules]
            with formatter.section(title):
                formatter.write_dl([(f"{one.name:<{width}}", one.get_short_help_str(200)) for one in listed])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if " " in args[0].strip():
            ctx.fail(f"No such command {args[0]!r}. Did you mean {PROGRAM} query {shlex.quote(args[0])}?")
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Grouped, pretty_exceptions_enable=False, rich_markup_mode=None)  # `run` takes the errors
for _module in chain.from_iterable(GROUPS.values()):
    app.command(_verb(_module), epilog=examples(*_module.EXAMPLES))(
        getattr(_module, _module.__name__.rpartition(".")[2])
    )


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"{PROGRAM} {__version__}")
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
    """Ask a folder of documents: gistrag compresses each once into gist caches, and answers from them."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    code = completed(app, program=PROGRAM)
    return exit_codes.run(app, argv, program=PROGRAM) if code is None else code


def run(*verb: str) -> None:
    """Run the program, or one verb of it, with the arguments of the process, and end the process."""
    open_streams()
    sys.exit(main([*verb, *sys.argv[1:]]))
