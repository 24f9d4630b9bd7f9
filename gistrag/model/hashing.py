"""Hashes that tell model files apart, remembered in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

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
    """Return one hash over weights, configuration and tokenizer of a model folder.

    Raises:
        ModelNotFoundError: no safetensors weights in it.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name in _IDENTITY_FILES)
    files += sorted(folder.glob("*_Pooling/config.json"))
    if not any(path.suffix == ".safetensors" for path in files):
        raise ModelNotFoundError(f"expected *.safetensors weights in {folder}, found none; convert the model first")
    parts = "".join(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n" for path in files)
    return hashlib.sha256(parts.encode()).hexdigest()


def weights_sha256(path: Path) -> str:
    """Return the hash an adapter knows its base model by: of a GGUF file, or of all safetensors files of a folder."""
    if path.is_file():
        return file_sha256(path)
    parts = "".join(f"{file_sha256(weights)}\n" for weights in sorted(path.glob("*.safetensors")))
    return hashlib.sha256(parts.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, remembered in the user's cache while size and time of change stay the same."""
    status = path.resolve().stat()
    key = hashlib.sha256(
        f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}".encode()
    ).hexdigest()
    note = cache_folder() / "hashes" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads(note.read_text("utf-8"))["sha256"])
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"path": str(path), "sha256": found}), "utf-8")
    return found
