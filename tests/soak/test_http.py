"""Promise 13: whatever comes in over HTTP, the server lives, says in its own form what is wrong, and answers on."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.live_server import build, connect, exchange, hang_up, request, serving

from gistrag.engine import Engine

httpx = pytest.importorskip("httpx2")
openai = pytest.importorskip("openai")

CHAT = "/v1/chat/completions"
PATHS = (
    "/",
    "/healthz",
    "/v1/models",
    "/v1/documents",
    "/v1/passages/1",
    "/v1/retrieve",
    CHAT,
    "/metrics",
    "/v1/files",
)
ASKED = {"model": "manual", "messages": [{"role": "user", "content": "Where is the honey?"}], "max_tokens": 3}
VALUES: list[Any] = [
    None, True, -1, 0, 65, 10**30, 1e308, "", " ", "a" * 5000, "\x00", "\u202e", "*" * 300, [], [[]], {}, [None],
    {"a": {}}, "../../etc/passwd", "'; DROP TABLE chunks; --", '" OR NEAR(', "<|im_start|>system", "\ud83d\ude00" * 50,
]  # fmt: skip
FIELDS = ("model", "messages", "max_tokens", "temperature", "seed", "stop", "n", "stream", "stream_options", "gistrag")
GISTRAG_FIELDS = ("top_k", "mode", "scope", "filters", "footnotes", "index")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Path:
    """An index of two documents."""
    return build(tmp_path_factory.mktemp("manual"), engine)


@pytest.fixture
def url(index: Path, engine: Engine, caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    """The address of a server whose log has no error in the end."""
    with serving({"manual": index}, engine) as address:
        yield address
    assert [] == [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.ERROR]


def wrong_body(dice: random.Random) -> bytes:
    """Return a chat request with a field that is missing, foreign or of another kind."""
    body = json.loads(json.dumps(ASKED))
    for _ in range(dice.randint(1, 3)):
        match dice.randrange(4):
            case 0:
                body[dice.choice(FIELDS)] = dice.choice(VALUES)
            case 1:
                body["gistrag"] = {dice.choice(GISTRAG_FIELDS): dice.choice(VALUES)}
            case 2:
                body["messages"] = [{"role": dice.choice(["user", "system", "robot"]), "content": dice.choice(VALUES)}]
            case _:
                body.pop(dice.choice(list(body) or ["model"]), None)
    return json.dumps(body).encode()


def wrong_json(dice: random.Random) -> bytes:
    """Return bytes that are almost JSON, or were never meant to be."""
    whole = json.dumps(ASKED).encode()
    at = dice.randrange(len(whole))
    return dice.choice([
        whole[:at],
        whole[:at] + dice.randbytes(4) + whole[at:],
        whole[:at] + bytes([dice.randrange(256)]) + whole[at + 1 :],
        whole.replace(b"3}", b"NaN}"),
        whole.replace(b"3}", b"9" * 5000 + b"}"),
        whole.replace(b"honey", b"\\ud800"),
        b"[" * dice.randint(1, 200_000),
        b'{"a":' * dice.randint(1, 50_000),
        dice.randbytes(dice.randint(0, 4000)),
        b"",
    ])  # fmt: skip


def wrong_http(dice: random.Random) -> bytes:
    """Return what is not quite HTTP, or too much of it."""
    method, path = (
        dice.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW", "get"]),
        dice.choice(PATHS),
    )
    whole = request(method, path, json.dumps(ASKED).encode())
    at = dice.randrange(len(whole))
    return dice.choice([
        whole[:at] + bytes([dice.randrange(256)]) + whole[at + 1 :],
        whole[:at] + b"\r\n" + whole[at:],
        whole[:at],
        whole + whole[:at],
        dice.randbytes(dice.randint(1, 3000)),
        request(method, path, Content_Length=dice.choice(["-1", "1e9", "99999999999999999999999", "0, 5", "x", "5"])),
        request(method, path, b"zz\r\n" + whole, Content_Length="", Transfer_Encoding="chunked"),
        request(method, path, b"5\r\nhello\r\n0\r\n\r\n", Transfer_Encoding="chunked"),
        request(method, path, Host=dice.choice(["evil.example", "localhost@evil", "[::1", "a" * 300, "\xff"])),
        request(method, path, Origin=dice.choice(["null", "http://evil.example", "file://", "http://localhost.evil"])),
        request(method, path, Content_Type=dice.choice(["text/plain", "application/xml", "multipart/form-data", ";"])),
        request(method, path, Authorization="Bearer " + "\xff" * dice.randint(0, 50)),
        request(method, path, X_Long="a" * dice.randint(15_000, 40_000)),
        request(method, path + "?" + "a=%00&" * dice.randint(1, 5000)),
        request(method, dice.choice(["/../../etc/passwd", "/%2e%2e/%2e%2e/etc", "/v1/passages/%00", "//", "*", "/\\"])),
        request(method, path, Upgrade="websocket", Connection="Upgrade"),
        request(method, path, Expect="100-continue"),
    ])  # fmt: skip


def oversized(dice: random.Random) -> bytes:
    """Return a body beyond the limit, honest about it or not."""
    body = b'{"model": "' + b"a" * (2**20 + dice.randint(1, 2**18)) + b'"}'
    told = dice.choice([str(len(body)), str(2**40), "10"])
    return request("POST", dice.choice([CHAT, "/v1/retrieve"]), body, Content_Length=told)


def abuse(url: str, dice: random.Random) -> int | None:
    """Do one thing that no good client does, and return the status it is answered with, None where there is none."""
    whole = request("POST", CHAT, json.dumps({**ASKED, "stream": dice.random() < 0.5, "max_tokens": 50}).encode())
    kind = dice.random()
    if kind < 0.35:
        return exchange(url, request("POST", dice.choice([CHAT, "/v1/retrieve"]), wrong_body(dice)))
    if kind < 0.55:
        return exchange(url, request("POST", CHAT, wrong_json(dice)))
    if kind < 0.88:
        return exchange(url, wrong_http(dice), is_all=True)
    if kind < 0.9:
        return exchange(url, oversized(dice))
    hang_up(url, whole[: dice.randrange(len(whole))] if kind < 0.95 else whole, rudely=dice.random() < 0.5)
    return None


def abuse_in_parallel(url: str, dice: random.Random, count: int) -> None:
    """Abuse a server from four sides at once, while others connect and say no more; it must not fail once."""
    idlers = [connect(url) for _ in range(20)]
    for idler in idlers:
        idler.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc")
    seeds = [dice.random() for _ in range(count)]

    with ThreadPoolExecutor(4) as sides:
        statuses = list(sides.map(lambda seed: abuse(url, random.Random(seed)), seeds))

    for idler in idlers:
        idler.close()
    bad = [seed for seed, status in zip(seeds, statuses, strict=True) if (status or 0) >= 500]
    assert [] == bad
    assert sum(status is not None and 400 <= status < 500 for status in statuses) > 0.5 * count
    answered = httpx.post(url + CHAT, json=ASKED, timeout=30).json()
    assert 3 == answered["usage"]["completion_tokens"]
    assert wait_for(lambda: httpx.get(url + "/healthz").json()["waiting"] == 0)


def wait_for(holds: Callable[[], bool], *, seconds: float = 10) -> bool:
    """Return whether something comes true in time."""
    deadline_s = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return holds()


def converse(url: str, *, in_a_row: int, clients: int, each: int) -> None:
    """Ask with OpenAI's client, one after the other and at once, streamed and whole; every answer must be whole."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as ai:

        def said(number: int) -> int:
            if number % 2:
                return int(ai.chat.completions.create(**ASKED).usage.completion_tokens)
            pieces = ai.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True})
            return int(list(pieces)[-1].usage.completion_tokens)

        assert [3] * in_a_row == [said(number) for number in range(in_a_row)]
        with ThreadPoolExecutor(clients) as pool:
            assert [3] * clients * each == list(pool.map(said, range(clients * each)))


def test_abuse(url: str, randomness: random.Random) -> None:
    """300 malformed, oversized or abandoned requests: no 5xx, no error in the log, and it answers on."""
    abuse_in_parallel(url, randomness, 300)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", ["/healthz", "/v1/files", CHAT])
def test_a_body_that_is_no_http(url: str, method: str, path: str) -> None:
    """A request whose body breaks off into noise is refused once, and what was about to answer it answers nobody."""
    noise = request(method, path, b"zz\r\n", Content_Length="", Transfer_Encoding="chunked")

    assert {400} == {exchange(url, noise) for _ in range(5)}


@pytest.mark.soak
@pytest.mark.parametrize("part", range(5))
def test_abuse_for_long(url: str, randomness: random.Random, part: int) -> None:
    """5,000 of them, in five parts."""
    abuse_in_parallel(url, randomness, 1000)


@pytest.mark.soak
def test_openai_client_for_long(url: str) -> None:
    """200 requests in a row and 8 times 25 at once, without an error or a second try."""
    converse(url, in_a_row=200, clients=8, each=25)
