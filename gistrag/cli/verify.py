"""`gistrag verify`: check every file of an index against its record; see `gistrag.index.integrity`.

The command changes nothing. Queries read the text of a damaged gist until the build in the last line repairs it.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gistrag.cli.exit_codes import DAMAGED
from gistrag.cli.options import INDEX, Debug, Index, Json, Quiet
from gistrag.cli.output import print_json, tell

if TYPE_CHECKING:
    from gistrag.index.integrity import Findings

NAMED = 5
"""Number of documents named in the last line; the full check lists all."""


EXAMPLES = (
    "gistrag verify",
    "gistrag verify --full --index notes-index/",
)


def verify(
    index: Index = INDEX,
    full: Annotated[
        bool, typer.Option("--full", help="Check every page of index.db, the vectors and the converted models too.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Check every gist file against its hash.

    Changes nothing. Exits with code 4 if a file is damaged or missing, and prints the build command that repairs it.
    """
    from gistrag.index.integrity import check
    from gistrag.index.store import Store
    from gistrag.model.conversion import damaged

    with Store.open(index) as store, store.snapshot():
        findings = check(store, full=full)
        source = os.path.normpath(store.folder / store.config.source)
        build = shlex.join(["gistrag", "build", source, "--index", str(store.folder), "--verify"])
    conversions = [str(path) for path in damaged()] if full else []
    is_sound = findings.is_sound and not conversions
    if as_json:
        print_json({"index": str(index), "sound": is_sound, **asdict(findings), "conversions": conversions})
    else:
        again = "is damaged; the next command converts the model again"
        tell(*(f"cache: {path} {again}" for path in conversions), *_lines(findings, build, full=full))
    return 0 if is_sound else DAMAGED


def _lines(findings: Findings, build: str, *, full: bool) -> list[str]:
    found = {
        "damaged": findings.damaged,
        "missing": findings.missing,
        "database": findings.database,
        "unreferenced": findings.unreferenced,
        "stale": findings.stale,
        "again": [f"{path}, {count:,} gists" for path, count in findings.documents.items() if full],
    }
    lines = [f"{name}: {line}" for name, listed in found.items() for line in listed]
    if findings.is_sound:
        return [*lines, f"{findings.gists:,} gist files match their records"]
    named = [*findings.documents][:NAMED]
    more = [f"{len(findings.documents) - NAMED:,} more"] if len(findings.documents) > NAMED else []
    again = f"; rebuilds the gists of {', '.join([*named, *more])}" if named else ""
    return [*lines, f"run {build}{again}"]
