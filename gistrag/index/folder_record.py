"""What an index records about its folder: files that no reader knows, and documents that are in no folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from gistrag.index.store import Store

_LEFT_OUT = "left_out"
_IMPORTED = "imported"


def left_out(store: Store) -> dict[str, int]:
    """Return how many files of the folder no reader knew, by suffix; ``""`` counts those without one."""
    try:
        found: dict[str, int] = json.loads(store.database.get(_LEFT_OUT) or "{}")
    except ValueError:
        raise store.database.damaged("the counts of files left out are no JSON") from None
    return found


def set_left_out(store: Store, counts: Mapping[str, int]) -> None:
    """Record how many files of the folder no reader knows."""
    store.database.set(_LEFT_OUT, json.dumps(dict(counts)))


def imported_documents(store: Store) -> set[str]:
    """Return the paths of documents that came from another index, which a build of the folder leaves alone."""
    try:
        found = json.loads(store.database.get(_IMPORTED) or "[]")
    except ValueError:
        raise store.database.damaged("the list of imported documents is no JSON") from None
    return {row.path for row in store.documents()}.intersection(found)


def mark_imported(store: Store, paths: Iterable[str]) -> None:
    """Record which documents came from another index."""
    store.database.set(_IMPORTED, json.dumps(sorted(paths)))
