"""From the tokens of a chunk to its gist cache.

Every chunk is read alone behind the shared prefix; a batch only shares the arithmetic. All placements
(`gistrag.compression.placements`) return the same `GistCache`, so gist files, relocation and answering know nothing
of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from gistrag.compression.placements import TextPass
from gistrag.kv.cache import GistCache
from gistrag.model.batching import batches_by_length
from gistrag.model.gist_model import GistModel
from gistrag.settings import GistSettings

BATCH_TOKENS = 2048


def compress(
    model: GistModel, chunks: Sequence[Sequence[int]], settings: GistSettings | None = None
) -> list[GistCache]:
    """Return the gist cache of each chunk, in the order given.

    A chunk of *n* tokens gets ``ceil(n / tokens_per_gist)`` gist tokens. Chunks of similar length are read together,
    which changes the result by no more than the rounding of the model's dtype. A cache with a number that is not
    finite is computed again in float32 where the model can; it may still not be finite afterwards.

    Args:
        chunks: token ids of each chunk, as `GistModel.encode_passage` gives them; none of them empty.
        settings: placement and compression rate; matched gists of 4 tokens by default.

    Raises:
        torch.OutOfMemoryError: on a GPU, not even one chunk at a time fits; larger batches are halved.
    """
    settings = settings or GistSettings()
    caches = _compress_all(model, chunks, settings)
    broken = [row for row, cache in enumerate(caches) if not cache.is_finite]
    if broken and model.can_widen:
        with suppress(torch.OutOfMemoryError), model.in_float32():
            wide = _compress_all(model, [chunks[row] for row in broken], settings)
            for row, cache in zip(broken, wide, strict=True):
                caches[row] = replace(cache, kv=cache.kv.to(caches[row].kv.dtype))
    return caches


def _compress_all(model: GistModel, chunks: Sequence[Sequence[int]], settings: GistSettings) -> list[GistCache]:
    """Return the gist cache of each chunk, as the model computes them; batches that do not fit are halved."""
    caches: dict[int, GistCache] = {}
    waiting = list(batches_by_length([len(chunk) for chunk in chunks], budget=BATCH_TOKENS))
    while waiting:
        rows = waiting.pop()
        try:
            caches.update(zip(rows, _compress(model, [chunks[row] for row in rows], settings), strict=True))
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            waiting += [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return [caches[row] for row in range(len(chunks))]


def _compress(model: GistModel, chunks: Sequence[Sequence[int]], settings: GistSettings) -> list[GistCache]:
    """Return the caches of one batch; its intermediate memory is free when this returns."""
    return TextPass(model, chunks, making=settings.making).compress(settings.placement, settings.tokens_per_gist)
