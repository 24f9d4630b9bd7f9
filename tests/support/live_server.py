"""A server of tiny indexes in a thread, at a real socket, and a client that may send anything."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gistrag.engine import Engine
from gistrag.rag import GistRAG
from gistrag.server import http
from gistrag.server.app import ServerConfig, application
from gistrag.server.auth import Access
from gistrag.server.folders import Folders

CHAT = "/v1/chat/completions"
HONEY = {"model": "manual", "messages": [{"role": "user", "content": "Where is the honey?"}], "max_tokens": 6}
STREAMED = {**HONEY, "stream": True}
TEXTS = {
    "bees.md": "# Bees\n\nBees gather nectar in spring.\n\n## Honey\n\nHoney is kept in combs of wax for winter.\n",
    "mills.md": "# Mills\n\nThe mill stands by the river and grinds the wheat of the whole valley.\n",
}


def build(folder: Path, engine: Engine, texts: Mapping[str, str] = TEXTS, **settings: Any) -> Path:
    """Return an index of some texts, made under *folder*."""
    documents = folder / "docs"
    documents.mkdir(parents=True)
    for name, text in texts.items():
        (documents / name).write_text(text, "utf-8")
    GistRAG.from_folder(documents, index=folder / "index", engine=engine, **{"gists": "now", **settings}).close()
    return folder / "index"


@contextmanager
def serving(
    indexes: Mapping[str, Path],
    engine: Engine,
    *,
    access: Mapping[str, Any] | None = None,
    root: Path | None = None,
    **config: Any,
) -> Iterator[str]:
    """Serve indexes for the length of the block; yield the URL of the server.

    Args:
        root: folder whose folders may be added.
    """
    registry = {name: GistRAG.open(path, engine=engine) for name, path in indexes.items()}
    folders = Folders(root, registry, engine) if root else None
    allowed = Access(**{"indexes": registry.keys(), **(access or {})})
    with http.listen("127.0.0.1", 0) as listening:
        running = http.server(application(registry, access=allowed, config=ServerConfig(**config), folders=folders))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield http.address(listening)
        finally:
            running.should_exit = True
            thread.join()
            for rag in registry.values():
                rag.close()


def connect(url: str, *, timeout_s: float = 60) -> socket.socket:
    """Return a connection to a server."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    return socket.create_connection((host, port), timeout=timeout_s)


def exchange(url: str, data: bytes, *, is_all: bool = False, timeout_s: float = 60) -> int | None:
    """Return the status of the response to some bytes, or None if the server closes the connection without one.

    Args:
        url: address of the server.
        data: a request, or something like one.
        is_all: signal the end of the data, in case the server waits for more; a later response may get lost.
        timeout_s: how long to wait for an answer.
    """
    with connect(url, timeout_s=timeout_s) as client, suppress(OSError):
        client.sendall(data)
        if is_all:
            client.shutdown(socket.SHUT_WR)
        return status_in(client.recv(65536))
    return None


def hang_up(url: str, data: bytes, *, rudely: bool) -> None:
    """Send some bytes and disconnect, rudely with a reset."""
    with connect(url) as client:
        client.sendall(data)
        if rudely:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def status_in(head: bytes) -> int | None:
    """Return the status in the first line of a response."""
    parts = head.split(b" ", 2)
    return int(parts[1]) if parts[0].startswith(b"HTTP/1.1") else None


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    """Return a request as bytes; write - in header names as _; an empty value leaves a header out."""
    given = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(body))}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in given.items() if value]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode("latin-1") + body


def error(response: Any) -> tuple[int, str]:
    """Return status and code of an error, which must have the form of OpenAI's API."""
    body = response.json()["error"]
    assert body.keys() == {"message", "type", "param", "code"}
    assert "/tmp" not in body["message"]
    return response.status_code, body["code"]
