"""Attention as the network computes it: ragged heads, padding slots, and an observer of queries and keys.

Every layer and head of a memory may hold another number of gist tokens; the slots behind the last one are padding,
which nothing attends to. Compression watches attention through an `Observer`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

Observer = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called by every layer, for some rows of the batch after the others, with the layer's number, its rotated queries
``(rows, heads, n, head_dim)``, all rotated keys ``(rows, kv_heads, slots, head_dim)`` and the attention of one for the
other ``(rows, heads, n, slots)``."""


ATTENTION = "gistrag_sdpa"


@dataclass(frozen=True)
class Near:
    """Positions, by which a layer with a window knows what is near enough.

    Attributes:
        asked: of the tokens being read, ``(batch, n)``.
        slots: of all slots of each layer, ``(batch, kv_heads or 1, slots)``; one entry where layers are alike.
    """

    asked: Tensor
    slots: Sequence[Tensor] | Tensor

    def within(self, window: int, layer: int) -> Tensor:
        """Return who is near enough to whom in a layer, ``(batch, kv_heads or 1, n, slots)`` bool."""
        slots = self.slots[layer if len(self.slots) > 1 else 0]
        return slots[:, :, None] > self.asked[:, None, :, None] - window


def _observed_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Return scaled-dot-product attention as transformers computes it, showing it to an observer.

    Nothing attends to padding slots, which differ between layers and heads, nor to the padding of a batch.

    Args:
        visible: for each layer, slots of the memory that are none, ``(batch, kv_heads, slots)`` bool.
        near: positions, for a layer with a window.
    """
    observer: Observer | None = kwargs.pop("observer", None)
    visible: list[Tensor] | None = kwargs.pop("visible", None)
    near: Near | None = kwargs.pop("near", None)
    width = query.shape[3]
    if kwargs.get("scaling", width**-0.5) != width**-0.5:  # put into the queries, so that all scores are alike
        query = query * (kwargs["scaling"] * width**0.5)
        kwargs["scaling"] = width**-0.5
    if visible is not None:
        mask = _seen(visible[module.layer_idx], mask, key.shape[2])
    if near is not None and (window := kwargs.get("sliding_window")):
        within = near.within(window, module.layer_idx)
        mask = within if mask is None else mask & within
    if mask is not None and observer:
        return _observed(module.layer_idx, query, key, value, mask, observer), None
    if mask is not None and query.requires_grad and query.device.type == "cpu":
        return _attended(_attention(query, key, mask), value), None
    if mask is not None and mask.shape[1] not in (1, query.shape[1]):
        mask = mask.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # (batch, heads, n, slots)
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    return output


def _observed(layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, observer: Observer) -> Tensor:
    """Return what attention makes of values, ``(batch, n, heads, head_dim)``.

    On a CPU one row after the other, for a row stays in the processor's cache.
    """
    made, size = [], 1 if query.device.type == "cpu" else len(query)
    for start in range(0, len(query), size):
        rows = slice(start, start + size)
        weights = _attention(query[rows], key[rows], mask[rows] if len(mask) > 1 else mask)
        observer(layer, query[rows], key[rows], weights)
        made.append(_attended(weights, value[rows]))
    return torch.cat(made)


def _seen(visible: Tensor, mask: Tensor | None, slots: int) -> Tensor:
    """Return who looks where, ``(batch, kv_heads, n, slots)`` bool: into the memory, and at what was read behind it.

    Args:
        visible: ``(batch, kv_heads, …)`` bool, of the memory.
        mask: its last columns are what was read behind; None lets every token look at all of that.
    """
    memory = visible[:, :, None]
    if mask is None:
        return functional.pad(memory, (0, slots - memory.shape[3]), value=True)
    behind = mask[..., mask.shape[3] - (slots - memory.shape[3]) :]
    shape = (*visible.shape[:2], mask.shape[2], -1)
    return torch.cat((memory.expand(shape), behind.expand(shape)), dim=3)


def _attention(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Return attention weights ``(batch, heads, n, slots)``; with gradients on a CPU three times as fast as torch's.

    Heads that share keys are multiplied as one, so that keys and values are never repeated.

    Args:
        query: ``(batch, heads, n, head_dim)``; key: ``(batch, kv_heads, slots, head_dim)``.
        mask: ``(batch or 1, kv_heads or 1, n, slots)`` bool.
    """
    batch, heads, count, width = query.shape
    kv_heads, slots = key.shape[1:3]
    stacked = (query * width**-0.5).reshape(batch * kv_heads, -1, width)
    scores = torch.bmm(stacked, key.reshape(batch * kv_heads, slots, width).transpose(1, 2))
    bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    grouped = scores.view(batch, kv_heads, heads // kv_heads, count, slots).add_(bias[:, :, None])
    return grouped.softmax(dim=-1).view(batch, heads, count, slots)


def _attended(weights: Tensor, value: Tensor) -> Tensor:
    """Return what attention weights make of values, ``(batch, n, heads, head_dim)``.

    Args:
        value: ``(batch, kv_heads, slots, head_dim)``.
    """
    batch, heads, count, slots = weights.shape
    stacked = value.reshape(-1, slots, value.shape[3])
    mixed = torch.bmm(weights.view(len(stacked), -1, slots), stacked)
    return mixed.view(batch, heads, count, value.shape[3]).transpose(1, 2)


AttentionInterface.register(ATTENTION, _observed_sdpa)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def without_cudnn(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context without cuDNN's attention, whose plans are for one shape: here every layer has its own."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
