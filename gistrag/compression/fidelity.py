"""How much of a chunk its gists keep, and gists that keep enough.

The model is asked to repeat a chunk, once behind its text and once behind its gists, and the chunk is fed to it. At the
tokens that surprise it most, which are what gists lose first, its two guesses are compared: the *fidelity* is how
far they overlap, 1 where they are the same and 0 where they share nothing::

    behind text    Repeat the passage.  The port is ▁8420        p      fidelity = mean over tokens of Σ min(p, q)
    behind gists   Repeat the passage.  The port is ▁8420        q

It needs no question and no answer, so it can be had while an index is built. How well it foretells answers is
measured by ``notebooks/bench/calibration.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gistrag.compression.compress import REPEAT, TextPass, anchors, compress
from gistrag.kv.cache import GistCache, as_stored, concatenate
from gistrag.model.gist_model import GistModel, Reading
from gistrag.settings import KvCacheDtype, Placement

SHARE = 0.25
"""Of the tokens of a chunk, those that surprise most, at which guesses are compared."""


class Repeated:
    """What a model guesses while it repeats one chunk behind its text.

    Args:
        chunk: token ids as `GistModel.encode_passage` gives them, not empty.
    """

    def __init__(self, model: GistModel, chunk: Sequence[int]) -> None:
        text = TextPass(model, [chunk])
        self._model = model
        self._asked = model.encode_question(REPEAT)
        room = max(1, model.window - text.start - len(chunk) - len(self._asked))
        self._fed = torch.tensor([[*self._asked, *chunk[:room]]])
        count = len(chunk[:room])
        self._places = anchors(text.surprise(0)[:count], math.ceil(SHARE * count))  # (n,)
        self._guesses = self._guessed(text.reading.fork(), text.start + len(chunk))  # (n, vocabulary)

    def _guessed(self, reading: Reading, begin: int) -> Tensor:
        hidden = reading.feed(self._fed, positions=begin + torch.arange(self._fed.shape[1]), role="answers")
        before = hidden[0, len(self._asked) - 1 : -1][self._places]
        return self._model.logits(before).float().softmax(dim=-1)

    def fidelity(self, cache: GistCache) -> float:
        """Return how far the guesses behind gists of the chunk overlap with those behind its text, 0 to 1."""
        memory = concatenate([self._model.prefix, cache], self._model.rope)
        guesses = self._guessed(self._model.read(memory), memory.next_position)
        overlap = torch.minimum(self._guesses, guesses).sum(dim=-1)  # (n,)
        return min(1.0, float(overlap.mean()))


def compress_to(
    model: GistModel,
    chunks: Sequence[Sequence[int]],
    *,
    placement: Placement,
    tokens_per_gist: int,
    min_quality: float,
    kv_cache_dtype: KvCacheDtype = "auto",
) -> list[GistCache]:
    """Return the gist cache of each chunk with its fidelity, the smallest one that reaches *min_quality*.

    A chunk whose gists are below is compressed again with half the tokens per gist, down to 1; of one that never gets
    there the cache of highest fidelity is returned, and is to be read as text where answers matter.

    Args:
        kv_cache_dtype: of the files that the caches are for; fidelity is that of what comes back from them.
    """
    repeated = [Repeated(model, chunk) for chunk in chunks]
    best: dict[int, GistCache] = {}
    pending = list(range(len(chunks)))
    while pending and tokens_per_gist:
        made = compress(model, [chunks[row] for row in pending], placement=placement, tokens_per_gist=tokens_per_gist)
        for row, cache in zip(pending, made, strict=True):
            measured = replace(cache, fidelity=repeated[row].fidelity(as_stored(cache, kv_cache_dtype)))
            best[row] = max(best.get(row, measured), measured, key=lambda one: one.fidelity or 0.0)
        pending = [row for row in pending if not is_faithful(best[row], min_quality)]
        tokens_per_gist //= 2
    return [best[row] for row in range(len(chunks))]


def is_faithful(cache: GistCache, min_quality: float) -> bool:
    """Return whether a cache keeps enough of its chunk; one that was never measured is taken to."""
    return cache.fidelity is None or cache.fidelity >= min_quality
