"""The local model and an endpoint as teachers; the endpoint is a real server on this machine."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from support.teacher_endpoint import RUBBISH, SLOW, Endpoint, said, serve  # noqa: F401  a fixture
from support.tiny_models import tiny_model

from gistrag.errors import ResourceError, UsageError
from gistrag.kv.cache import concatenate
from gistrag.model import generation
from gistrag.model.generation import generate
from gistrag.model.gist_model import GistModel
from gistrag.training.teacher import HOPELESS, LOST, EndpointTeacher, LocalTeacher, Request

NEAR = "http://127.0.0.1:8000/v1"
UNENCRYPTED = "the key goes to far.example without encryption; name an https address"
PASSAGE = Request("Who runs it?", "Adela Novak runs the tower.", ("Towers",), rules="Be brief.")


def teacher(endpoint: Endpoint, **settings: Any) -> EndpointTeacher:
    """Return a teacher that is quick to try again."""
    return EndpointTeacher(endpoint.url, "tutor", **{"timeout_s": 5.0, "parallel": 1, **settings})


def test_endpoint_gets_a_chat_and_gives_its_text(serve: Callable[..., Endpoint]) -> None:
    """Model, messages and length are sent with the key; the text comes back trimmed."""
    endpoint = serve(lambda number, body: " Adela Novak.\n")

    texts = teacher(endpoint, key="sesame").write([PASSAGE], max_new_tokens=7)

    (body,) = endpoint.bodies
    assert texts == ["Adela Novak."]
    assert body["model"] == "tutor"
    assert body["max_tokens"] == 7
    assert body["temperature"] == 0
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][0]["content"].endswith("Be brief.")
    assert "Towers\nAdela Novak runs the tower.\n\nWho runs it?" in body["messages"][1]["content"]
    assert endpoint.headers[0]["Authorization"] == "Bearer sesame"


def test_without_a_passage_only_the_task_is_sent() -> None:
    """A closed-book question is the question and nothing else."""
    assert Request("Who runs it?").messages() == [{"role": "user", "content": "Who runs it?"}]


def test_answers_stand_in_the_order_of_the_requests(serve: Callable[..., Endpoint]) -> None:
    """However they overtake each other."""
    endpoint = serve(lambda number, body: body["messages"][0]["content"].upper())
    requests = [Request(f"task {number}") for number in range(20)]

    texts = teacher(endpoint, parallel=4).write(requests, max_new_tokens=5)

    assert [f"TASK {number}" for number in range(20)] == texts


def test_thoughts_are_no_answer(serve: Callable[..., Endpoint]) -> None:
    """What a model thinks aloud before it answers is left out."""
    endpoint = serve(lambda number, body: "<think>hm,\nwho?</think>\nShe does.")

    assert teacher(endpoint).write([PASSAGE], max_new_tokens=5) == ["She does."]


def test_half_a_character_is_replaced(serve: Callable[..., Endpoint]) -> None:
    """JSON can hold what no file and no tokenizer takes."""
    endpoint = serve(lambda number, body: "Who \ud83d built it?")

    assert teacher(endpoint).write([PASSAGE], max_new_tokens=5) == ["Who ? built it?"]


@pytest.mark.parametrize("first", RUBBISH)
def test_what_is_no_answer_is_asked_for_again(serve: Callable[..., Endpoint], first: Any) -> None:
    """Rubbish and errors that pass are followed by another attempt."""
    endpoint = serve(lambda number, body: "fine" if number else first)

    assert teacher(endpoint).write([PASSAGE], max_new_tokens=5) == ["fine"]


def test_what_never_answers_is_none_and_the_rest_goes_on(
    serve: Callable[..., Endpoint], caplog: pytest.LogCaptureFixture
) -> None:
    """A request is given up after its retries, with a line that says why; the others are answered."""
    endpoint = serve(lambda number, body: "fine" if "good" in str(body) else RUBBISH[0])
    requests = [Request("good 1"), Request("bad"), Request("good 2")]

    texts = teacher(endpoint, retries=2, key="sesame").write(requests, max_new_tokens=5)

    assert texts == ["fine", None, "fine"]
    assert len(endpoint.bodies) == 5
    assert "expected a chat completion, got b'<html>" in caplog.text
    assert "sesame" not in caplog.text


def test_an_endpoint_that_names_a_pause_gets_it(serve: Callable[..., Endpoint]) -> None:
    """`Retry-After` decides when an overloaded endpoint is asked again."""
    endpoint = serve(lambda number, body: "fine" if number else (429, {"Retry-After": "1", **SLOW}, b""))
    started_s = time.monotonic()

    texts = teacher(endpoint).write([PASSAGE], max_new_tokens=5)

    assert texts == ["fine"]
    assert 1.0 <= time.monotonic() - started_s < 10


def test_an_endpoint_that_hangs_is_given_up(serve: Callable[..., Endpoint]) -> None:
    """No request waits longer than its time."""
    endpoint = serve(lambda number, body: "hang" if "slow" in str(body) else "fine")

    texts = teacher(endpoint, timeout_s=1.0, retries=1).write([Request("slow"), Request("fast")], max_new_tokens=5)

    assert texts == [None, "fine"]


def test_ctrl_c_waits_for_no_slow_endpoint(serve: Callable[..., Endpoint]) -> None:
    """The process ends at once, although a request is under way."""
    endpoint = serve(lambda number, body: "hang")
    code = (
        "from gistrag.training.teacher import EndpointTeacher, Request\n"
        f"EndpointTeacher({endpoint.url!r}, 'tutor').write([Request('slow')] * 8, max_new_tokens=5)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    while not endpoint.bodies and process.poll() is None:
        time.sleep(0.05)

    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)

    assert "KeyboardInterrupt" in err
    assert process.returncode != 0


def test_an_endpoint_that_trickles_is_given_up(serve: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that never ends counts as none, though bytes keep coming."""
    endpoint = serve(lambda number, body: "fine")

    def trickle(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not endpoint.is_over.wait(0.02):
            handler.wfile.write(b" ")

    monkeypatch.setattr(endpoint, "_answer", trickle)

    assert teacher(endpoint, timeout_s=0.2, retries=0).write([PASSAGE], max_new_tokens=5) == [None]


def test_an_endpoint_that_is_down_costs_little_patience(serve: Callable[..., Endpoint]) -> None:
    """After a row of requests without an answer each is tried once only, until one is answered again."""
    is_up = False
    endpoint = serve(lambda number, body: "fine" if is_up else RUBBISH[6])
    down = teacher(endpoint, retries=1)

    texts = down.write([PASSAGE] * (HOPELESS + 5), max_new_tokens=5)

    assert [None] * (HOPELESS + 5) == texts
    assert HOPELESS * 2 + 5 == len(endpoint.bodies)
    is_up = True
    assert down.write([PASSAGE], max_new_tokens=5) == ["fine"]
    is_up = False
    before = len(endpoint.bodies)
    down.write([PASSAGE], max_new_tokens=5)
    assert len(endpoint.bodies) - before == 2


def test_an_endpoint_that_stays_down_is_given_up(
    serve: Callable[..., Endpoint], caplog: pytest.LogCaptureFixture
) -> None:
    """After a long row of requests without an answer; only the first few have a line of their own."""
    endpoint = serve(lambda number, body: RUBBISH[6])
    down = teacher(endpoint, retries=0)

    with pytest.raises(ResourceError, match=f"to {LOST} requests in a row"):
        down.write([PASSAGE] * (LOST + 20), max_new_tokens=5)

    assert LOST <= len(endpoint.bodies) < LOST + 20
    assert caplog.text.count("no answer from") == HOPELESS


def test_nobody_at_the_address(serve: Callable[..., Endpoint], caplog: pytest.LogCaptureFixture) -> None:
    """A refused connection is no answer, not an error."""
    endpoint = serve(lambda number, body: "fine")
    endpoint.close()

    assert teacher(endpoint, retries=1).write([PASSAGE], max_new_tokens=5) == [None]
    assert "refused" in caplog.text


@pytest.mark.parametrize(("status", "hint"), [(401, "GISTRAG_TEACHER_KEY"), (403, "KEY"), (404, "--teacher")])
def test_a_refusal_that_stays_ends_the_run(serve: Callable[..., Endpoint], status: int, hint: str) -> None:
    """A wrong key, address or model is said at once, without the key."""
    endpoint = serve(lambda number, body: (status, {}, b"no"))

    with pytest.raises(UsageError, match=hint) as caught:
        teacher(endpoint, key="sesame").write([PASSAGE] * 3, max_new_tokens=5)

    assert len(endpoint.bodies) == 1
    assert "sesame" not in str(caught.value)


def test_a_request_the_endpoint_cannot_take_is_not_repeated(serve: Callable[..., Endpoint]) -> None:
    """Such as one that is too long for it."""
    endpoint = serve(lambda number, body: (400, {}, b"too long"))

    assert teacher(endpoint).write([PASSAGE], max_new_tokens=5) == [None]
    assert len(endpoint.bodies) == 1


def test_a_redirect_is_not_followed(serve: Callable[..., Endpoint]) -> None:
    """The key goes to the address that was given and to no other."""
    other = serve(lambda number, body: "fine")
    endpoint = serve(lambda number, body: (302, {"Location": f"{other.url}/chat/completions"}, b""))

    assert teacher(endpoint, key="sesame").write([PASSAGE], max_new_tokens=5) == [None]
    assert other.bodies == []


@pytest.mark.parametrize(
    "address",
    ["file:///etc", "localhost:8000", "http://[::1", "http://[bad", "http://a b/v1", "http://", "http://a:99999", ""],
)
def test_an_address_must_be_one(address: str) -> None:
    """Only http and https are asked; an address that is none is refused before the first request."""
    with pytest.raises(UsageError, match="http://localhost"):
        EndpointTeacher(address, "tutor")


def test_a_key_may_end_with_a_line(serve: Callable[..., Endpoint]) -> None:
    """As it does where it comes from a file."""
    endpoint = serve(lambda number, body: "fine")

    assert teacher(endpoint, key="sesame\n").write([PASSAGE], max_new_tokens=5) == ["fine"]
    assert endpoint.headers[0]["Authorization"] == "Bearer sesame"


@pytest.mark.parametrize("key", ["two\nlines", "öffne"])
def test_a_key_that_no_header_holds(key: str) -> None:
    """It is refused before the first request, and not shown."""
    with pytest.raises(UsageError, match="GISTRAG_TEACHER_KEY") as caught:
        EndpointTeacher("http://localhost:8000/v1", "tutor", key=key)

    assert key not in str(caught.value)


@pytest.mark.parametrize(("address", "warned"), [("http://far.example/v1", 1), ("https://far.example", 0), (NEAR, 0)])
def test_a_key_in_the_clear(address: str, warned: int, caplog: pytest.LogCaptureFixture) -> None:
    """One line says that others on the way can read the key."""
    EndpointTeacher(address, "tutor", key="sesame")

    assert [record.message for record in caplog.records].count(UNENCRYPTED) == warned


def test_a_missing_package_names_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The openai package is an extra."""
    monkeypatch.setitem(sys.modules, "openai", None)

    with pytest.raises(UsageError, match=r'pip install "gistrag\[synthesize\]"'):
        EndpointTeacher("http://localhost:8000/v1", "tutor")


def test_without_a_key_nothing_of_the_environment_is_sent(
    serve: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client would add the key and organization of an OpenAI account; they are for another address."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    monkeypatch.setenv("OPENAI_ORG_ID", "secret-organization")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "secret-project")
    endpoint = serve(lambda number, body: "fine")

    texts = teacher(endpoint).write([PASSAGE], max_new_tokens=5)

    assert texts == ["fine"]
    assert "Authorization" not in endpoint.headers[0]
    assert "secret" not in str(endpoint.headers)


# The local model

REQUESTS = [
    Request("what?", "a passage to write about", ("Title",)),
    Request("and this rather longer task?", "short"),
    Request("no passage", rules="for others", begin="Q:"),
]


def test_local_teacher_reads_like_a_prompt(model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes is the greedy answer behind prefix, passage as text, and the beginning it is given."""
    monkeypatch.setitem(model.__dict__, "stop_ids", frozenset())
    memory = concatenate([model.prefix], model.rope)
    prompts = [
        [*model.encode_passage(REQUESTS[0].passage, ("Title",)), *model.encode_question("what?")],
        [*model.encode_passage("short"), *model.encode_question(REQUESTS[1].task)],
        [*model.encode_question("no passage"), *model.encode("Q:")],
    ]
    said = [model.decode(list(generate(model, memory, ids, max_new_tokens=9))) for ids in prompts]
    expected = [said[0].strip(), said[1].strip(), f"Q:{said[2]}".strip()]

    assert LocalTeacher(model).write(REQUESTS, max_new_tokens=9) == expected


def test_local_teacher_leaves_out_what_does_not_fit(model: GistModel) -> None:
    """A passage longer than the window has no text; the others do."""
    asked = [Request("what?", "x" * 2000), Request("what?", "x")]
    texts = LocalTeacher(model).write(asked, max_new_tokens=3)
    assert [LocalTeacher(model).fits(one, max_new_tokens=3) for one in asked] == [False, True]

    assert texts[0] is None
    assert isinstance(texts[1], str)


def test_local_teacher_reads_as_many_as_fit(model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read side by side up to a number of rows and of tokens, and every request is served once."""
    monkeypatch.setattr("gistrag.training.teacher.ROWS", 3)
    monkeypatch.setattr("gistrag.training.teacher.TOKENS", 200)
    sizes: list[int] = []
    together = generation.generate_batch

    def watched(*arguments: Any, **settings: Any) -> Any:
        sizes.append(len(arguments[2]))
        return together(*arguments, **settings)

    monkeypatch.setattr("gistrag.model.generation.generate_batch", watched)
    requests = [Request("?", "x" * 90)] * 3 + [Request("?", "x")] * 4

    texts = LocalTeacher(model).write(requests, max_new_tokens=2)

    assert len(texts) == 7
    assert None not in texts
    assert sum(sizes) == 7
    assert sizes[:2] == [3, 1]


def test_local_teacher_wants_the_base_model() -> None:
    """With an adapter it would not be the model the person has."""
    model = tiny_model()
    model.new_adapter(rank=2, gists=1)

    with pytest.raises(UsageError, match="without"):
        LocalTeacher(model)


def test_warnings_name_the_library_logger(serve: Callable[..., Endpoint], caplog: pytest.LogCaptureFixture) -> None:
    """What goes wrong is told through the library's logger, so that --quiet is obeyed."""
    endpoint = serve(lambda number, body: RUBBISH[0])

    teacher(endpoint, retries=0).write([PASSAGE], max_new_tokens=5)

    assert [(record.name, record.levelno) for record in caplog.records] == [("gistrag", logging.WARNING)]
