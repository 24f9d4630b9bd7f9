"""`gistrag verify --full` finds any changed bit, and says what a build makes again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.small_index import gist_file, make

from gistrag.cli import verify
from gistrag.cli.main import main as run_command
from gistrag.index import manifest
from gistrag.index.integrity import Findings
from gistrag.index.store import Store


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """An index with its manifest."""
    make(tmp_path / "index", "hello world", "other words")
    with Store.build(tmp_path / "index") as opened:
        manifest.write(opened)
    return tmp_path / "index"


def findings(index: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    code = run_command(["verify", "--index", str(index), "--full", "--json"])
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    assert code == (0 if found["sound"] else 4)
    return found


def test_any_changed_byte_of_the_database_is_found(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one that no row and no page knows of."""
    path = index / "index.db"
    data = path.read_bytes()
    quiet = next(place for place in range(5000, len(data)) if not any(data[place - 50 : place + 50]))
    path.write_bytes(data[:quiet] + b"?" + data[quiet + 1 :])

    found = findings(index, capsys)
    assert ["index.db differs from its hash in manifest.json"] == found["database"]
    assert {"a.md": 0} == found["documents"]


def test_older_database_is_found(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that was put back after a later build."""
    before = (index / "index.db").read_bytes()
    with Store.build(index) as opened:
        opened.mark_stale("a.md")
        manifest.write(opened)
    (index / "index.db").write_bytes(before)

    assert "index.db is older than manifest.json" in str(findings(index, capsys)["database"])


def test_build_that_was_stopped_is_no_damage(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A database that is newer than its manifest is compared row by row only."""
    with Store.build(index) as opened:
        opened.mark_stale("a.md")

    found = findings(index, capsys)
    assert (True, ["a.md"]) == (found["sound"], found["stale"])


def test_index_without_a_manifest_is_sound(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to compare then; an unreadable one is told."""
    (index / "manifest.json").unlink()
    assert findings(index, capsys)["sound"]

    (index / "manifest.json").write_bytes(b"\xff")
    assert not findings(index, capsys)["sound"]


def test_uncommitted_work_of_a_builder_is_no_damage(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index is sound while it is built."""
    with Store.build(index) as opened:
        opened.mark_stale("a.md")
        assert findings(index, capsys)["sound"]
        opened.commit()
        assert findings(index, capsys)["sound"]


def test_what_a_build_makes_again_is_listed(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The document of a damaged gist, with the number of chunks that use it, and the build that mends it."""
    path = gist_file(index)
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    assert 4 == run_command(["verify", "--index", str(index), "--full"])
    told = capsys.readouterr().out
    assert "again: a.md, 2 gists\n" in told
    assert f"run gistrag build {index / 'docs'} --index {index} --verify; rebuilds the gists of a.md" in told


def test_gist_without_a_row_is_missing(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chunk that names a gist which the database does not know is answered from text, and listed."""
    with Store.build(index) as opened:
        opened.database.execute("PRAGMA foreign_keys = OFF")
        opened.database.execute("DELETE FROM gists")

    found = findings(index, capsys)
    assert ([f"no row in index.db for gist {gist_file(index).stem}"], {"a.md": 2}) == (
        found["missing"],
        found["documents"],
    )


def test_many_documents_are_not_all_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The last line names five and counts the rest."""
    wrong = Findings(damaged=["x"], documents=dict.fromkeys("abcdefg", 1))

    assert "run B; rebuilds the gists of a, b, c, d, e, 2 more" == verify._lines(wrong, "B", full=False)[-1]
