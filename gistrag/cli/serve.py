"""`gistrag serve`: indexes over HTTP, for chat front-ends, programs and browsers."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gistrag.cli.exit_codes import INTERRUPTED
from gistrag.cli.options import (
    INDEX,
    AdapterPlace,
    Debug,
    Device,
    EmbedderPlace,
    ModelPlace,
    NoGists,
    NoSecondReading,
    Quiet,
    RerankerName,
    RuntimeOption,
)
from gistrag.cli.output import loading, say
from gistrag.errors import UsageError

if TYPE_CHECKING:
    import uvicorn

    from gistrag.index.gist_worker import When
    from gistrag.server.auth import Access

KEY = "GISTRAG_API_KEY"


EXAMPLES = (
    "gistrag serve",
    "gistrag serve --index manual=index/ --index notes=notes-index/ --port 8080",
    "gistrag serve --allow-build ~/documents",
    "gistrag serve --host 0.0.0.0 --allow-host docs.example.org --key-file keys.txt",
)


def serve(
    index: Annotated[
        list[str] | None,
        typer.Option("--index", metavar="NAME=FOLDER", help="Index folder and its model name; repeatable."),
    ] = None,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="N", help="Port to listen at; 0: a free one.")
    ] = 8000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="Another host name of this machine; repeatable."),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", metavar="FILE", help="File of API keys and the indexes they open."),
    ] = None,
    allow_build: Annotated[
        Path | None,
        typer.Option(
            "--allow-build", metavar="FOLDER", help="Folders in this one may be added in the page, on this machine."
        ),
    ] = None,
    together: Annotated[
        int,
        typer.Option(
            "--together", min=1, max=64, metavar="N", help="Answers to generate at the same time, interleaved."
        ),
    ] = 8,
    footnotes: Annotated[bool, typer.Option("--footnotes", help="End every answer with its sources.")] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="Serve Prometheus metrics at /metrics.")] = False,
    log_questions: Annotated[bool, typer.Option("--log-questions", help="Write questions to the log.")] = False,
    reranker: RerankerName = None,
    no_second_reading: NoSecondReading = False,
    no_gists: NoGists = False,
    model: ModelPlace = None,
    adapter: AdapterPlace = None,
    embedder: EmbedderPlace = None,
    device: Device = None,
    runtime: RuntimeOption = "auto",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve indexes over HTTP: OpenAI-compatible API and web page.

    The API is under /v1, where each index is a model; the page is at /. By default only this machine can connect. To
    listen at another address, give API keys with --key-file, or one key for all indexes in the environment variable
    GISTRAG_API_KEY.
    """
    with ExitStack() as stack:
        with loading():
            try:
                from gistrag.server import app, http, registry
                from gistrag.server.auth import digest
                from gistrag.server.folders import Folders
            except ModuleNotFoundError as error:
                raise UsageError(f"{error.name} is not installed; run pip install 'gistrag[server]'") from error
            is_bare = allow_build is not None and not index and not INDEX.exists()
            folders = {} if is_bare else registry.named(index or [str(INDEX)])
            access = access_for(host, folders, names=allow_host or (), key_file=key_file)
            key = build_key(host, access) if allow_build else ""
            listening = stack.enter_context(http.listen(host, port))
            gists: When = "none" if no_gists else "background"
            opened = registry.opened(
                folders,
                gists=gists,
                device=device,
                runtime=runtime,
                reranker=reranker,
                model=model,
                adapter=adapter,
                embedder=embedder,
            )
            rags = stack.enter_context(opened)
            loaded = (
                registry.engine_of(rags, device=device, runtime=runtime, reranker=reranker) if allow_build else None
            )
            adding = Folders(allow_build, rags, loaded, gists=gists, device=device) if allow_build and loaded else None
            access = replace(access, indexes=rags.keys(), build_key=digest(key) if key else b"")
        config = app.ServerConfig(
            together=together,
            footnotes=footnotes,
            second_reading=not no_second_reading,
            log_questions=log_questions,
            metrics=metrics,
        )
        _announce(", ".join(rags), http.address(listening), key)
        running = http.server(app.application(rags, access=access, config=config, folders=adding))
        until_stopped(running, listening)


def _announce(names: str, url: str, key: str) -> None:
    say(f"serving {names or 'no index yet'} at {url}; Ctrl-C stops")
    if key:
        say(f"to add folders, open {url}/#key={key}")


def until_stopped(running: uvicorn.Server, listening: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM, which end a server without an error."""
    try:
        running.run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise


def access_for(host: str, indexes: Collection[str], *, names: Sequence[str], key_file: Path | None) -> Access:
    """Return who may ask a server at *host*: everybody on a local address, else clients with a key.

    Args:
        host: address or name to listen at.
        indexes: names of the served indexes.
        names: further names of this machine.
        key_file: see `gistrag.server.auth.key_file`; the key in the environment variable GISTRAG_API_KEY opens all.

    Raises:
        UsageError: other machines could reach the server, and there is no key.
    """
    from gistrag.server.auth import LOCAL_NAMES, Access, read_keys
    from gistrag.server.auth import key_file as keys_in

    keys = keys_in(key_file, indexes) if key_file else {}
    if given := os.environ.get(KEY):
        keys |= read_keys(f"{given} *", indexes, where=f"the environment variable {KEY}")
    if not is_local(host) and not keys:
        raise UsageError(
            f"expected API keys, because other machines can reach {host}; give a file with --key-file, or set {KEY}"
        )
    own = f"[{host}]" if ":" in host else host
    hosts = frozenset(name.lower() for name in (*LOCAL_NAMES, own, *names))
    return Access(indexes=frozenset(indexes), hosts=hosts, keys=keys)


def build_key(host: str, access: Access) -> str:
    """Return a new key for adding folders, "" where a key that opens all indexes does it.

    Raises:
        UsageError: other machines could reach the server, or no key opens all indexes.
    """
    from gistrag.server.auth import ALL

    if not is_local(host):
        raise UsageError(f"expected --host 127.0.0.1 with --allow-build, got {host}, which other machines can reach")
    if access.keys and ALL not in access.keys.values():
        raise UsageError("expected a key that opens all indexes (*) with --allow-build; add one to the key file")
    return "" if access.keys else secrets.token_urlsafe(24)


def is_local(host: str) -> bool:
    """Return whether only this machine can reach an address.

    >>> [is_local(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "docs.example.org")]
    [True, True, True, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
