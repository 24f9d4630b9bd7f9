"""`gistrag serve`: indexes over HTTP, for chat front-ends, programs and browsers."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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

logger = logging.getLogger("gistrag")

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
    no_token: Annotated[
        bool,
        typer.Option("--no-token", help="Ask for no key: every user and program of this machine may read all indexes."),
    ] = False,
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
    queue: Annotated[
        int, typer.Option("--queue", min=0, max=10_000, metavar="N", help="Requests that may wait; more are refused.")
    ] = 200,
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

    The API is under /v1, where each index is a model; the page is at /. By default only this machine can connect, with
    a key that is new each time and printed as a link to the page. To keep a key, or to listen at another address, give
    keys with --key-file, or one key for all indexes in the environment variable GISTRAG_API_KEY. SIGHUP reads the key
    file again.
    """
    with ExitStack() as stack:
        with loading(), needs_extra():
            from gistrag.server import app, http, registry
            from gistrag.server.folders import Folders

            is_bare = allow_build is not None and not index and not INDEX.exists()
            folders = {} if is_bare else registry.named(index or [str(INDEX)])
            access = access_for(host, folders, names=allow_host or (), key_file=key_file)
            token = own_token(access, no_token=no_token)
            if allow_build:
                require_builder(host, access)
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
            adding = None
            if allow_build:
                loaded = registry.engine_of(rags, device=device, runtime=runtime, reranker=reranker)
                adding = Folders(allow_build, rags, loaded, gists=gists, device=device)
            access.indexes = rags.keys()
        config = app.ServerConfig(
            together=together,
            queue=queue,
            footnotes=footnotes,
            second_reading=not no_second_reading,
            log_questions=log_questions,
            metrics=metrics,
        )
        _announce(", ".join(rags), http.address(listening), token, access)
        running = http.server(app.application(rags, access=access, config=config, folders=adding))
        until_stopped(running, listening, hang_up=lambda: hang_up(running, access, key_file))


@contextmanager
def needs_extra() -> Iterator[None]:
    """Name what has to be installed if a module is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed; run pip install 'gistrag[server]'") from error


def _announce(names: str, url: str, token: str, access: Access) -> None:
    say(f"serving {names or 'no index yet'} at {url}; Ctrl-C stops")
    if token:
        say(f"open {url}/#key={token}", f"programs use the API key {token}")
    if not access.keys:
        say("every user and program of this machine may read all of it (--no-token)")


def own_token(access: Access, *, no_token: bool) -> str:
    """Give a server without keys a new one that opens everything, and return it; "" where it needs none.

    Raises:
        UsageError: keys are given, and none is wanted.
    """
    from gistrag.server.auth import ALL, digest

    if no_token and access.keys:
        raise UsageError(f"--no-token contradicts the keys; omit it, or --key-file and {KEY}")
    if no_token or access.keys:
        return ""
    token = secrets.token_urlsafe(24)
    access.keys = {digest(token): ALL}
    return token


def hang_up(running: uvicorn.Server, access: Access, path: Path | None) -> None:
    """Do what SIGHUP asks for: read the key file again, or end where there is none, as when a terminal is closed.

    A file that cannot be used changes no key.
    """
    if path is None:
        running.should_exit = True
        return
    try:
        access.keys = keys_of(path, access.indexes)
        logger.warning("%d keys are read from %s", len(access.keys), path)
    except UsageError as error:
        logger.error("the keys stay as they are: %s", error)


def until_stopped(running: uvicorn.Server, listening: socket.socket, *, hang_up: Callable[[], None]) -> None:
    """Serve until Ctrl-C or SIGTERM, which end a server without an error; SIGHUP calls *hang_up*."""
    try:
        if hasattr(signal, "SIGHUP"):  # not on Windows
            signal.signal(signal.SIGHUP, lambda *_: hang_up())
        running.run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise


def access_for(host: str, indexes: Collection[str], *, names: Sequence[str], key_file: Path | None) -> Access:
    """Return who may ask a server at *host*: clients with a key of the file or the environment.

    Args:
        host: address or name to listen at.
        indexes: names of the served indexes.
        names: further names of this machine.
        key_file: see `gistrag.server.auth.key_file`; the key in the environment variable GISTRAG_API_KEY opens all.

    Raises:
        UsageError: other machines could reach the server, and there is no key.
    """
    from gistrag.server.auth import LOCAL_NAMES, Access

    keys = keys_of(key_file, indexes)
    if not is_local(host) and not keys:
        raise UsageError(
            f"expected API keys, because other machines can reach {host}; give a file with --key-file, or set {KEY}"
        )
    own = f"[{host}]" if ":" in host else host
    hosts = frozenset(name.lower() for name in (*LOCAL_NAMES, own, *names))
    return Access(indexes=frozenset(indexes), hosts=hosts, keys=keys)


def keys_of(path: Path | None, indexes: Collection[str]) -> dict[bytes, frozenset[str]]:
    """Return the keys in a file and in the environment, see `gistrag.server.auth.read_keys`.

    Raises:
        UsageError: one of them is none.
    """
    from gistrag.server.auth import key_file, read_keys

    keys = key_file(path, indexes) if path else {}
    if given := os.environ.get(KEY):
        keys |= read_keys(f"{given} *", indexes, where=f"the environment variable {KEY}")
    return keys


def require_builder(host: str, access: Access) -> None:
    """Check that somebody may add folders, and nobody from elsewhere.

    Raises:
        UsageError: other machines could reach the server, or no key opens all indexes.
    """
    from gistrag.server.auth import ALL

    if not is_local(host):
        raise UsageError(f"expected --host 127.0.0.1 with --allow-build, got {host}, which other machines can reach")
    if ALL not in access.keys.values():
        raise UsageError(
            "expected a key that opens all indexes (*) with --allow-build; add one to the key file, or omit --no-token"
        )


def is_local(host: str) -> bool:
    """Return whether only this machine can reach an address.

    >>> [is_local(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "docs.example.org")]
    [True, True, True, False, False]
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
