"""`gistrag export`: the gist caches of chosen chunks as a CARTRIDGE adapter, which peft loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

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

SUFFIX = ".gists"
EXAMPLES = (
    "gistrag export --scope safety.md -o safety.gists",
    "gistrag export --scope safety.md -o safety-cartridge/",
    "gistrag export --chunk 12 --chunk 7 -o two-chunks/ --index notes-index/",
)


def export(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="New .gists file, or new or empty folder.")
    ],
    index: Index = INDEX,
    chunk: Annotated[
        list[int] | None, typer.Option("--chunk", metavar="ID", help="Number of a chunk to export; repeatable.")
    ] = None,
    scope: Annotated[
        list[str] | None, typer.Option("--scope", metavar="PATH", help="Document to export whole; repeatable.")
    ] = None,
    model: ModelPlace = None,
    adapter: AdapterPlace = None,
    embedder: EmbedderPlace = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Export documents with their gists as a file, or chosen chunks as an adapter for peft.

    An output that ends in .gists is one file with the text and gists of whole documents, for `gistrag import`. Any
    other is the folder of an adapter. Whole documents come first, then single chunks, both in the order given.
    """
    if not (chunk or scope):
        raise UsageError("expected chunks to export; name some with --chunk, or a document with --scope")
    if output.suffix == SUFFIX:
        _export_documents(index, scope or (), output, has_chunks=bool(chunk), as_json=as_json)
        return
    with loading():
        from gistrag import export
        from gistrag.rag import GistRAG

        rag = GistRAG.open(index, device=device, model=model, adapter=adapter, embedder=embedder)
    with rag, rag.store.snapshot():
        made = export.cartridge_of(rag.store, rag.model, export.chosen(rag.store, chunk or (), scope or ()))
        facts = export.save(made, rag.model, output, name=rag.store.settings.model)
    if as_json:
        print_json({"output": str(output), **facts})
    else:
        tell(_line(facts, output))


def _export_documents(index: Path, paths: Sequence[str], output: Path, *, has_chunks: bool, as_json: bool) -> None:
    from gistrag.index import document_file
    from gistrag.index.store import Store

    if has_chunks:
        raise UsageError(f"a {SUFFIX} file holds whole documents; name them with --scope, without --chunk")
    with Store.open(index) as store:
        document_file.export(store, paths, output)
    if as_json:
        print_json({"output": str(output), "documents": list(paths)})
    else:
        tell(f"{output}: {len(paths):,} documents with text and gists; gistrag import takes it in")


def _line(facts: dict[str, Any], output: Path) -> str:
    texts, again = (sum(chunk[name] for chunk in facts["chunks"]) for name in ("as_text", "compressed_again"))
    read = f", {texts:,} of them as text" if texts else ""
    read += f", {again:,} compressed again with one budget for all heads" if again else ""
    merge = "; merge its adapter into the base before loading it" if facts["adapter"] else ""
    counts = f"{len(facts['chunks']):,} chunks{read}, {facts['slots']:,} slots for {facts['source_tokens']:,} tokens"
    return f"{output}: {counts}, for {facts['base']}{merge}"
