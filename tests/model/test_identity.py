"""Which folders hold the same model: the same numbers, tokenizer and geometry, whatever wrote the files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.tiny_models import byte_tokenizer, tiny_network

from gistrag.errors import ModelNotFoundError
from gistrag.model.cpu_conversion import open_cpu_runtime
from gistrag.model.gist_model import GistModel
from gistrag.model.hashing import folder_sha256
from gistrag.model.identity import model_identity, recognized


@pytest.fixture
def folder(tmp_path: Path, private_cache: Path) -> Path:
    """A tiny model as transformers saves it."""
    tiny_network(dtype=torch.bfloat16, hidden_size=64).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewritten(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Return a copy of *folder* in which one file of JSON is changed."""
    copy = Path(shutil.copytree(folder, folder.with_name("changed")))
    values = json.loads((copy / name).read_text("utf-8"))
    change(values)
    (copy / name).write_text(json.dumps(values, indent=3), "utf-8")
    return copy


def of_release(folder: Path, release: str) -> Path:
    """Return a copy of *folder* as another release of transformers writes it."""
    copy = Path(shutil.copytree(folder, folder.with_name(f"of {release}")))
    config = (copy / "config.json").read_text("utf-8")
    version = json.loads(config)["transformers_version"]
    (copy / "config.json").write_text(config.replace(f'"{version}"', f'"{release}"'), "utf-8")
    return copy


def test_the_form_of_the_files_does_not_count(folder: Path) -> None:
    """Shards, the order of tensors, another release and fields that change no number leave the identity."""
    expected = model_identity(folder)
    copy = of_release(folder, "5.99.3")
    config = json.loads((copy / "config.json").read_text("utf-8"))
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {"rope_theta": theta, "use_cache": False, "new_field_of_a_later_release": None}
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    for number in range(2):
        part = {name: tensor for place, (name, tensor) in enumerate(tensors.items()) if place % 2 == number}
        safetensors.torch.save_file(part, copy / f"model-{number}.safetensors", {"note": "another"})
    tokenizer = json.loads((copy / "tokenizer.json").read_text("utf-8"))
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer | {"truncation": {"max_length": 9}}), "utf-8")

    assert expected.startswith("v2:")
    assert expected == model_identity(copy)
    assert folder_sha256(folder) != folder_sha256(copy)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda values: values["rope_parameters"].update(rope_theta=20_000.0)),
        ("config.json", lambda values: values.update(rms_norm_eps=1e-3)),
        ("config.json", lambda values: values.update(num_key_value_heads=4)),
        ("config.json", lambda values: values.update(tie_word_embeddings=not values["tie_word_embeddings"])),
        ("tokenizer.json", lambda values: values["model"]["vocab"].update(a=1, b=0)),
        ("tokenizer.json", lambda values: values["pre_tokenizer"].update(add_prefix_space=True)),
    ],
)
def test_what_changes_a_cache_is_another_model(
    folder: Path, name: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    """Geometry, angles and what the tokenizer makes of text count."""
    assert model_identity(folder) != model_identity(rewritten(folder, name, change))


@pytest.mark.parametrize("what", ["number", "dtype", "name"])
def test_other_tensors_are_another_model(folder: Path, what: str) -> None:
    """One bit of a weight, the numbers in another dtype, or a weight in another place count."""
    expected, path = model_identity(folder), folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = sorted(tensors)[-1]
    if what == "number":
        tensors[name].view(torch.int16).flatten()[0] ^= 1
    elif what == "dtype":
        tensors[name] = tensors[name].float()
    else:
        tensors[f"{name}2"] = tensors.pop(name)
    safetensors.torch.save_file(tensors, path)

    assert expected != model_identity(folder)


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0{}", b"\xff" * 64])
def test_weights_that_are_none_are_refused(folder: Path, damage: bytes) -> None:
    """An empty, cut or foreign file is one line that names the folder."""
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:99])
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        model_identity(folder)
    (folder / "model.safetensors").write_bytes(damage)
    (folder / "config.json").write_text("no JSON", "utf-8")

    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        model_identity(folder)


@pytest.mark.parametrize("quantized", ["", " nf4"])
@pytest.mark.parametrize("release", ["5.0.0", "5.23.0", "5.61.4"])
def test_a_record_of_version_0_2_is_recognized(folder: Path, release: str, quantized: str) -> None:
    """A hash over the files as any release of transformers writes them names this model, with its angles."""
    old = {"model": folder_sha256(of_release(folder, release)) + quantized, "rope": "0123456789abcdef x 1"}
    current = {"model": model_identity(folder) + quantized, "rope": "of today", "kv_dtype": "bfloat16"}

    assert recognized(current, old, folder) == {**old, "kv_dtype": "bfloat16"}
    assert recognized(current, None, folder) == current
    assert recognized(current, old, None) == current


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_record_of_another_model_is_not(folder: Path, name: str) -> None:
    """One changed byte of any file, other weights in memory, or 4 bits: what is recorded names another model."""
    copy = of_release(folder, "5.24.0")
    data = bytearray((copy / name).read_bytes())
    data[-3] ^= 1
    (copy / name).write_bytes(data)
    current = {"model": model_identity(folder)}

    assert recognized(current, {"model": folder_sha256(copy)}, folder) == current
    assert recognized(current, {"model": f"{folder_sha256(folder)} nf4"}, folder) == current
    assert recognized(current, {"model": "tiny llama"}, folder) == current


def test_every_runtime_says_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch in 16 bits, torch in 32 bits and the CPU runtime have one fingerprint, and know their folder."""
    found = []
    for is_fast in (True, False):
        monkeypatch.setattr("gistrag.model.gist_model.multiplies_16_bits", lambda is_fast=is_fast: is_fast)
        found.append(GistModel.load(folder))
    found.append(open_cpu_runtime(folder, None))

    assert [found[0].fingerprint] * 3 == [one.fingerprint for one in found]
    assert [folder] * 3 == [one.model_folder for one in found]


def test_the_angles_count_but_not_their_last_bit(folder: Path) -> None:
    """Processors differ in the last bit of a power; other angles are another model."""
    model = GistModel.load(folder)
    expected, angles = model.fingerprint["rope"], model.rope.inv_freq

    angles[1] = torch.nextafter(angles[1], torch.tensor(1.0))
    assert expected == model.fingerprint["rope"]
    angles[1] *= 1.02
    assert expected != model.fingerprint["rope"]
