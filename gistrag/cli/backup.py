"""`gistrag backup`: copy an index, even while a build writes it; see `gistrag.index.backup`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gistrag.cli.exit_codes import DAMAGED
from gistrag.cli.options import INDEX, Debug, Index, Json, Quiet
from gistrag.cli.output import print_json, tell
from gistrag.progress import megabytes

if TYPE_CHECKING:
    from gistrag.index.backup import Copied


EXAMPLES = (
    "gistrag backup /mnt/disk/index",
    "gistrag backup copy/ --index notes/",
)


def backup(
    destination: Annotated[
        Path, typer.Argument(metavar="DEST", help="Folder of the copy: new, empty, or an earlier copy.")
    ],
    index: Index = INDEX,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Copy an index, even while it is used or built.

    The copy has the state of one moment. A second copy to the same folder writes only what is new. Exits with code 4
    if a damaged gist was left out.
    """
    from gistrag.index.backup import copy
    from gistrag.index.store import Store

    with Store.open(index) as store:
        done = copy(store, destination)
    if as_json:
        print_json({"index": str(index), "destination": str(destination), **asdict(done)})
    else:
        tell(*(f"damaged: {line}" for line in done.damaged), _line(done, destination))
    return DAMAGED if done.damaged else 0


def _line(done: Copied, destination: Path) -> str:
    copied = f"{done.gists:,} gist files copied ({megabytes(done.bytes)})"
    return f"{destination}: {copied}, {done.kept:,} kept from an earlier copy"
