"""``manifest.json``, which a finished build writes beside the index for people and for `gistrag verify`.

No answer depends on it. It holds the hash of index.db, which reveals any changed bit, and the number of commits, which
reveals an older index.db in place of a newer one: `gistrag.index.doubt` compares them.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime

from gistrag import __version__
from gistrag.index.doubt import MANIFEST
from gistrag.index.schema import FORMAT_VERSION
from gistrag.index.store import Store
from gistrag.storage import files


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
    files.write_atomic(store.folder / MANIFEST, text.encode())
