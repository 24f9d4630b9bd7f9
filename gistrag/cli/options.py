"""The options that several commands share, as types for their parameters."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from gistrag.settings import Mode, RuntimeName

logger = logging.getLogger("gistrag")

INDEX = Path("index")


def _silence(is_given: bool) -> bool:
    if is_given:
        logger.setLevel(logging.ERROR)
    return is_given


def _explain_all(is_given: bool) -> bool:
    if is_given:
        logger.setLevel(logging.DEBUG)
    return is_given


# Quiet and Debug act through their callbacks: these set the level of the logger, which `say` and `run` read.
Index = Annotated[Path, typer.Option("--index", metavar="FOLDER", help="Folder of the index.")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="Device of the models, such as cpu or cuda:0.")
]
RuntimeOption = Annotated[
    RuntimeName,
    typer.Option(
        "--runtime", help="What runs the model: cpu has 8-bit weights and needs no torch; auto takes it without a GPU."
    ),
]
NoSecondReading = Annotated[
    bool, typer.Option("--no-second-reading", help="Do not read the passages again where an answer is unsure.")
]
NoGists = Annotated[
    bool, typer.Option("--no-gists", help="Do not make missing gists in the background while questions are answered.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
Quiet = Annotated[bool, typer.Option("--quiet", callback=_silence, help="Print results and errors only.")]
Debug = Annotated[bool, typer.Option("--debug", callback=_explain_all, help="Show the traceback of an error.")]
TopK = Annotated[int, typer.Option("--top-k", min=1, metavar="N", help="Number of chunks to answer from.")]
AnswerMode = Annotated[
    Mode,
    typer.Option(
        "--mode", help="gist loads gist caches, text reads the text, hybrid reads only the best chunk as text."
    ),
]
Scope = Annotated[str | None, typer.Option("--scope", metavar="PATH", help="Answer from all chunks of one document.")]
Filters = Annotated[
    list[str] | None,
    typer.Option(
        "--filter", metavar="KEY=VALUE", help="Search only this path, kind, heading, date, from, …; repeatable."
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Most tokens of an answer.")]
RerankerName = Annotated[
    str | None,
    typer.Option("--reranker", metavar="MODEL", help="Cross-encoder that reranks the chunks: hub id or folder."),
]

# The models: a build takes those of the index where an option is left out, every other command has a default.
MODEL = typer.Option("--model", metavar="MODEL", help="Base model: hub id, folder or catalogue name.")
EMBEDDER = typer.Option("--embedder", metavar="MODEL", help="Embedding model: hub id, folder or catalogue name.")
QUANTIZE = typer.Option("--quantize", help="nf4 loads the base model in 4 bits.")
ModelPlace = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Where the base model of the index is now: folder, hub id or name."),
]
AdapterPlace = Annotated[
    str | None, typer.Option("--adapter", metavar="ADAPTER", help="Where its adapter is now: folder or name.")
]
EmbedderPlace = Annotated[
    str | None,
    typer.Option("--embedder", metavar="MODEL", help="Where its embedding model is now: folder, hub id or name."),
]
BaseModel = Annotated[str, MODEL]
Quantize = Annotated[Literal["none", "nf4"], QUANTIZE]
