"""An index travels: to another folder, another user's cache, another release of transformers, another dtype."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import HashEmbedder, byte_tokenizer, tiny_network

from gistrag.cli.main import main as run_command
from gistrag.engine import Engine
from gistrag.errors import FingerprintMismatchError, ModelNotFoundError
from gistrag.index import background
from gistrag.index.store import Store
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


@pytest.mark.parametrize("runtime", ["torch", "cpu"])
def test_a_moved_index_answers_the_same_tokens(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: Any
) -> None:
    """All of it in another folder, with an empty cache, files of another release, and computing in another dtype."""
    with built(home) as rag:
        expected = answer(rag) if runtime == "torch" else None
    if expected is None:
        with GistRAG.open(home / "index", runtime=runtime) as rag:
            expected = answer(rag)
    second = tmp_path / "second" / "deeper"
    second.mkdir(parents=True)
    for name in ("index", "model", "adapter"):
        shutil.move(home / name, second / name)
    shutil.rmtree(home)
    monkeypatch.setenv("GISTRAG_CACHE", str(second / "cache"))
    of_release(second / "model", "5.77.1")

    with GistRAG.open(second / "index", runtime=runtime) as rag:
        assert expected == answer(rag)
        assert str(second / "model") == rag.store.settings.model


def test_a_machine_of_another_dtype_reads_the_gists(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made where a processor multiplies in 16 bits, they answer where it computes in 32."""
    monkeypatch.setattr("gistrag.model.gist_model.multiplies_16_bits", lambda: True)
    built(home).close()
    monkeypatch.setattr("gistrag.model.gist_model.multiplies_16_bits", lambda: False)

    with GistRAG.open(home / "index", runtime="torch") as rag:
        answer(rag)
        assert rag.model.network_dtype == torch.float32


def test_model_and_adapter_are_where_the_caller_says(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index alone moves; the models are somewhere else, and it asks for them in one line."""
    built(home).close()
    elsewhere = tmp_path / "second"
    elsewhere.mkdir()
    shutil.move(home / "index", elsewhere / "index")
    models = Path(shutil.move(home, tmp_path / "models"))
    arguments = ["query", QUESTION, "--index", str(elsewhere / "index"), "--runtime", "torch"]

    assert 2 == run_command(arguments)
    told = capsys.readouterr().err
    assert 1 == told.count("\n")
    assert re.search("has its model at .*, where nothing is now; say .* with --model and --adapter", told)

    monkeypatch.chdir(models)
    places = ["--model", "model", "--adapter", "adapter"]
    assert 0 == run_command([*arguments, *places])
    assert 0 == run_command(["inspect", "--index", str(elsewhere / "index"), *places])
    told = capsys.readouterr().out
    assert re.search("model +the one of this index\n", told)
    assert re.search("adapter +the one of this index\n", told)
    with GistRAG.open(elsewhere / "index", model="model", adapter="adapter", runtime="torch") as rag:
        answer(rag)


def test_a_build_takes_the_new_places(home: Path, tmp_path: Path) -> None:
    """They are compared by hash and recorded, relative to the index; no gist is made again."""
    built(home).close()
    for name in ("model", "adapter"):
        shutil.move(home / name, tmp_path / name)
    options = {"index": home / "index", "gists": "now", "runtime": "torch"}
    with pytest.raises(ModelNotFoundError, match="has its model at"):
        GistRAG.from_folder(home / "docs", **options)

    moved = {name: str(tmp_path / name) for name in ("model", "adapter")}
    with GistRAG.from_folder(home / "docs", **options, **moved) as rag:
        assert rag.report is not None
        assert len(TEXTS) == rag.report.unchanged
        recorded = json.loads(rag.store.config.values["settings"])

    assert ("../../model", "../../adapter") == (recorded["model"], recorded["adapter"])


@pytest.mark.parametrize("name", ["model", "adapter"])
def test_another_model_at_the_place_named_is_refused(
    home: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever names it: a query, a build, or `inspect`, which says so."""
    built(home).close()
    other = Path(shutil.copytree(home / name, tmp_path / "other"))
    weights = next(other.glob("*vectors.safetensors" if name == "adapter" else "model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    settings = json.loads((home / "adapter" / "gist_settings.json").read_text("utf-8"))
    if name == "model":
        settings["base"] = weights_sha256(other)
        (home / "adapter" / "gist_settings.json").write_text(json.dumps(settings), "utf-8")

    with pytest.raises(FingerprintMismatchError, match=f"was made with {name}"):
        GistRAG.open(home / "index", runtime="torch", **{name: str(other)})
    with pytest.raises(FingerprintMismatchError, match=f"was made with {name}"):
        GistRAG.from_folder(home / "docs", index=home / "index", runtime="torch", **{name: str(other)})
    assert 0 == run_command(["inspect", "--index", str(home / "index"), f"--{name}", str(other)])
    assert re.search(f"{name} +another than the one of this index", capsys.readouterr().out)


def test_a_place_recorded_by_version_0_2_still_leads_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was kept as the build was given it: absolute, or from the working folder."""
    built(home).close()
    with Store.build(home / "index") as store:
        values = json.loads(store.config.values["settings"])
        old = {**values, "model": "./model", "adapter": str(home / "adapter")}
        store.database.set_sealed("config", {**store.config.values, "settings": json.dumps(old)})
    monkeypatch.chdir(home)

    with GistRAG.open(home / "index", runtime="torch") as rag:
        answer(rag)


def test_the_worker_loads_the_models_from_the_new_places(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gists that are made in the background are of the model that the caller named."""
    built(home).close()
    places = {name: shutil.move(home / name, tmp_path / name) for name in ("model", "adapter")}
    monkeypatch.setattr(background, "register_module_forward_pre_hook", lambda hook: None)
    inbox: Any = None
    with GistRAG.open(home / "index", runtime="torch", gists="on demand", **places) as rag:
        given = json.loads(rag._worker._places)
    with Store.open(home / "index") as store:
        model = background._loaded(store, inbox, "cpu", given)

    assert tmp_path / "model" == model.model_folder
    assert model.adapter is not None
    assert tmp_path / "adapter" == model.adapter.folder
