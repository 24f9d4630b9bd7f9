"""Whether index.db is, bit by bit, what the last build left.

Chunks and gists have hashes of their own. The pages of the keyword search and the vectors have none: damage there shows
no wrong text, but lets other passages be found. So a finished build records the hash of the whole file in
``manifest.json``, and whoever opens the index to search or to write compares it. A builder that finds another hash
records that in index.db, so that no later commit hides it, until a build has made keywords and vectors again.

There is nothing to compare while a build is at work or was stopped: its commits are newer than the manifest.
"""

from __future__ import annotations

import json

from gistrag.index.database import Database
from gistrag.storage import files

MANIFEST = "manifest.json"
_DOUBT = "doubt"


def differences(database: Database) -> list[str]:
    """Return how index.db differs from its manifest, a line each; nothing where it does not, or has no manifest.

    Call it inside a snapshot, or in a builder that has not committed yet.
    """
    if found := recorded(database):
        return [found]
    try:
        manifest = json.loads(files.read(database.folder / MANIFEST))
        commits, sha256 = int(manifest.get("commits", 0)), manifest.get("database_sha256", "")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__})"]
    if database.commits != commits:
        older = f"index.db is older than {MANIFEST}: it has seen {database.commits} of {commits} commits"
        return [older] if database.commits < commits else []
    hashed = database.sha256() if sha256 else ""
    return [f"index.db differs from its hash in {MANIFEST}"] if hashed and hashed != sha256 else []


def remember(database: Database) -> None:
    """Record in a builder's transaction how index.db differs, before a commit makes its manifest outdated."""
    if found := differences(database):
        database.set(_DOUBT, found[0])


def recorded(database: Database) -> str:
    """Return how index.db differed when a builder opened it, "" where it did not; nothing is hashed."""
    return database.get(_DOUBT) or ""


def settle(database: Database) -> None:
    """Forget it, when keywords and vectors were made again."""
    with database.writing():
        database.execute("DELETE FROM settings WHERE name = ?", (_DOUBT,))
