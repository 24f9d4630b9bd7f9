"""`gistrag mcp`: indexes as tools for agents, over standard input and output."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from gistrag.cli.options import (
    INDEX,
    AdapterPlace,
    Debug,
    Device,
    EmbedderPlace,
    ModelPlace,
    Quiet,
    RerankerName,
    RuntimeOption,
)
from gistrag.cli.output import say
from gistrag.errors import UsageError

EXAMPLES = (
    "gistrag mcp",
    "gistrag mcp --index manual=index/ --index notes=notes-index/",
)


def mcp(
    index: Annotated[
        list[str] | None,
        typer.Option("--index", metavar="NAME=FOLDER", help="Index folder and its name for agents; repeatable."),
    ] = None,
    reranker: RerankerName = None,
    model: ModelPlace = None,
    adapter: AdapterPlace = None,
    embedder: EmbedderPlace = None,
    device: Device = None,
    runtime: RuntimeOption = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve indexes to an agent as MCP tools.

    The tools are search, ask, list_documents and status. An MCP client, such as an editor or a desktop assistant,
    starts this command and talks to it over standard input and output. The command ends with the client.
    """
    logging.getLogger().addHandler(logging.NullHandler())  # without a handler, the SDK prints every message twice
    try:
        from gistrag.server import mcp, registry
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed; run pip install 'gistrag[mcp]'") from error
    with registry.opened(
        registry.named(index or [str(INDEX)]),
        device=device,
        runtime=runtime,
        reranker=reranker,
        model=model,
        adapter=adapter,
        embedder=embedder,
    ) as rags:
        say(f"serving {', '.join(rags)} to an MCP client on standard input")
        mcp.server(rags).run("stdio")
