"""What a gist depends on: the model, and how a chunk becomes a gist cache."""

from __future__ import annotations

from collections.abc import Mapping

from gistrag.compression.making import making
from gistrag.index.embedder import Embedder
from gistrag.model.identity import recognized
from gistrag.model.runtime import AnyRuntime
from gistrag.settings import IndexSettings


def gist_fingerprint(
    runtime: AnyRuntime, settings: IndexSettings, *, made_with: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return everything that a gist depends on.

    Args:
        runtime: of the model that compresses.
        made_with: fingerprint of gists that are there already: how it names the same model stays, and its version if
            that can still be made.
    """
    parts = {name: str(getattr(settings, name)) for name in ("placement", "tokens_per_gist", "chunk_tokens")}
    if settings.kv_cache_dtype != "auto":
        parts["kv_cache_dtype"] = settings.kv_cache_dtype
    model = recognized(runtime.fingerprint, made_with, runtime.model_folder)
    return {**model, **parts, **making(settings.placement, made_with)}


def embedder_fingerprint(embedder: Embedder, *, made_with: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return everything that a vector depends on; *made_with*: fingerprint of vectors that are there already."""
    return recognized(embedder.fingerprint, made_with, embedder.folder, part="embedder")
