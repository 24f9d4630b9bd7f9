"""`gistrag gc` removes what nothing refers to, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.small_index import gist_file, make

from gistrag.cli import exit_codes
from gistrag.cli.main import main as run_command
from gistrag.index.store import Store
from gistrag.storage import files


def test_what_a_stopped_build_left_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files without a row go, with the bytes they took; a gist that is used and a stranger's file stay."""
    make(tmp_path)
    stray = tmp_path / "gists" / "00" / f"{'0' * 64}.safetensors"
    stray.parent.mkdir()
    stray.write_bytes(bytes(10_000))
    (tmp_path / "notes.txt").write_text("mine")

    assert 0 == run_command(["gc", "--index", str(tmp_path), "--json"])
    done = json.loads(capsys.readouterr().out)
    assert (1, True) == (done["files"], done["is_gone"])
    assert not stray.exists()
    assert gist_file(tmp_path).exists()
    assert (tmp_path / "notes.txt").exists()
    assert 0 == run_command(["verify", "--index", str(tmp_path), "--full"])


def test_nothing_to_remove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index in order stays as it is."""
    make(tmp_path)

    assert 0 == run_command(["gc", "--index", str(tmp_path)])
    assert capsys.readouterr().out.startswith("0 files removed")


@pytest.mark.parametrize("exists", [True, False])
def test_without_an_index_none_is_made(tmp_path: Path, exists: bool) -> None:
    """A folder without an index ends with code 4 and stays as it is."""
    folder = tmp_path / "index"
    if exists:
        folder.mkdir()

    assert 4 == run_command(["gc", "--index", str(folder)])
    assert ([], exists) == (list(folder.glob("*")), folder.exists())


def test_a_build_at_work_is_not_disturbed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While a build holds the lock, code 6 and who it is."""
    make(tmp_path)
    with files.lock(tmp_path / "lock", command="gistrag build docs"):
        assert exit_codes.LOCKED == run_command(["gc", "--index", str(tmp_path)])
    assert "gistrag build docs" in capsys.readouterr().err


def test_deleted_rows_take_no_words_along(tmp_path: Path) -> None:
    """What a build removed without cleaning up, having been stopped, is cleaned up."""
    make(tmp_path, "the quokka word")
    with Store.build(tmp_path) as store:
        store.remove_document("a.md")

    assert 0 == run_command(["gc", "--index", str(tmp_path)])
    held = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"quokka" not in held
    assert [] == list(tmp_path.rglob("*.safetensors"))
