"""`gistrag import`: documents of another index, with the gists they bring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gistrag.cli.options import (
    INDEX,
    AdapterPlace,
    Debug,
    Device,
    EmbedderPlace,
    Index,
    Json,
    ModelPlace,
    Quiet,
)
from gistrag.cli.output import loading, print_json, tell
from gistrag.errors import UsageError

EXAMPLES = (
    "gistrag import safety.gists",
    "gistrag import safety.gists --index notes-index/",
    "gistrag import --remove safety.md",
)


def import_(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="What gistrag export wrote, a .gists file.")
    ] = None,
    index: Index = INDEX,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", metavar="PATH", help="Remove this imported document instead; repeatable."),
    ] = None,
    model: ModelPlace = None,
    adapter: AdapterPlace = None,
    embedder: EmbedderPlace = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Import documents that gistrag export wrote.

    They answer from the gists they bring, and a build of the folder leaves them alone. The index must be of the same
    model and settings.
    """
    if (file is None) == (not remove):
        raise UsageError("expected a FILE to import, or documents to --remove, and not both")
    with loading():
        from gistrag.rag import GistRAG

        rag = GistRAG.open(index, device=device, model=model, adapter=adapter, embedder=embedder)
    with rag:
        if file is None:
            rag.remove_imported(remove or ())
            done, paths = "removed", list(remove or ())
        else:
            done, paths = "imported", rag.import_documents(file)
    if as_json:
        print_json({"index": str(index), done: paths})
    else:
        for path in paths:
            tell(f"{done}: {path}")
