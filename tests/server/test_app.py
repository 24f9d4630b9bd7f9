"""The server as its clients see it: over a real socket, with OpenAI's own client where that is who talks."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.live_server import build, connect, exchange, request, serving

from gistrag.answering import stream as answer_stream
from gistrag.engine import Engine
from gistrag.model.gist_model import GistModel, Reading
from gistrag.rag import GistRAG
from gistrag.server import app, auth, http
from gistrag.server.auth import digest

httpx = pytest.importorskip("httpx2")
openai = pytest.importorskip("openai")

HONEY = {"model": "manual", "messages": [{"role": "user", "content": "Where is the honey?"}], "max_tokens": 6}
STREAMED = {**HONEY, "stream": True}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Path:
    """An index of two documents."""
    return build(tmp_path_factory.mktemp("manual"), engine)


@pytest.fixture(scope="module")
def url(index: Path, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of that index and an empty one."""
    empty = build(tmp_path_factory.mktemp("empty"), engine, {})
    with serving({"manual": index, "empty": empty}, engine, metrics=True) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    """A plain HTTP client."""
    with httpx.Client(base_url=url, timeout=60) as opened:
        yield opened


@pytest.fixture
def ai(url: str) -> Iterator[Any]:
    """OpenAI's client, which must need no second try."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_early_end(model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of a random model go on until they are cut."""
    monkeypatch.setitem(model.__dict__, "stop_ids", frozenset())


def events(body: str) -> list[dict[str, Any]]:
    """Return the events of a stream that are JSON; it must end as OpenAI's streams do."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert "[DONE]" == lines[-1]
    return [json.loads(line) for line in lines[:-1]]


def error(response: Any) -> tuple[int, str]:
    """Return status and code of an error, which must have the form of OpenAI's API."""
    told = response.json()["error"]
    assert {"message", "type", "param", "code"} == told.keys()
    assert "/tmp" not in told["message"]
    return response.status_code, told["code"]


# Asking


def test_an_answer_in_one_piece(client: Any, index: Path, engine: Engine) -> None:
    """The answer is that of the library, with its sources, what it took and why it ended."""
    with GistRAG.open(index, engine=engine) as rag:
        expected = rag.query("Where is the honey?", max_new_tokens=6)

    told = client.post(CHAT, json=HONEY).json()

    (choice,) = told["choices"]
    assert (expected.text, "assistant", "length") == (
        choice["message"]["content"],
        choice["message"]["role"],
        choice["finish_reason"],
    )
    assert [source.place for source in expected.sources] == [one["place"] for one in told["gistrag"]["sources"]]
    assert expected.usage.gist_slots == told["usage"]["gist_slots"] == told["gistrag"]["usage"]["gist_slots"]
    assert told["usage"]["total_tokens"] == told["usage"]["prompt_tokens"] + 6
    assert 0 < told["gistrag"]["timings"]["ttft_s"] <= told["gistrag"]["timings"]["total_s"]


def test_a_streamed_answer_is_the_same(client: Any) -> None:
    """Pieces add up to the answer in one piece; sources come first, costs and usage last."""
    whole = client.post(CHAT, json=HONEY).json()

    response = client.post(CHAT, json={**STREAMED, "stream_options": {"include_usage": True}})

    assert "no" == response.headers["x-accel-buffering"]  # or a proxy would hold them back

    assert "text/event-stream; charset=utf-8" == response.headers["content-type"]
    first, *pieces, last, usage = events(response.text)
    said = "".join(piece["choices"][0]["delta"]["content"] for piece in pieces)
    assert whole["choices"][0]["message"]["content"] == said.strip()
    assert {"role": "assistant", "content": ""} == first["choices"][0]["delta"]
    assert whole["gistrag"]["sources"] == first["gistrag"]["sources"] == last["gistrag"]["sources"]
    assert ({}, "length") == (last["choices"][0]["delta"], last["choices"][0]["finish_reason"])
    assert ([], whole["usage"]) == (usage["choices"], usage["usage"])
    assert 1 == len({event["id"] for event in (first, *pieces, last, usage)})


def test_openai_client(ai: Any) -> None:
    """OpenAI's own client lists models, asks, streams and counts without knowing whom it talks to."""
    assert ["manual", "empty"] == [model.id for model in ai.models.list()]
    assert "manual" == ai.models.retrieve("manual").id

    whole = ai.chat.completions.create(**HONEY, extra_body={"gistrag": {"mode": "hybrid", "top_k": 1}})
    pieces = list(ai.chat.completions.create(**STREAMED, stream_options={"include_usage": True}))

    assert ("length", 6) == (whole.choices[0].finish_reason, whole.usage.completion_tokens)
    assert ["bees.md"] == [source["path"] for source in whole.gistrag["sources"]]
    assert whole.gistrag["usage"]["text_tokens"] > 0
    assert 6 == pieces[-1].usage.completion_tokens
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        ai.chat.completions.create(**{**HONEY, "model": "gpt-4"})


def test_a_conversation_asks_its_last_question(client: Any) -> None:
    """Earlier turns do not answer; a follow-up brings the question it leans on."""
    turns = [{"role": "user", "content": "Where is the mill?"}, {"role": "assistant", "content": "By the river."}]

    def best(question: str) -> str:
        messages = [{"role": "system", "content": "Be kind."}, *turns, {"role": "user", "content": question}]
        told = client.post(CHAT, json={**HONEY, "messages": messages, "gistrag": {"top_k": 1}}).json()
        return told["gistrag"]["sources"][0]["path"]

    assert "bees.md" == best("Where do bees keep honey?")
    assert "mills.md" == best("And what does it do?")


def test_footnotes_stops_and_scope(client: Any) -> None:
    """Sources on request below the answer; an answer ends before a stop; one document may be asked alone."""
    whole = client.post(CHAT, json=HONEY).json()["choices"][0]["message"]["content"]
    noted = client.post(CHAT, json={**HONEY, "gistrag": {"footnotes": True, "scope": "mills.md"}}).json()
    cut = client.post(CHAT, json={**HONEY, "stop": [whole[3]]}).json()["choices"][0]["message"]["content"]

    assert noted["choices"][0]["message"]["content"].endswith("\n\n[1] mills.md, Mills")
    assert whole[: whole.index(whole[3])].strip() == cut


def test_an_empty_index_says_so(client: Any) -> None:
    """An index without documents answers, with no source."""
    told = client.post(CHAT, json={**HONEY, "model": "empty"}).json()

    assert "There are no documents in this index." == told["choices"][0]["message"]["content"]
    assert ("stop", []) == (told["choices"][0]["finish_reason"], told["gistrag"]["sources"])


def test_retrieve_documents_and_passages(client: Any) -> None:
    """Passages are found, listed by document and read whole, without generating anything."""
    (hit,) = client.post("/v1/retrieve", json={"model": "manual", "query": "honey", "top_k": 1}).json()["data"]
    listed = client.get("/v1/documents", params={"model": "manual"}).json()
    passage = client.get(f"/v1/passages/{hit['chunk_id']}", params={"model": "manual"}).json()

    assert ("bees.md", ["Bees"]) == (hit["path"], hit["heading"])
    assert ["bees.md", "mills.md"] == [row["path"] for row in listed["data"]]
    assert (2, listed["status"]["chunks"]) == (
        listed["status"]["documents"],
        sum(row["chunks"] for row in listed["data"]),
    )
    assert hit["text"] == passage["text"]
    assert (None, None) == (passage["previous"], passage["next"])


def test_health_and_counters(client: Any) -> None:
    """Whoever watches sees that the server lives and what it did, but no question."""
    before = client.get("/metrics").text
    client.post(CHAT, json=HONEY)
    after = client.get("/metrics").text

    name = 'gistrag_answer_tokens_total{index="manual"} '
    assert 6 == sum(
        sign * float(text.partition(name)[2].partition("\n")[0] or 0) for sign, text in ((-1, before), (1, after))
    )
    assert "honey" not in after
    assert ("ok", 0) == (client.get("/healthz").json()["status"], client.get("/healthz").json()["waiting"])


# The manual


def blocks(language: str) -> list[str]:
    """Return the examples of the manual's page that are in a language, meant for a server at its usual address."""
    page = Path(__file__).parents[2] / "docs" / "server.md"
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_examples_in_python(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The examples run as they stand, with the address put in."""
    for block in blocks("python"):
        exec(block.replace("http://127.0.0.1:8000", url), {})

    told = capsys.readouterr().out
    assert "bees.md, Bees" in told
    assert "gist tokens stand for" in told


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_examples_with_curl(url: str) -> None:
    """So do those with curl, each with an answer that is no error."""
    (block,) = (block for block in blocks("bash") if block.startswith("curl"))
    script = f'set -e\ncurl() {{ command curl -sS --fail-with-body "$@"; }}\n{block}'

    ran = subprocess.run(["bash", "-c", script.replace("http://127.0.0.1:8000", url)], capture_output=True, text=True)

    assert (0, "") == (ran.returncode, ran.stderr)
    for told in ('"id":"manual"', '"chat.completion"', '"bees.md"', '"passage"', '"status":"ok"'):
        assert told in ran.stdout


# What is refused


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": "diary"}, (404, "model_not_found")),
        ({"messages": [{"role": "user", "content": " "}]}, (400, "invalid_value")),
        ({"messages": [{"role": "user", "content": "long " * 300}]}, (400, "context_length_exceeded")),
        ({"max_tokens": 2000}, (400, "context_length_exceeded")),
        ({"gistrag": {"scope": "../../etc/passwd"}}, (400, "invalid_value")),
        ({"gistrag": {"filters": {"size": "1"}}}, (400, "invalid_value")),
        ({"gistrag": {"index": "/etc"}}, (400, "invalid_value")),
        ({"n": 2}, (400, "invalid_value")),
    ],
)  # fmt: skip
def test_bad_requests(client: Any, change: dict[str, Any], expected: tuple[int, str]) -> None:
    """What makes no sense is refused with a code, streamed or not, and no folder is named."""
    assert expected == error(client.post(CHAT, json={**HONEY, **change}))
    assert expected == error(client.post(CHAT, json={**STREAMED, **change}))


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "messages.0.content.0.type",
            "Input should be 'text'",
        ),
        ({"stop": ["a" * 300]}, "stop.0", "String should have at most 200 characters"),
        ({"stop": "a" * 300}, "stop", "String should have at most 200 characters"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "Input should be a valid string"),
    ],
)
def test_what_is_misshapen_is_named(client: Any, change: dict[str, Any], where: str, what: str) -> None:
    """By the names a client knows, not by those of the program."""
    told = client.post(CHAT, json={**HONEY, **change}).json()["error"]

    assert (where, f"{where}: {what}") == (told["param"], told["message"])


def test_what_is_no_json_has_no_place(client: Any) -> None:
    """The message says what was expected."""
    told = client.post(CHAT, content=b'{"model": ', headers={"Content-Type": "application/json"}).json()["error"]

    assert (None, "body: expected JSON, Expecting value") == (told["param"], told["message"])


@pytest.mark.parametrize("given", [{"max_completion_tokens": None}, {"max_completion_tokens": 6, "max_tokens": 9}])
def test_the_longest_answer_has_two_names(client: Any, given: dict[str, Any]) -> None:
    """A client may send both: null is as good as nothing, and the newer name counts."""
    assert 6 == client.post(CHAT, json={**HONEY, **given}).json()["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v2", (404, "not_found")),
        ("GET", "/docs", (404, "not_found")),
        ("GET", CHAT, (405, "method_not_allowed")),
        ("GET", "/v1/documents", (400, "missing_parameter")),
        ("GET", "/v1/documents?model=diary", (404, "model_not_found")),
        ("GET", "/v1/passages/99?model=manual", (404, "passage_not_found")),
        ("GET", "/v1/passages/-1?model=manual", (400, "invalid_value")),
        ("GET", f"/v1/passages/{10**30}?model=manual", (400, "invalid_value")),
        ("GET", "/v1/passages/..%2f..%2findex.db?model=manual", (404, "not_found")),
    ],
)
def test_bad_paths(client: Any, method: str, path: str, expected: tuple[int, str]) -> None:
    """What is not there, or not meant that way, is said in the same form."""
    assert expected == error(client.request(method, path))


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
        (request("GET", "/healthz", Origin="http://localhost"), 200),
        (request("GET", "/healthz", Host="[::1]:8000"), 200),
    ],
)  # fmt: skip
def test_the_door(url: str, data: bytes, expected: int) -> None:
    """Who comes by another name, from another origin, with something else than JSON or with too much, is sent away."""
    assert expected == exchange(url, data)


def test_errors_are_in_one_form(url: str, client: Any) -> None:
    """Even what is no HTTP at all is answered in the form of OpenAI's errors."""
    with connect(url) as raw:
        raw.sendall(b"hello\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(65536), b""))

    assert "invalid_http" == json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]
    with connect(url) as raw:  # a head that comes in parts
        raw.sendall(b"GET / HTTP/1.1\r\nX-Long: ")
        for _ in range(5):
            time.sleep(0.01)
            raw.sendall(b"a" * 4000)
        assert b"HTTP/1.1 431" == raw.recv(12)
    assert (421, "unknown_host") == error(client.get("/", headers={"Host": "evil.example"}))


def test_an_error_nobody_foresaw_tells_nothing(
    client: Any, model: GistModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A bug in the server is a 500 without a trace, and an event in a stream that had begun."""

    def broken(*given: object, **options: object) -> Iterator[int]:
        yield from model.encode("so far")
        raise RuntimeError("/tmp/secret")

    monkeypatch.setattr(answer_stream, "generate", broken)
    whole, streamed = client.post(CHAT, json=HONEY), client.post(CHAT, json=STREAMED)

    assert (500, "internal_error") == error(whole)
    assert "close" == whole.headers["connection"]
    assert "internal_error" == json.loads(streamed.text.split("\n\n")[-2].removeprefix("data: "))["error"]["code"]
    assert "secret" not in whole.text + streamed.text
    assert "secret" in caplog.text


# Keys


def test_keys_open_their_indexes(index: Path, engine: Engine) -> None:
    """A key sees its indexes and no others; without one only the page and the health are there."""
    keys = {digest("alice"): frozenset({"manual"}), digest("bob"): frozenset({"manual", "notes"})}
    with serving({"manual": index, "notes": index}, engine, access={"keys": keys}, metrics=True) as url:

        def get(path: str, key: str = "") -> Any:
            return httpx.get(url + path, headers={"Authorization": f"Bearer {key}"} if key else {})

        assert [200, 200, 401, 401] == [get(path).status_code for path in ("/", "/healthz", "/v1/models", "/metrics")]
        assert (401, "invalid_api_key") == error(get("/v1/models", "mallory"))
        assert [["manual"], ["manual", "notes"]] == [
            [one["id"] for one in get("/v1/models", key).json()["data"]] for key in ("alice", "bob")
        ]
        assert (404, "model_not_found") == error(get("/v1/documents?model=notes", "alice"))
        assert 200 == get("/v1/documents", "alice").status_code
        assert [(404, "not_found"), 200] == [error(get("/metrics", "alice")), get("/metrics", "bob").status_code]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="alice", max_retries=0) as ai:
            assert 6 == ai.chat.completions.create(**HONEY).usage.completion_tokens
            with pytest.raises(openai.NotFoundError):
                ai.chat.completions.create(**{**HONEY, "model": "notes"})


# Many at once


def test_answers_at_the_same_time_do_not_mix(url: str, client: Any) -> None:
    """Twenty questions from four clients at once get, each, the very answer they get alone."""
    asked = [f"{word} number {number}?" for number in range(10) for word in ("honey", "mill")]
    bodies = [
        {**HONEY, "messages": [{"role": "user", "content": question}], "max_tokens": 4 + number % 5}
        for number, question in enumerate(asked)
    ]

    def told(body: dict[str, Any]) -> tuple[str, list[str]]:
        response = httpx.post(url + CHAT, json=body, timeout=60).json()
        return response["choices"][0]["message"]["content"], [one["path"] for one in response["gistrag"]["sources"]]

    alone = [told(body) for body in bodies]
    with ThreadPoolExecutor(4) as clients:
        beside = list(clients.map(told, bodies))

    assert alone == beside


def test_openai_client_in_a_row_and_at_once(url: str) -> None:
    """Twenty requests one after the other and four times five at once, without an error or a second try."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as ai:

        def said(_: int) -> int:
            return ai.chat.completions.create(**HONEY).usage.completion_tokens

        assert [6] * 20 == [said(number) for number in range(20)]
        with ThreadPoolExecutor(4) as clients:
            assert [6] * 20 == list(clients.map(said, range(20)))


def test_a_full_queue_is_429(index: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is answered, sixteen wait, the next is told to try again; then all are answered."""
    gate = threading.Event()

    def blocked(*given: object, **options: object) -> Iterator[int]:
        gate.wait(60)
        yield from b"ab"

    monkeypatch.setattr(answer_stream, "generate", blocked)
    with serving({"manual": index}, engine, together=1) as url, ThreadPoolExecutor(17) as clients:
        waiting = [clients.submit(httpx.post, url + CHAT, json=HONEY, timeout=60) for _ in range(17)]
        deadline_s = time.monotonic() + 30
        while httpx.get(url + "/healthz").json()["waiting"] < app.QUEUE_MAX and time.monotonic() < deadline_s:
            time.sleep(0.01)

        refused = httpx.post(url + CHAT, json=HONEY)

        gate.set()
        assert (429, "queue_full") == error(refused)
        assert "2" == refused.headers["retry-after"]
        assert {200} == {one.result().status_code for one in waiting}


# Clients that go, or never come to the point


@pytest.mark.parametrize("body", [STREAMED, HONEY])
def test_a_client_that_goes_frees_the_worker(url: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """When a client hangs up, no more is computed for it."""
    made: list[float] = []
    feed = Reading.feed

    def counted(self: Reading, *given: Any, **options: Any) -> Any:
        made.append(time.monotonic())
        time.sleep(0.005)
        return feed(self, *given, **options)

    monkeypatch.setattr(Reading, "feed", counted)
    with connect(url) as raw:
        raw.sendall(request("POST", CHAT, json.dumps({**body, "max_tokens": 700}).encode()))
        while len(made) < 5:
            time.sleep(0.005)
    while made[-1] > time.monotonic() - 0.3:
        time.sleep(0.1)

    assert len(made) < 350


def test_slow_requests_are_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head or a body that does not come is not waited for, also on a connection that was used before."""
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

    assert 200 == exchange(url, health)


def test_an_answer_that_takes_too_long_is_cut(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time an answer ends with what there is."""
    monkeypatch.setattr(app, "GENERATION_S", 0.0)

    told = client.post(CHAT, json={**HONEY, "max_tokens": 500}).json()

    assert "length" == told["choices"][0]["finish_reason"]
    assert told["usage"]["completion_tokens"] < 10


def test_a_reader_that_does_not_read_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exchange that takes for ever is ended, with whatever was said."""
    monkeypatch.setattr(auth, "EXCHANGE_S", 0.3)
    monkeypatch.setattr(answer_stream, "generate", slowly)

    with connect(url, timeout_s=30) as raw:
        raw.sendall(request("POST", CHAT, json.dumps(STREAMED).encode()))
        received = b""
        while data := raw.recv(65536):
            received += data

    assert b"[DONE]" not in received


def slowly(*given: object, **options: object) -> Iterator[int]:
    """Say a letter ten times a second."""
    for letter in b"a" * 20:
        time.sleep(0.1)
        yield letter


# What is written down


@pytest.mark.parametrize("wanted", [False, True])
def test_questions_are_logged_only_when_asked(
    index: Path, engine: Engine, caplog: pytest.LogCaptureFixture, wanted: bool
) -> None:
    """The log has a line for each answer, and the question only where that was wished for."""
    with serving({"manual": index}, engine, log_questions=wanted) as url, caplog.at_level(logging.INFO, "gistrag"):
        httpx.post(url + CHAT, json=HONEY, timeout=60)

    assert "manual: 6 tokens, first after" in caplog.text
    assert wanted == ("Where is the honey?" in caplog.text)
