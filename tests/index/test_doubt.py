"""Damage in index.db that no row and no page notices: it is told when the index is searched, and no build hides it."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import pytest
from support.live_server import TEXTS, build
from support.small_index import document, entries, make

from gistrag.cli.main import main as run_command
from gistrag.engine import Engine
from gistrag.index import retriever
from gistrag.index.chunk_rows import damaged_documents
from gistrag.index.store import Store
from gistrag.rag import GistRAG


@pytest.fixture
def index(tmp_path: Path, engine: Engine) -> Path:
    return build(tmp_path, engine)


def damage(index: Path, kind: str) -> None:
    """Change a letter in the keywords, or a bit of a vector."""
    path = index / "index.db"
    data = path.read_bytes()
    if kind == "keywords":
        changed = data.replace(b"honei", b"money")  # the stem
    else:
        connection = sqlite3.connect(path)
        (vector,) = connection.execute("SELECT vector FROM vectors LIMIT 1").fetchone()
        connection.close()
        changed = data.replace(vector, bytes([vector[0] ^ 64]) + vector[1:])
    assert changed != data
    path.write_bytes(changed)


def sync(index: Path, engine: Engine) -> list[str]:
    with GistRAG.from_folder(index.parent / "docs", index=index, engine=engine, gists="now") as rag:
        assert rag.report is not None
        assert rag.report.gists_made == 0
        return rag.report.changed


@pytest.mark.parametrize("kind", ["keywords", "vectors"])
def test_damage_of_keywords_and_vectors_is_told_and_mended(
    index: Path, engine: Engine, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By the first search and by verify; the next build of any kind makes both again, and gists stay."""
    with Store.open(index) as reader:
        found, rows = reader.keyword_search(["honey"], 3), reader.vectors.rows().vectors.tolist()
    damage(index, kind)

    assert 4 == run_command(["verify", "--index", str(index)])
    with GistRAG.open(index, engine=engine) as rag:
        for _ in range(2):
            assert rag.retrieve("Where is the honey?")
    assert ["differs from its hash" in one.message for one in caplog.records if "passages" in one.message] == [True]

    assert sorted(TEXTS) == sync(index, engine)
    assert 0 == run_command(["verify", "--index", str(index), "--full"])
    with Store.open(index) as reader:
        assert len(found) == len(reader.keyword_search(["honey"], 3)) > 0
        assert rows == reader.vectors.rows().vectors.tolist()
    assert [] == sync(index, engine)


def test_no_other_commit_hides_damage(index: Path, engine: Engine) -> None:
    """Whoever writes into the index first, and even a manifest: the doubt stays until a build has removed it."""
    damage(index, "keywords")
    with Store.build(index) as opened:
        opened.mark_stale("bees.md")
    assert 0 == run_command(["gc", "--index", str(index)])

    assert 4 == run_command(["verify", "--index", str(index)])
    assert sorted(TEXTS) == sync(index, engine)
    assert 0 == run_command(["verify", "--index", str(index)])


def test_a_large_database_is_not_hashed_by_a_search(
    index: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That would make its first question wait; verify and every build hash it."""
    monkeypatch.setattr(retriever, "HASHED_BYTES_MAX", 1)
    damage(index, "keywords")
    with GistRAG.open(index, engine=engine) as rag:
        rag.retrieve("Where is the honey?")

    assert [] == [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert 4 == run_command(["verify", "--index", str(index)])


@pytest.mark.parametrize("column", ["documents.path", "metadata.value"])
def test_a_changed_path_is_not_cited(index: Path, engine: Engine, column: str) -> None:
    """A document whose path differs from the one it was read under is left out, told by verify and made again."""
    table, name = column.split(".")
    connection = sqlite3.connect(index / "index.db")
    connection.execute(f"UPDATE {table} SET {name} = replace({name}, 'mills.md', 'lies.md')")
    connection.commit()
    connection.close()
    (index / "manifest.json").unlink()  # the hash of the whole file is another promise

    with GistRAG.open(index, engine=engine) as rag:
        assert {"bees.md"} == {hit.chunk.path for hit in rag.retrieve("Who grinds the wheat by the river?", top_k=9)}
    assert 4 == run_command(["verify", "--index", str(index)])
    sync(index, engine)
    assert 0 == run_command(["verify", "--index", str(index), "--full"])
    with Store.open(index) as reader:
        assert sorted(TEXTS) == [row.path for row in reader.documents()]


def test_paths_that_changed_or_were_never_recorded_are_no_damage(tmp_path: Path) -> None:
    """A renamed document, one whose metadata were never read, and an index made before there were metadata."""
    make(tmp_path, "hello world")
    with Store.build(tmp_path) as opened:
        opened.rename_document("a.md", "b.md")
        opened.commit()
        with Store.open(tmp_path) as reader:
            assert ["b.md"] == [one.path for one in reader.chunks([1])]
        opened.replace_document(document("c d.md"), entries(["other words"]))
    with Store.build(tmp_path) as opened:
        assert [] == damaged_documents(opened.database)
        opened.database.execute("DROP TABLE metadata")
    with Store.open(tmp_path) as reader:
        assert ([], 2) == (damaged_documents(reader.database), len(reader.chunks([1, 2])))
