"""What a gist depends on: the model, and how a chunk becomes a gist cache."""

from __future__ import annotations

from collections.abc import Mapping

from gistrag.compression.making import making
from gistrag.settings import IndexSettings


def gist_fingerprint(
    model: Mapping[str, str], settings: IndexSettings, *, made_with: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return everything that a gist depends on.

    Args:
        model: fingerprint of the model that compresses.
        made_with: fingerprint of gists that are there already, whose version stays if it can still be made.
    """
    parts = {name: str(getattr(settings, name)) for name in ("placement", "tokens_per_gist", "chunk_tokens")}
    if settings.kv_cache_dtype != "auto":
        parts["kv_cache_dtype"] = settings.kv_cache_dtype
    return {**model, **parts, **making(settings.placement, made_with)}
