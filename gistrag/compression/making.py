"""What can be said of the gists of a chunk before they are made, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gistrag.model.runtime import AnyRuntime
from gistrag.settings import GistSettings, Placement

READ_TWICE = 3
"""Version of matched gists for which every chunk is read a second time."""
MAKINGS: dict[Placement, tuple[int, ...]] = {"matched": (4, READ_TWICE), "adaptive": (2,), "selected": (2,)}
"""Versions of each placement that can be made, newest first, 1 if not listed; a new one where the same chunk gets other
gists than before."""


def making(placement: Placement, made_with: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what a fingerprint records of the version of a placement; nothing where that never changed.

    Args:
        made_with: fingerprint of gists that are there already; their version stays if it can still be made.

    >>> making("matched"), making("matched", {"making": "3"}), making("anchored")
    ({'making': '4'}, {'making': '3'}, {})
    """
    versions = [str(version) for version in MAKINGS.get(placement, ())]
    before = (made_with or {}).get("making")
    return {"making": before if before in versions else versions[0]} if versions else {}


def gist_count(source_tokens: int, tokens_per_gist: int) -> int:
    """Return the gists of a chunk.

    >>> gist_count(9, 4)
    3
    """
    return math.ceil(source_tokens / tokens_per_gist)


def is_compressible(runtime: AnyRuntime, ids: Sequence[int], settings: GistSettings) -> bool:
    """Return whether a passage gets gists: long enough for one, and short enough to be read twice in one window.

    Args:
        ids: token ids of the passage as it stands in the prompt, its heading path included.
    """
    return max(2, settings.tokens_per_gist) <= len(ids) <= (runtime.window - runtime.prefix_slots) // 2
