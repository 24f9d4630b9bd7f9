"""An index travels: to another folder, another user's cache, another release of transformers, another dtype."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import HashEmbedder, byte_tokenizer, tiny_network

from gistrag.engine import Engine
from gistrag.errors import FingerprintMismatchError
from gistrag.model.gist_model import GistModel
from gistrag.model.hashing import folder_sha256, weights_sha256
from gistrag.rag import GistRAG

TEXTS = {
    "bees.md": "# Bees\n\nBees gather nectar in spring and keep the honey in combs of wax for winter.",
    "mills.md": "# Mills\n\nThe mill stands by the river and grinds the wheat of the whole valley.",
}
QUESTION = "What does the mill grind?"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a first user: documents, a model with an adapter, and a cache."""
    folder = tmp_path / "first"
    monkeypatch.setenv("GISTRAG_CACHE", str(folder / "cache"))
    (folder / "docs").mkdir(parents=True)
    for name, text in TEXTS.items():
        (folder / "docs" / name).write_text(text, "utf-8")
    tiny_network(dtype=torch.bfloat16, hidden_size=64).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    model = GistModel.load(folder / "model")
    model.new_adapter(rank=2, gists=1, tokens_per_gist=4)
    assert model.adapter is not None
    model.adapter.save(folder / "adapter")
    return folder


@pytest.fixture(autouse=True)
def hashed_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every engine embed without a model."""
    real = Engine.load.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr("gistrag.engine.Embedder", lambda *_, **__: HashEmbedder())
    monkeypatch.setattr(
        Engine, "load", classmethod(lambda cls, settings, **given: real(cls, dataclasses.replace(
            settings, embedder=str(Path(__file__).parent)), **given))
    )  # fmt: skip


def built(home: Path) -> GistRAG:
    """Build the index of the first user, with all its gists."""
    places = {"model": str(home / "model"), "adapter": str(home / "adapter")}
    return GistRAG.from_folder(home / "docs", index=home / "index", gists="now", runtime="torch", **places)


def answer(rag: GistRAG) -> tuple[str, tuple[str, ...]]:
    """Return the text of an answer, and its sources; nothing is read as text."""
    found = rag.query(QUESTION, max_new_tokens=12, second_reading=False)
    assert found.usage.text_fallbacks == 0
    assert found.sources
    return found.text, tuple(source.path for source in found.sources)


def of_release(folder: Path, release: str) -> None:
    """Rewrite a model folder as another release of transformers does."""
    config = folder / "config.json"
    values = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps({**values, "transformers_version": release}, indent=2, sort_keys=True) + "\n", "utf-8")


def built_by_0_2(home: Path) -> dict[str, str]:
    """Build the index as version 0.2 did, which recorded hashes of whole files, and return its fingerprint."""
    real = GistModel.fingerprint.fget  # type: ignore[attr-defined]
    old = {"model": folder_sha256(home / "model"), "rope": "0123456789abcdef x 1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GistModel, "fingerprint", property(lambda model: {**real(model), **old}))
        with built(home) as rag:
            return rag.store.config.gist_fingerprint


@pytest.mark.parametrize("runtime", ["torch", "cpu"])
def test_an_index_of_version_0_2_opens_with_the_model_of_another_release(home: Path, runtime: Any) -> None:
    """Whichever runtime answers; a build goes on in it, and keeps how it names its model and every gist of it."""
    old = built_by_0_2(home)
    of_release(home / "model", "5.77.1")
    (home / "docs" / "new.md").write_text("A new document about the weather in the valley.", "utf-8")

    GistRAG.open(home / "index", runtime=runtime).close()
    with GistRAG.from_folder(home / "docs", index=home / "index", gists="now", runtime=runtime) as rag:
        report, kept = rag.report, rag.store.config.gist_fingerprint

    assert old == kept
    assert report is not None
    assert (["new.md"], []) == (report.added, report.changed)


def test_another_model_is_refused_whatever_the_form_of_the_record(home: Path) -> None:
    """Other weights in the folder of the model do not open an index of today, nor one of version 0.2."""
    built_by_0_2(home)
    shutil.move(home / "index", home / "before")
    built(home).close()
    weights = home / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    settings = json.loads((home / "adapter" / "gist_settings.json").read_text("utf-8"))
    changed = json.dumps({**settings, "base": weights_sha256(home / "model")})
    (home / "adapter" / "gist_settings.json").write_text(changed, "utf-8")

    for index in (home / "index", home / "before"):
        with pytest.raises(FingerprintMismatchError, match="was made with model"):
            GistRAG.open(index, runtime="torch")
