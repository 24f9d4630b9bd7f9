"""`gistrag query`: one question, one answer with its sources."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from gistrag.cli.options import (
    INDEX,
    AdapterPlace,
    AnswerMode,
    Debug,
    Device,
    EmbedderPlace,
    Filters,
    Index,
    Json,
    MaxNewTokens,
    ModelPlace,
    NoSecondReading,
    Quiet,
    RerankerName,
    RuntimeOption,
    Scope,
    TopK,
)
from gistrag.cli.output import loading, print_answer, print_json
from gistrag.errors import UsageError
from gistrag.settings import require_question

EXAMPLES = (
    'gistrag query "How long is a gist?"',
    'gistrag query "Who holds the lock?" --top-k 5 --mode hybrid',
    'gistrag query "What is this page about?" --scope safety.md',
    "gistrag query \"What is new?\" --filter kind=pdf --filter 'path=reports/*'",
    "gistrag query \"What did Kim ask for?\" --filter from=kim --filter 'date=>=2026-01-01'",
    "gistrag query --json < question.txt",
)


def query(
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="The question; standard input if left out, or -.")
    ] = None,
    index: Index = INDEX,
    top_k: TopK = 3,
    mode: AnswerMode = "gist",
    scope: Scope = None,
    filters: Filters = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="X", help="0 picks the likeliest token; higher values sample.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed of the sampling.")] = 0,
    no_second_reading: NoSecondReading = False,
    reranker: RerankerName = None,
    model: ModelPlace = None,
    adapter: AdapterPlace = None,
    embedder: EmbedderPlace = None,
    device: Device = None,
    runtime: RuntimeOption = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Answer one question from an index, with its sources.

    The answer is printed to standard output; the sentence that carries it, how sure it is, its sources and its timings
    to standard error.
    """
    asked, passing = question_from(question), parsed(filters or ())
    started_s = time.perf_counter()
    with loading():
        from gistrag.rag import GistRAG

        imported_s = time.perf_counter()
        rag = GistRAG.open(
            index, device=device, runtime=runtime, reranker=reranker, model=model, adapter=adapter, embedder=embedder
        )
        loaded_s = time.perf_counter()
    with rag:
        stream = rag.stream(
            asked,
            top_k=top_k,
            mode=mode,
            scope=scope,
            filters=passing,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            second_reading=not no_second_reading,
        )
        if not as_json:
            print_answer(stream)
            return
        for _ in stream:
            pass
    startup = {"import_s": imported_s - started_s, "load_s": loaded_s - imported_s}
    print_json({"question": asked, "mode": mode, **asdict(stream.answer), "startup_s": startup})


def question_from(argument: str | None) -> str:
    """Return the question: the argument, or what comes from standard input where it is ``-`` or left out.

    Raises:
        UsageError: there is none, or `require_question` refuses it.
    """
    if argument in (None, "-"):
        if argument is None and sys.stdin.isatty():
            raise UsageError("expected a question; give it in quotes, or on standard input")
        argument = sys.stdin.read()
    return require_question(str(argument).strip())


def parsed(filters: Sequence[str]) -> dict[str, str]:
    """Return filters by their key.

    Raises:
        UsageError: one that is no ``key=value``, a key twice or unknown, or an impossible date.

    >>> parsed(["kind=pdf", "path=reports/*"])
    {'kind': 'pdf', 'path': 'reports/*'}
    """
    from gistrag.index.metadata import require_known

    found: dict[str, str] = {}
    for line in filters:
        key, equals, value = line.partition("=")
        if not (key and equals and value) or key in found:
            raise UsageError(f"--filter takes KEY=VALUE, each key once, got {line!r}; for example --filter kind=pdf")
        found[key] = value
    require_known(found)
    return found
