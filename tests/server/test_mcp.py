"""The tools of an agent, through the SDK's own client."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.believing import NOT_FOUND, SURE
from support.live_server import build

from gistrag.answering.stream import Stream
from gistrag.engine import Engine
from gistrag.errors import IndexFolderError
from gistrag.model.prompt import REFUSAL
from gistrag.rag import GistRAG
from gistrag.server.registry import Record, status_record

pytest.importorskip("mcp")

from mcp import Client

from gistrag.server import mcp

# `gistrag mcp` in a subprocess, with a tiny model in place of a real one
TINY_SERVER = """
import sys
sys.path.insert(0, {tests!r})
from support.tiny_models import HashEmbedder, tiny_model
from gistrag.cli.main import main
from gistrag.engine import Engine
Engine.load = lambda *given, **options: Engine(tiny_model(), HashEmbedder())
sys.exit(main(["mcp", "--index", "manual={index}"]))
"""


@pytest.fixture
def index(tmp_path: Path, engine: Engine) -> Path:
    """An index of two documents."""
    return build(tmp_path, engine)


@pytest.fixture
def registry(index: Path, engine: Engine) -> Iterator[dict[str, GistRAG]]:
    """That index twice, under two names."""
    with GistRAG.open(index, engine=engine) as manual, GistRAG.open(index, engine=engine) as notes:
        yield {"manual": manual, "notes": notes}


def tiny_server(index: Path) -> str:
    """Return the source of that program."""
    return TINY_SERVER.format(tests=str(Path(__file__).parents[1]), index=index)


def talk(server: Any, script: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
    """Run a script with a client that is connected to a server."""

    async def connected() -> None:
        async with Client(server) as client:
            await script(client)

    asyncio.run(asyncio.wait_for(connected(), timeout=120))


def test_the_tools(registry: dict[str, GistRAG]) -> None:
    """Four read-only tools, each with a description of itself and of its parameters."""

    async def script(client: Client) -> None:
        listed = (await client.list_tools()).tools
        assert [tool.name for tool in listed] == ["search", "ask", "list_documents", "status"]
        for tool in listed:
            assert tool.annotations is not None
            assert tool.annotations.read_only_hint
            assert tool.description
            assert all("description" in one for one in tool.input_schema.get("properties", {}).values())

    talk(mcp.server(registry), script)


def test_search_ask_and_status(registry: dict[str, GistRAG]) -> None:
    """An agent searches, asks and lists, by the names of indexes and documents."""

    async def script(client: Client) -> None:
        async def call(name: str, **given: Any) -> Any:
            reply = await client.call_tool(name, given)
            assert not reply.is_error, reply.content
            return reply.structured_content

        found = await call("search", question="Where is the honey?", index="manual", top_k=1)
        answer = await call("ask", question="honey", index="notes", document="mills.md", max_tokens=4, mode="text")
        filtered = await call("search", question="honey", index="manual", filters={"path": "mills*"})
        wrong = await client.call_tool("search", {"question": "x", "index": "manual", "filters": {"date": "2026-13"}})
        documents = await call("list_documents", index="manual")
        status = await call("status")

        assert [passage["path"] for passage in found["passages"]] == ["bees.md"]
        assert [passage["path"] for passage in filtered["passages"]] == ["mills.md"]
        assert wrong.is_error
        assert "real date" in str(wrong.content)
        assert "combs of wax" in found["passages"][0]["text"]
        assert [one["path"] for one in answer["sources"]] == ["mills.md"]
        assert answer["usage"]["answer_tokens"] == 4
        assert answer["is_cut"]
        assert answer["evidence"] == answer["sources"][0]["evidence"]
        assert answer["evidence"]["text"]
        assert (answer["confidence"], answer["verdict"]) == (None, None)
        assert [row["path"] for row in documents["documents"]] == ["bees.md", "mills.md"]
        assert {name: one["documents"] for name, one in status["indexes"].items()} == {"manual": 2, "notes": 2}

    talk(mcp.server(registry), script)


def test_an_agent_learns_how_far_to_believe(registry: dict[str, GistRAG], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a calibration an answer has a confidence and a verdict; one that is not found is told as such."""
    for rag, calibration in zip(registry.values(), (SURE, NOT_FOUND), strict=True):
        monkeypatch.setattr(rag, "engine", replace(rag.engine, calibration=calibration))

    async def script(client: Client) -> None:
        sure, refused = [
            (await client.call_tool("ask", {"question": "honey", "index": name, "max_tokens": 4})).structured_content
            for name in ("manual", "notes")
        ]
        assert sure["confidence"] == pytest.approx(0.91)
        assert sure["verdict"] == ("unsure" if sure["unsupported"] else "answered")
        assert (refused["verdict"], refused["answer"]) == ("not found", REFUSAL)

    talk(mcp.server(registry), script)


def test_a_follow_up_brings_its_history(registry: dict[str, GistRAG]) -> None:
    """What was searched is the question with the one it leans on, in search and in ask."""

    async def script(client: Client) -> None:
        given = {"question": "And what does it do?", "history": ["Where is the mill?"], "index": "manual", "top_k": 1}
        for name, places in (("search", "passages"), ("ask", "sources")):
            reply = (await client.call_tool(name, given)).structured_content
            assert reply["searched"] == "Where is the mill? And what does it do?"
            assert [one["path"] for one in reply[places]] == ["mills.md"]

    talk(mcp.server(registry), script)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("search", {"question": "honey"}, "expected index, one of manual, notes, got None"),
        ("search", {"question": "honey", "index": "/etc"}, "expected index, one of manual, notes, got '/etc'"),
        ("search", {"question": " ", "index": "manual"}, "the question is empty"),
        ("search", {"question": "x" * 2**20, "index": "manual"}, "at most 65,536 characters, got 1,048,576"),
        ("ask", {"question": "x" * 2**20, "index": "manual"}, "at most 65,536 characters, got 1,048,576"),
        ("ask", {"question": "honey", "index": "manual", "document": "x.md"}, "no document 'x.md' in manual"),
        ("ask", {"question": "honey", "index": "manual", "top_k": 65}, "less than or equal to 64"),
        ("ask", {"question": "Why?", "index": "manual", "history": [5]}, "history.0"),
        ("ask", {"question": "Why?", "index": "manual", "history": ["a"] * 1001}, "at most 1000 items"),
        ("ask", {"question": "a" * 2000, "index": "manual"}, "the model's context window has 1024"),
        ("remove", {}, "remove"),
    ],
)
def test_what_goes_wrong_is_told(
    registry: dict[str, GistRAG], tmp_path: Path, name: str, given: dict[str, Any], message: str
) -> None:
    """A bad call is an error that an agent can read, and that names no folder."""

    async def script(client: Client) -> None:
        reply = str(await failure(client, name, given))
        assert message in reply
        assert str(tmp_path) not in reply

    talk(mcp.server(registry), script)


async def failure(client: Client, name: str, given: dict[str, Any]) -> Any:
    """Return the error of a call."""
    try:
        reply = await client.call_tool(name, given)
    except Exception as error:
        return error
    assert reply.is_error
    return reply.content[0]


def test_a_cancelled_answer_ends(registry: dict[str, GistRAG], monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled answer ends at the next token, and frees the index for others."""
    pieces: list[str] = []
    next_of = Stream.__next__

    def slowly(stream: Stream) -> str:
        pieces.append(next_of(stream))
        time.sleep(0.02)
        return pieces[-1]

    monkeypatch.setattr(Stream, "__next__", slowly)

    async def script(client: Client) -> None:
        asking = asyncio.create_task(
            client.call_tool("ask", {"question": "honey", "index": "manual", "max_tokens": 500})
        )
        while not pieces:
            await asyncio.sleep(0.01)
        asking.cancel()
        found = await client.call_tool("search", {"question": "honey", "index": "manual"})
        assert not found.is_error

    talk(mcp.server(registry), script)
    assert len(pieces) < 50


def test_an_answer_that_ends_is_whole(registry: dict[str, GistRAG], monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that the model ends itself is not cut."""
    monkeypatch.setattr(Stream, "_answer", lambda stream: iter(["wax", "."]))

    async def script(client: Client) -> None:
        reply = await client.call_tool("ask", {"question": "honey", "index": "manual", "max_tokens": 500})
        assert reply.structured_content is not None
        assert reply.structured_content["answer"] == "wax."
        assert not reply.structured_content["is_cut"]

    talk(mcp.server(registry), script)


def test_an_answer_that_takes_too_long_is_cut(registry: dict[str, GistRAG], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the time limit an agent gets an incomplete answer with `is_cut`."""
    monkeypatch.setattr(mcp, "ANSWER_S", 0.0)

    async def script(client: Client) -> None:
        reply = await client.call_tool("ask", {"question": "honey", "index": "manual", "max_tokens": 500})
        assert reply.structured_content is not None
        assert reply.structured_content["usage"]["answer_tokens"] < 10
        assert reply.structured_content["is_cut"]

    talk(mcp.server(registry), script)


def test_an_index_that_cannot_be_read_hides_no_other(
    registry: dict[str, GistRAG], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`status` reports an unreadable index beside the others."""

    def status(rag: GistRAG) -> Record:
        if rag is registry["notes"]:
            raise IndexFolderError(f"{rag.folder} is damaged")
        return status_record(rag)

    monkeypatch.setattr(mcp, "status_record", status)

    async def script(client: Client) -> None:
        reply = (await client.call_tool("status", {})).structured_content
        assert reply is not None
        assert reply["indexes"]["manual"]["documents"] == 2
        assert reply["indexes"]["notes"] == {"error": "notes is damaged"}

    talk(mcp.server(registry), script)


def test_over_standard_input_and_output(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The manual's example starts the command and calls its tools, with a tiny model in place of the real one."""
    page = (Path(__file__).parents[2] / "docs" / "mcp.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    command = 'command="gistrag", args=["mcp", "--index", "manual=index/"]'
    assert command in block

    exec(block.replace(command, f"command={sys.executable!r}, args=['-c', {tiny_server(index)!r}]"), {})

    reply = capsys.readouterr().out
    assert "search - Return the passages" in reply
    assert "bees.md ['Bees']" in reply
