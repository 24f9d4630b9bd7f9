"""Hashes that tell model files apart, remembered in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gistrag.errors import ModelNotFoundError


def cache_folder() -> Path:
    """Return where converted models and file hashes are kept: ``$GISTRAG_CACHE``, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GISTRAG_CACHE") or Path(home) / "gistrag")


_IDENTITY_FILES = {
    *("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"),
    *("modules.json", "sentence_bert_config.json"),
}


def folder_sha256(folder: Path) -> str:
    """Return one hash over all bytes of weights, configuration and tokenizer of a model folder.

    It tells copies of files apart; `gistrag.model.identity` tells models apart.

    Raises:
        ModelNotFoundError: no safetensors weights in it.
    """
    return joined_sha256(file_hashes(folder))


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of weights, configuration and tokenizer of a model folder, by name.

    Raises:
        ModelNotFoundError: as for `folder_sha256`.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name in _IDENTITY_FILES)
    files += sorted(folder.glob("*_Pooling/config.json"))
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelNotFoundError(f"expected *.safetensors weights in {folder}, found none; convert the model first")
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def joined_sha256(hashes: Mapping[str, str]) -> str:
    """Return one hash over those of several files, in the order given."""
    return hashlib.sha256("".join(f"{name} {sha256}\n" for name, sha256 in hashes.items()).encode()).hexdigest()


def weights_sha256(path: Path) -> str:
    """Return the hash an adapter knows its base model by: of a GGUF file, or of all safetensors files of a folder."""
    if path.is_file():
        return file_sha256(path)
    parts = "".join(f"{file_sha256(weights)}\n" for weights in sorted(path.glob("*.safetensors")))
    return hashlib.sha256(parts.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, remembered in the user's cache while size and time of change stay the same."""
    return str(remembered(path, "sha256", _sha256))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered(path: Path, name: str, find: Callable[[Path], Any]) -> Any:
    """Return what *find* finds in a file, remembered in the user's cache while size and time of change stay the same.

    Args:
        name: of what is found, a value of JSON.
    """
    status = path.resolve().stat()
    stamp = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    key = hashlib.sha256(stamp.encode()).hexdigest()
    note = cache_folder() / "hashes" / (f"{key}.json" if name == "sha256" else f"{key}-{name}.json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(note.read_text("utf-8"))[name]
    found = find(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"path": str(path), name: found}), "utf-8")
    return found
