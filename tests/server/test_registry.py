"""Names of indexes, and indexes that share models."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.live_server import build
from support.tiny_models import HashEmbedder

from gistrag.engine import Engine
from gistrag.errors import FingerprintMismatchError, UsageError
from gistrag.rag import GistRAG
from gistrag.server import registry


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a=one", "a=two"], "two indexes are named 'a'"),
        (["../x=one"], "--index expects NAME=FOLDER, .*, got '../x=one'"),
        (["=one"], "got '=one'"),
        (["two words=one"], "got 'two words=one'"),
    ],
)
def test_bad_names_are_refused(given: list[str], message: str) -> None:
    """A name that could be a path, or that is used twice, is refused."""
    with pytest.raises(UsageError, match=message):
        registry.named(given)


def test_all_indexes_share_the_models_of_the_first(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models are loaded once; an index that was made with other models is refused."""
    folders = {name: build(tmp_path / name, engine) for name in ("a", "b")}
    loaded: list[object] = []

    def load(*given: object, **options: object) -> Engine:
        loaded.append(given)
        return engine

    monkeypatch.setattr(Engine, "load", load)

    with registry.opened(folders) as rags:
        assert list(rags) == ["a", "b"]
        assert {id(rag.engine) for rag in rags.values()} == {id(engine)}
    assert len(loaded) == 1

    folders["c"] = build(tmp_path / "c", Engine(engine.model, HashEmbedder("another")))
    with pytest.raises(FingerprintMismatchError, match="was made with embedder 'another', this one has 'hash'"):
        registry.opened(folders).__enter__()


def test_records_hold_no_folder(tmp_path: Path, engine: Engine) -> None:
    """The records about an index do not contain the path of its folder."""
    with GistRAG.open(build(tmp_path, engine), engine=engine) as rag:
        records = [
            registry.status_record(rag),
            registry.document_records(rag),
            registry.hit_record(rag.retrieve("honey")[0]),
        ]

    assert "bees.md" in str(records)
    assert str(tmp_path) not in str(records)


def test_examples_come_from_all_over_the_index(tmp_path: Path, engine: Engine) -> None:
    """Titles of three documents, the middle section of each; no title twice, none that is long or missing."""
    texts = {f"{letter}.md": f"# Guide {letter}\n\nOne.\n\n## Part {letter}\n\nTwo.\n" for letter in "abcdefghi"}
    texts |= {
        "twin.md": "# Guide a\n\nOne.\n",
        "long.md": f"# {'Very ' * 20}long\n\nOne.\n",
        "plain.txt": "Just words.",
    }
    with GistRAG.open(build(tmp_path, engine, texts, chunk_tokens=32), engine=engine) as rag:
        examples = registry.example_records(rag)

    assert len({one["title"] for one in examples}) == 3
    assert all(len(one["title"]) <= 60 for one in examples)
    assert {"title": "Guide d", "heading": "Part d"} in examples


def test_an_empty_index_has_no_examples(tmp_path: Path, engine: Engine) -> None:
    """Nothing can be asked about."""
    with GistRAG.open(build(tmp_path, engine, {}), engine=engine) as rag:
        assert registry.example_records(rag) == []
