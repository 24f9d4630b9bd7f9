"""`gistrag mcp`: indexes as tools for agents, over standard input and output."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from gistrag.cli import command
from gistrag.errors import UsageError

app = command.application()


@app.command(
    "mcp",
    epilog=command.examples("gistrag mcp", "gistrag mcp --index manual=index/ --index notes=notes-index/"),
)
def mcp(
    index: Annotated[
        list[str] | None,
        typer.Option("--index", metavar="NAME=FOLDER", help="Index folder and its name for agents; repeatable."),
    ] = None,
    reranker: command.RerankerName = None,
    device: command.Device = None,
    quiet: command.Quiet = False,
    debug: command.Debug = False,
) -> None:
    """Offer indexes to an agent as tools of the Model Context Protocol: search, ask, list_documents, status.

    An MCP client, such as an editor or a desktop assistant, starts this command and uses it over standard input and
    output. The command ends when the client does.
    """
    logging.getLogger().addHandler(logging.NullHandler())  # without a handler, the SDK prints every message twice
    try:
        from gistrag.server import mcp, registry
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed; run pip install 'gistrag[mcp]'") from error
    with registry.opened(registry.named(index or [str(command.INDEX)]), device=device, reranker=reranker) as rags:
        command.say(f"offering {', '.join(rags)} to an MCP client on standard input")
        mcp.server(rags).run("stdio")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve an agent until it disconnects, and return the exit code."""
    return command.run(app, argv, program="gistrag mcp")


if __name__ == "__main__":
    sys.exit(main())
