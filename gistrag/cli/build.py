"""`gistrag build`: build the index of a folder of documents, or bring it up to date."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gistrag.cli.dry_run import dry_run_of
from gistrag.cli.exit_codes import PARTIAL
from gistrag.cli.options import EMBEDDER, INDEX, MODEL, QUANTIZE, Debug, Device, Index, Json, Quiet
from gistrag.cli.output import counted, logger, print_json, progress_of, say
from gistrag.errors import IndexLockedError, ResourceError, UsageError
from gistrag.progress import megabytes
from gistrag.settings import Placement
from gistrag.storage import files

if TYPE_CHECKING:
    from gistrag.rag import GistRAG

REASONS_SHOWN = 5


EXAMPLES = (
    "gistrag build docs/",
    "gistrag build notes/ --index notes-index/ --include '*.md' --exclude drafts/",
    "gistrag build docs/ --tokens-per-gist 4 --rebuild",
    "gistrag build report.pdf --index report-index/",
    "gistrag build docs/ --dry-run",
    "gistrag build docs/ --watch",
    "gistrag build docs/ --no-gists",
    "gistrag build docs/ --strict --quiet || mail -s 'build failed' me",
)


def build(
    folder: Annotated[Path, typer.Argument(metavar="DOCUMENTS", help="Folder of documents, or one file.", exists=True)],
    index: Index = INDEX,
    include: Annotated[
        list[str] | None, typer.Option("--include", metavar="GLOB", help="Read only the files that match; repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="GLOB", help="Skip the files that match; repeatable.")
    ] = None,
    model: Annotated[str | None, MODEL] = None,
    embedder: Annotated[str | None, EMBEDDER] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="ADAPTER", help="Adapter: folder, name, auto or none. Default: auto.")
    ] = None,
    placement: Annotated[
        Placement | None,
        typer.Option(metavar="PLACEMENT", help="Where a chunk's gists come from; the default suits nearly everyone."),
    ] = None,
    tokens_per_gist: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens of text per gist. Default: the best rate of the adapter; without one, 4.",
        ),
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=16, metavar="N", help="Most tokens of a chunk. Default: 256.")
    ] = None,
    quantize: Annotated[Literal["none", "nf4"] | None, QUANTIZE] = None,
    kv_cache_dtype: Annotated[
        Literal["auto", "int8"] | None,
        typer.Option(help="Number format of gist files; auto is that of the model. Default: int8."),
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Rebuild an existing index with other settings.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the hash of every gist file first, and retry skipped files.")
    ] = False,
    no_gists: Annotated[
        bool,
        typer.Option("--no-gists", help="Stop when all documents are searchable; answers come from text meanwhile."),
    ] = False,
    no_delete: Annotated[
        bool, typer.Option("--no-delete", help="Keep documents in the index whose file is gone.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove documents whose file is gone, even if that is most of them.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, how long it takes and how much disk; do nothing.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Stay, and bring the index up to date whenever files change.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 3 if a file was skipped.")] = False,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Build the index of a folder, or bring it up to date.

    The index answers as soon as its documents are searchable, from text until the gists of a chunk are made; ask it in
    another terminal. The defaults are those of a new index; an existing one keeps its settings. The last line on
    standard output is JSON.
    """
    settings = {
        "model": model,
        "embedder": embedder,
        "adapter": adapter,
        "placement": placement,
        "tokens_per_gist": tokens_per_gist,
        "chunk_tokens": chunk_tokens,
        "quantize": quantize,
        "kv_cache_dtype": kv_cache_dtype,
    }
    if not watch and not files.exists(index / "index.db"):
        require_documents(folder, include or (), exclude or ())
    if dry_run:
        chosen = {"include": include, "exclude": exclude, "delete": not no_delete, "prune": prune}
        return dry_run_of(folder, index, settings, chosen, rebuild=rebuild, as_json=as_json)
    from gistrag.rag import GistRAG

    with progress_of() as progress:
        rag = GistRAG.from_folder(
            folder,
            index=index,
            include=include,
            exclude=exclude,
            rebuild=rebuild,
            verify=verify,
            delete=not no_delete,
            prune=prune,
            gists="none" if no_gists else "now",
            device=device,
            progress=progress,
            **settings,  # type: ignore[arg-type]  # each of the type that its option has
        )
    with rag:
        done = summary(rag)
        if not as_json:
            say(*lines_of(done))
        print_json(done)
        if watch:
            follow(rag, delete=not no_delete, as_json=as_json)
    return PARTIAL if strict and done["skipped"] else 0


def require_documents(documents: Path, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Return if there is something to read, before any model is loaded.

    Raises:
        UsageError: there is nothing; says what could be read.
    """
    from gistrag.documents.discovery import listed
    from gistrag.documents.readers import READERS

    if documents.is_dir() and not listed(documents, include=include, exclude=exclude):
        chosen = " of what --include and --exclude leave" if include or exclude else ""
        raise UsageError(
            f"nothing to read in {documents}{chosen}; these suffixes are read: {' '.join(sorted(READERS))}"
        )


def follow(rag: GistRAG, *, delete: bool, as_json: bool) -> None:
    """Bring an index up to date whenever files of its folder change, until the user ends it."""
    from gistrag.configure import source_folder
    from gistrag.documents.watching import changes_of

    folder, patterns = source_folder(rag.store), rag.store.patterns
    say(f"watching {folder}; Ctrl-C ends")
    try:
        for _ in changes_of(folder, include=patterns["include"], exclude=patterns["exclude"]):
            _sync(rag, delete=delete, as_json=as_json)
    except KeyboardInterrupt:
        say("", "stopped watching")


def _sync(rag: GistRAG, *, delete: bool, as_json: bool) -> None:
    try:
        with progress_of() as progress:
            rag.sync(delete=delete, progress=progress)
    except (IndexLockedError, ResourceError, UsageError) as error:
        logger.error("%s; the next change is tried again", error)
        return
    done = summary(rag)
    if as_json:
        print_json(done)
    else:
        say(*lines_of(done)[:-1])


def summary(rag: GistRAG) -> dict[str, Any]:
    """Return what the last sync did and what the index contains now."""
    report, stats = rag.report, rag.store.stats()
    if report is None:
        raise ValueError("expected an index that was just built, got an opened one")
    return {
        "index": str(rag.folder),
        "documents": stats.documents,
        "chunks": stats.chunks,
        "tokens": stats.tokens,
        "gist_bytes": stats.gist_bytes,
        "added": len(report.added),
        "changed": len(report.changed),
        "renamed": len(report.renamed),
        "removed": len(report.removed),
        "unchanged": report.unchanged,
        "skipped": [{"path": row.path, "reason": row.reason} for row in report.skipped],
        "left_out": report.left_out,
        "new_chunks": report.chunks,
        "new_tokens": report.tokens,
        "new_gist_bytes": report.gist_bytes,
        "gists_made": report.gists_made,
        "gists_found": report.gists_found,
        "gists_pending": report.gists_pending,
        "without_gist": report.without_gist,
        "coverage": report.coverage,
        "seconds": round(report.seconds, 3),
        "tokens_per_s": round(report.tokens / report.seconds, 1) if report.seconds else 0.0,
    }


def lines_of(done: dict[str, Any]) -> list[str]:
    """Return for people what `summary` returned."""
    counts = ", ".join(f"{done[what]:,} {what}" for what in ("added", "changed", "renamed", "removed", "unchanged"))
    lines = [f"documents: {counts}, {len(done['skipped']):,} skipped"]
    lines += [f"  skipped {row['path']}: {row['reason']}" for row in done["skipped"][:REASONS_SHOWN]]
    if len(done["skipped"]) > REASONS_SHOWN:
        lines.append("  … gistrag inspect lists them all")
    if done["left_out"]:
        lines.append(f"left out: {counted(done['left_out'])}; no reader knows them")
    if done["new_chunks"] or done["gists_made"] or done["gists_found"]:
        lines.append(_work(done))
    if done["gists_pending"]:
        lines.append(f"pending: {done['gists_pending']:,} gists; until they are made, their chunks are read as text")
    totals = f"{done['documents']:,} documents, {done['chunks']:,} chunks, {done['tokens']:,} tokens"
    return [*lines, f"{done['index']}: {totals}, {megabytes(done['gist_bytes'])} of gists"]


def _work(done: dict[str, Any]) -> str:
    """Return what was computed in one line."""
    made = f"{done['gists_made']:,} gists made ({megabytes(done['new_gist_bytes'])})"
    found = f", {done['gists_found']:,} found" if done["gists_found"] else ""
    text = f", {done['without_gist']:,} chunks stay text" if done["without_gist"] else ""
    if not done["gists_made"]:
        return f"indexed: {done['new_chunks']:,} chunks in {done['seconds']:.1f} s{found}{text}"
    work = f"{done['new_chunks']:,} chunks, {done['new_tokens']:,} tokens in {done['seconds']:.1f} s"
    return f"compressed: {work} ({done['tokens_per_s']:,.0f} tokens/s), {made}{found}{text}"
