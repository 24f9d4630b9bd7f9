"""What is known of a document besides its text is stored, returned, and looked at by filters."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from support.small_index import configure, document, entries

from gistrag import GistRAG
from gistrag.answering.answer import Options
from gistrag.cli.main import main as run_command
from gistrag.documents.discovery import Document
from gistrag.documents.text import Part
from gistrag.engine import Engine
from gistrag.errors import UsageError
from gistrag.index.store import Store
from gistrag.server.registry import hit_record, source_record

MAIL = {"date": "2026-01-31T10:00:00+09:00", "from": "Kim Min <kim@example.org>", "subject": "Crane"}


def described(path: str, *metadata: dict[str, str]) -> Document:
    """Return a document with metadata of its own, or with several parts, each of ten characters."""
    whole = metadata[0] if len(metadata) == 1 else {}
    parts = tuple(Part(10 * at, one) for at, one in enumerate(metadata)) if len(metadata) > 1 else ()
    made = document(path)
    return Document(**{**vars(made), "text": "x" * 10 * len(metadata), "metadata": whole, "parts": parts})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An index of a mail, a diary of a day, a mailbox of two messages, and a text of which nothing is known."""
    with Store.build(tmp_path / "index") as store:
        configure(store)
        store.replace_document(described("mail.eml", MAIL), entries(["crane"]))
        store.replace_document(described("diary.md", {"date": "2026-02-01"}), entries(["rain"]))
        first, second = (
            {"from": "Ann <ann@example.org>", "date": "2025-12-24"},
            {"from": "박지우", "date": "2026-03-01"},
        )
        chunks = entries(["a" * 10, "b" * 10])
        moved = [type(one)(chunk=one.chunk, gist_key=None, vectors=one.vectors) for one in chunks]
        object.__setattr__(moved[1].chunk, "start", 10)
        store.replace_document(described("box.mbox", first, second), moved)
        store.replace_document(document("plain.txt"), entries(["nothing"]))
    return tmp_path / "index"


def passing(folder: Path, **filters: str) -> list[str]:
    """Return the texts of the chunks that pass."""
    with Store.open(folder) as store:
        return sorted(chunk.text[:5] for chunk in store.chunks(store.select(filters) or ()))


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"date": ">=2026-01-01"}, ["bbbbb", "crane", "rain"]),
        ({"date": "<2026"}, ["aaaaa"]),
        ({"date": "2026-01-31"}, ["crane"]),
        ({"date": "<=2026-01-31"}, ["aaaaa", "crane"]),
        ({"date": ">2026-01"}, ["bbbbb", "rain"]),
        ({"date": "==2026-01-31T10"}, None),
        ({"date": ">=2026-01-31T10:00, <2026-03"}, ["crane", "rain"]),
        ({"from": "KIM"}, ["crane"]),
        ({"from": "== ann <ANN@example.org>"}, ["aaaaa"]),
        ({"from": "==kim"}, []),
        ({"from": "박"}, ["bbbbb"]),
        ({"subject": "100%_'; DROP TABLE metadata; --"}, []),
        ({"from": "example.org", "date": ">=2026", "kind": "markdown"}, ["crane"]),
        ({"from": "kim", "path": "*.md"}, []),
    ],
)
def test_filters_look_at_metadata(folder: Path, filters: dict[str, str], expected: list[str] | None) -> None:
    """Dates compare as far as they go, other values hold a part; each message of a mailbox counts for itself."""
    if expected is None:
        with pytest.raises(UsageError, match="real date"):
            passing(folder, **filters)
    else:
        assert passing(folder, **filters) == expected


@pytest.mark.parametrize(
    "filters",
    [
        {"date": ">=2026-02-30"},
        {"date": "2026-13"},
        {"date": "yesterday"},
        {"date": "0000-01-01"},
        {"date": ""},
        {"date": ">=2026-01-01,"},
        {"date": "２０２６-01-01"},
        {"from": ""},
        {"from": ">kim"},
        {"colour": "red"},
    ],
)
def test_a_filter_that_makes_no_sense_is_refused_in_one_line(folder: Path, filters: dict[str, str]) -> None:
    """Impossible dates, empty values, an order of names and unknown filters, before anything is searched."""
    for refuse in (lambda: passing(folder, **filters), lambda: Options(filters=filters)):
        with pytest.raises(UsageError) as caught:
            refuse()
        assert "\n" not in str(caught.value)


def test_the_command_refuses_an_impossible_date(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code of a wrong use, one line, before a model is loaded."""
    assert run_command(["query", "x", "--index", str(folder), "--filter", "date=>=2026-02-30"]) == 2

    assert capsys.readouterr().err.count("\n") == 1


def test_chunks_know_the_part_they_are_in(folder: Path) -> None:
    """A chunk of a mailbox has the metadata of its message, one of a plain text has none."""
    with Store.open(folder) as store:
        assert [chunk.metadata["from"] for chunk in store.chunks_of("box.mbox")] == ["Ann <ann@example.org>", "박지우"]
        assert [chunk.metadata for chunk in store.chunks_of("plain.txt")] == [{}]
        assert [chunk.metadata for chunk in store.chunks_of("mail.eml")] == [MAIL]


def test_sources_and_hits_have_metadata(tmp_path: Path, engine: Engine) -> None:
    """Python and JSON return them; the date in the name of a file is one, and front matter names the title."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "2026-01-05 minutes.md").write_text("---\ntitle: 'Cranes'\n---\nThe harbour has three cranes.")
    (docs / "other.md").write_text("The harbour of another town has none.")
    expected = {"date": "2026-01-05", "title": "Cranes"}

    with GistRAG.from_folder(docs, index=tmp_path / "index", engine=engine, gists="none") as rag:
        hits = rag.retrieve("harbour", filters={"date": ">=2026-01-01"})
        answer = rag.query("How many cranes are there?", filters={"title": "crane"}, max_new_tokens=2)

    assert [hit.metadata for hit in hits] == [expected]
    assert [source.metadata for source in answer.sources] == [expected]
    assert hit_record(hits[0])["metadata"] == source_record(answer.sources[0])["metadata"] == expected


def test_an_older_index_opens_and_its_next_build_reads_metadata_only(tmp_path: Path, engine: Engine) -> None:
    """Without the table there is no metadata and no error; a build reads it, and embeds and compresses nothing."""
    docs, index = tmp_path / "docs", tmp_path / "index"
    docs.mkdir()
    (docs / "2026-01-05.md").write_text("The harbour has three cranes.")
    GistRAG.from_folder(docs, index=index, engine=engine).close()
    with sqlite3.connect(index / "index.db") as database:
        database.execute("DROP TABLE metadata")

    with GistRAG.open(index, engine=engine) as old:
        assert [hit.metadata for hit in old.retrieve("harbour")] == [{}]
        assert old.retrieve("harbour", filters={"date": "2026"}) == []
    with GistRAG.from_folder(docs, index=index, engine=engine, gists="none") as new:
        assert new.report is not None
        assert (new.report.chunks, new.report.unchanged) == (0, 1)
        assert [hit.metadata for hit in new.retrieve("harbour")] == [{"date": "2026-01-05"}]


def test_a_renamed_file_has_the_date_of_its_new_name(tmp_path: Path, engine: Engine) -> None:
    """Its text is not read into the index again, its metadata are."""
    docs, index = tmp_path / "docs", tmp_path / "index"
    docs.mkdir()
    (docs / "2026-01-05.md").write_text("The harbour has three cranes.")
    GistRAG.from_folder(docs, index=index, engine=engine, gists="none").close()
    (docs / "2026-01-05.md").rename(docs / "2026-01-06.md")

    with GistRAG.from_folder(docs, index=index, engine=engine, gists="none") as rag:
        assert rag.report is not None
        assert (rag.report.chunks, rag.report.renamed) == (0, ["2026-01-05.md → 2026-01-06.md"])
        assert [hit.metadata for hit in rag.retrieve("harbour")] == [{"date": "2026-01-06"}]
