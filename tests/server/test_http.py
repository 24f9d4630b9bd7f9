"""The socket: which requests pass, how long a request may take, and what is answered to bytes that are not HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.live_server import CHAT, STREAMED, connect, error, exchange, request

from gistrag.answering import judge
from gistrag.server import auth, http

pytestmark = pytest.mark.usefixtures("no_early_end")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (request("GET", "/", Host="evil.example"), 421),
        (request("GET", "/healthz", Host="localhost.evil.example:80"), 421),
        (request("GET", "/v1/models", Origin="http://evil.example"), 403),
        (request("POST", CHAT, b"{}", Origin="null"), 403),
        (request("POST", CHAT, b"{}", Content_Type="text/plain"), 415),
        (request("POST", CHAT, b"{}", Content_Type=""), 415),
        (request("POST", CHAT, b"{}", Content_Type="application/x-www-form-urlencoded"), 415),
        (request("POST", CHAT, Content_Length=str(2**21)), 413),
        (request("POST", CHAT, b"ffffff\r\n" + b" " * 0xFFFFFF, Content_Length="", Transfer_Encoding="chunked"), 413),
        (request("GET", "/", X_Long="a" * 20_000), 431),
        (request("GET", "/?" + "a" * 20_000), 431),
        (request("POST", CHAT, b'{"model": '), 400),
        (request("POST", CHAT, b"[" * 100_000), 400),
        (request("POST", CHAT, b"\xff\xfe"), 400),
        (b"hello\r\n\r\n", 400),
        (request("POST", CHAT, b"2\r\n{}\r\n0\r\n\r\n", Transfer_Encoding="chunked"), 400),
        (request("GET", "/v1/models", Sec_Fetch_Site="cross-site"), 403),
        (request("GET", "/", Sec_Fetch_Site="cross-site"), 200),
        (request("GET", "/healthz", Origin="http://localhost"), 200),
        (request("GET", "/healthz", Host="[::1]:8000"), 200),
    ],
)  # fmt: skip
def test_the_door(url: str, data: bytes, expected: int) -> None:
    """An unknown host or origin, a body that is not JSON, and too much data are refused."""
    assert exchange(url, data) == expected


def test_errors_are_in_one_form(url: str, client: Any) -> None:
    """Even bytes that are not HTTP get an error in the form of OpenAI's API."""
    with connect(url) as raw:
        raw.sendall(b"hello\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(65536), b""))

    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    with connect(url) as raw:  # a head that comes in parts
        raw.sendall(b"GET / HTTP/1.1\r\nX-Long: ")
        for _ in range(5):
            time.sleep(0.01)
            raw.sendall(b"a" * 4000)
        assert raw.recv(12) == b"HTTP/1.1 431"
    assert error(client.get("/", headers={"Host": "evil.example"})) == (421, "unknown_host")


def test_slow_requests_are_closed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection whose request does not arrive in time is closed, also after an earlier request."""
    monkeypatch.setattr(http, "REQUEST_S", 0.5)
    health = request("GET", "/healthz", Content_Length="", Content_Type="")
    begun = [[b""], [b"GET / HT"], [request("POST", CHAT, b"{", Content_Length="100")], [health, b"GET /"]]

    for parts in begun:
        with connect(url, timeout_s=30) as raw:
            for data in parts:
                raw.sendall(data)
                left = raw.recv(65536)
            while left:
                left = raw.recv(65536)

    assert exchange(url, health) == 200


def test_two_lengths_end_the_connection(url: str) -> None:
    """A body with a length and in chunks is read differently by different programs; nothing after it is answered."""
    doubtful = request("POST", CHAT, b"2\r\n{}\r\n0\r\n\r\n", Transfer_Encoding="chunked")
    with connect(url) as raw:
        raw.sendall(doubtful + request("GET", "/healthz"))
        answers = b"".join(iter(lambda: raw.recv(65536), b""))

    assert answers.startswith(b"HTTP/1.1 400")
    assert answers.count(b"HTTP/1.1") == 1


def test_idle_connections_keep_nobody_out(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are too many connections, the one that has waited longest is closed and the newest is answered."""
    monkeypatch.setattr(http, "CONNECTIONS_MAX", 20)
    health = request("GET", "/healthz", Content_Length="", Content_Type="")
    idle = [connect(url) for _ in range(40)]

    assert [exchange(url, health) for _ in range(5)] == [200] * 5

    idle[0].settimeout(10)
    assert idle[0].recv(1) == b""
    for one in idle:
        one.close()


def test_an_exchange_that_takes_too_long_is_closed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection is closed at the limit, even in the middle of an answer."""
    monkeypatch.setattr(auth, "EXCHANGE_S", 0.3)
    monkeypatch.setattr(judge, "generate_steps", slowly)

    with connect(url, timeout_s=30) as raw:
        raw.sendall(request("POST", CHAT, json.dumps(STREAMED).encode()))
        received = b""
        while data := raw.recv(65536):
            received += data

    assert b"[DONE]" not in received


def slowly(*given: object, **options: object) -> Iterator[int]:
    """Generate ten letters a second."""
    for letter in b"a" * 20:
        time.sleep(0.1)
        yield letter
