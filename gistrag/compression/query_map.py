"""The queries of a reconstruction pass, predicted from the text pass instead of read in a second forward pass.

What a head would ask of a chunk while the model repeats it (KVzip, Kim et al. 2025, arXiv 2505.23416) depends mostly on
the token just repeated and on the next one, which is what induction heads look for. Both have left their keys and
values in the same layer, so a linear map of low rank gives the query of the repetition::

    keys and values of token i and of token i + 1   →   rank numbers   →   query of every head, attention to the rest

*The rest* is what the repetition pays to its own tokens, as one score per head. A map belongs to the weights of a base
model, and is fitted once by least squares over texts that the model repeats (``notebooks/bench/query_map.py``). A model
without a map makes the reconstruction pass itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from gistrag.compression.matching import Reconstruction
from gistrag.model.gist_model import GistModel
from gistrag.model.hub import ADAPTERS

BASE = "base"
"""Name under which the file of a map holds the sha256 of the weights it belongs to."""

KEPT_BYTES = 1 << 28
"""Most bytes of attention that are kept from scoring tokens to matching; more is computed a second time."""
LARGEST = 60.0
"""Most by which a score exceeds that of the rest; its exponential still fits into 16 bits."""


@dataclass(frozen=True, eq=False)
class QueryMap:
    """A linear map for each layer of a model.

    Attributes:
        mean: ``(layers, 1, 4 · kv_heads · head_dim)``, taken off key and value of a token, and of the next one: some
            channels are so large that 16 bits would leave little of their differences.
        down: ``(layers, 4 · kv_heads · head_dim, rank)``.
        up: ``(layers, rank, heads · (head_dim + 1))``; queries of all heads, then the score of the rest of each.
        bias: ``(layers, 1, heads · (head_dim + 1))``.
    """

    mean: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor

    def predict(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Return un-rotated queries ``(layers, rows, heads, n, head_dim)``, and scores of the rest without the last.

        Args:
            kv: ``(layers, 2, rows, kv_heads, n, head_dim)``, keys un-rotated; 0 where a row has no token.
        """
        layers, _, rows, _, count, width = kv.shape
        own = kv.permute(0, 2, 4, 1, 3, 5).reshape(layers, rows, count, -1)
        following = functional.pad(own[:, :, 1:], (0, 0, 0, 1))
        asked = torch.cat((own, following), dim=3).view(layers, rows * count, -1) - self.mean
        made = torch.baddbmm(self.bias, asked @ self.down, self.up)
        heads = made.shape[2] // (width + 1)
        made = made.view(layers, rows, count, -1).transpose(2, 3)  # (layers, rows, heads · (head_dim + 1), n)
        return made[:, :, : heads * width].reshape(layers, rows, heads, width, count).mT, made[:, :, heads * width :]


def path_of(weights: str) -> Path | None:
    """Return the file of the map that comes with this library for a base model, None where there is none.

    Args:
        weights: `gistrag.model.hashing.weights_sha256` of the base model.
    """
    return _paths().get(weights)


@cache
def _paths() -> dict[str, Path]:
    found = {}
    for path in sorted(ADAPTERS.glob("*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            found[file.metadata()[BASE]] = path
    return found


@cache
def _loaded(path: Path, device: torch.device, dtype: torch.dtype) -> QueryMap:
    tensors = safetensors.torch.load_file(path)
    return QueryMap(**{name: one.to(device, dtype) for name, one in tensors.items()})


def query_map(model: GistModel) -> QueryMap | None:
    """Return the map of a model, where it computes and in what it computes in; None where there is none."""
    path = path_of(model.weights)
    return _loaded(path, model.device, model.network_dtype) if path else None


def predicted(model: GistModel, fitted: QueryMap, kv: Tensor, lengths: Sequence[int]) -> tuple[Reconstruction, Tensor]:
    """Return the predicted reconstruction pass over chunks, and the most that each of their tokens got in it.

    The second has the shape ``(layers, rows, kv_heads, n)``. The chunks are repeated right behind themselves.

    Args:
        kv: of the chunks behind the shared prefix, ``(layers, 2, rows, kv_heads, n, head_dim)``, keys rotated.
        lengths: tokens of each chunk.
    """
    start, places = model.prefix.gists, torch.arange(kv.shape[4], device=kv.device)
    ends = torch.tensor(lengths, device=kv.device)
    is_real = places < ends[:, None]  # (rows, n)
    plain = torch.stack((model.rope.unrotate(kv[:, 0], start + places).to(kv.dtype), kv[:, 1]), dim=1)
    asked, rest = fitted.predict(plain if bool(is_real.all()) else plain * is_real[:, None, :, None])
    half = kv.shape[5] // 2
    first = torch.cat((kv.new_ones(half), kv.new_zeros(half)))  # turned, it is the cosines and then the sines
    if model.rope.is_by_layer:
        first = first.expand(model.layers, 1, 1, 1, -1)
    table = model.rope.rotate(first, (start + ends[:, None] + places)[:, None]).to(kv.dtype)
    queries = [_turned(each, *turn.chunk(2, dim=-1)) for each, turn in zip(asked, _by_layer(table, asked), strict=True)]
    prefix = model.rope.rotate(model.prefix.kv[:, 0], places.new_tensor(range(start))).to(kv.dtype)
    is_kept = len(queries) * queries[0].shape[1] * is_real.numel() * kv.shape[4] * kv.itemsize <= KEPT_BYTES
    kept, masses, greatest = [], [], []
    for query, key, before, others in zip(queries, kv[:, 0], prefix, rest, strict=True):
        attention, mass = _received(query, key, before, others, is_real)
        masses.append(mass)
        greatest.append(attention.amax(dim=3))
        if is_kept:
            kept.append(attention)
    return Reconstruction(queries, list(kv[:, 0]), masses, lengths, start, kept), torch.stack(greatest).float()


def _by_layer(table: Tensor, asked: Tensor) -> Tensor:
    """Return a table of cosines and sines for each layer, ``(layers, rows, 1, n, head_dim)``."""
    return table.expand(len(asked), *table.shape[-4:])


def _turned(queries: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return queries rotated in their own dtype, as the model does it."""
    first, second = queries.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _received(queries: Tensor, keys: Tensor, prefix: Tensor, rest: Tensor, is_real: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention that the tokens of chunks get from the queries of a layer, and its sum for each query.

    Shapes ``(rows, kv_heads, n, m)`` for the queries of all heads that share a key, and ``(rows, heads, n)``. This is
    a softmax over chunk, prefix and rest, of which only the chunk's part is kept.

    Args:
        queries: ``(rows, heads, n, head_dim)``; keys: ``(rows, kv_heads, n, head_dim)``.
        prefix: ``(kv_heads, start, head_dim)``; rest: ``(rows, heads, n)``; is_real: ``(rows, n)``.
    """
    rows, kv_heads, count, width = keys.shape
    grouped = (queries * width**-0.5).view(rows * kv_heads, -1, width).mT
    before = (prefix.repeat(rows, 1, 1) @ grouped).logsumexp(dim=1, keepdim=True)
    others = torch.logaddexp(before, rest.reshape(before.shape))  # (rows · kv_heads, 1, m)
    weights = torch.baddbmm(others, keys.flatten(0, 1), grouped, beta=-1).clamp_(max=LARGEST).exp_()
    if not bool(is_real.all()):
        weights *= is_real.repeat_interleave(kv_heads, dim=0)[..., None]
    total = weights.sum(dim=1, keepdim=True).to(torch.promote_types(weights.dtype, torch.float32)) + 1
    is_asked = is_real[:, None].expand(rest.shape)
    weights *= (is_asked.reshape(total.shape) / total).to(weights.dtype)
    mass = ((total - 1) / total).view(rest.shape) * is_asked
    return weights.view(rows, kv_heads, count, -1), mass
