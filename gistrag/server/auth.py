"""Access control: which requests reach the application, and which indexes they may ask about.

`Guard` stands before the application and lets only whole, allowed requests through: a known host and origin, a valid
key where keys are required, JSON, and a size within the limits. It reads the body itself, so a truncated or overlong
body never reaches the application. Keys are compared by their hashes, and the server decides which indexes a key
opens, never the request.

Two middlewares of Starlette are left out: `TrustedHostMiddleware` answers 400 in plain text where this API answers 421
in JSON, and `AuthenticationMiddleware` cannot stand between the check of the headers and the reading of the body, where
a missing key has to be refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gistrag.errors import UsageError
from gistrag.server.protocol import APIError

HEAD_BYTES_MAX = 16 * 1024
BODY_BYTES_MAX = 1024 * 1024
EXCHANGE_S = 900.0
"""Seconds after which a connection is closed, even if the client has not read the whole answer."""

KEY_CHARACTERS_MIN, KEY_DIFFERENT_MIN = 16, 8
ALL = frozenset({"*"})
"""What a key opens that opens every index, also one that is added later."""
PUBLIC = re.compile(r"/|/healthz|/readyz|/static/.*")
"""Paths that need no key: the page, which asks for one, and whether the server runs and can answer."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(kw_only=True)
class Access:
    """Who may ask about which indexes; `keys` may be replaced while a server runs.

    Attributes:
        indexes: names of all served indexes.
        hosts: names of this server; a request with another Host header comes from a page that lured a browser here
            (DNS rebinding).
        keys: sha256 of each API key and the indexes it opens, or `ALL`; empty: no request needs a key.
    """

    indexes: Set[str]
    hosts: frozenset[str] = frozenset(LOCAL_NAMES)
    keys: Mapping[bytes, frozenset[str]] = field(default_factory=dict)

    def opened_by(self, authorization: str) -> Opened:
        """Return what an Authorization header opens.

        Raises:
            APIError: the header holds no valid key.
        """
        if not self.keys:
            return Opened(self.indexes)
        given = _bearer(authorization)
        opened = [(known, names) for known, names in self.keys.items() if hmac.compare_digest(known, given)]
        if not opened:
            raise APIError(401, "invalid_api_key", "expected a valid API key in the header Authorization: Bearer KEY")
        (key, names), *_ = opened
        return Opened(self.indexes, key.hex(), True) if names == ALL else Opened(names, key.hex())


@dataclass(frozen=True)
class Opened:
    """What a client may do.

    Attributes:
        indexes: names of those it may ask; client: its key, as a hash, "" for all clients without one.
        may_build: whether it may add folders, which takes a key that opens all indexes.
    """

    indexes: Set[str]
    client: str = ""
    may_build: bool = False


def _bearer(authorization: str) -> bytes:
    """Return the sha256 of the key in an Authorization header, nothing where there is none."""
    scheme, _, key = authorization.partition(" ")
    return digest(key.strip()) if scheme.lower() == "bearer" else b""


def digest(key: str) -> bytes:
    """Return the sha256 of an API key."""
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def read_keys(text: str, indexes: Collection[str], *, where: str) -> dict[bytes, frozenset[str]]:
    """Return the keys in a text: one a line, followed by the names of the indexes it opens, or ``*`` for all.

    Args:
        indexes: names of all served indexes.
        where: source of the text, for error messages.

    Raises:
        UsageError: a short or repeated key, or the name of an index that is not served.
    """
    keys: dict[bytes, frozenset[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        key, *names = line.partition("#")[0].split() or [""]
        if not key:
            continue
        opened = frozenset(names)
        if len(key) < KEY_CHARACTERS_MIN or len(set(key)) < KEY_DIFFERENT_MIN:
            raise UsageError(
                f"line {number} of {where}: expected a key of {KEY_CHARACTERS_MIN} characters or more, "
                f"{KEY_DIFFERENT_MIN} of them different, got {len(key)} and {len(set(key))}; "
                f"use a random one, such as {secrets.token_urlsafe(24)}"
            )
        if not opened or (opened != ALL and not opened <= set(indexes)):
            raise UsageError(
                f"line {number} of {where}: expected names of indexes after the key, or *, got "
                f"{' '.join(names) or 'nothing'}; this server has {', '.join(indexes)}"
            )
        if digest(key) in keys:
            raise UsageError(f"line {number} of {where}: this key is already on an earlier line; use another one")
        keys[digest(key)] = opened
    return keys


def key_file(path: Path, indexes: Collection[str]) -> dict[bytes, frozenset[str]]:
    """Return the keys in a file; see `read_keys`.

    Raises:
        UsageError: the file cannot be read, is readable by everybody, or holds no key.
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
        raise UsageError(f"expected a line with a key and its indexes in {path}, found none")
    return keys


class Guard:
    """An ASGI middleware that passes allowed requests on to an application and answers all others itself.

    Args:
        refused: called for each request that is answered here, with the address it came from.
    """

    def __init__(
        self, app: ASGIApp, *, access: Access, refused: Callable[[str, Scope, APIError], None] = lambda *_: None
    ) -> None:
        self._app, self._access, self._refused = app, access, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(EXCHANGE_S):
                await self._serve(scope, receive, send)
        except TimeoutError:
            return  # uvicorn closes a connection whose answer is incomplete

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            headers = self._check(scope)
            body = await read_body(headers, receive) if scope["method"] == "POST" else b""
        except APIError as error:
            self._refused((scope.get("client") or ("nowhere",))[0], scope, error)
            closes = {"connection": "close"} if error.code == "invalid_http" else None
            await JSONResponse(error.body(), error.status, closes)(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replayed(body, receive), send)

    def _check(self, scope: Scope) -> Headers:
        """Return the headers of an allowed request, and record in ``state.opened`` what its client may do.

        Raises:
            APIError: the request is not allowed.
        """
        size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(k) + len(v) for k, v in scope["headers"])
        if size > HEAD_BYTES_MAX:
            raise headers_too_large()
        headers = Headers(scope=scope)
        if "content-length" in headers and "transfer-encoding" in headers:
            raise APIError(400, "invalid_http", "expected a body with Content-Length or in chunks, not both")
        host = headers.get("host", "").lower()
        if host_name(host) not in self._access.hosts:
            raise APIError(421, "unknown_host", "this server does not go by that name; see --allow-host")
        if headers.get("origin", f"http://{host}").lower() not in (f"http://{host}", f"https://{host}"):
            raise APIError(
                403,
                "unknown_origin",
                "requests from pages of other origins are not answered; a proxy must pass on Host",
            )
        is_public = PUBLIC.fullmatch(scope["path"])
        if not is_public and headers.get("sec-fetch-site") == "cross-site":
            raise APIError(403, "unknown_origin", "requests from pages of other origins are not answered")
        opened = Opened(self._access.indexes) if is_public else self._access.opened_by(headers.get("authorization", ""))
        scope["state"] = {**scope.get("state", {}), "opened": opened}
        return headers


def host_name(host: str) -> str:
    """Return the name in a Host header, without the port.

    >>> host_name("localhost:8000"), host_name("[::1]:8000"), host_name("127.0.0.1")
    ('localhost', '[::1]', '127.0.0.1')
    """
    return re.sub(r":\d*$", "", host)


def headers_too_large() -> APIError:
    """Return the error for a request whose line and headers exceed `HEAD_BYTES_MAX`."""
    return APIError(431, "headers_too_large", f"expected headers of at most {HEAD_BYTES_MAX:,} bytes")


async def read_body(headers: Mapping[str, str], receive: Receive) -> bytes | None:
    """Return the whole body of a request, or None if the client disconnects first.

    Raises:
        APIError: the body is not JSON, or larger than `BODY_BYTES_MAX`.
    """
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise APIError(415, "unsupported_media_type", "expected a body with the header Content-Type: application/json")
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


def _too_large() -> APIError:
    return APIError(413, "request_too_large", f"expected a body of at most {BODY_BYTES_MAX:,} bytes")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a way to receive a request whose body is already read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
