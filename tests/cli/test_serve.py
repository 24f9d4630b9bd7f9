"""The command `gistrag serve`: what it refuses before it loads a model, and how it runs and ends."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.live_server import exchange, request

import gistrag.server
from gistrag.cli import serve
from gistrag.cli.main import main as run_command
from gistrag.errors import UsageError
from gistrag.server.auth import ALL, Access, digest

KEY = "0123456789abcdef0123"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key in the environment."""
    monkeypatch.delenv(serve.KEY, raising=False)


def test_others_need_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that other machines can reach requires keys, from a file or the environment."""
    with pytest.raises(UsageError, match=r"because other machines can reach 0\.0\.0\.0; give a file with --key-file"):
        serve.access_for("0.0.0.0", ["manual"], names=(), key_file=None)

    path = tmp_path / "keys.txt"
    path.write_text(f"{KEY} manual\n", "utf-8")
    path.chmod(0o600)
    monkeypatch.setenv(serve.KEY, KEY[::-1])
    access = serve.access_for("0.0.0.0", ["manual", "notes"], names=("Docs.Example.org",), key_file=path)

    assert access.keys == {digest(KEY): {"manual"}, digest(KEY[::-1]): ALL}
    assert access.hosts == {"localhost", "127.0.0.1", "[::1]", "0.0.0.0", "docs.example.org"}


def test_a_new_key_opens_everything() -> None:
    """Without keys the server makes one, another each time."""
    access = Access(indexes=frozenset({"manual"}))
    first = serve.own_token(access, no_token=False)

    assert len(first) >= 32
    assert access.keys == {digest(first): ALL}
    assert serve.own_token(access, no_token=False) == ""

    access.keys = {}
    assert serve.own_token(access, no_token=True) == ""
    assert first != serve.own_token(access, no_token=False)


def test_a_terminal_that_closes_ends_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SIGHUP reads the key file again, keeps the keys if it is bad, and ends a server that has none."""
    path = tmp_path / "keys.txt"
    path.write_text(f"{KEY} manual\n", "utf-8")
    path.chmod(0o600)
    running: Any = SimpleNamespace(should_exit=False)
    access = serve.access_for("127.0.0.1", ["manual"], names=(), key_file=path)

    path.write_text(f"{KEY[::-1]} manual\n", "utf-8")
    serve.hang_up(running, access, path)
    assert access.keys == {digest(KEY[::-1]): {"manual"}}

    path.write_text("short manual\n", "utf-8")
    serve.hang_up(running, access, path)
    assert access.keys == {digest(KEY[::-1]): {"manual"}}
    assert "the keys stay as they are: line 1" in caplog.text
    assert not running.should_exit

    serve.hang_up(running, access, None)
    assert running.should_exit


def test_no_token_beside_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two wishes that contradict each other are refused."""
    monkeypatch.setenv(serve.KEY, KEY)

    assert run_command(["serve", "--port", "0", "--index", str(tmp_path / "index"), "--no-token"]) == 2
    assert "--no-token contradicts the keys" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "keys", "message"),
    [
        (["--host", "0.0.0.0"], f"{KEY} *", "expected --host 127.0.0.1 with --allow-build, got 0.0.0.0"),
        ([], f"{KEY} index", "expected a key that opens all indexes (*) with --allow-build"),
        (["--no-token"], "", "expected a key that opens all indexes (*) with --allow-build"),
    ],
)
def test_who_may_not_add_folders(
    arguments: list[str], keys: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other machines may not, nor a server whose keys open some indexes only: one line, before a model is loaded."""
    path = tmp_path / "keys.txt"
    path.write_text(keys + "\n", "utf-8")
    path.chmod(0o600)
    given = ["--index", f"index={tmp_path / 'index'}", "--allow-build", str(tmp_path)]
    given += ["--key-file", str(path)] if keys else []

    assert run_command(["serve", "--port", "0", *given, *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["serve", "--port", "0"], ["mcp"]])
def test_without_an_index_there_is_no_server(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an index the command ends with one line and exit code 4."""
    monkeypatch.chdir(tmp_path)

    assert run_command(arguments) == 4
    assert "gistrag build" in capsys.readouterr().err.splitlines()[-1]


def test_a_taken_port_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A port in use is refused before a model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        assert run_command(["serve", "--port", str(port)]) == 2
    assert f"cannot listen at 127.0.0.1 port {port}" in capsys.readouterr().err


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """If FastAPI or the MCP SDK is missing, the error says what to install."""
    for name in ("http", "mcp"):
        monkeypatch.delattr(gistrag.server, name, raising=False)
        monkeypatch.setitem(sys.modules, f"gistrag.server.{name}", None)

    assert (
        run_command(
            [
                "serve",
            ]
        )
        == 2
    )
    assert (
        run_command(
            [
                "mcp",
            ]
        )
        == 2
    )
    output = capsys.readouterr().err
    assert "pip install 'gistrag[server]'" in output
    assert "pip install 'gistrag[mcp]'" in output


@pytest.mark.model
def test_the_command_serves_and_ends(tmp_path: Path) -> None:
    """With the real models: the command prints address and key, answers whoever has it, ends at SIGTERM with code 0."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "port.md").write_text("The harbour of Anlaby has three cranes.", "utf-8")
    run = [sys.executable, "-m", "gistrag"]
    subprocess.run([*run, "build", "docs", "--quiet"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, "-m", "gistrag", "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as running:
        try:
            assert running.stderr is not None
            line = next(line for line in running.stderr if line.startswith("open"))
            url, key = re.findall(r"(http://\S+:\d+)/#key=(\S+)", line)[0]
            body = b'{"model": "index", "max_tokens": 8, "messages": [{"role": "user", "content": "How many cranes?"}]}'

            assert exchange(url, request("POST", "/v1/chat/completions", body)) == 401
            asked = request("POST", "/v1/chat/completions", body, Authorization=f"Bearer {key}")
            assert exchange(url, asked) == 200
            running.send_signal(signal.SIGTERM)
            assert running.wait(timeout=60) == 0
        finally:
            running.kill()  # the end of the block would wait for a server that nobody stops
