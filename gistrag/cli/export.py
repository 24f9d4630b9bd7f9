"""`gistrag export`: chosen chunks of an index in a form that other programs load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gistrag.cli.options import INDEX, Debug, Device, Index, Json, Quiet
from gistrag.cli.output import loading, print_json
from gistrag.errors import UsageError

EXAMPLES = (
    "gistrag export --scope safety.md -o safety-cartridge/",
    "gistrag export --chunk 12 --chunk 7 -o two-chunks/ --index notes-index/",
)


def export(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where to write: none yet, or empty.")
    ],
    index: Index = INDEX,
    form: Annotated[
        Literal["cartridge"], typer.Option("--format", help="cartridge is a KV cache as an adapter for peft.")
    ] = "cartridge",
    chunk: Annotated[
        list[int] | None, typer.Option("--chunk", metavar="ID", help="A chunk, by its number; repeatable.")
    ] = None,
    scope: Annotated[
        list[str] | None, typer.Option("--scope", metavar="PATH", help="All chunks of a document; repeatable.")
    ] = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the gist caches of chosen chunks as one adapter that peft loads on the base model.

    Documents come first, each in its order, then single chunks in the order given.
    """
    if not (chunk or scope):
        raise UsageError("no chunks; name some with --chunk, or a document with --scope")
    with loading():
        from gistrag import export
        from gistrag.rag import GistRAG

        rag = GistRAG.open(index, device=device)
    with rag, rag.store.snapshot():
        made = export.cartridge_of(rag.store, rag.model, export.chosen(rag.store, chunk or (), scope or ()))
        facts = export.save(made, rag.model, output, name=rag.store.settings.model)
    if as_json:
        print_json({"output": str(output), **facts})
    else:
        print(_line(facts, output))


def _line(facts: dict[str, Any], output: Path) -> str:
    texts, again = (sum(chunk[name] for chunk in facts["chunks"]) for name in ("as_text", "compressed_again"))
    read = f", {texts:,} of them read as text" if texts else ""
    read += f", {again:,} compressed again, alike for every head" if again else ""
    merge = "; merge its adapter into the base before loading it" if facts["adapter"] else ""
    counts = f"{len(facts['chunks']):,} chunks{read}, {facts['slots']:,} slots for {facts['source_tokens']:,} tokens"
    return f"{output}: {counts}, for {facts['base']}{merge}"
