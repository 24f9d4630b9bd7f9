"""`gistrag search`: the passages that fit a question, without an answer; no language model is loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gistrag.answering.quoting import harmless
from gistrag.cli.options import (
    INDEX,
    Debug,
    Device,
    EmbedderPlace,
    Filters,
    Index,
    Json,
    Quiet,
    RerankerName,
    Scope,
    TopK,
)
from gistrag.cli.output import loading, print_json, tell
from gistrag.cli.query import parsed, question_from

if TYPE_CHECKING:
    from gistrag.index.retriever import Hit

EXAMPLES = (
    'gistrag search "gist file format"',
    'gistrag search "travel costs" --top-k 10 --filter kind=pdf',
    'gistrag search "who signs" --scope contract.docx --json',
)


def search(
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="The question; standard input if left out, or -.")
    ] = None,
    index: Index = INDEX,
    top_k: TopK = 5,
    scope: Scope = None,
    filters: Filters = None,
    reranker: RerankerName = None,
    embedder: EmbedderPlace = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show the passages that fit a question best, without an answer.

    Each is printed with its file, page and heading, best first. With --json each is a line with its whole text.
    """
    asked, passing = question_from(question), parsed(filters or ())
    with loading():
        from gistrag.searching import searching

        opened = searching(index, device=device, reranker=reranker, embedder=embedder)
    with opened as retriever:
        hits = retriever.search(asked, top_k=top_k, scope=scope, filters=passing)
    for number, hit in enumerate(hits, 1):
        _show(number, hit, as_json=as_json)


def _show(number: int, hit: Hit, *, as_json: bool) -> None:
    from gistrag.answering.passages import source_of

    if as_json:
        scores = {"score": hit.score, "dense": hit.dense, "keyword": hit.keyword}
        print_json({"rank": number, **asdict(hit.chunk), **scores})
    else:
        source = source_of(hit, as_text=True)
        tell(f"{number}. {harmless(source.place)}", f"   {harmless(source.snippet)}")
