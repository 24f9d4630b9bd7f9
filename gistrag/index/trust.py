"""Whether an index may be used at all: whoever writes into its folder steers the answers."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path

from gistrag.errors import IndexFolderError
from gistrag.storage import files

logger = logging.getLogger("gistrag")


def require_trust(folder: Path) -> None:
    """Return if no stranger can put a gist into an index and so steer the model; known others are only warned of.

    Raises:
        IndexFolderError: everybody can, or index.db is a link out of the folder. Root, as whom containers run on
            folders that are open to everybody, is only warned as well.
    """
    if (folder / "index.db").is_symlink():
        raise IndexFolderError(f"expected a file at {folder / 'index.db'}, found a link; name the folder of the index")
    for path in (folder, folder / "gists", folder / "index.db"):
        others = files.writers(path) if path.exists() else ""
        if others == "everybody" and os.geteuid():
            raise IndexFolderError(
                f"everybody may write to {path}, and whoever does steers the answers; if all in it is yours, run "
                f"chmod -R go-w {folder}"
            )
        if others:
            _warn(folder, others)
            return


@functools.cache
def _warn(folder: Path, others: str) -> None:
    """Say it once in a process."""
    logger.warning("%s may write to the index in %s, and whoever does steers the answers", others, folder)
