"""`gistrag inspect`: the contents of an index, of a document, or of a chunk and its gists.

No model is loaded. For the text under the gists of a chunk the tokenizer is enough; whether it is the right one is
seen from the gist's key, which hashes the very token ids.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gistrag.cli.options import INDEX, AdapterPlace, Debug, Index, Json, ModelPlace, Quiet
from gistrag.cli.output import counted, print_json, print_table, say, tell, tell_text
from gistrag.errors import ModelNotFoundError, UsageError
from gistrag.model.prompt import passage_text
from gistrag.progress import megabytes
from gistrag.terminal import visible

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gistrag.index.schema import StoredChunk
    from gistrag.index.store import Store
    from gistrag.kv.packed import PackedGists

SNIPPET_CHARACTERS = 60
SHADE = (255, 176, 0)
SHADE_MIN = 0.15


EXAMPLES = (
    "gistrag inspect",
    "gistrag inspect --document safety.md",
    "gistrag inspect --chunk 12",
    "gistrag inspect --json --index notes-index/",
)


def inspect(
    index: Index = INDEX,
    document: Annotated[
        str | None, typer.Option("--document", metavar="PATH", help="List the chunks of this document.")
    ] = None,
    chunk: Annotated[int | None, typer.Option("--chunk", metavar="ID", help="Show this chunk and its gists.")] = None,
    model: ModelPlace = None,
    adapter: AdapterPlace = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what an index, a document or a chunk contains.

    Without options it shows documents, chunks, skipped files with reasons, sizes, settings and fingerprints. With
    --chunk it shows the text of the chunk, marked where its gists come from, and its gist file. With --model or
    --adapter it also says whether that is the one of the index.
    """
    from gistrag.index.store import Store

    if document is not None and chunk is not None:
        raise UsageError("--document and --chunk are mutually exclusive")
    with Store.open(index) as store, store.snapshot():
        if chunk is not None:
            _show_chunk(store, chunk, model=model, as_json=as_json)
        elif document is not None:
            _show_document(store, document, as_json=as_json)
        else:
            named = {name: value for name, value in (("model", model), ("adapter", adapter)) if value is not None}
            _show_index(store, named, as_json=as_json)


# The whole index


def overview(store: Store) -> dict[str, Any]:
    """Return the contents of an index, without its text."""
    from gistrag.index.folder_record import imported_documents, left_out
    from gistrag.index.versions import known_bugs, versions

    stats, imported = store.stats(), imported_documents(store)
    source_tokens = sum(row.source_tokens for row in store.gists.rows())
    return {
        "index": str(store.folder),
        "source": os.path.normpath(store.folder / store.config.source),
        **asdict(stats),
        "bytes_per_source_token": round(stats.gist_bytes / source_tokens, 1) if source_tokens else 0.0,
        "index_bytes": sum(path.stat().st_size for path in store.folder.rglob("*") if path.is_file()),
        "settings": asdict(store.settings),
        "gist_fingerprint": store.config.gist_fingerprint,
        "embedder_fingerprint": store.config.embedder_fingerprint,
        "document_rows": [{**asdict(row), "imported": row.path in imported} for row in store.documents()],
        "left_out": left_out(store),
        "skipped_files": [asdict(row) for row in store.skipped()],
        "runs_on": versions(),
        "known_bugs": known_bugs(),
    }


def _show_index(store: Store, named: Mapping[str, str], *, as_json: bool) -> None:
    held = overview(store)
    if named:
        from gistrag.configure import are_of_index

        held["is_of_index"] = are_of_index(store, named)
    if as_json:
        print_json(held)
        return
    tell(*(f"{name:<12}{value}" for name, value in _facts(held)))
    if held["document_rows"]:
        print()
        rows = [(row["path"], row["kind"], row["chunks"], row["tokens"], _state(row)) for row in held["document_rows"]]
        print_table(["document", "kind", "chunks", "tokens", ""], rows)
    if held["skipped_files"]:
        print()
        print_table(["skipped", "reason"], [(row["path"], row["reason"]) for row in held["skipped_files"]])


def _facts(held: dict[str, Any]) -> Iterator[tuple[str, str]]:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in held["kinds"].items())
    yield "index", f"{held['index']}, of {held['source']}"
    yield "documents", f"{held['documents']:,}" + (f" ({kinds})" if kinds else "") + f", {held['skipped']:,} skipped"
    if held["left_out"]:
        yield "left out", f"{counted(held['left_out'])}; no reader knows them"
    yield "chunks", f"{held['chunks']:,} with {held['tokens']:,} tokens"
    size = f"{megabytes(held['gist_bytes'])}, {held['bytes_per_source_token']:,.0f} bytes per source token"
    pending = f"; {made_of(held)}" if held["pending_chunks"] else ""
    yield "gists", f"{held['gists']:,} in {held['gist_files']:,} files, {size}{pending}"
    yield "on disk", megabytes(held["index_bytes"])
    yield "settings", ", ".join(f"{name} {value}" for name, value in held["settings"].items() if value is not None)
    for name, is_same in held.get("is_of_index", {}).items():
        yield name, "the one of this index" if is_same else "another than the one of this index"
    yield "gists by", ", ".join(f"{name} {value[:16]}" for name, value in held["gist_fingerprint"].items())
    yield "vectors by", ", ".join(f"{name} {value[:16]}" for name, value in held["embedder_fingerprint"].items())
    yield "runs on", held["runs_on"]
    yield from (("known bug", bug) for bug in held["known_bugs"])


def made_of(held: Mapping[str, Any]) -> str:
    """Return how many chunks have their gists.

    >>> made_of({"gist_chunks": 264, "pending_chunks": 144})
    '120 of 264 chunks'
    """
    return f"{held['gist_chunks'] - held['pending_chunks']:,} of {held['gist_chunks']:,} chunks"


def _state(row: dict[str, Any]) -> str:
    if row["stale"]:
        return "stale: the last build could not read the file"
    if row["imported"]:
        return "imported"
    return "" if row["gists_current"] and row["vectors_current"] else "from another model; the next build updates it"


# One document


def _show_document(store: Store, path: str, *, as_json: bool) -> None:
    store.select(scope=path)
    chunks, gists = store.chunks_of(path), {row.key: row.gists for row in store.gists.rows()}
    if as_json:
        print_json({"document": path, "chunks": [asdict(chunk) for chunk in chunks]})
        return
    rows = [
        (chunk.id, _place(chunk), f"{chunk.start}-{chunk.end}", chunk.tokens, gists.get(chunk.gist_key or "", "text"),
         " ".join(chunk.text.split())[:SNIPPET_CHARACTERS])
        for chunk in chunks
    ]  # fmt: skip
    print_table(["chunk", "where", "characters", "tokens", "gists", "begins"], rows)


def _place(chunk: StoredChunk) -> str:
    return f"page {chunk.page}" if chunk.page else " > ".join(chunk.heading)


# One chunk


@dataclass(frozen=True)
class Piece:
    """A piece of a passage, and the share of heads whose gists keep it, from 0 to 1."""

    text: str
    kept: float


def _show_chunk(store: Store, chunk_id: int, *, model: str | None, as_json: bool) -> None:
    chunks = store.chunks([chunk_id])
    if not chunks:
        raise UsageError(
            f"no chunk {chunk_id} in {store.folder}; gistrag inspect --document PATH lists the chunks of a document"
        )
    chunk = chunks[0]
    is_pending = chunk.gist_key is not None and store.gists.is_pending(chunk.gist_key)
    cache = store.gists.load(chunk.gist_key) if chunk.gist_key and not is_pending else None
    pieces = _kept_pieces(store, chunk, cache, model or store.settings.model) if cache else []
    gist = gist_facts(store, chunk, cache) if cache else None
    if as_json:
        print_json({**asdict(chunk), "gist": gist, "kept": [asdict(piece) for piece in pieces]})
        return
    tell(f"chunk {chunk.id} of {chunk.path}, {_place(chunk)}".rstrip(", "))
    tell(f"characters {chunk.start} to {chunk.end}, {chunk.tokens:,} tokens", "")
    told = "gists still to be made: read as text" if is_pending else "no gist: read as text"
    _print_pieces(pieces, cache.gists) if pieces and cache else tell_text(chunk.text.strip())
    tell("", *([f"{name:<15}{value}" for name, value in gist.items()] if gist else [told]))


def gist_facts(store: Store, chunk: StoredChunk, cache: PackedGists) -> dict[str, Any]:
    """Return the contents of the gist file of a chunk."""
    row = next(row for row in store.gists.rows() if row.key == chunk.gist_key)
    return {
        "gists": row.gists,
        "source_tokens": row.source_tokens,
        "kv": "layers {}, 2, kv_heads {}, gists {}, head_dim {}".format(*cache.counts.shape, *cache.slots_and_width),
        "dtype": cache.dtype,
        "kv_cache_dtype": store.settings.kv_cache_dtype,
        "positions": "of every head" if cache.is_ragged else "of all heads alike",
        "bytes": row.size,
        "key": row.key,
        "sha256": row.sha256,
        "file": str(store.gists.path(row.key)),
    }


def _kept_pieces(store: Store, chunk: StoredChunk, cache: PackedGists, model: str) -> list[Piece]:
    """Return the passage of a chunk in pieces; none if its tokenizer is not on this machine."""
    passage = passage_text(chunk.text, chunk.heading)
    try:
        encoding = _tokenizer(model).encode(passage, add_special_tokens=False)
    except (ModelNotFoundError, OSError) as error:
        say(f"cannot mark where the gists come from: {error}", "")
        return []
    if store.gists.key(encoding.ids) != chunk.gist_key:
        say("cannot mark where the gists come from: the tokenizer on this machine cuts other tokens", "")
        return []
    return list(pieces(passage, encoding.offsets, kept_fractions(cache)))


def kept_fractions(cache: PackedGists) -> list[float]:
    """Return for each source token the fraction of heads that keep it."""
    counts = Counter(cache.rows().positions.tolist())
    return [counts[token] / cache.counts.size for token in range(cache.source_tokens)]


def pieces(passage: str, offsets: Sequence[tuple[int, int]], kept: Sequence[float]) -> Iterator[Piece]:
    """Yield the whole passage, a token at a time; tokens that share a character are cut where the first ends.

    >>> [piece.text for piece in pieces("ab c", [(0, 1), (1, 2), (3, 4)], [0, 1, 0.5])]
    ['a', 'b', ' ', 'c']
    """
    done = 0
    for (start, end), fraction in zip(offsets, kept, strict=True):
        if start > done:
            yield Piece(passage[done:start], 0.0)
        if end > max(start, done):
            yield Piece(passage[max(start, done) : end], fraction)
        done = max(done, end)
    if done < len(passage):
        yield Piece(passage[done:], 0.0)


def _tokenizer(model: str) -> Tokenizer:
    """Return the tokenizer of a model, for which special tokens are ordinary text."""
    from tokenizers import Tokenizer

    from gistrag.model.gguf import converted
    from gistrag.model.hub import find
    from gistrag.model.tokenizer import plain_tokenizer

    path = find(model).path
    folder = converted(path) if path.suffix == ".gguf" else path
    return plain_tokenizer(Tokenizer.from_str((folder / "tokenizer.json").read_text("utf-8")))


def _print_pieces(shown: Sequence[Piece], gists: int) -> None:
    """Print a passage: on a terminal shaded by how many heads keep each token, else with brackets."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        tell_text(bracketed(shown, gists).strip())
        return
    text = Text()
    for piece in shown:
        text.append(visible(piece.text, keep="\n\t"), style=_shade(piece.kept))
    text.rstrip()
    console.print(text, soft_wrap=True)
    console.print("\nThe stronger a token is shaded, the more heads keep it.", style="dim")


def bracketed(shown: Sequence[Piece], gists: int) -> str:
    """Return a passage with its *gists* most kept tokens in «brackets», neighbours together.

    >>> bracketed([Piece("The", 0.1), Piece(" port", 0.6), Piece(" 8", 0.9), Piece(".", 0)], 2)
    'The «port 8».'
    """
    order = sorted(range(len(shown)), key=lambda i: -shown[i].kept)
    most = {i for i in order[:gists] if shown[i].kept}
    runs = groupby(range(len(shown)), most.__contains__)
    texts = ((is_kept, "".join(shown[i].text for i in run)) for is_kept, run in runs)
    return "".join(
        re.sub(r"\S(.*\S)?", r"«\g<0>»", text, flags=re.DOTALL) if is_kept else text for is_kept, text in texts
    )


def _shade(kept: float) -> str:
    """Return a background that is stronger the more heads keep a token; none for a token that few heads keep."""
    if kept < SHADE_MIN:
        return ""
    red, green, blue = (int(value * kept) for value in SHADE)
    return f"{'black' if kept > 0.5 else 'white'} on rgb({red},{green},{blue})"
