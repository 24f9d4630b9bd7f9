"""What is made of a model is kept as an index is: whole, synced, hashed, mended by itself, and swept."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors import SafetensorError
from support.tiny_models import byte_tokenizer, tiny_network

from gistrag.cli.main import main as run_command
from gistrag.errors import GistRAGError, ModelNotFoundError, ResourceError, UsageError
from gistrag.model import gguf, hashing
from gistrag.model.conversion import FILES, conversion, opened
from gistrag.model.gist_model import GistModel
from gistrag.model.hashing import cache_folder, file_sha256, remembered
from gistrag.storage import files

pytestmark = pytest.mark.usefixtures("private_cache")

WEIGHTS = "model.safetensors"


@pytest.fixture
def model_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF file, and in place of its conversion a tiny model that is saved in a second."""

    def convert(_: Path, folder: Path) -> None:
        tiny_network(dtype=torch.bfloat16).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)

    monkeypatch.setattr(gguf, "_convert", convert)
    (tmp_path / "tiny.gguf").write_bytes(b"a model")
    return tmp_path / "tiny.gguf"


def write(folder: Path) -> None:
    (folder / "weights").write_bytes(b"many numbers")


def made(make: Callable[[Path], None] = write) -> Path:
    return conversion("models", "one", make, what="a model")


def leftovers() -> list[str]:
    return sorted(path.name for path in cache_folder().rglob(".*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "weights cut": lambda folder: os.truncate(folder / WEIGHTS, 5000),
    "weights gone": lambda folder: (folder / WEIGHTS).unlink(),
    "a flipped bit": lambda folder: flip(folder / WEIGHTS),
    "tokenizer empty": lambda folder: os.truncate(folder / "tokenizer.json", 0),
    "configuration gone": lambda folder: (folder / "config.json").unlink(),
    "configuration no JSON": lambda folder: folder.joinpath("config.json").write_text("{"),
    "list of hashes gone": lambda folder: (folder / FILES).unlink(),
    "list of hashes empty": lambda folder: folder.joinpath(FILES).write_text("{}"),
    "list of hashes of another kind": lambda folder: folder.joinpath(FILES).write_text("[1]"),
}


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_model_is_converted_again(
    model_file: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None]
) -> None:
    """By itself, with one line that names the folder; it is the same model then, and nothing is left beside it."""
    before, folder = GistModel.load(model_file).fingerprint, gguf.converted(model_file)
    harm(folder)
    caplog.clear()

    with caplog.at_level(logging.INFO, "gistrag"):
        model = GistModel.load(model_file)

    (line,) = [record.message for record in caplog.records if record.name == "gistrag"]
    assert str(folder) in line
    assert (before, folder, []) == (model.fingerprint, model.model_folder, leftovers())


def test_damage_without_a_trace_is_found_when_it_cannot_be_loaded(caplog: pytest.LogCaptureFixture) -> None:
    """The files are read then whatever is remembered of them; what is whole and cannot be loaded is not made again."""
    forge(made() / "weights", b"many")
    caplog.clear()
    with caplog.at_level(logging.INFO, "gistrag"):
        found = opened("models", "one", write, lambda folder: len_of(folder, 12), what="a model")

    assert found == 12
    assert ["is damaged" in record.message for record in caplog.records] == [True]
    with pytest.raises(ValueError, match="12 bytes"):
        opened("models", "one", write, lambda folder: len_of(folder, 7), what="a model")
    assert len(caplog.records) == 1


def test_damage_without_a_trace_is_found_by_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In full; the next command then converts the model again."""
    from support.small_index import make

    make(tmp_path / "index")
    folder = made()
    (folder.parent / "of an older version").mkdir()
    assert 0 == run_command(["verify", "--index", str(tmp_path / "index"), "--full"])
    forge(folder / "weights", b"many lumbers")
    assert made() == folder
    assert b"many lumbers" == (folder / "weights").read_bytes()
    capsys.readouterr()

    assert 0 == run_command(["verify", "--index", str(tmp_path / "index")])
    assert 4 == run_command(["verify", "--index", str(tmp_path / "index"), "--full"])
    assert f"cache: {folder} " in capsys.readouterr().out
    assert 4 == run_command(["verify", "--index", str(tmp_path / "index"), "--full", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (False, [str(folder)]) == (found["sound"], found["conversions"])
    assert b"many numbers" == (made() / "weights").read_bytes()


def forge(path: Path, data: bytes) -> None:
    """Change a file as a broken disk would: what is remembered of it stays."""
    sha256 = file_sha256(path)
    path.write_bytes(data)
    kept = pytest.MonkeyPatch()
    kept.setattr(hashing, "_sha256", lambda _: sha256)
    assert sha256 == file_sha256(path)
    kept.undo()


def len_of(folder: Path, expected: int) -> int:
    found = len((folder / "weights").read_bytes())
    if found != expected:
        raise ValueError(f"{found} bytes")
    return found


def test_bytes_and_names_reach_the_disk_before_the_folder_appears(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file and its folder are synced, then it is renamed, then that name is synced."""
    steps: list[str] = []
    for name in ("sync_file", "sync_folder", "rename"):
        real = getattr(files, name)
        monkeypatch.setattr(files, name, lambda *given, name=name, real=real: (steps.append(name), real(*given)))

    made()

    assert ["sync_file", "sync_file", "sync_folder", "rename", "sync_folder"] == steps


KILLED = """
import os, sys
from pathlib import Path
from gistrag.model.conversion import conversion
def make(folder):
    (folder / "weights").write_bytes(b"half")
    os.kill(os.getpid(), 9)
conversion("models", "one", make, what="a model")
"""


def test_what_a_killed_conversion_left_is_swept() -> None:
    """By the next one, as what older versions left; the scratch folder of a process that is at work stays."""
    subprocess.run([sys.executable, "-c", KILLED], check=False)
    parent = cache_folder() / "models"
    assert 2 == len(leftovers())
    (parent / ".converting-old" / "model").mkdir(parents=True)
    (parent / ".converting-busy").mkdir()

    with files.lock(parent / ".converting-busy.lock", command="another"):
        assert b"many numbers" == (made() / "weights").read_bytes()
        assert [".converting-busy", ".converting-busy.lock"] == leftovers()
    made()

    assert [] == leftovers()


def refuse(error: Exception) -> Callable[[Path], NoReturn]:
    def make(folder: Path) -> NoReturn:
        (folder / "weights").write_bytes(b"half")
        raise error

    return make


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("error", "expected", "code"),
    [
        (OSError(28, "No space left on device"), ResourceError, 5),
        (SafetensorError(FULL), ResourceError, 5),
        (PermissionError(13, "Permission denied"), UsageError, 2),
        (FileNotFoundError(2, "No such file", "/somewhere/else.gguf"), FileNotFoundError, None),
        (ModelNotFoundError("no weights"), ModelNotFoundError, 2),
    ],
    ids=["full", "full, as a library says it", "refused", "another file", "no fault of the cache"],
)
def test_a_cache_that_cannot_be_written_is_named(
    error: Exception, expected: type[Exception], code: int | None, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line with the variable that names another, and nothing half made stays."""
    monkeypatch.setattr(gguf, "_convert", lambda _, folder: refuse(error)(folder))
    with pytest.raises(expected) as raised:
        gguf.converted(model_file)

    if expected in (ResourceError, UsageError):
        assert ("GISTRAG_CACHE" in str(raised.value), "\n" in str(raised.value)) == (True, False)
    assert code == (raised.value.exit_code if isinstance(raised.value, GistRAGError) else None)
    assert [] == leftovers()


def test_a_cache_that_cannot_be_made_is_named(
    tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file stands in its way."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GISTRAG_CACHE", str(tmp_path / "file" / "cache"))

    with pytest.raises(UsageError, match=r"Not a directory.*GISTRAG_CACHE"):
        GistModel.load(model_file)


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "", '{"sha256": null}', '{"sha256": "0000"}', '{"sha256": []}', "wrong"],
)
def test_a_note_that_was_not_written_counts_for_nothing(tmp_path: Path, content: str) -> None:
    """The file is hashed anew, and the note mended."""
    (tmp_path / "weights").write_bytes(b"many numbers")
    expected = file_sha256(tmp_path / "weights")
    (note,) = (cache_folder() / "hashes").iterdir()
    written = note.read_text()
    note.write_text(written.replace(expected, "f" * 64) if content == "wrong" else content)

    assert expected == file_sha256(tmp_path / "weights")
    assert written == note.read_text()
    assert expected == remembered(tmp_path / "weights", "sha256", refuse(AssertionError()))
