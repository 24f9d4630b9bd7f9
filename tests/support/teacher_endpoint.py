"""A chat endpoint on this machine with scripted replies, and the replies of a bad one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

import pytest


def said(text: str) -> bytes:
    """Return the body of a chat completion."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


SLOW = {"retry-after-ms": ""}
"""Headers of a reply that leaves the pause before the next attempt to the client."""


class Endpoint:
    """A chat endpoint that replies as *reply* says, which gets the number of a request, from 0, and its body.

    A reply is a text, or a status with headers and a body, or "hang" for no answer at all. After an error the client
    may try again at once.
    """

    def __init__(self, reply: Callable[[int, dict[str, Any]], Any]) -> None:
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.is_over = threading.Event()
        self._numbers = count()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                endpoint._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        number = next(self._numbers)
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.bodies.append(body)
        self.headers.append({name.title(): value for name, value in handler.headers.items()})
        reply = self.reply(number, body)
        if reply == "hang":
            self.is_over.wait(30)
            return
        status, headers, content = (200, {}, said(reply)) if isinstance(reply, str) else reply
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "retry-after-ms": "1", **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    def close(self) -> None:
        """Stop serving, and let go of who hangs."""
        self.is_over.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Endpoint]]:
    """Start endpoints that end with the test."""
    monkeypatch.setenv("no_proxy", "*")
    endpoints: list[Endpoint] = []

    def start(reply: Callable[[int, dict[str, Any]], Any]) -> Endpoint:
        endpoints.append(Endpoint(reply))
        return endpoints[-1]

    yield start
    for endpoint in endpoints:
        endpoint.close()


RUBBISH = [
    (200, {}, b"<html>welcome</html>"),
    (200, {}, b'{"choices": []}'),
    (200, {}, b"[1, 2]"),
    (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
    (200, {}, said("  ")),
    (200, {}, b"\xff\xfe"),
    (500, {}, b"oops"),
    (503, {}, b""),
    (429, {}, b""),
]
