"""``manifest.json``, which a finished build writes beside the index for people and for `gistrag verify`.

No answer depends on it. It holds the hash of index.db, which reveals any changed bit, and the number of commits, which
reveals an older index.db in place of a newer one. A build that was stopped leaves the manifest of the one before it;
then there is nothing to compare.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime

from gistrag import __version__
from gistrag.index.schema import FORMAT_VERSION
from gistrag.index.store import Store
from gistrag.storage import files

NAME = "manifest.json"


def write(store: Store) -> None:
    """Commit, and write the manifest of a finished index: what it is made with, its totals and its hash.

    Raises:
        ResourceError: the disk is full.
        IndexFolderError: any other refusal of the system.
    """
    store.commit()
    store.database.checkpoint()
    manifest = {
        "format": FORMAT_VERSION,
        "gistrag": __version__,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": store.config.source,
        "settings": asdict(store.settings),
        "gist_fingerprint": store.config.gist_fingerprint,
        "embedder_fingerprint": store.config.embedder_fingerprint,
        "stats": asdict(store.stats()),
        "commits": store.database.commits,
        "database_sha256": store.database.sha256(),
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    files.write_atomic(store.folder / NAME, text.encode())


def differences(store: Store) -> list[str]:
    """Return how index.db differs from its manifest, a line each; nothing where it does not, or has no manifest.

    Call it inside a snapshot, or in a builder that has not committed yet.
    """
    try:
        manifest = json.loads(files.read(store.folder / NAME))
        commits, sha256 = int(manifest.get("commits", 0)), manifest.get("database_sha256", "")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return [f"{NAME} cannot be read ({type(error).__name__})"]
    if store.database.commits < commits:
        return [f"index.db is older than {NAME}: it has seen {store.database.commits} of {commits} commits"]
    found = store.database.sha256()
    if store.database.commits > commits or not sha256 or not found or found == sha256:
        return []
    return [f"index.db differs from its hash in {NAME}"]
