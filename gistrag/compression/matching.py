"""Attention matching: gists get the attention and pass on the values of the whole chunk.

The method is that of Zweiger et al. 2026, arXiv 2602.16284.

A head that keeps a few tokens of a chunk pays them too little attention, and the values of the others are lost.
A closed form corrects both: the queries of the reconstruction pass get from the gists what they got from the text::

    share of attention     Σ exp(q·k) over gists  ≈  Σ exp(q·k) over text     weight of each gist, non-negative
    what comes out of it   Σ a·v      over gists  ≈  Σ a·v      over text     values, least squares

The paper adds the logarithm of a weight to the attention score of its gist token. Here the weight goes into the key,
along the direction that all queries of a head share, so a matched gist cache holds keys and values and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from gistrag.kv.cache import GistCache
from gistrag.kv.rope import Rope

WEIGHT_MAX = 20.0
"""A gist token weighs at most as much as so many tokens, and at least a fraction 1 / so many of one."""
RIDGE = 0.01
"""Ridge penalty that pulls a weight to 1, as a share of its Gram diagonal; `RIDGE_VALUES` keeps
values near the old ones."""
RIDGE_VALUES = 0.5
RIDGE_DIRECTION = 0.01
WHOLE = 0.5
"""A head that keeps this share of a chunk is left unchanged."""
DISTANCES = (0, 150, 300, 600, 1200, 2400)
"""Positions by which a question may stand further from the chunk than the reconstruction pass does."""


@dataclass(frozen=True)
class Reconstruction:
    """Queries, keys and attention of the reconstruction pass over chunks, padded to the longest.

    Attributes:
        queries: of each layer, ``(rows, heads, m, head_dim)``, rotated.
        keys: of each layer, of the chunks, ``(rows, kv_heads, n, head_dim)``, rotated.
        mass: of each layer, the share of attention that the chunk got, ``(rows, heads, m)``; 0 for padding.
        lengths: tokens of each chunk; start: position of the chunks.
        attention: of each layer, ``(rows, kv_heads, n, m)`` as in `received`; empty where it was not kept.
    """

    queries: Sequence[Tensor]
    keys: Sequence[Tensor]
    mass: Sequence[Tensor]
    lengths: Sequence[int]
    start: int
    attention: Sequence[Tensor] = ()

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return queries, scaled as scores are, and mass of a layer by key head.

        Shapes ``(rows, kv_heads, m, head_dim)`` and ``(rows, kv_heads, m)``; *m* goes over the queries of all query
        heads that share a key.
        """
        rows, kv_heads, _, width = self.keys[layer].shape
        queries = (self.queries[layer] / math.sqrt(width)).reshape(rows, kv_heads, -1, width)
        return queries, self.mass[layer].reshape(rows, kv_heads, -1)

    def received(self, layer: int) -> Tensor:
        """Return the attention that each token of a chunk got from each query, ``(rows, kv_heads, n, m)``."""
        if self.attention:
            return self.attention[layer]
        queries, mass = self.of(layer)
        scores = self.keys[layer] @ queries.mT
        if min(self.lengths) < scores.shape[2]:
            lengths = torch.tensor(self.lengths, device=scores.device)
            is_padding = torch.arange(scores.shape[2], device=scores.device) >= lengths[:, None]
            scores.masked_fill_(is_padding[:, None, :, None], -torch.inf)
        return scores.softmax(dim=2).mul_(mass[:, :, None])


def match(caches: Sequence[GistCache], values: Tensor, seen: Reconstruction, rope: Rope) -> list[GistCache]:
    """Return caches whose keys and values are matched to the chunks they were taken from.

    Args:
        values: of all the texts, ``(layers, rows, kv_heads, n, head_dim)``.
    """
    kv, at = _stacked(caches)
    exact = torch.promote_types(kv.dtype, torch.float32)
    lengths = torch.tensor(seen.lengths, device=at.device)
    gists = (at >= 0).sum(dim=-1)  # (layers, rows, kv_heads)
    changed = gists < WHOLE * lengths[:, None]
    common, turned = _common(seen, rope, exact), torch.zeros_like(kv[:, 0], dtype=exact)
    slots = (at >= 0) & changed[..., None]
    of_layer = slots.nonzero()[:, 0] if rope.is_by_layer else None
    turned[slots] = rope.unrotate(common[..., None, :].expand_as(turned)[slots], seen.start + at[slots], of_layer)
    for layer, count in enumerate(gists):  # one at a time stays in a processor's cache
        heads = changed[layer].nonzero(as_tuple=True)  # numbers of rows, and of heads
        if not len(heads[0]):
            continue
        fullest, count = int(count[heads].max()), count[heads]
        keys, old = (each[layer][heads][:, :fullest].to(exact) for each in (kv[:, 0], kv[:, 1]))  # (some, slots, width)
        positions = at[layer][heads][:, :fullest]
        queries, mass = (each[heads] for each in seen.of(layer))
        received = seen.received(layer)
        row, head = (number[:, None] for number in heads)
        kept = received[row, head, positions.clamp(min=0)].to(exact) * (positions >= 0)[..., None]  # (some, slots, m)
        queries = queries.to(exact) * (mass > 0)[..., None]
        weight = _weights(kept, mass).log()[..., None]
        kept = kept * (weight * (common[layer][heads][:, None] @ queries.mT)).exp()
        kept = kept * (mass / kept.sum(dim=1).clamp(min=torch.finfo(exact).tiny))[:, None]
        target = (values[layer].mT @ received)[heads].mT.to(exact)  # (some, m, width)
        kv[layer, 0, heads[0], heads[1], :fullest] = (keys + weight * turned[layer][heads][:, :fullest]).to(kv.dtype)
        kv[layer, 1, heads[0], heads[1], :fullest] = _values(kept, target, old, count, kv.dtype).to(kv.dtype)
    kv = torch.where((at >= 0)[:, None, ..., None], kv, kv[..., :1, :])
    return [replace(cache, kv=kv[:, :, row, :, : cache.kv.shape[3]].contiguous()) for row, cache in enumerate(caches)]


def _stacked(caches: Sequence[GistCache]) -> tuple[Tensor, Tensor]:
    """Return a copy of the keys and values of caches and their positions, with padding slots behind the shorter ones.

    Shapes ``(layers, 2, rows, kv_heads, slots, head_dim)`` and ``(layers, rows, kv_heads, slots)``.
    """
    slots = max(cache.kv.shape[3] for cache in caches)
    short = [slots - cache.kv.shape[3] for cache in caches]
    kv = [functional.pad(cache.kv, (0, 0, 0, pad)) for cache, pad in zip(caches, short, strict=True)]
    at = [functional.pad(cache.positions, (0, pad), value=-1) for cache, pad in zip(caches, short, strict=True)]
    return torch.stack(kv, dim=2), torch.stack(at, dim=1)


def _weights(kept: Tensor, mass: Tensor) -> Tensor:
    """Return the non-negative weights with which the shares of gists add up to that of the text, ``(heads, slots)``.

    Args:
        kept: ``(heads, slots, m)``; mass: ``(heads, m)``.
    """
    gram = kept @ kept.mT
    ridge, rhs = RIDGE * gram.diagonal(dim1=1, dim2=2).clamp(min=1e-12), kept @ mass[..., None]
    return _solved(gram, rhs, ridge, torch.ones_like(rhs))[..., 0].clamp(1 / WEIGHT_MAX, WEIGHT_MAX)


def _common(seen: Reconstruction, rope: Rope, exact: torch.dtype) -> Tensor:
    """Return the direction whose product with all queries of a head is as near to 1 as can be.

    Shape ``(layers, rows, kv_heads, head_dim)``.

    So it is near also for the queries of questions that stand further away.
    """
    spreads, means = [], []
    for layer in range(len(seen.keys)):
        queries, mass = seen.of(layer)
        queries = queries.to(exact)  # in 16 bits what follows is not positive definite now and then
        heard = (mass[..., None] * queries).mT  # (rows, kv_heads, head_dim, m)
        spreads.append(heard @ queries)
        means.append(heard.sum(dim=3))
    shape = len(spreads), *means[0].shape
    spread, mean = torch.stack(spreads).flatten(1, 2), torch.stack(means).flatten(1, 2)  # of all heads of all chunks
    at = torch.tensor(DISTANCES, device=spread.device)
    total = rope.rotate_products(spread, at).flatten(0, 1)  # (heads, head_dim, head_dim)
    rhs = Rope(rope.inv_freq).rotate(mean[:, :, None, None], at[:, None]).sum(dim=2).flatten(0, 1)  # (heads, 1, width)
    ridge = RIDGE_DIRECTION * total.diagonal(dim1=1, dim2=2).mean(dim=-1, keepdim=True)
    return _solved(total, rhs.mT, ridge, torch.zeros_like(rhs.mT))[..., 0].view(shape)


def _values(kept: Tensor, target: Tensor, old: Tensor, gists: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values with which *kept* comes nearest to *target*, held at *old*; ``(heads, slots, head_dim)``.

    Args:
        dtype: of the products over the repetition; the ridge is wide enough for 16 bits.
    """
    narrow = kept.to(dtype)
    gram = (narrow @ narrow.mT).to(kept.dtype)
    ridge = RIDGE_VALUES * gram.diagonal(dim1=1, dim2=2).sum(dim=-1) / gists + 1e-6  # (heads,)
    return _solved(gram, kept @ target, ridge[:, None], old)


def _solved(gram: Tensor, rhs: Tensor, ridge: Tensor, start: Tensor) -> Tensor:
    """Return the solution of ``gram x = rhs`` for every head, held at *start*; *start* itself where there is none.

    By Cholesky: torch's batched LU on a CPU goes wrong, without an error, with two threads and some 150 rows.

    Args:
        gram: ``(heads, n, n)``; rhs, start: ``(heads, n, columns)``; ridge: ``(heads, n or 1)``.
    """
    regularized = gram + ridge[..., None] * torch.eye(gram.shape[1]).to(gram)
    factor, failed = torch.linalg.cholesky_ex(regularized)
    rhs = rhs + ridge[..., None] * start
    if rhs.device.type == "cpu":
        solution = torch.cholesky_solve(rhs, factor)
    else:  # where that goes through the heads one by one
        half = torch.linalg.solve_triangular(factor, rhs, upper=False)
        solution = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return torch.where((failed == 0)[:, None, None], solution, start)
