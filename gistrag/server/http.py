"""A socket, and HTTP/1.1 on it that does not wait for ever.

The one door to uvicorn and h11. uvicorn bounds how long a connection may idle between requests; how long a request may
take to arrive is bounded here, so that clients who send a byte now and then cannot hold all the connections.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from contextlib import suppress
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gistrag.errors import UsageError
from gistrag.server.auth import HEAD_BYTES_MAX, headers_too_large
from gistrag.server.protocol import Refusal

REQUEST_S = 20.0
"""Seconds in which a request must have come, head and body."""
IDLE_S = 5
CONNECTIONS_MAX = 256
GOODBYE_S = 5
HEADERS = [
    ("cache-control", "no-store"),
    ("cross-origin-resource-policy", "same-origin"),
    ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
]


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
        UsageError: it is taken, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS_MAX)
    except OSError as error:
        raise UsageError(
            f"cannot listen at {host} port {port} ({error.strerror}); name others with --host and --port"
        ) from error


def address(listening: socket.socket) -> str:
    """Return the address of a socket as a browser takes it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server(app: Any) -> uvicorn.Server:
    """Return a server for an ASGI application, to be run on a listening socket."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=ImpatientProtocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            headers=HEADERS,
            h11_max_incomplete_event_size=HEAD_BYTES_MAX,
            limit_concurrency=CONNECTIONS_MAX,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=GOODBYE_S,
        )
    )


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with a limit to how long a request may take to arrive."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._await_request()

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request, and wait on while it is not whole."""
        super().data_received(data)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or has too long a head, in the form of all other errors, and close."""
        refusal = Refusal(400, "invalid_http", msg)
        if getattr(sys.exception(), "error_status_hint", None) == 431:  # h11's, which uvicorn is handling
            refusal = headers_too_large()
        body = json.dumps(refusal.body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        with suppress(h11.LocalProtocolError):  # an answer to an earlier request is under way
            for event in (
                h11.Response(status_code=refusal.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the request before it is not answered any more
            self.cycle.message_event.set()
        self.transport.close()

    def _await_request(self) -> None:
        is_due = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if not is_due or self.transport.is_closing():
            self._stop_waiting()
        elif self._patience is None:
            self._patience = self.loop.call_later(REQUEST_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
