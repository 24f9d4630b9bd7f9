"""Hashes that tell model files apart, remembered in the user's cache."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gistrag.errors import GistRAGError, IndexFolderError, ModelNotFoundError, ResourceError, UsageError


def cache_folder() -> Path:
    """Return where converted models and file hashes are kept: ``$GISTRAG_CACHE``, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GISTRAG_CACHE") or Path(home) / "gistrag")


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turn what the system refuses to write into the cache into one line that names it.

    Raises:
        ResourceError: its disk is full.
        UsageError: it cannot be made, or not be written.
    """
    try:
        yield
    except Exception as error:
        if (refusal := _refusal(error)) is None:
            raise
        raise refusal from error


def _refusal(error: BaseException) -> GistRAGError | None:
    """Return the error for what the system refused, None where it refused nothing."""
    known = error.__cause__ if isinstance(error, IndexFolderError | ResourceError) else error  # see `files.explained`
    code = known.errno if isinstance(known, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):  # as libraries in Rust say it
        return ResourceError(
            f"no space left in the cache {cache_folder()}; free some and run the same command again, or set "
            "GISTRAG_CACHE to a folder on another disk"
        )
    if not isinstance(known, OSError) or code is None or not _is_of_cache(known.filename):
        return None
    return UsageError(
        f"could not write into the cache {cache_folder()} ({known.strerror}); set GISTRAG_CACHE to a folder of yours"
    )


def _is_of_cache(path: Any) -> bool:
    """Return whether a path that the system refused lies in the cache, or the cache in it."""
    if not isinstance(path, str | os.PathLike):
        return path is None
    found, cache = Path(path).absolute(), cache_folder().absolute()
    return found.is_relative_to(cache) or cache.is_relative_to(found)


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


def file_sha256(path: Path, *, anew: bool = False) -> str:
    """Return the sha256 of a file, remembered in the user's cache while size and time of change stay the same.

    Args:
        anew: read the file all the same.
    """
    return str(remembered(path, "sha256", _sha256, anew=anew))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remembered(path: Path, name: str, find: Callable[[Path], Any], *, anew: bool = False) -> Any:
    """Return what *find* finds in a file, remembered in the user's cache while size and time of change stay the same.

    A note that is not what was written counts for nothing.

    Args:
        name: of what is found, a value of JSON; anew: look all the same.
    """
    status = path.resolve().stat()
    stamp = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    key = hashlib.sha256(stamp.encode()).hexdigest()
    note = cache_folder() / "hashes" / (f"{key}.json" if name == "sha256" else f"{key}-{name}.json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads("" if anew else note.read_text("utf-8"))
        if kept["seal"] == _seal(key, name, kept[name]):
            return kept[name]
    found = find(path)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"path": str(path), name: found, "seal": _seal(key, name, found)}), "utf-8")
    return found


def _seal(key: str, name: str, found: Any) -> str:
    return hashlib.sha256(f"{key} {name} {json.dumps(found)}".encode()).hexdigest()
