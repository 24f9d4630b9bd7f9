"""A text being read by torch: a KV cache that grows with every forward pass.

`Reading` is the only way to run the network; `decode_steps` generates from it. Positions continue where a memory ends,
which differs from the number of its slots, and every token attends to every slot; in a layer with a window, to those
whose positions are near enough. A missing position or mask would give fluent wrong text and no error.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from gistrag.kv.cache import Memories, Memory, side_by_side
from gistrag.model.adapter import Role
from gistrag.model.attention import Near, Observer, without_cudnn
from gistrag.model.runtime import TEMPERATURE_MIN, Floats, Trace


class Network(Protocol):
    """What a reading needs of a model, see `gistrag.model.gist_model.GistModel`."""

    network: Any
    device: torch.device
    stop_ids: frozenset[int]
    line_ends: frozenset[int]

    @property
    def network_dtype(self) -> torch.dtype:
        """What the network computes in."""

    def reading_as(self, role: Role, /) -> AbstractContextManager[None]:
        """Let the adapter act, and gradients flow, as *role* wants it."""

    def logits(self, hidden: Tensor, /) -> Tensor:
        """Return the next-token logits of final hidden states."""

    def read_behind(self, memories: Memories, /) -> Reading:
        """Return a reading that starts behind a memory for each row."""

    def pieces(self, ids: Sequence[int], /) -> list[Sequence[int]]:
        """Return token ids in pieces between which a caller may stop."""


class Reading:
    """A text being read: keys and values of all that was fed so far, for every row of a batch.

    Attributes:
        slots: cache slots filled so far.
    """

    def __init__(
        self, model: Network, kv: Tensor | None, visible: Tensor | None = None, positions: Tensor | None = None
    ) -> None:
        self._model = model
        types = getattr(model.network.config, "layer_types", None) or ()
        self._layer_types = types if "sliding_attention" in types else ()
        self._positions = positions  # of every slot, (layers, batch, kv_heads, slots), where a layer has a window
        layers = None  # of keys and values, each (batch, kv_heads, slots, head_dim)
        if kv is not None:
            layers = [(keys, values) for keys, values in kv.to(model.network_dtype)]
        self._began = 0 if kv is None else kv.shape[4]
        self._columns: list[Tensor] | None = None
        self._visible: list[Tensor] | None = None
        if layers is not None and visible is not None:  # a slot that no head of a layer filled is not even carried
            self._columns = [layer.any(dim=(0, 1)).nonzero()[:, 0] for layer in visible]
            self._visible = [layer[..., at] for layer, at in zip(visible, self._columns, strict=True)]
            layers = [(keys[:, :, at], values[:, :, at])
                      for (keys, values), at in zip(layers, self._columns, strict=True)]  # fmt: skip
        self._cache = transformers.DynamicCache(layers)  # without a configuration no layer forgets
        self.slots = self._began

    def feed(
        self,
        ids: Tensor | None = None,
        *,
        positions: Tensor,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
        observer: Observer | None = None,
        role: Role = "text",
    ) -> Tensor:
        """Read tokens and return their final hidden states, ``(batch, n, hidden)``.

        Args:
            ids: ``(batch, n)`` token ids, or None with *embeddings* ``(batch, n, hidden)`` in their place.
            positions: ``(n,)`` or ``(batch, n)``; gaps and repeats are fine.
            mask: ``(batch or 1, n, slots + n)`` bool, True where a token may look; None is causal over everything.
            observer: sees queries, keys and attention of every layer.
            role: what is read, which says whether the adapter acts on it.
        """
        device = self._model.device
        rows, count = ids.shape if ids is not None else _shape(embeddings)
        if mask is None and (count > 1 or observer):
            # explicit, so that transformers never guesses one from the positions
            mask = torch.ones(1, count, self.slots + count, dtype=torch.bool).tril(self.slots)
        with self._model.reading_as(role), without_cudnn(device):
            output = self._model.network.model(
                input_ids=None if ids is None else ids.to(device),
                inputs_embeds=embeddings,
                position_ids=positions.to(device).reshape(-1, count),
                attention_mask=self._for_network(None if mask is None else mask[:, None].to(device)),
                past_key_values=self._cache,
                use_cache=True,
                observer=observer,
                visible=self._visible,
                near=self._near(positions.to(device).reshape(-1, count).expand(rows, -1)),
            )
        self.slots += count
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _for_network(self, mask: Tensor | None) -> Any:
        """Return the mask in the form that keeps the network from making one of its own for layers with a window."""
        return dict.fromkeys(self._layer_types, mask) if self._layer_types else mask

    def _near(self, asked: Tensor) -> Near | None:
        """Add the positions of the tokens being read, ``(batch, n)``, and return where all slots stand.

        None for a network in which no layer has a window.
        """
        if not self._layer_types:
            return None
        if self._positions is None:
            self._positions = asked[None, :, None]
        else:
            here = asked[None, :, None].expand(*self._positions.shape[:3], -1)
            self._positions = torch.cat((self._positions.to(asked.device), here), dim=3)
        if self._columns is None:
            return Near(asked, self._positions)
        tail = torch.arange(self._began, self._positions.shape[3], device=asked.device)
        return Near(asked, [of_layer[..., torch.cat((at, tail))]
                            for of_layer, at in zip(self._positions, self._columns, strict=True)])  # fmt: skip

    def fork(self) -> Reading:
        """Return a reading of its own that has read the same; the tensors so far are shared, none is copied."""
        twin = copy.copy(self)
        twin._cache = transformers.DynamicCache([(layer.keys, layer.values) for layer in self._cache.layers])
        return twin

    def kv(self, start: int = 0) -> Tensor:
        """Return keys (rotated) and values from slot *start* on, ``(layers, 2, batch, kv_heads, n, head_dim)``."""
        layers = [(layer.keys, layer.values) for layer in self._cache.layers]
        if self._columns is not None:
            layers = [(self._spread(keys, at), self._spread(values, at))
                      for (keys, values), at in zip(layers, self._columns, strict=True)]  # fmt: skip
        return torch.stack([torch.stack((keys[:, :, start:], values[:, :, start:])) for keys, values in layers])

    def _spread(self, carried: Tensor, columns: Tensor) -> Tensor:
        """Return what a layer carries with every slot in its place, ``(batch, kv_heads, slots, head_dim)``."""
        whole = carried.new_zeros(*carried.shape[:2], self.slots, carried.shape[3])
        whole[:, :, columns] = carried[:, :, : len(columns)]
        whole[:, :, self._began :] = carried[:, :, len(columns) :]
        return whole

    def seen(self, layer: int) -> Tensor:
        """Return which carried slots of the memory a layer fills, ``(kv_heads, slots)``, of the first row."""
        if self._visible is None:
            keys = self._cache.layers[layer].keys
            return torch.ones(keys.shape[1], self._began, dtype=torch.bool)
        return self._visible[layer][0].cpu()

    def watch(self, layers: Sequence[int], found: dict[int, list[Floats]]) -> Observer:
        """Return an observer that puts into *found* what `Runtime.attention` returns, of the first row."""

        def observe(layer: int, queries: Tensor, keys: Tensor, weights: Tensor) -> None:
            if layer in layers:
                group = queries.shape[1] // keys.shape[1]
                seen = self.seen(layer)  # (kv_heads, carried slots of the memory)
                found[layer] = [
                    of_head[:, : seen.shape[1]][:, seen[head // group]].float().cpu().numpy()
                    for head, of_head in enumerate(weights[0])
                ]

        return observe

    def memory(self, next_position: int, *, row: int = 0, slots: int | None = None) -> Memory:
        """Return what a row has read so far, or the last *slots* of it."""
        kv, visible = self.kv()[:, :, row], None
        start = 0 if slots is None else self.slots - slots
        if self._visible is not None and self._columns is not None:
            visible = kv.new_zeros(kv[:, 0, ..., 0].shape, dtype=torch.bool)  # (layers, kv_heads, slots)
            visible[..., self._began :] = True
            for layer, at, seen in zip(visible, self._columns, self._visible, strict=True):
                layer[:, at] = seen[row]
            visible = visible[..., start:]
        places = None
        if self._positions is not None and self._layer_types:
            every = (*kv.shape[:1], self._positions.shape[1], *kv.shape[2:4])
            places = self._positions.expand(every)[:, row, :, start:]
        return Memory(kv[:, :, :, start:], next_position, visible, places)


def _shape(embeddings: Tensor | None) -> Sequence[int]:
    if embeddings is None:
        raise ValueError("expected ids or embeddings, got neither")
    return embeddings.shape[:2]


def decode_steps(
    model: Network,
    memories: Sequence[Memory],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    trace: Trace | None = None,
) -> Iterator[dict[int, int]]:
    """Yield the next token of every unfinished row, see `gistrag.model.runtime.Runtime.decode_steps`.

    Rows are padded on the left, so that all end in the same column; nothing attends to padding. A batch of one has
    none, needs no mask and is read in pieces.
    """
    batch = side_by_side(memories)
    ids, is_token = _padded_left(prompts)
    begins = torch.tensor([memory.next_position for memory in memories])[:, None]
    positions = (begins + is_token.cumsum(dim=1) - 1).clamp(min=0)  # (batch, n)
    visible = torch.cat((batch.real, is_token), dim=1)  # (batch, slots + n)
    is_padded = not bool(visible.all())
    mask = _causal(visible, ids.shape[1]) if is_padded else None
    randomness = torch.Generator(model.device).manual_seed(seed) if temperature else None
    reading = model.read_behind(batch)
    for piece in model.pieces(prompts[0])[:-1] if len(prompts) == 1 else ():
        reading.feed(ids[:, : len(piece)], positions=positions[:, : len(piece)], role="answers")
        ids, positions = ids[:, len(piece) :], positions[:, len(piece) :]
        yield {}
    unfinished = set(range(len(prompts)))
    for step in range(max_new_tokens):
        if step and is_padded:
            visible = torch.cat((visible, torch.ones(len(prompts), 1, dtype=torch.bool)), dim=1)
            mask = visible[:, None]
        seen: dict[int, list[Floats]] = {}
        observer = reading.watch(trace.layers, seen) if trace and trace.layers else None
        hidden = reading.feed(ids, positions=positions, mask=mask, observer=observer, role="answers")
        logits = model.logits(hidden[:, -1]).float()
        if not step and model.line_ends:
            logits[:, sorted(model.line_ends)] = -torch.inf
        picked = _pick(logits, temperature, randomness).cpu()
        tokens = picked.tolist()
        if trace:
            last = {layer: [of_head[-1] for of_head in heads] for layer, heads in seen.items()}
            trace.record(logits[0].cpu().numpy(), tokens[0], last)
        unfinished -= {row for row in unfinished if tokens[row] in model.stop_ids}
        if not unfinished:
            return
        yield {row: tokens[row] for row in sorted(unfinished)}
        ids, positions = picked[:, None], positions[:, -1:] + 1


def _causal(visible: Tensor, count: int) -> Tensor:
    """Return the mask ``(batch, n, slots + n)`` of *count* prompt columns behind a memory, True where a token attends.

    Args:
        visible: ``(batch, slots + n)`` bool, False for padding.
    """
    slots = visible.shape[1] - count
    mask = torch.ones(count, visible.shape[1], dtype=torch.bool).tril(slots) & visible[:, None]
    mask[:, :, slots:] |= torch.eye(count, dtype=torch.bool)  # softmax over nothing is not a number
    return mask


def _padded_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ids and which of them are tokens rather than padding, both ``(batch, n)``."""
    count = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (count - len(row)) + list(row) for row in rows])
    padding = torch.tensor([count - len(row) for row in rows])
    return ids, torch.arange(count) >= padding[:, None]


def _pick(logits: Tensor, temperature: float, randomness: torch.Generator | None) -> Tensor:
    """Return the next token of each row, ``(batch,)``."""
    if temperature < TEMPERATURE_MIN:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=randomness)[:, 0]
