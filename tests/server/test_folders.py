"""Folders that are added while the server runs: who may, which ones, and what comes of them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.live_server import CHAT, HONEY, TEXTS, build, error, serving

from gistrag.engine import Engine
from gistrag.errors import UsageError
from gistrag.index.gist_worker import GistWorker
from gistrag.rag import GistRAG
from gistrag.server.auth import ALL, digest
from gistrag.server.folders import Folders

httpx = pytest.importorskip("httpx2")
KEY = "a-key-that-builds-0123456789"
BUILDS = {"keys": {digest(KEY): ALL}}
ADD = "/v1/folders"


@pytest.fixture(autouse=True)
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child process: the tiny model lies in no folder that it could load."""
    monkeypatch.setattr(GistWorker, "_start", lambda worker: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of documents, of an empty folder, of hidden ones and of a link that leads out."""
    folder = tmp_path / "root"
    for inner in ("notes/2026", "empty", ".secret", "회의록"):
        (folder / inner).mkdir(parents=True)
    for name, text in TEXTS.items():
        (folder / "notes" / name).write_text(text, "utf-8")
        (folder / ".secret" / name).write_text(text, "utf-8")
    (folder / "회의록" / "a.md").write_text("# 회의\n\n다음 회의는 화요일입니다.\n", "utf-8")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.md").write_text("# Outside\n", "utf-8")
    (folder / "link").symlink_to(tmp_path / "outside")
    return folder


@pytest.fixture
def client(root: Path, tmp_path: Path, engine: Engine) -> Iterator[Any]:
    """A client with the key that builds, of a server of one index."""
    index = build(tmp_path, engine, {"mills.md": TEXTS["mills.md"]})
    with serving({"mills": index}, engine, access=BUILDS, root=root) as url, opened(url) as client:
        yield client


def opened(url: str, key: str = KEY) -> Any:
    """Return a client of a server."""
    return httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {key}"})


def built(client: Any, path: str) -> dict[str, Any]:
    """Add a folder and return its build once it has ended."""
    client.post(ADD, json={"path": path}).raise_for_status()
    for _ in range(600):
        known: dict[str, Any] = client.get(ADD).json()["build"]
        if known["state"] != "reading":
            return known
        time.sleep(0.02)
    raise AssertionError(known)


def test_a_folder_becomes_an_index(client: Any, root: Path) -> None:
    """It is listed as a model, answers, is brought up to date when it is added again, and keeps its index."""
    assert client.get(ADD).json() == {"build": None, "choices": ["empty", "notes", "회의록"]}

    first = built(client, "notes")
    assert first == {
        **{"path": "notes", "name": "notes", "state": "ready", "documents": 2, "of": 2, "skipped": 0, "error": ""}
    }
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["mills", "notes"]
    reply = client.post(CHAT, json={**HONEY, "model": "notes"}).json()
    assert "bees.md" in {one["path"] for one in reply["gistrag"]["sources"]}
    (root / "notes" / "new.md").write_text("# New\n\nNewer words.\n", "utf-8")
    assert built(client, "./notes/")["of"] == 1
    listed = client.get("/v1/documents", params={"model": "notes"}).json()
    assert [one["path"] for one in listed["data"]] == ["bees.md", "mills.md", "new.md"]
    assert listed["status"]["pending_chunks"] == listed["status"]["gist_chunks"] > 0
    assert (root / ".gistrag" / "notes" / "index.db").exists()


def test_names(client: Any) -> None:
    """Letters of any script stay, a path becomes one word, and a name that is taken gets a number."""
    assert built(client, "회의록")["name"] == "회의록"
    assert built(client, "notes/2026")["name"] == "notes-2026"


def test_the_root_itself_and_a_taken_name(root: Path, tmp_path: Path, engine: Engine) -> None:
    """The root is a folder too; an index of that name that was served before stays what it was."""
    index = build(tmp_path, engine, {"mills.md": TEXTS["mills.md"]})
    with serving({"root": index}, engine, access=BUILDS, root=root) as url, opened(url) as client:
        assert built(client, ".")["name"] == "root-2"
        paths = [one["path"] for one in client.get("/v1/documents", params={"model": "root-2"}).json()["data"]]
        assert paths == ["notes/bees.md", "notes/mills.md", "회의록/a.md"]


def test_a_later_server_serves_it_again(root: Path, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Without any other index too; one that is damaged is left out with a warning."""
    with serving({}, engine, access=BUILDS, root=root) as url, opened(url) as client:
        assert client.get("/v1/models").json() == {"object": "list", "data": [], "may_add_folders": True}
        built(client, "notes")
    (root / ".gistrag" / "broken").mkdir()
    (root / ".gistrag" / "broken" / "index.db").write_text("nothing of the kind", "utf-8")

    with serving({}, engine, access=BUILDS, root=root) as url, opened(url) as client:
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["notes"]
    assert "broken is not served" in caplog.text


@pytest.mark.parametrize(
    "path", ["../outside", "link", "/etc", "nothing", "notes/bees.md", ".secret", ".gistrag", "a\0b", "x" * 4000]
)
def test_folders_that_are_refused(client: Any, path: str) -> None:
    """Outside of the root, by a link too, hidden, missing, or a file: one answer for all, and nothing is built."""
    reply = client.post(ADD, json={"path": path})

    assert error(reply) == (400, "invalid_value")
    assert reply.json()["error"]["message"] == f"expected the path of a folder in root, got {path!r}"
    assert client.get(ADD).json()["build"] is None


@pytest.mark.parametrize("body", [{}, {"path": 1}, {"path": "notes", "index": "/tmp"}, {"path": "x" * 5000}])
def test_requests_that_are_refused(client: Any, body: dict[str, Any]) -> None:
    """A request names a path and nothing else."""
    assert error(client.post(ADD, json=body)) == (400, "invalid_value")


def test_an_empty_folder_says_so(client: Any) -> None:
    """It becomes no index, and the next folder can be added."""
    known = built(client, "empty")

    assert known["state"] == "failed"
    assert known["error"].startswith("nothing to read in root/empty;")
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["mills"]
    assert built(client, "notes")["state"] == "ready"


def test_a_failure_that_nobody_expected_names_nothing(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client learns that it failed, the log why."""

    def fail(*given: object, **options: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(GistRAG, "from_folder", fail)

    assert built(client, "notes")["error"] == "internal error; see the server log"


def test_one_at_a_time(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a folder is read, another one is refused, how far it is can be seen, and questions are answered."""
    going, original = threading.Event(), Folders.read

    def read(folders: Folders, *, documents: int, of: int) -> None:
        original(folders, documents=documents, of=of)
        going.wait(30)

    monkeypatch.setattr(Folders, "read", read)
    client.post(ADD, json={"path": "notes"})
    while not (known := client.get(ADD).json()["build"])["of"]:
        time.sleep(0.02)
    refused = client.post(ADD, json={"path": "회의록"})
    answered = client.post(CHAT, json={**HONEY, "model": "mills"})
    going.set()

    assert (known["state"], known["documents"], known["of"]) == ("reading", 0, 2)
    assert error(refused) == (409, "build_under_way")
    assert answered.status_code == 200


def test_a_server_that_ends_ends_the_build(
    root: Path, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for the rest of the folder."""
    begun, original = threading.Event(), Folders.read
    seen: list[str] = []

    def read(folders: Folders, *, documents: int, of: int) -> None:
        begun.set()
        while not folders._is_closed:
            time.sleep(0.02)
        seen.append("closed")
        original(folders, documents=documents, of=of)

    monkeypatch.setattr(Folders, "read", read)
    with serving({}, engine, access=BUILDS, root=root) as url, opened(url) as client:
        client.post(ADD, json={"path": "notes"})
        assert begun.wait(30)

    assert seen == ["closed"]


def test_who_may_not(root: Path, tmp_path: Path, engine: Engine) -> None:
    """Without the key it is 401, with one of some indexes only, or on a server without keys, 403."""
    index = build(tmp_path, engine)
    with serving({"manual": index}, engine, access=BUILDS, root=root) as url:
        for key in ("none", "another-key-0123456789"):
            with opened(url, key) as client:
                assert error(client.post(ADD, json={"path": "notes"})) == (401, "invalid_api_key")
                assert error(client.get(ADD)) == (401, "invalid_api_key")
    with serving({"manual": index}, engine, root=root) as url, opened(url, "none") as client:
        assert error(client.get(ADD)) == (403, "may_not_build")
        assert client.get("/v1/models").json()["may_add_folders"] is False
    keys = {digest("all-0123456789012"): ALL, digest("some-0123456789012"): frozenset({"manual"})}
    with serving({"manual": index}, engine, access={"keys": keys}, root=root) as url:
        with opened(url, "some-0123456789012") as client:
            assert error(client.post(ADD, json={"path": "notes"})) == (403, "may_not_build")
        with opened(url, "all-0123456789012") as client:
            assert built(client, "notes")["state"] == "ready"
            assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["manual", "notes"]
        with opened(url, "some-0123456789012") as client:
            assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["manual"]


def test_without_the_flag_there_is_no_such_route(tmp_path: Path, engine: Engine) -> None:
    """A server that was not told a root knows nothing of folders."""
    with serving({"manual": build(tmp_path, engine)}, engine, access=BUILDS) as url, opened(url) as client:
        assert error(client.post(ADD, json={"path": "notes"})) == (404, "not_found")
        assert client.get("/v1/models").json()["may_add_folders"] is False


def test_a_root_that_is_none(tmp_path: Path, engine: Engine) -> None:
    """The option names a folder."""
    with pytest.raises(UsageError, match=r"expected a folder at .*nothing, found none; check --allow-build"):
        Folders(tmp_path / "nothing", {}, engine)


def test_gists_are_made_as_the_server_was_told(root: Path, engine: Engine) -> None:
    """Without gists in the background nobody makes any: for new folders, those added again, and a later server's."""
    registry: dict[str, GistRAG] = {}

    async def add(folders: Folders) -> None:
        folders.add("notes")
        assert folders._task
        await folders._task

    for text in ("One.", "Two."):
        (root / "notes" / "more.md").write_text(f"# More\n\n{text} And some more words of it.\n", "utf-8")
        asyncio.run(add(Folders(root, registry, engine, gists="none")))
    status = registry["notes"].store.stats()
    registry.pop("notes").close()
    Folders(root, registry, engine, gists="none")
    reopened = registry["notes"]

    assert (status.documents, status.gists) == (3, 0)
    assert status.pending_chunks == status.gist_chunks == 3
    assert not reopened.progress.is_working
    reopened.close()
