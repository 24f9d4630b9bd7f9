"""Who may look at whom when chunks, gists and a question are one sequence.

Every chunk stands behind the prefix and before its gists, and knows nothing of the other chunks::

          P a b G P c d G q
       P  1 . . . . . . . .        P  prefix: the attention sink
       a  1 1 . . . . . . .
       b  1 1 1 . . . . . .
       G  1 1 1 1 . . . . .        gists see their chunk, and each other in both directions
       P  . . . . 1 . . . .
       c  . . . . 1 1 . . .        a chunk never sees another chunk
       d  . . . . 1 1 1 . .
       G  . . . . 1 1 1 1 .
       q  1 . . 1 . . . 1 1        the question sees the first prefix and all gists, never the text

The prefix stands before each chunk because a chunk is compressed right behind it: were there only one, the second chunk
would see it from further away than when it was compressed, and rotary attention is a matter of distance. All
copies are the same up to rotation, so serving keeps the first. Pure functions; positions are other modules' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def gist_mask(prefix_tokens: int, chunks: Sequence[tuple[int, int]], question_tokens: int) -> Tensor:
    """Return the mask of the picture above, ``(n, n)`` bool, True where the row may look at the column.

    Args:
        prefix_tokens: length of the prefix before each chunk.
        chunks: for each chunk its number of text tokens and of gists.
        question_tokens: length of the question and answer at the end.

    >>> gist_mask(1, [(1, 1)], 1).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    """
    blocks, gists = [], []
    for number, (text, count) in enumerate(chunks):
        blocks += [number] * (prefix_tokens + text + count)
        gists += [False] * (prefix_tokens + text) + [True] * count
    block = torch.tensor(blocks + [len(chunks)] * question_tokens)
    is_gist = torch.tensor(gists + [False] * question_tokens)

    order = torch.arange(len(block))
    kept = is_gist | (order < prefix_tokens)  # what serving keeps
    asks = block == len(chunks)
    same = block[:, None] == block[None, :]
    causal = order[:, None] >= order[None, :]
    both_gists = is_gist[:, None] & is_gist[None, :]
    return (same & (causal | both_gists)) | (asks[:, None] & kept[None, :])


def by_layer(config: Any, mask: Tensor, positions: Tensor) -> Any:
    """Return a mask ``(n, n)`` as a network of any family takes it, without what lies outside of a layer's window.

    Args:
        positions: of the tokens, ``(n,)``.
    """
    types = getattr(config, "layer_types", None) or ()
    if "sliding_attention" not in types:
        return mask[None, None]
    near = positions[None, :] > positions[:, None] - config.sliding_window
    return {"full_attention": mask[None, None], "sliding_attention": (mask & near)[None, None]}
