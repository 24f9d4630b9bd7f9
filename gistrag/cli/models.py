"""`gistrag models`: the readers and embedders in the catalog, what they cost here, and how to install them."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gistrag.cli.exit_codes import MISSING
from gistrag.cli.options import Debug, Json, Quiet
from gistrag.cli.output import print_json, print_table, say
from gistrag.errors import ModelNotFoundError, UsageError

if TYPE_CHECKING:
    from gistrag.model.hub import Entry, ReaderShape
    from gistrag.model.suggestions import Suggestion


EXAMPLES = (
    "gistrag models",
    "gistrag models --install",
    "gistrag models gemma3-270m --install",
)


def models(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this model of the catalog.")] = None,
    install: Annotated[
        bool, typer.Option("--install", help="Install what is missing: the model NAME, or the default models.")
    ] = False,
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Accept the terms of use that the model NAME comes under.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """List the models, what they cost on this machine, and where they are.

    Exits with code 2 if the model NAME, or without a name a default model, is missing.
    """
    from gistrag.model.hub import CATALOG, ENTRIES
    from gistrag.model.suggestions import BY_HUB_ID

    entries = CATALOG if name is None else [entry for entry in CATALOG if entry.name == name]
    if not entries:
        known = ", ".join(entry.name for entry in CATALOG)
        raise UsageError(f"no model {name!r} in the catalog, which has {known}; any other model is named where it is "
                         "used, with --model")  # fmt: skip
    if accept_terms and name is None:
        raise UsageError("name the model whose terms you accept: gistrag models NAME --install --accept-terms")
    wanted = ENTRIES if name is None else entries
    for entry in wanted if install or accept_terms else ():
        _require_accepted(entry, accept_terms)
    for entry in wanted if install else ():
        _install(entry)
    rows = [_row(entry) for entry in entries]
    others = [] if name else [_suggestion(one) for one in BY_HUB_ID]
    if as_json:
        print_json({"models": rows, "by_hub_id": others})
    else:
        _print(rows, others)
    return MISSING if any(row["path"] is None for row in rows if name or row["is_default"]) else 0


def _print(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    """Print where the models are, and what readers cost, those by hub id behind the others."""
    shown = [[row["name"], row["kind"], row["origin"] or "missing", row["path"] or row["install"]] for row in rows]
    print_table(["name", "kind", "found in", "path, or the command that installs it"], shown)
    readers = [row for row in rows if row["reader"]]
    if readers:
        print()
        headers = ["reader", "license", "languages", "on disk", "memory", "a slot", "tokens/s here", "adapter"]
        print_table(headers, [_costs(row) for row in (*readers, *others)])
    if others:
        print("\nA reader with a slash in its name is taken by its hub id: gistrag build FOLDER --model NAME")
    for row in rows:
        say(*([row["problem"]] if row["problem"] and (row["is_default"] or len(rows) == 1) else []))


def _costs(row: dict[str, Any]) -> list[str]:
    reader = row["reader"]
    disk, memory = (f"{size / 1e6:.0f} MB" if size else "-" for size in (row["disk_bytes"], reader["memory_bytes"]))
    slot, rate = f"{reader['slot_bytes'] / 1024:.1f} KiB", f"~{reader['tokens_per_s']:.0f}"
    return [row["name"], row["license"], row["languages"], disk, memory, slot, rate, row["adapter"] or "none"]


def _require_accepted(entry: Entry, is_accepted_now: bool) -> None:
    """Return if the terms of a model are accepted: before, by an option, or by a typed yes.

    Raises:
        UsageError: they are not.
    """
    from gistrag.model.parts import accept, is_accepted, package_folder

    if entry.terms is None or is_accepted(entry.name, entry.terms):
        return
    terms, folder = entry.terms, package_folder(entry.package)
    copies = sorted(folder.glob("data/*TERMS*")) if folder else []
    places = " and ".join([terms.url, *map(str, copies)])
    say(f"{entry.name} comes under the {terms.name}, at {places}:", *(f"  - {line}" for line in terms.summary))
    if not is_accepted_now:
        if not sys.stdin.isatty():
            raise UsageError(f"the {terms.name} are not accepted; read them, then run the command with --accept-terms")
        sys.stderr.write(f"Type yes to accept the {terms.name}: ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() != "yes":
            raise UsageError(f"the {terms.name} were not accepted, so {entry.name} is not installed")
    accept(entry.name, terms)


def _install(entry: Entry) -> None:
    """Install a missing model; the output of the command goes to standard error."""
    if _found(entry)["path"]:
        return
    say(f"running {shlex.join(entry.install_command)}")
    subprocess.run(entry.install_command, stdout=sys.stderr.fileno(), check=False)  # _row reports the result
    importlib.invalidate_caches()


def _found(entry: Entry) -> dict[str, Any]:
    """Return where a model is; ``path`` is None if it is missing."""
    from gistrag.model.hub import find

    try:
        found = find(entry.name, download=False)
    except ModelNotFoundError as error:
        return {"path": None, "origin": None, "problem": str(error)}
    return {"path": str(found.path), "origin": found.origin, "problem": None}


def _row(entry: Entry) -> dict[str, Any]:
    """Return the facts about a model."""
    from gistrag.model.hub import ENTRIES, shipped_adapter

    found = _found(entry)
    adapter = shipped_adapter(entry.sha256) if entry.kind == "model" else None
    return {
        "name": entry.name,
        "kind": entry.kind,
        **found,
        "hub_id": entry.hub_id,
        "install": f"gistrag models {entry.name} --install" if entry.terms else shlex.join(entry.install_command),
        "is_default": entry in ENTRIES,
        "license": entry.license,
        "languages": entry.languages,
        "disk_bytes": _disk_bytes(Path(found["path"])) if found["path"] else None,
        "adapter": adapter.name if adapter else None,
        "reader": _reader(entry.reader) if entry.reader else None,
    }


def _suggestion(one: Suggestion) -> dict[str, Any]:
    """Return the facts about a reader by hub id, whose files are not looked for."""
    return {
        "name": one.hub_id,
        "license": one.license,
        "languages": one.languages,
        "disk_bytes": None,
        "adapter": None,
        "reader": _reader(one.reader),
    }


def _reader(shape: ReaderShape) -> dict[str, Any]:
    """Return what a reader costs: memory of its weights, bytes of a slot in a gist file, and tokens a second here."""
    from gistrag.model.speed import decode_rate, weight_bytes

    memory = weight_bytes(shape.parameters)
    slot = 2 * shape.layers * shape.kv_heads * shape.head_dim
    return {"parameters": shape.parameters, "memory_bytes": memory, "slot_bytes": slot,
            "tokens_per_s": round(decode_rate(memory), 1)}  # fmt: skip


def _disk_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    return sum(one.stat().st_size for one in files)
