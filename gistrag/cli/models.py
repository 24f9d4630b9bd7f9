"""`gistrag models`: which default models are on this machine, and what brings those that are not."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gistrag.cli import command
from gistrag.errors import ModelNotFoundError

if TYPE_CHECKING:
    from gistrag.model.hub import Entry

MISSING = 2

app = command.application()


@app.command("models", epilog=command.examples("gistrag models", "gistrag models --install"))
def models(
    install: Annotated[bool, typer.Option("--install", help="Run the commands that bring what is missing.")] = False,
    as_json: command.Json = False,
    quiet: command.Quiet = False,
    debug: command.Debug = False,
) -> int:
    """List the default models and where they are.

    Ends with code 2 if one is missing.
    """
    from gistrag.model.hub import ENTRIES

    if install:
        for entry in ENTRIES:
            _install(entry)
    rows = [_row(entry) for entry in ENTRIES]
    if as_json:
        command.print_json({"models": rows})
    else:
        shown = [[row["name"], row["kind"], row["origin"] or "missing", row["path"] or row["install"]] for row in rows]
        command.print_table(["name", "kind", "found in", "path, or the command that brings it"], shown)
        for row in rows:
            command.say(*([row["problem"]] if row["problem"] else []))
    return 0 if all(row["path"] for row in rows) else MISSING


def _install(entry: Entry) -> None:
    """Run the command that brings a model, unless it is here; its output goes to standard error."""
    if _row(entry)["path"]:
        return
    command.say(f"running {shlex.join(entry.install_command)}")
    subprocess.run(entry.install_command, stdout=sys.stderr.fileno(), check=False)  # _row tells how it went
    importlib.invalidate_caches()


def _row(entry: Entry) -> dict[str, Any]:
    """Return what is known of a model; ``path`` is None where it is missing."""
    from gistrag.model.hub import find

    row: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "path": None, "origin": None, "problem": None}
    try:
        found = find(entry.name, download=False)
        row |= {"path": str(found.path), "origin": found.origin}
    except ModelNotFoundError as error:
        row["problem"] = str(error)
    return {**row, "hub_id": entry.hub_id, "install": shlex.join(entry.install_command)}


def main(argv: Sequence[str] | None = None) -> int:
    """List the models and return the exit code."""
    return command.run(app, argv, program="gistrag models")


if __name__ == "__main__":
    sys.exit(main())
