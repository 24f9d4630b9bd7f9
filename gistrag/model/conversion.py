"""What is made of a model once, and kept in the user's cache.

A conversion lies in a folder named by the hashes of all it was made from, and appears there in one step when it is
whole. It lists the hash of every file; one that is damaged is made again. Two processes that convert at the same time
make the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from gistrag.model.hashing import cache_folder, file_sha256

logger = logging.getLogger("gistrag")

FILES = "files.json"


def conversion(kind: str, parts: Sequence[str], make: Callable[[Path], None], *, what: str) -> Path:
    """Return the folder of a conversion, made at the first call.

    Args:
        kind: folder of the cache; parts: all that the conversion depends on.
        make: writes it into an empty folder.
        what: is converted, as a message names it.

    Raises:
        OSError: the cache cannot be written, or the disk is full; and what *make* raises.
    """
    target = cache_folder() / kind / hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
    if target.is_dir():
        if _is_sound(target):
            return target
        logger.warning("the converted %s in %s is damaged; converting it again", what, target)
        shutil.rmtree(target)
    logger.info("converting the %s for the CPU, once", what)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
        folder = Path(scratch) / "conversion"
        folder.mkdir()
        make(folder)
        hashes = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
        (folder / FILES).write_text(json.dumps(hashes, indent=1) + "\n", "utf-8")
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def _is_sound(folder: Path) -> bool:
    """Return whether every file of a conversion is as it was written."""
    with suppress(OSError, ValueError, AttributeError):
        recorded = json.loads((folder / FILES).read_text("utf-8"))
        return bool(recorded) and all(file_sha256(folder / name) == sha256 for name, sha256 in recorded.items())
    return False
