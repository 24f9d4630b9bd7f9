"""The loaded models, which several indexes can share."""

from __future__ import annotations

from dataclasses import dataclass

from gistrag.compression.compress import making
from gistrag.index.embedder import Embedder, Reranker
from gistrag.model.gist_model import GistModel
from gistrag.model.hub import find, find_adapter
from gistrag.settings import IndexSettings


@dataclass(frozen=True)
class Engine:
    """The loaded models; indexes made with the same ones can share an engine.

    Attributes:
        model: compresses and answers; embedder: of questions and chunks; reranker: a cross-encoder, or None.
    """

    model: GistModel
    embedder: Embedder
    reranker: Reranker | None = None

    @classmethod
    def load(cls, settings: IndexSettings, *, device: str | None = None, reranker: str | None = None) -> Engine:
        """Return the models an index is made with, loaded one after the other.

        Raises:
            ModelNotFoundError: with the command that brings the model.
        """
        embedder = Embedder(find(settings.embedder).path, device=device)
        embedder.embed_query("warm up")
        path = find(settings.model).path
        adapter = find_adapter(settings.adapter, path)
        model = GistModel.load(path, adapter=adapter, quantize=settings.quantize, device=device)
        return cls(model, embedder, Reranker(find(reranker).path, device=device) if reranker else None)

    def gist_fingerprint(self, settings: IndexSettings) -> dict[str, str]:
        """Return everything that a gist depends on."""
        parts = {name: str(getattr(settings, name)) for name in ("placement", "tokens_per_gist", "chunk_tokens")}
        if settings.kv_cache_dtype != "auto":
            parts["kv_cache_dtype"] = settings.kv_cache_dtype
        return {**self.model.fingerprint, **parts, **making(settings.placement)}
