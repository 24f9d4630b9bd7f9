"""A listening socket, and a uvicorn server that limits how long a request may take to arrive.

uvicorn limits the idle time between requests, but not the time in which a request arrives: clients that send a byte now
and then (Slowloris), or nothing, could hold all connections. No public setting of uvicorn limits that time or chooses
the answer to bytes that are not HTTP. So `TimedProtocol` extends uvicorn's own protocol class, and pyproject.toml
admits only the releases of uvicorn that it was tested with.
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
from gistrag.server.protocol import APIError

REQUEST_S = 20.0
"""Seconds in which a request must arrive, headers and body."""
IDLE_S = 5
CONNECTIONS_MAX = 256
"""Beyond it the connection that has waited longest for a request is closed, and a request is refused if none has."""
SHUTDOWN_S = 3
HEADERS = [
    ("cache-control", "no-store"),
    ("cross-origin-resource-policy", "same-origin"),
    ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
]


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
        UsageError: the port is in use, or the address does not belong to this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS_MAX)
    except OSError as error:
        raise UsageError(
            f"cannot listen at {host} port {port} ({error.strerror}); choose others with --host and --port"
        ) from error


def address(listening: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def server(app: Any) -> uvicorn.Server:
    """Return a server for an ASGI application, to be run on a listening socket."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=TimedProtocol,
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
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
    )


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol, with `REQUEST_S` to receive a request and JSON for a request that is not HTTP."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer for the first request, and make room where there are too many connections."""
        super().connection_made(transport)
        self._update_timer()
        if len(self.connections) >= CONNECTIONS_MAX:
            self._close_longest_waiting()

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request, and stop the timer once the request is whole."""
        super().data_received(data)
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP, or too large headers, with an error in JSON, and close the connection."""
        error = APIError(400, "invalid_http", msg)
        if getattr(sys.exception(), "error_status_hint", None) == 431:  # the error of h11 that uvicorn is handling
            error = headers_too_large()
        body = json.dumps(error.body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        with suppress(h11.LocalProtocolError):  # an answer to an earlier request is under way
            for event in (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application must not answer the earlier request any more
            self.cycle.message_event.set()
        self.transport.close()

    def _close_longest_waiting(self) -> None:
        waiting = [(one._deadline.when(), one) for one in self.connections if one is not self and one._deadline]  # type: ignore[union-attr]
        if waiting:
            _, longest = min(waiting, key=lambda pair: pair[0])
            longest.transport.close()
            self.connections.discard(longest)

    def _update_timer(self) -> None:
        is_incomplete = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if not is_incomplete or self.transport.is_closing():
            self._stop_timer()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
