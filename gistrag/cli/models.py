"""`gistrag models`: which default models are installed, and how to install the others."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gistrag.cli.exit_codes import MISSING
from gistrag.cli.options import Debug, Json, Quiet
from gistrag.cli.output import print_json, print_table, say
from gistrag.errors import ModelNotFoundError

if TYPE_CHECKING:
    from gistrag.model.hub import Entry


EXAMPLES = (
    "gistrag models",
    "gistrag models --install",
)


def models(
    install: Annotated[bool, typer.Option("--install", help="Install the missing models.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """List the default models and where they are.

    Exits with code 2 if one is missing.
    """
    from gistrag.model.hub import ENTRIES

    if install:
        for entry in ENTRIES:
            _install(entry)
    rows = [_row(entry) for entry in ENTRIES]
    if as_json:
        print_json({"models": rows})
    else:
        shown = [[row["name"], row["kind"], row["origin"] or "missing", row["path"] or row["install"]] for row in rows]
        print_table(["name", "kind", "found in", "path, or the command that installs it"], shown)
        for row in rows:
            say(*([row["problem"]] if row["problem"] else []))
    return 0 if all(row["path"] for row in rows) else MISSING


def _install(entry: Entry) -> None:
    """Install a missing model; the output of the command goes to standard error."""
    if _row(entry)["path"]:
        return
    say(f"running {shlex.join(entry.install_command)}")
    subprocess.run(entry.install_command, stdout=sys.stderr.fileno(), check=False)  # _row reports the result
    importlib.invalidate_caches()


def _row(entry: Entry) -> dict[str, Any]:
    """Return the facts about a model; ``path`` is None if it is missing."""
    from gistrag.model.hub import find

    row: dict[str, Any] = {"name": entry.name, "kind": entry.kind, "path": None, "origin": None, "problem": None}
    try:
        found = find(entry.name, download=False)
        row |= {"path": str(found.path), "origin": found.origin}
    except ModelNotFoundError as error:
        row["problem"] = str(error)
    return {**row, "hub_id": entry.hub_id, "install": shlex.join(entry.install_command)}
