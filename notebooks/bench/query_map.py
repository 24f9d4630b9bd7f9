"""Fit the query map of the default model: the linear maps that predict what a reconstruction pass would ask.

    python notebooks/bench/query_map.py squad.jsonl.gz --output gistrag/adapters/smollm2-135m-instruct.safetensors

The model reads paragraphs of SQuAD, of the articles that training may use, and pieces of Python's standard library, and
repeats them. For each layer, ridge regression takes the keys and values of a token and of the next one to the queries
of all heads in the repetition, and to the score of what they attend to besides chunk and prefix. The principal
directions of what it predicts are kept. Some minutes on two CPU cores; the same files give the same map.

This script uses internal modules of gistrag, which change without notice.
"""

from __future__ import annotations

import argparse
import os
import pydoc_data
import random
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from gistrag.compression.making import READ_TWICE
from gistrag.compression.placements import TextPass
from gistrag.compression.query_map import BASE
from gistrag.model.gist_model import GistModel
from gistrag.model.hub import find
from gistrag.qa.dataset import read_contexts, split_by_article
from gistrag.settings import DEFAULT_MODEL

TOKENS = 48, 256
"""Fewest and most tokens of a text."""
RIDGE = 1e-3
"""Ridge penalty, as a share of the variance of each feature."""
LEAST_SHARE = 1e-3
"""Least share of the attention outside the chunk that is counted as going to the repetition itself."""


def main() -> None:
    """Fit the map and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--paragraphs", type=int, default=160)
    parser.add_argument("--pieces", type=int, default=48, help="of Python's standard library")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    model = GistModel.load(find(DEFAULT_MODEL).path)
    randomness = random.Random(0)
    texts = [*paragraphs(model, given.file, given.paragraphs, randomness), *pieces(model, given.pieces, randomness)]
    products, outputs, squares = observed(model, texts)
    heads = model.network.config.num_attention_heads
    layers = [fitted(*sums, rank=given.rank, heads=heads) for sums in zip(products, outputs, squares, strict=True)]
    tensors = {name: torch.stack(parts).contiguous() for name, parts in zip(
        ("mean", "down", "up", "bias"), zip(*(one[:4] for one in layers), strict=True), strict=True)}  # fmt: skip
    safetensors.torch.save_file(tensors, given.output, metadata={BASE: model.weights})
    shares = [share for *_, share in layers]
    print(f"explained variance of the queries: {sum(shares) / len(shares):.3f}, {min(shares):.3f} in the worst layer")


def paragraphs(model: GistModel, file: Path, count: int, randomness: random.Random) -> Iterator[list[int]]:
    """Yield the token ids of paragraphs that training may use."""
    train, _ = split_by_article(read_contexts(file)[0])
    for context in randomness.sample(train, count):
        yield model.encode_passage(context.text, context.heading)[: TOKENS[1]]


def pieces(model: GistModel, count: int, randomness: random.Random) -> Iterator[list[int]]:
    """Yield the token ids of pieces of code and of the manual of Python."""
    files = [*sorted(Path(os.__file__).parent.glob("*.py")), *Path(pydoc_data.__path__[0]).glob("topics.py")]
    for number in range(count):
        text = (files[-1] if number % 4 == 0 else randomness.choice(files)).read_text("utf-8", errors="ignore")
        begin = randomness.randrange(max(1, len(text) - 1500))
        yield model.encode(text[begin : begin + 1500])[: randomness.randint(*TOKENS)]


@torch.no_grad()
def observed(model: GistModel, texts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the products of features, their products with what is predicted, and its squares, summed over texts.

    Shapes ``(layers, features, features)``, ``(layers, features, made)`` and ``(layers, made)``; the last feature is 1.
    """
    heads = model.network.config.num_attention_heads
    features, made = 4 * model.kv_heads * model.head_dim + 1, heads * (model.head_dim + 1)
    products = torch.zeros(model.layers, features, features)
    outputs, squares = torch.zeros(model.layers, features, made), torch.zeros(model.layers, made)
    for ids in texts:
        text = TextPass(model, [ids], making=READ_TWICE)
        for layer in range(model.layers):
            given, asked = _features(text, layer), _asked(text, layer)
            products[layer] += given.T @ given
            outputs[layer] += given.T @ asked
            squares[layer] += asked.square().sum(dim=0)
    return products, outputs, squares


def _features(text: TextPass, layer: int) -> Tensor:
    """Return un-rotated key and value of each token, of the next one, and 1; ``(n, features)``."""
    keys, values = text.kv[layer, :, 0].float()
    keys = text.model.rope.unrotate(text.kv[layer, 0, 0], text.start + torch.arange(keys.shape[1])).float()
    own = torch.cat((keys, values)).transpose(0, 1).flatten(1)
    following = torch.cat((own[1:], torch.zeros_like(own[:1])))
    return torch.cat((own, following, torch.ones(len(own), 1)), dim=1)


def _asked(text: TextPass, layer: int) -> Tensor:
    """Return the un-rotated queries of the repetition, and the scores of what it attends to in itself."""
    model, real, count = text.model, text.reconstruction, len(text.chunks[0])
    queries = real.queries[layer][0, :, real.asked :].float()  # (heads, n, head_dim)
    mass = real.mass[layer][0, :, real.asked :].float().clamp(1e-4, 1 - 1e-4)
    prefix = text.reading.kv()[layer, 0, 0, :, : text.start].float()
    grouped = (queries * model.head_dim**-0.5).view(model.kv_heads, -1, model.head_dim)
    of_text, of_prefix = (
        (grouped @ keys.float().mT).logsumexp(dim=2).view(mass.shape) for keys in (text.kv[layer, 0, 0], prefix)
    )
    outside = of_text + (1 / mass - 1).log()
    own = outside + (1 - (of_prefix - outside).exp()).clamp(min=LEAST_SHARE).log()
    plain = model.rope.unrotate(queries, text.start + count + real.asked + torch.arange(count))
    return torch.cat((plain.transpose(0, 1).flatten(1), own.T), dim=1)


def fitted(
    products: Tensor, outputs: Tensor, squares: Tensor, *, rank: int, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Return the map of a layer, and the share of the variance of the queries that it explains.

    Args:
        products, outputs, squares: of the layer, as `observed` gives them; heads: of queries.
    """
    products, outputs = products.double(), outputs.double()
    count = products[-1, -1]
    mean, level = products[-1, :-1] / count, outputs[-1] / count
    products = products[:-1, :-1] - count * mean[:, None] * mean
    outputs = outputs[:-1] - count * mean[:, None] * level
    spread = products.diagonal().clamp(min=1e-9).sqrt()
    scaled = products / spread[:, None] / spread + RIDGE * torch.eye(len(spread)).double()
    full = torch.linalg.solve(scaled, outputs / spread[:, None]) / spread[:, None]
    asked = full[:, :-heads]
    directions = torch.linalg.eigh(asked.T @ products @ asked).eigenvectors[:, -rank:]
    down = asked @ directions
    inner = down.T @ products @ down
    inner += 1e-6 * inner.diagonal().mean() * torch.eye(rank).double()
    rest = torch.linalg.solve(inner, down.T @ outputs[:, asked.shape[1] :])
    up = torch.cat((directions.T, rest), dim=1)
    center, down, up = (each.bfloat16().double() for each in (mean, down, up))  # as they are stored
    both = down @ up
    missed = (both * (products @ both)).sum(dim=0) - 2 * (both * outputs).sum(dim=0)
    total = squares.double() - count * level.square()
    share = -missed[: asked.shape[1]].sum() / total[: asked.shape[1]].sum()
    bias = level - (mean - center) @ both
    return center[None].bfloat16(), down.bfloat16(), up.bfloat16(), bias[None].bfloat16(), float(share)


if __name__ == "__main__":
    main()
