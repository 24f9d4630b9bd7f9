"""Who may talk to a server, how much at once, and about which indexes.

A `Guard` stands before an application and lets through only whole requests: of a known host and origin, small enough,
JSON, with a key where keys are asked for. It reads the body itself, so one that is cut short or longer than it says
never reaches what is behind. Keys are compared by their hashes, and which indexes a key opens is decided here, never
by the request.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gistrag.errors import UsageError
from gistrag.server.protocol import Refusal

HEAD_BYTES_MAX = 16 * 1024
BODY_BYTES_MAX = 1024 * 1024
EXCHANGE_S = 900.0
"""Seconds after which a connection is given up, however little the client has read by then."""

KEY_CHARACTERS_MIN = 16
PUBLIC = ("/", "/healthz")
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask about what.

    Attributes:
        indexes: names of all that is served.
        hosts: names the server goes by; a request that calls it otherwise was lured here (DNS rebinding).
        keys: sha256 of each API key and the indexes it opens; none means that nobody needs one.
    """

    indexes: frozenset[str]
    hosts: frozenset[str] = frozenset(LOCAL_NAMES)
    keys: Mapping[bytes, frozenset[str]] = field(default_factory=dict)

    def opened_by(self, authorization: str) -> frozenset[str]:
        """Return the indexes that an Authorization header opens.

        Raises:
            Refusal: no key, or not one of ours.
        """
        if not self.keys:
            return self.indexes
        scheme, _, key = authorization.partition(" ")
        shown = digest(key.strip()) if scheme.lower() == "bearer" else b""
        opened = [names for known, names in self.keys.items() if hmac.compare_digest(known, shown)]
        if not opened:
            raise Refusal(401, "invalid_api_key", "expected a valid API key in the header Authorization: Bearer KEY")
        return opened[0]


def digest(key: str) -> bytes:
    """Return the sha256 of an API key."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def read_keys(text: str, indexes: Collection[str], *, where: str) -> dict[bytes, frozenset[str]]:
    """Return the keys of a key file: a line each, the key and then the names of the indexes it opens, ``*`` for all.

    Raises:
        UsageError: a short key, one that stands twice, or an index that is not served.
    """
    keys: dict[bytes, frozenset[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        key, *names = line.partition("#")[0].split() or [""]
        if not key:
            continue
        opened = frozenset(indexes if names == ["*"] else names)
        if len(key) < KEY_CHARACTERS_MIN:
            example = secrets.token_urlsafe(24)
            raise UsageError(
                f"line {number} of {where}: expected a key of {KEY_CHARACTERS_MIN} characters or more, got {len(key)}; "
                f"take a random one, such as {example}"
            )
        if not opened or not opened <= set(indexes):
            raise UsageError(
                f"line {number} of {where}: expected names of indexes after the key, or *, got "
                f"{' '.join(names) or 'nothing'}; served are {', '.join(indexes)}"
            )
        if digest(key) in keys:
            raise UsageError(f"line {number} of {where}: the key of an earlier line; give each line its own")
        keys[digest(key)] = opened
    return keys


def key_file(path: Path, indexes: Collection[str]) -> dict[bytes, frozenset[str]]:
    """Return the keys in a file; see `read_keys`.

    Raises:
        UsageError: no such file, one that others can read, or no key in it.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"expected a key file at {path}, found {type(error).__name__}; check --key-file") from error
    if mode & 0o007:
        raise UsageError(
            f"expected a key file that not everybody can read, {path} has mode {mode & 0o777:04o}; run chmod 600 {path}"
        )
    if not (keys := read_keys(text, indexes, where=str(path))):
        raise UsageError(f"expected a line of key and indexes in {path}, found none")
    return keys


class Guard:
    """An ASGI application that lets the right requests through to another one."""

    def __init__(self, app: Application, *, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let it be answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(EXCHANGE_S):
                await self._serve(scope, receive, send)
        except TimeoutError:
            return  # the server closes a connection whose answer was not completed

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = self._inspect(scope)
            body = await read_body(headers, receive) if scope["method"] == "POST" else b""
        except Refusal as refusal:
            await _refuse(send, refusal)
            return
        if body is not None:
            await self._app(scope, _replayed(body, receive), send)

    def _inspect(self, scope: Scope) -> dict[str, str]:
        """Return the headers of a request that may pass, and note in *scope* which indexes it may ask about.

        Raises:
            Refusal: says why it may not.
        """
        size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(k) + len(v) for k, v in scope["headers"])
        if size > HEAD_BYTES_MAX:
            raise headers_too_large()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "").lower()
        if host_name(host) not in self._access.hosts:
            raise Refusal(421, "unknown_host", "this server does not go by that name; see --allow-host")
        if "origin" in headers and headers["origin"].lower() not in (f"http://{host}", f"https://{host}"):
            raise Refusal(
                403,
                "unknown_origin",
                "requests from pages of other origins are not answered; a proxy must pass on Host",
            )
        scope["state"] = {**scope.get("state", {}), "indexes": self._access.indexes}
        if scope["path"] not in PUBLIC:
            scope["state"]["indexes"] = self._access.opened_by(headers.get("authorization", ""))
        return headers


def host_name(host: str) -> str:
    """Return the name in a Host header, without the port.

    >>> host_name("localhost:8000"), host_name("[::1]:8000"), host_name("127.0.0.1")
    ('localhost', '[::1]', '127.0.0.1')
    """
    return re.sub(r":\d*$", "", host)


def headers_too_large() -> Refusal:
    """Return what is told of too long a head."""
    return Refusal(431, "headers_too_large", f"expected headers of at most {HEAD_BYTES_MAX:,} bytes")


async def read_body(headers: Mapping[str, str], receive: Receive) -> bytes | None:
    """Return the whole body of a request, None where the client went away.

    Raises:
        Refusal: no JSON, or too large.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "unsupported_media_type", "expected a body with the header Content-Type: application/json")
    if int(headers.get("content-length", 0)) > BODY_BYTES_MAX:
        raise _too_large()
    body, is_complete = b"", False
    while not is_complete:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        is_complete = not message.get("more_body", False)
        if len(body) > BODY_BYTES_MAX:
            raise _too_large()
    return body


def _too_large() -> Refusal:
    return Refusal(413, "request_too_large", f"expected a body of at most {BODY_BYTES_MAX:,} bytes")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a way to receive a request whose body was read already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


async def _refuse(send: Send, refusal: Refusal) -> None:
    body = json.dumps(refusal.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
