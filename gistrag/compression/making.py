"""What can be said of the gists of a chunk before they are made, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gistrag.model.runtime import AnyRuntime
from gistrag.settings import GistSettings, Placement

MAKINGS: dict[Placement, int] = {"matched": 3, "adaptive": 2, "selected": 2}
"""Version of each placement, 1 if not listed; raised when the same chunk gets other gists than before."""


def making(placement: Placement) -> dict[str, str]:
    """Return what a fingerprint records of the version of a placement; nothing where that never changed.

    >>> making("matched"), making("anchored")
    ({'making': '3'}, {})
    """
    return {"making": str(MAKINGS[placement])} if placement in MAKINGS else {}


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
