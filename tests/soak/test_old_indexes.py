"""Promise 14: an index of every format there was opens, migrates, or is refused in one line."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from pathlib import Path

import pytest
from support import fake_compressor
from support.make_golden import DATA, FORMS, GISTS, contents, found_in

from gistrag.cli.main import main as run_command
from gistrag.errors import FingerprintMismatchError
from gistrag.index.schema import FORMAT_VERSION
from gistrag.rag import GistRAG

BYTES_MAX = 200_000
FOLDERS = sorted(DATA.glob("golden-index-*"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a golden index; reading needs to write beside index.db."""
    return Path(shutil.copytree(request.param, tmp_path / "index"))


def test_every_format_has_a_golden_index() -> None:
    """A new format comes with a golden index, and keeps those before it; each is small."""
    assert [f"golden-index-{number}" for number in range(1, FORMAT_VERSION + 1)] == [path.name for path in FOLDERS]
    for folder in FOLDERS:
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < BYTES_MAX


def test_golden_index_holds_what_it_held(golden: Path) -> None:
    """Documents, chunks, gists, vectors, words and settings are read as they were written."""
    expected = json.loads((golden / "expected.json").read_text("utf-8"))
    found = json.loads(json.dumps(contents(golden)))

    assert expected.pop("settings").items() <= found.pop("settings").items()  # later versions may know more of them
    assert expected == found


def test_golden_index_is_sound(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The full check finds nothing."""
    assert 0 == run_command(["verify", "--index", str(golden), "--full"])
    assert "match their records" in capsys.readouterr().out


def test_golden_index_is_built_on(golden: Path, tmp_path: Path) -> None:
    """A build goes on with it, or refuses because its model was another; then --rebuild makes it again."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "new.txt").write_text("The lantern burns all night over the bridge.")
    options = {"index": golden, "engine": fake_compressor.engine()}
    with fake_compressor.fake_compression():
        try:
            GistRAG.from_folder(tmp_path / "docs", gists="now", **options).close()
        except FingerprintMismatchError as error:
            assert re.search("--rebuild", str(error))  # noqa: PT017  either is right
            GistRAG.from_folder(tmp_path / "docs", rebuild=True, gists="now", **options).close()
        with GistRAG.open(golden, engine=options["engine"]) as rag:
            assert ["new.txt"] == [row.path for row in rag.store.documents()]


def test_newer_format_is_refused_in_one_line(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A format that does not exist yet ends with code 4 and both numbers."""
    database = sqlite3.connect(golden / "index.db")
    database.execute(f"PRAGMA user_version = {FORMAT_VERSION + 1}")
    database.close()

    assert 4 == run_command(["verify", "--index", str(golden)])
    told = capsys.readouterr().err
    assert 1 == told.count("\n")
    assert f"format {FORMAT_VERSION + 1}, this gistrag reads up to {FORMAT_VERSION}" in told


@pytest.mark.parametrize("form", FORMS)
def test_golden_gist_holds_what_it_held(form: str) -> None:
    """A gist file of every form is read as it was written: whole or in few bits, with as many tokens a head or not."""
    expected = json.loads((GISTS / "expected.json").read_text("utf-8"))

    assert expected[form] == found_in((GISTS / f"{form}.safetensors").read_bytes(), form)
