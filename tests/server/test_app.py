"""The server as its clients see it: over a real socket, with OpenAI's own client where one would use it."""

from __future__ import annotations

import dataclasses
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
from support.live_server import CHAT, HONEY, STREAMED, build, connect, error, request, serving

from gistrag.answering import judge
from gistrag.answering.confidence import Again, Calibration
from gistrag.engine import Engine
from gistrag.model.gist_model import GistModel, Reading
from gistrag.rag import GistRAG
from gistrag.server import app
from gistrag.server.auth import ALL, digest
from gistrag.server.scheduler import Scheduler

httpx = pytest.importorskip("httpx2")
openai = pytest.importorskip("openai")
pytestmark = pytest.mark.usefixtures("no_early_end")


@pytest.fixture
def ai(url: str) -> Iterator[Any]:
    """OpenAI's client, without retries."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


def events(body: str) -> list[dict[str, Any]]:
    """Return the JSON events of a stream, which must end as OpenAI's streams do."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# Asking


def test_an_answer_in_one_piece(client: Any, index: Path, engine: Engine) -> None:
    """The answer equals the library's, with its sources, usage, timings and finish reason."""
    with GistRAG.open(index, engine=engine) as rag:
        expected = rag.query("Where is the honey?", max_new_tokens=6)

    reply = client.post(CHAT, json=HONEY).json()

    (choice,) = reply["choices"]
    assert choice["message"]["content"] == expected.text
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    assert [one["place"] for one in reply["gistrag"]["sources"]] == [source.place for source in expected.sources]
    assert reply["usage"]["gist_slots"] == reply["gistrag"]["usage"]["gist_slots"] == expected.usage.gist_slots
    assert reply["usage"]["total_tokens"] == reply["usage"]["prompt_tokens"] + 6
    assert 0 < reply["gistrag"]["timings"]["ttft_s"] <= reply["gistrag"]["timings"]["total_s"]


def test_a_streamed_answer_is_the_same(client: Any) -> None:
    """The pieces add up to the whole answer; the sources come first, the evidence in them and the usage last."""
    whole = client.post(CHAT, json=HONEY).json()

    response = client.post(CHAT, json={**STREAMED, "stream_options": {"include_usage": True}})

    assert response.headers["x-accel-buffering"] == "no"  # or a proxy would delay the events

    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    first, *pieces, last, usage = events(response.text)
    text = "".join(piece["choices"][0]["delta"]["content"] for piece in pieces)
    assert text.strip() == whole["choices"][0]["message"]["content"]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["gistrag"]["sources"] == whole["gistrag"]["sources"]
    ids = [source["chunk_id"] for source in last["gistrag"]["sources"]]
    assert [source["chunk_id"] for source in first["gistrag"]["sources"]] == ids  # the evidence is not known yet
    assert any(source["evidence"] for source in last["gistrag"]["sources"])
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert len({event["id"] for event in (first, *pieces, last, usage)}) == 1


def test_openai_client(ai: Any) -> None:
    """OpenAI's own client lists models, asks, streams and reads the usage."""
    assert [model.id for model in ai.models.list()] == ["manual", "empty"]
    assert ai.models.retrieve("manual").id == "manual"

    whole = ai.chat.completions.create(**HONEY, extra_body={"gistrag": {"mode": "hybrid", "top_k": 1}})
    pieces = list(ai.chat.completions.create(**STREAMED, stream_options={"include_usage": True}))

    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 6
    assert [source["path"] for source in whole.gistrag["sources"]] == ["bees.md"]
    assert whole.gistrag["usage"]["text_tokens"] > 0
    assert pieces[-1].usage.completion_tokens == 6
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        ai.chat.completions.create(**{**HONEY, "model": "gpt-4"})


def test_a_chat_history_asks_its_last_question(client: Any) -> None:
    """Earlier messages change no answer; a follow-up brings the question it leans on, and the reply says so."""
    turns = [{"role": "user", "content": "Where is the mill?"}, {"role": "assistant", "content": "By the river."}]

    def best(question: str) -> tuple[str, str]:
        messages = [{"role": "system", "content": "Be kind."}, *turns, {"role": "user", "content": question}]
        reply = client.post(CHAT, json={**HONEY, "messages": messages, "gistrag": {"top_k": 1}}).json()
        return reply["gistrag"]["sources"][0]["path"], reply["gistrag"]["searched"]

    assert best("Where do bees keep honey?") == ("bees.md", "Where do bees keep honey?")
    assert best("And what does it do?") == ("mills.md", "Where is the mill? And what does it do?")


def test_a_question_about_a_document_is_answered_by_its_summary(client: Any) -> None:
    """Nothing is generated, whole and streamed; its source can be opened like any other. So for a greeting, without."""
    asked = {
        **STREAMED,
        "messages": [{"role": "user", "content": "What is this about?"}],
        "gistrag": {"scope": "bees.md"},
    }
    first, piece, last = events(client.post(CHAT, json=asked).text)
    (source,) = first["gistrag"]["sources"]
    passage = client.get(f"/v1/passages/{source['chunk_id']}", params={"model": "manual"}).json()
    hello = client.post(CHAT, json={**HONEY, "messages": [{"role": "user", "content": "Hello!"}]}).json()

    assert passage["text"] == piece["choices"][0]["delta"]["content"]
    assert passage["text"].startswith("Bees\n\n")
    assert (passage["previous"], passage["next"], last["choices"][0]["finish_reason"]) == (None, None, "stop")
    assert hello["choices"][0]["message"]["content"].endswith("2 documents of this index: bees.md and mills.md.")
    assert hello["gistrag"]["sources"] == []


def test_a_long_or_empty_history_is_no_error(client: Any) -> None:
    """A thousand messages, some of them blank, are a conversation as any other."""
    turns = [{"role": "user", "content": "" if number % 2 else "Where is the mill?"} for number in range(1000)]
    messages = [*turns, {"role": "user", "content": "And what does it do?"}]

    first, *_, last = events(client.post(CHAT, json={**STREAMED, "messages": messages}).text)

    assert first["gistrag"]["searched"] == last["gistrag"]["searched"] == "Where is the mill? And what does it do?"


def test_footnotes_stops_and_scope(client: Any) -> None:
    """Footnotes quote the sources, an answer ends before a stop, and a scope restricts the search to one document."""
    whole = client.post(CHAT, json=HONEY).json()["choices"][0]["message"]["content"]
    noted = client.post(CHAT, json={**HONEY, "gistrag": {"footnotes": True, "scope": "mills.md"}}).json()
    cut = client.post(CHAT, json={**HONEY, "stop": [whole[1]]}).json()["choices"][0]["message"]["content"]

    assert noted["choices"][0]["message"]["content"].endswith("\n\n[1] mills.md, Mills: “# Mills”")
    assert cut == whole[: whole.index(whole[1])].strip()


def test_what_changes_nothing_is_named(client: Any) -> None:
    """A reply, whole or streamed, lists the settings and messages that were ignored; a name of half a letter is 400."""
    asked = {**STREAMED, "top_p": 0.9, "messages": [{"role": "system", "content": "In French."}, *HONEY["messages"]]}

    *_, last = events(client.post(CHAT, json=asked).text)

    assert last["gistrag"]["ignored"] == ["top_p", "messages.system"]
    assert client.post(CHAT, json={**asked, "stream": False}).json()["gistrag"]["ignored"] == [
        "top_p",
        "messages.system",
    ]
    half = json.dumps({**HONEY, "half \ud83d": 1})
    refused = client.post(CHAT, content=half, headers={"content-type": "application/json"})
    assert error(refused) == (400, "invalid_value")


def test_an_unsure_answer_is_read_again_unless_told_otherwise(
    index: Path, engine: Engine, model: GistModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The confidence, the verdict and the number of readings come with the answer, and a request decides about them."""
    monkeypatch.setattr(judge, "generate_steps", lambda *_, **__: iter(model.encode("Wax")))
    doubtful = Calibration("a", (), {}, 0.0, Again(), sure=0.9, found=0.2, doubtful=0.7, measured={})
    with serving({"manual": index}, dataclasses.replace(engine, calibration=doubtful)) as url:
        replies = [
            httpx.post(url + CHAT, json={**HONEY, "gistrag": {"second_reading": wanted}}, timeout=60).json()["gistrag"]
            for wanted in (None, False)
        ]

    assert [reply["usage"]["readings"] for reply in replies] == [3, 1]
    assert [reply["verdict"] for reply in replies] == ["unsure", "unsure"]
    assert replies[1]["confidence"] == 0.5
    assert [source["evidence"]["text"] for source in replies[1]["sources"] if source["evidence"]] == [
        "Honey is kept in combs of wax for winter."
    ]


def test_an_empty_index_says_so(client: Any) -> None:
    """An index without documents answers that it has none, without a source."""
    reply = client.post(CHAT, json={**HONEY, "model": "empty"}).json()

    assert reply["choices"][0]["message"]["content"] == "There are no documents in this index."
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["gistrag"]["sources"] == []


def test_retrieve_documents_and_passages(client: Any) -> None:
    """Passages can be found, documents listed, and passages read in full; nothing is generated."""
    (hit,) = client.post("/v1/retrieve", json={"model": "manual", "query": "honey", "top_k": 1}).json()["data"]
    listed = client.get("/v1/documents", params={"model": "manual"}).json()
    passage = client.get(f"/v1/passages/{hit['chunk_id']}", params={"model": "manual"}).json()

    dated = {"model": "manual", "query": "honey", "filters": {"date": "2026"}}
    assert client.post("/v1/retrieve", json=dated).json()["data"] == []
    assert hit["metadata"] == {}
    assert hit["path"] == "bees.md"
    assert hit["heading"] == ["Bees"]
    assert [row["path"] for row in listed["data"]] == ["bees.md", "mills.md"]
    assert listed["status"]["documents"] == 2
    assert listed["status"]["chunks"] == sum(row["chunks"] for row in listed["data"])
    assert hit["text"] == passage["text"]
    assert passage["previous"] is None
    assert passage["next"] is None


def test_health_and_counters(client: Any) -> None:
    """Monitoring sees that the server runs and what it did, but no question."""
    before = client.get("/metrics").text
    client.post(CHAT, json=HONEY)
    after = client.get("/metrics").text

    name = 'gistrag_answer_tokens_total{index="manual"} '
    assert (
        sum(sign * float(text.partition(name)[2].partition("\n")[0] or 0) for sign, text in ((-1, before), (1, after)))
        == 6
    )
    assert "honey" not in after
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/healthz").json()["waiting"] == 0


# The manual


def blocks(language: str) -> list[str]:
    """Return the examples in one language on the manual's page."""
    page = Path(__file__).parents[2] / "docs" / "server.md"
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_examples_in_python(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python examples run as they are, with another address."""
    monkeypatch.setenv("GISTRAG_API_KEY", "alice")
    for block in blocks("python"):
        exec(block.replace("http://127.0.0.1:8000", url), {})

    reply = capsys.readouterr().out
    assert "bees.md, Bees" in reply
    assert "gist tokens stand for" in reply


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_examples_with_curl(index: Path, engine: Engine) -> None:
    """The curl examples run as they are, with their key, without an error."""
    (block,) = (block for block in blocks("bash") if block.startswith("auth"))
    script = f'set -e\nGISTRAG_API_KEY=alice\ncurl() {{ command curl -sS --fail-with-body "$@"; }}\n{block}'

    with serving({"manual": index}, engine, access={"keys": {digest("alice"): ALL}}) as url:
        script = script.replace("http://127.0.0.1:8000", url)
        ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True)

    assert ran.returncode == 0
    assert ran.stderr == ""
    for reply in ('"id":"manual"', '"chat.completion"', '"bees.md"', '"passage"', '"status":"ok"'):
        assert reply in ran.stdout


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
        ({"gistrag": {"filters": {"date": ">=2026-02-30"}}}, (400, "invalid_value")),
        ({"gistrag": {"index": "/etc"}}, (400, "invalid_value")),
        ({"n": 2}, (400, "invalid_value")),
    ],
)  # fmt: skip
def test_bad_requests(client: Any, change: dict[str, Any], expected: tuple[int, str]) -> None:
    """A bad value is refused with a code, streamed or not, and no folder is named."""
    assert error(client.post(CHAT, json={**HONEY, **change})) == expected
    assert error(client.post(CHAT, json={**STREAMED, **change})) == expected


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
def test_a_field_of_the_wrong_type_is_named(client: Any, change: dict[str, Any], where: str, what: str) -> None:
    """The error names the field as the client wrote it."""
    reply = client.post(CHAT, json={**HONEY, **change}).json()["error"]

    assert reply["param"] == where
    assert reply["message"] == f"{where}: {what}"


def test_a_body_that_is_not_json_names_no_field(client: Any) -> None:
    """The message says that JSON was expected."""
    reply = client.post(CHAT, content=b'{"model": ', headers={"Content-Type": "application/json"}).json()["error"]

    assert reply["param"] is None
    assert reply["message"] == "body: expected JSON, Expecting value"


@pytest.mark.parametrize("given", [{"max_completion_tokens": None}, {"max_completion_tokens": 6, "max_tokens": 9}])
def test_the_longest_answer_has_two_names(client: Any, given: dict[str, Any]) -> None:
    """A client may send both names: null counts as absent, and the newer name wins."""
    assert client.post(CHAT, json={**HONEY, **given}).json()["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/v2", (404, "not_found")),
        ("GET", "/docs", (404, "not_found")),
        ("GET", CHAT, (405, "method_not_allowed")),
        ("GET", "/v1/documents", (400, "missing_parameter")),
        ("GET", "/v1/documents?model=diary", (404, "model_not_found")),
        ("GET", "/v1/passages/99?model=manual", (404, "passage_not_found")),
        ("GET", "/v1/passages/-99?model=manual", (404, "passage_not_found")),
        ("GET", f"/v1/passages/-{10**30}?model=manual", (400, "invalid_value")),
        ("GET", f"/v1/passages/{10**30}?model=manual", (400, "invalid_value")),
        ("GET", "/v1/passages/..%2f..%2findex.db?model=manual", (404, "not_found")),
    ],
)
def test_bad_paths(client: Any, method: str, path: str, expected: tuple[int, str]) -> None:
    """A wrong path or method gets an error in the same form."""
    assert error(client.request(method, path)) == expected


def test_an_internal_error_reveals_nothing(
    client: Any, model: GistModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected error is a 500 without details, or an event in a stream that has begun."""

    def broken(*given: object, **options: object) -> Iterator[int]:
        yield from model.encode("so far")
        raise RuntimeError("/tmp/secret")

    monkeypatch.setattr(judge, "generate_steps", broken)
    whole, streamed = client.post(CHAT, json=HONEY), client.post(CHAT, json=STREAMED)

    assert error(whole) == (500, "internal_error")
    assert whole.headers["connection"] == "close"
    assert json.loads(streamed.text.split("\n\n")[-2].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "secret" not in whole.text + streamed.text
    assert "secret" in caplog.text


# Keys


def test_keys_open_their_indexes(index: Path, engine: Engine) -> None:
    """A key opens its indexes and no others; without a key only the page and the health check answer."""
    keys = {digest("alice"): frozenset({"manual"}), digest("bob"): frozenset({"manual", "notes"})}
    with serving({"manual": index, "notes": index}, engine, access={"keys": keys}, metrics=True) as url:

        def get(path: str, key: str = "") -> Any:
            return httpx.get(url + path, headers={"Authorization": f"Bearer {key}"} if key else {})

        assert [get(path).status_code for path in ("/", "/healthz", "/v1/models", "/metrics")] == [200, 200, 401, 401]
        assert error(get("/v1/models", "mallory")) == (401, "invalid_api_key")
        assert [[one["id"] for one in get("/v1/models", key).json()["data"]] for key in ("alice", "bob")] == [
            ["manual"],
            ["manual", "notes"],
        ]
        assert error(get("/v1/documents?model=notes", "alice")) == (404, "model_not_found")
        assert get("/v1/documents", "alice").status_code == 200
        assert [error(get("/metrics", "alice")), get("/metrics", "bob").status_code] == [(404, "not_found"), 200]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="alice", max_retries=0) as ai:
            assert ai.chat.completions.create(**HONEY).usage.completion_tokens == 6
            with pytest.raises(openai.NotFoundError):
                ai.chat.completions.create(**{**HONEY, "model": "notes"})


# Many at once


def test_answers_at_the_same_time_do_not_mix(url: str, client: Any) -> None:
    """Twenty questions from four clients at once get the same answers as one by one."""
    asked = [f"{word} number {number}?" for number in range(10) for word in ("honey", "mill")]
    bodies = [
        {**HONEY, "messages": [{"role": "user", "content": question}], "max_tokens": 4 + number % 5}
        for number, question in enumerate(asked)
    ]

    def reply(body: dict[str, Any]) -> tuple[str, list[str]]:
        response = httpx.post(url + CHAT, json=body, timeout=60).json()
        return response["choices"][0]["message"]["content"], [one["path"] for one in response["gistrag"]["sources"]]

    alone = [reply(body) for body in bodies]
    with ThreadPoolExecutor(4) as clients:
        beside = list(clients.map(reply, bodies))

    assert beside == alone


def test_openai_client_in_a_row_and_at_once(url: str) -> None:
    """Twenty requests in a row and twenty from four clients at once succeed without a retry."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as ai:

        def tokens(_: int) -> int:
            return ai.chat.completions.create(**HONEY).usage.completion_tokens

        assert [tokens(number) for number in range(20)] == [6] * 20
        with ThreadPoolExecutor(4) as clients:
            assert list(clients.map(tokens, range(20))) == [6] * 20


def test_a_full_queue_is_429(index: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request is active, sixteen wait, the next gets 429; then all others are answered."""
    gate = threading.Event()

    def blocked(*given: object, **options: object) -> Iterator[int]:
        gate.wait(60)
        yield from b"ab"

    monkeypatch.setattr(judge, "generate_steps", blocked)
    with serving({"manual": index}, engine, together=1, queue=16) as url, ThreadPoolExecutor(17) as clients:
        waiting = [clients.submit(httpx.post, url + CHAT, json=HONEY, timeout=60) for _ in range(17)]
        deadline_s = time.monotonic() + 30
        while httpx.get(url + "/healthz").json()["waiting"] < 16 and time.monotonic() < deadline_s:
            time.sleep(0.01)

        refused = httpx.post(url + CHAT, json=HONEY)

        gate.set()
        assert error(refused) == (429, "queue_full")
        assert refused.headers["retry-after"] == "2"
        assert {one.result().status_code for one in waiting} == {200}


# Clients that disconnect, or are slow


@pytest.mark.parametrize("body", [STREAMED, HONEY, {**HONEY, "gistrag": {"mode": "text"}}])
def test_a_client_that_disconnects_frees_its_place(
    url: str, body: dict[str, Any], model: GistModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a client disconnects, its answer is not computed any further, nor a text read that it would be made from."""
    monkeypatch.setattr(model, "piece_tokens", 1)
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


def test_others_are_answered_while_a_text_is_read(url: str, model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text is read in pieces, and between them others have their turn."""
    monkeypatch.setattr(model, "piece_tokens", 1)
    feed, begun, read = Reading.feed, threading.Event(), []

    def slow(self: Reading, ids: Any, role: str = "text", **options: Any) -> Any:
        if role == "text":
            begun.set()
            read.append(ids)
            time.sleep(0.02)
        return feed(self, ids, role=role, **options)

    monkeypatch.setattr(Reading, "feed", slow)
    as_text = {**HONEY, "gistrag": {"mode": "text", "top_k": 3}}
    with ThreadPoolExecutor(1) as clients:
        reading = clients.submit(httpx.post, url + CHAT, json=as_text, timeout=60)
        assert begun.wait(30)

        assert httpx.get(url + "/v1/documents", params={"model": "manual"}, timeout=60).status_code == 200

        read_by_then = len(read)
        assert reading.result().json()["gistrag"]["usage"]["text_tokens"] > read_by_then


def test_an_answer_that_takes_too_long_is_cut(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the time limit an answer ends with what it has."""
    monkeypatch.setattr(app, "GENERATION_S", 0.0)

    reply = client.post(CHAT, json={**HONEY, "max_tokens": 500}).json()

    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] < 10


# Monitoring, and the log


@pytest.mark.parametrize(
    ("worker", "status", "said"),
    [({}, 200, "ok"), ({"busy_s": 61.0}, 503, "stuck"), ({"is_alive": False}, 503, "stopped")],
)
def test_a_worker_that_is_stuck_is_told(
    client: Any, worker: dict[str, Any], status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/readyz says whether an answer can be had; /healthz only whether the program has to be started again."""
    for name, value in worker.items():
        monkeypatch.setattr(Scheduler, name, value)

    ready, health = client.get("/readyz"), client.get("/healthz")

    assert (ready.status_code, ready.json()) == (status, {"status": said})
    assert health.status_code == (503 if said == "stopped" else 200)


def test_an_index_that_is_gone_is_told(engine: Engine, tmp_path: Path) -> None:
    """/readyz says so, by no name."""
    index = build(tmp_path, engine)
    with serving({"manual": index}, engine) as url:
        assert httpx.get(url + "/readyz").status_code == 200
        index.rename(tmp_path / "elsewhere")

        answer = httpx.get(url + "/readyz")

    assert (answer.status_code, answer.json()) == (503, {"status": "an index is missing"})


def test_what_the_guard_refuses_is_logged_and_counted(
    index: Path, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong key leaves a line with address and path, harmless on a terminal and without the key, and is counted."""
    keys = {digest("alice"): frozenset({"*"})}
    with serving({"manual": index}, engine, access={"keys": keys}, metrics=True) as url:
        httpx.get(url + "/v1/models%1B%0A?key=secret", headers={"Authorization": "Bearer mallory"})
        counts = httpx.get(url + "/metrics", headers={"Authorization": "Bearer alice"}).text

    line = next(one for one in caplog.messages if one.startswith("refused"))
    assert line == r"refused GET /v1/models\x1b\n from 127.0.0.1: 401 invalid_api_key"
    assert 'gistrag_refusals_total{code="invalid_api_key"} 1.0' in counts
    assert "gistrag_waiting_seconds_count" in counts
    assert "mallory" not in caplog.text


def test_a_question_of_a_megabyte_is_refused_unread(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs no work of the model."""
    monkeypatch.setattr(GistModel, "encode_question", None)
    body = {**HONEY, "messages": [{"role": "user", "content": "honey " * 150_000}]}

    assert error(client.post(CHAT, json=body)) == (400, "invalid_value")
    assert error(client.post("/v1/retrieve", json={"query": "honey " * 150_000})) == (400, "invalid_value")


@pytest.mark.parametrize("wanted", [False, True])
def test_questions_are_logged_only_when_asked(
    index: Path, engine: Engine, caplog: pytest.LogCaptureFixture, wanted: bool
) -> None:
    """The log has a line for each answer, and the question only with `log_questions`."""
    with serving({"manual": index}, engine, log_questions=wanted) as url, caplog.at_level(logging.INFO, "gistrag"):
        httpx.post(url + CHAT, json=HONEY, timeout=60)

    assert "manual: 6 tokens, first after" in caplog.text
    assert ("Where is the honey?" in caplog.text) == wanted


# Vectors


def test_openai_client_embeds(ai: Any) -> None:
    """OpenAI's own client, which asks for base64, gets a vector of length 1 for each text."""
    made = ai.embeddings.create(model="manual", input=["honey", "salt"])
    (plain,) = ai.embeddings.create(model="manual", input="honey", encoding_format="float").data

    vectors = [one.embedding for one in made.data]
    assert [one.index for one in made.data] == [0, 1]
    assert vectors[0] == pytest.approx(plain.embedding)
    assert vectors[0] != pytest.approx(vectors[1])
    assert sum(number**2 for number in vectors[1]) == pytest.approx(1)
    assert made.usage.total_tokens > 0


@pytest.mark.parametrize("given", ["", "  ", [], ["honey", ""], [[1, 2]], ["x"] * 257, None])
def test_what_cannot_be_embedded_is_refused(client: Any, given: Any) -> None:
    """Texts without words, token ids, and too many texts are refused."""
    answer = client.post("/v1/embeddings", json={"model": "manual", "input": given})

    assert error(answer) == (400, "invalid_value")


def test_vectors_of_another_size_are_refused(client: Any) -> None:
    """The embedder has one size."""
    answer = client.post("/v1/embeddings", json={"model": "manual", "input": "honey", "dimensions": 3})

    assert error(answer) == (400, "invalid_value")


def test_an_unknown_address_names_those_there_are(client: Any) -> None:
    """Whoever looks for another route of OpenAI's API learns what there is."""
    assert "/v1/embeddings" in client.post("/v1/responses", json={}).json()["error"]["message"]
