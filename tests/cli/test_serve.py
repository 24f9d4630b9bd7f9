"""The command `gistrag serve`: what it refuses before loading anything, and how it runs and ends."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.live_server import exchange, request

import gistrag.server
from gistrag.cli import mcp, serve
from gistrag.errors import UsageError
from gistrag.server.auth import digest

KEY = "0123456789abcdef0123"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key in the environment."""
    monkeypatch.delenv(serve.KEY, raising=False)


def test_others_need_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that others can reach is refused without keys; a file or the environment gives them."""
    with pytest.raises(UsageError, match=r"because other machines can reach 0\.0\.0\.0; give a file with --key-file"):
        serve.access_for("0.0.0.0", ["manual"], names=(), key_file=None)

    path = tmp_path / "keys.txt"
    path.write_text(f"{KEY} manual\n", "utf-8")
    path.chmod(0o600)
    monkeypatch.setenv(serve.KEY, KEY[::-1])
    access = serve.access_for("0.0.0.0", ["manual", "notes"], names=("Docs.Example.org",), key_file=path)

    assert {digest(KEY): {"manual"}, digest(KEY[::-1]): {"manual", "notes"}} == access.keys
    assert {"localhost", "127.0.0.1", "[::1]", "0.0.0.0", "docs.example.org"} == access.hosts


def test_this_machine_needs_none() -> None:
    """On the loopback address anybody on the machine may ask."""
    access = serve.access_for("::1", ["manual"], names=(), key_file=None)

    assert ({}, {"manual"}) == (access.keys, access.indexes)


@pytest.mark.parametrize("verb", [serve, mcp])
def test_without_an_index_there_is_no_server(
    verb: object, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder without an index ends the command with one line and its exit code."""
    monkeypatch.chdir(tmp_path)

    assert 4 == verb.main(["--port", "0"] if verb is serve else [])  # type: ignore[attr-defined]
    assert "gistrag build" in capsys.readouterr().err.splitlines()[-1]


def test_a_taken_port_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A port that somebody listens at is refused before anything is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        assert 2 == serve.main(["--port", str(port)])
    assert f"cannot listen at 127.0.0.1 port {port}" in capsys.readouterr().err


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where FastAPI or the MCP SDK is missing, the error says what to install."""
    for name in ("http", "mcp"):
        monkeypatch.delattr(gistrag.server, name, raising=False)
        monkeypatch.setitem(sys.modules, f"gistrag.server.{name}", None)

    assert (2, 2) == (serve.main([]), mcp.main([]))
    told = capsys.readouterr().err
    assert "pip install 'gistrag[server]'" in told
    assert "pip install 'gistrag[mcp]'" in told


@pytest.mark.model
def test_the_command_serves_and_ends(tmp_path: Path) -> None:
    """With the real models: it says where it is, answers, and ends well when told to."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "port.md").write_text("The harbour of Anlaby has three cranes.", "utf-8")
    run = [sys.executable, "-m", "gistrag"]
    subprocess.run([*run, "build", "docs", "--quiet"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, "-m", "gistrag", "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr is not None
            told = next(line for line in running.stderr if line.startswith("serving"))
            url = re.findall(r"http://\S+:\d+", told)[0]
            body = b'{"model": "index", "max_tokens": 8, "messages": [{"role": "user", "content": "How many cranes?"}]}'

            assert 200 == exchange(url, request("POST", "/v1/chat/completions", body))
            running.send_signal(signal.SIGTERM)
            assert 0 == running.wait(timeout=60)
        finally:
            running.kill()  # the end of the block would wait for a server that nobody stops
