"""An index that is replaced, moved or removed while it is open, and a lock that is taken away from a build."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.live_server import CHAT, HONEY, build, serving
from support.small_index import cache, configure, document, entries, make

from gistrag.engine import Engine
from gistrag.errors import FingerprintMismatchError, IncompleteIndexError, IndexLockedError
from gistrag.index.retriever import VectorSearch
from gistrag.index.store import Store
from gistrag.rag import GistRAG
from gistrag.storage import files

SILVER = {"ore.md": "# Silver\n\nThe silver is kept in a vault below the mill, and nobody has the key to it.\n"}


@pytest.fixture
def two(tmp_path: Path, engine: Engine) -> tuple[Path, Path]:
    """An index of bees that is served as ``live``, and one of silver that was built aside."""
    live = build(tmp_path / "bees", engine).rename(tmp_path / "live")
    return live, build(tmp_path / "silver", engine, SILVER)


def test_an_index_put_in_place_of_an_open_one_answers(two: tuple[Path, Path], engine: Engine, tmp_path: Path) -> None:
    """With its own text, gists, vectors, summaries and name, as if it had been opened; the text of before is gone."""
    live, aside = two
    with GistRAG.open(live, engine=engine) as rag, GistRAG.open(aside, engine=engine) as other:
        rag.query("Where is the honey?", max_new_tokens=2)
        live.rename(tmp_path / "old")
        shutil.copytree(aside, live)
        found, expected = (one.query("Where is the honey?", max_new_tokens=2) for one in (rag, other))

        assert ["ore.md"] == [row.path for row in rag.documents()] == [source.path for source in found.sources]
        assert (found.text, 0) == (expected.text, found.usage.text_fallbacks)
        assert rag.store.summaries.titles() == other.store.summaries.titles()
        assert rag.index_id == other.index_id


def test_a_served_index_is_replaced_and_removed(two: tuple[Path, Path], engine: Engine, tmp_path: Path) -> None:
    """The server answers from the new one, refuses while there is none, and goes on when one is there again."""
    httpx = pytest.importorskip("httpx2")
    live, aside = two
    with serving({"manual": live}, engine) as url, httpx.Client(base_url=url, timeout=60) as client:
        first = client.post(CHAT, json=HONEY).json()
        live.rename(tmp_path / "old")
        aside.rename(live)
        second = client.post(CHAT, json=HONEY).json()
        live.rename(tmp_path / "gone")
        refused = [client.post(CHAT, json=HONEY), client.get("/v1/documents")]
        (tmp_path / "old").rename(live)
        third = client.post(CHAT, json=HONEY).json()

    assert {"ore.md"} == {source["path"] for source in second["gistrag"]["sources"]}
    assert [(503, "index_unavailable")] * 2 == [(one.status_code, one.json()["error"]["code"]) for one in refused]
    assert str(live) not in refused[0].text
    for name in ("choices", "model"):
        assert first[name] == third[name]


@pytest.mark.parametrize("made", ["gist_fingerprint", "embedder_fingerprint"])
def test_a_replacement_of_other_models_is_refused(tmp_path: Path, made: str) -> None:
    """In one line, at every question, until one of the same models is there."""
    make(tmp_path / "live", "hello world")
    with Store.build(tmp_path / "other") as opened:
        configure(opened, **{made: {"base": "of another model"}})
    with Store.open(tmp_path / "live") as reader:
        (tmp_path / "live").rename(tmp_path / "old")
        (tmp_path / "other").rename(tmp_path / "live")
        for _ in range(2):
            with pytest.raises(FingerprintMismatchError, match="open it again"):
                reader.documents()
        (tmp_path / "live").rename(tmp_path / "other")
        (tmp_path / "old").rename(tmp_path / "live")

        assert ["a.md"] == [row.path for row in reader.documents()]


def test_a_removed_index_is_one_line(tmp_path: Path) -> None:
    """Outside of a snapshot and inside; a snapshot that is open keeps to what it began with."""
    make(tmp_path / "live", "hello world")
    with Store.open(tmp_path / "live") as reader:
        with reader.snapshot():
            before = reader.documents()
            shutil.rmtree(tmp_path / "live")
            assert before == reader.documents()
        for _ in range(2):
            with pytest.raises(IncompleteIndexError, match="no index in"), reader.snapshot():
                pass
            with pytest.raises(IncompleteIndexError, match="no index in"):
                reader.documents()
        reader.close()
        make(tmp_path / "live", "hello again")
        with pytest.raises(Exception, match="closed"):
            reader.documents()


def test_vectors_are_those_of_the_replacement(tmp_path: Path) -> None:
    """Also where neither index has a vector file by which they could be told apart."""
    make(tmp_path / "live", "hello world")
    make(tmp_path / "aside", *map(str, range(5)))
    with Store.open(tmp_path / "live") as reader:
        search = VectorSearch(reader)
        question = reader.vectors.rows().vectors[0]
        assert 1 == len(search.nearest(question, 9))
        shutil.rmtree(tmp_path / "live")
        (tmp_path / "aside").rename(tmp_path / "live")

        assert 5 == len(search.nearest(question, 9))


@pytest.mark.parametrize("again", [False, True])
def test_a_build_whose_lock_was_taken_away_stops(tmp_path: Path, again: bool) -> None:
    """In one line, before the next commit or removal; its commits stand, and the other builder loses nothing."""
    make(tmp_path, "hello world")
    with pytest.raises(IndexLockedError, match="was removed") as raised, Store.build(tmp_path) as first:  # noqa: PT012
        first.replace_document(document("b.md"), entries(["committed"]))
        first.commit()
        (tmp_path / "lock").unlink()
        if again:
            with Store.build(tmp_path, command="the second build") as second:
                key = second.gists.key([9])
                second.gists.put({key: cache()})
                second.replace_document(document("c.md"), entries(["of the second"], key=key))
        first.replace_document(document("d.md"), entries(["of the first"]))

    assert (6, "\n" in str(raised.value)) == (IndexLockedError.exit_code, False)
    with Store.open(tmp_path) as reader:
        assert {"a.md", "b.md", *(["c.md"] if again else [])} == {row.path for row in reader.documents()}
        assert all(reader.gists.path(key).exists() for key in reader.gists.all_keys())


def test_a_lock_that_another_holds_is_named(tmp_path: Path) -> None:
    """With its process and its command."""
    path = tmp_path / "lock"
    with files.lock(path, command="the first") as require_held:
        require_held()
        path.unlink()
        with pytest.raises(IndexLockedError, match="nobody holds it"):
            require_held()
        with files.lock(path, command="the second"), pytest.raises(IndexLockedError, match="the second"):
            require_held()
