"""The five placements: where the gist tokens of a chunk come from.

==========  ==================================================================================================
matched     adaptive, with keys and values changed so that attention over them gives what the chunk gave, see
            `gistrag.compression.matching`; up to 4 tokens per gist the second pass is predicted where the model has a
            map, see `gistrag.compression.query_map`.
adaptive    the chunk's own keys and values at the tokens its heads score to repeat the chunk (KVzip, Kim et al. 2025,
            arXiv 2505.23416), weighting attention by value norms (VATP, Guo et al. 2024, arXiv 2406.12335):
            heads share one budget, and retrieval heads keep most of it (Ada-KV, Feng et al. 2024,
            arXiv 2407.11550). No training; at one token per gist it is the uncompressed KV cache of the chunk.
selected    the same with an equal budget for every head.
anchored    the chunk's tokens of highest surprisal, read a second time behind it, so that each attends to
            the whole chunk; an adapter can be trained to make them.
learned     learned tokens ``<GIST_0> <GIST_1> …`` read behind the chunk (Mu et al. 2023, arXiv 2304.08467).
==========  ==================================================================================================

Every chunk is read alone behind the shared prefix; a batch only shares the arithmetic. All placements return the same
`GistCache`, so files, relocation and answering know nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gistrag.compression.making import READ_TWICE, gist_count
from gistrag.compression.matching import Reconstruction, match
from gistrag.compression.query_map import predicted, query_map
from gistrag.kv.cache import GistCache, concatenate
from gistrag.model.gist_model import GistModel
from gistrag.model.reading import Reading
from gistrag.settings import MADE, Placement

REPEAT = "Repeat the passage."
PREDICTED_UP_TO = 4
"""Most tokens per gist for which the reconstruction pass is predicted; of fewer gists each has to be the right one."""
MINIMUM_SHARE = 0.1
"""Share of its equal budget that an adaptive head keeps in any case."""


def anchors(surprisal: Tensor, gists: int) -> Tensor:
    """Return the *gists* positions of highest surprisal in text order; ties go to the earlier token.

    Args:
        surprisal: ``(n,)`` negative log-likelihood of each token.

    >>> anchors(torch.tensor([3.0, 1.0, 3.0, 9.0]), 2).tolist()
    [0, 3]
    """
    return surprisal.argsort(descending=True, stable=True)[:gists].sort().values


class TextPass:
    """Chunks read side by side behind the shared prefix, padded on the right, by the base model.

    One forward pass serves all placements: anchors, the keys and values that gists read, the uncompressed KV cache.

    Attributes:
        lengths: tokens of each chunk; start: slots of the prefix.
        hidden: ``(batch, n, hidden)`` final states of the text pass.
    """

    def __init__(self, model: GistModel, chunks: Sequence[Sequence[int]], *, making: int | None = None) -> None:
        self.model = model
        self._map = None if making == READ_TWICE else query_map(model)
        self.chunks = [torch.tensor(list(chunk)) for chunk in chunks]
        self.lengths = torch.tensor([len(chunk) for chunk in chunks])
        self.start = model.prefix.gists
        self.reading: Reading = model.read(concatenate([model.prefix], model.rope), batch=len(chunks))
        self.ids = torch.nn.utils.rnn.pad_sequence(self.chunks, batch_first=True)  # (batch, n)
        self.hidden = self.reading.feed(self.ids, positions=self.start + torch.arange(self.ids.shape[1]))

    def compress(self, placement: Placement, tokens_per_gist: int) -> list[GistCache]:
        """Return the gist cache of each chunk; at one token per gist what is not made behind a chunk is all of it."""
        if tokens_per_gist == 1 and placement not in MADE:
            return list(_full(self))
        dtype = self.model.dtype
        return [replace(cache, kv=cache.kv.to(dtype)) for cache in _PLACE[placement](self, tokens_per_gist)]

    @cached_property
    def reconstruction(self) -> ReconstructionPass:
        """The reconstruction pass, the same for every compression rate."""
        return _reconstruct(self)

    def reconstructed(self, rows: slice, tokens_per_gist: int) -> tuple[Reconstruction, Tensor]:
        """Return what matching needs of the reconstruction pass over some chunks, and the most that each token got.

        It is predicted where the model has a map and keeps enough tokens. The second has the shape ``(layers, rows,
        kv_heads, n)``.
        """
        lengths = self.lengths[rows].tolist()
        if self._map and tokens_per_gist <= PREDICTED_UP_TO:
            return predicted(self.model, self._map, self.kv[:, :, rows, :, : max(lengths)], lengths)
        attention = self.reconstruction.attention[:, rows, :, : max(lengths)]
        return self.reconstruction.of(rows, lengths), attention

    @cached_property
    def kv(self) -> Tensor:
        """Keys (rotated) and values of the chunks, ``(layers, 2, batch, kv_heads, n, head_dim)``."""
        return self.reading.kv(self.start)

    def together(self) -> Iterator[slice]:
        """Yield the rows to work on at once: all on a GPU, one where a processor's cache holds no more."""
        size = 1 if self.kv.device.type == "cpu" else len(self.chunks)
        yield from (slice(row, row + size) for row in range(0, len(self.chunks), size))

    def visible(self) -> Tensor:
        """Return which slots hold prefix or text of each row, ``(batch, slots)`` bool: everything but padding."""
        return torch.arange(self.start + self.ids.shape[1]) < self.start + self.lengths[:, None]

    def surprisal(self, row: int) -> Tensor:
        """Return the negative log-likelihood of each token of one chunk, ``(n,)`` float32."""
        model, ids = self.model, self.chunks[row].to(self.model.device)
        before = torch.cat((self._last_of_prefix(), self.hidden[row, : len(ids) - 1]))
        return torch.nn.functional.cross_entropy(model.logits(before).float(), ids, reduction="none")

    def _last_of_prefix(self) -> Tensor:
        return self.model.prefix_hidden[-1:]


def _full(batch: TextPass) -> Iterator[GistCache]:
    """Yield the uncompressed KV cache of each chunk."""
    for row, length in enumerate(batch.lengths.tolist()):
        positions = torch.arange(length, device=batch.kv.device)
        yield batch.model.unrotated(batch.kv[:, :, row, :, :length], positions, start=batch.start, source_tokens=length)


def _selected(batch: TextPass, tokens_per_gist: int) -> Iterator[GistCache]:
    """Yield the tokens of highest importance of each head, with an equal budget for every head."""
    for row, score in enumerate(_importances(batch)):
        places = score.topk(gist_count(score.shape[2], tokens_per_gist), dim=-1).indices.sort(dim=-1).values
        yield _kept(batch, row, places)


def _adaptive(batch: TextPass, tokens_per_gist: int) -> Iterator[GistCache]:
    """Yield the tokens of highest importance, with one budget that all heads of a chunk share."""
    for row, score in enumerate(_importances(batch)):
        yield _kept(batch, row, shared_out(score, gist_count(score.shape[2], tokens_per_gist)))


def _matched(batch: TextPass, tokens_per_gist: int) -> Iterator[GistCache]:
    """Yield adaptive gists, matched to their chunk."""
    for rows in batch.together():
        lengths = batch.lengths[rows].tolist()
        seen, most = batch.reconstructed(rows, tokens_per_gist)
        values = batch.kv[:, 1, rows, :, : max(lengths)]
        caches = []
        for row, length in enumerate(lengths):
            score = importance(most[:, row, :, :length], values[:, row, :, :length])
            places = shared_out(score, gist_count(length, tokens_per_gist))
            caches.append(_kept(batch, rows.start + row, places))
        yield from match(caches, values, seen, batch.model.rope)


def _importances(batch: TextPass) -> Iterator[Tensor]:
    """Yield the importance score of each token of each chunk for every head, ``(layers, kv_heads, n)``."""
    for row, length in enumerate(batch.lengths.tolist()):
        yield importance(batch.reconstruction.attention[:, row, :, :length], batch.kv[:, 1, row, :, :length])


def _kept(batch: TextPass, row: int, places: Tensor) -> GistCache:
    """Return the cache of a chunk at some positions of each head; a padding slot repeats the first of its head.

    Args:
        places: ``(layers, kv_heads, slots)``, -1 for a padding slot.
    """
    model, is_padding = batch.model, places < 0
    layer, head, slot = (~is_padding).nonzero(as_tuple=True)
    at = places[layer, head, slot]
    own = batch.kv[layer, :, row, head, at]  # (kept, 2, head_dim)
    own[:, 0] = model.rope.unrotate(own[:, 0], batch.start + at, layer).to(own.dtype)
    kv = own.new_empty(*places.shape, *own.shape[1:])
    kv[layer, head, slot] = own
    kv[is_padding] = kv[:, :, :1].expand_as(kv)[is_padding]
    return GistCache(kv.movedim(3, 1).contiguous(), places, int(batch.lengths[row]))


def importance(attention: Tensor, values: Tensor) -> Tensor:
    """Return the importance score of each token for every head, ``(layers, kv_heads, n)``, float32 or wider.

    Attention is weighted by the norm of the value it brings in; between heads, by the root of the mean norm of their
    values, since upper layers have longer values without being that much more important.

    Args:
        attention: the most that each token got, ``(layers, kv_heads, n)``.
        values: ``(layers, kv_heads, n, head_dim)``.

    >>> importance(torch.tensor([[[0.5, 0.25]]]), torch.tensor([[[[1.0, 0.0], [0.0, 7.0]]]])).tolist()
    [[[0.25, 0.875]]]
    """
    exact = torch.promote_types(attention.dtype, values.dtype)
    lengths: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=exact)
    return attention * lengths / lengths.mean(dim=-1, keepdim=True).clamp(min=torch.finfo(exact).tiny).sqrt()


def shared_out(score: Tensor, gists: int) -> Tensor:
    """Return the tokens that each head keeps of one shared budget, ``(layers, kv_heads, slots)``.

    The budget is *gists* tokens for each head. Every head keeps a tenth of its part, and the rest goes to the highest
    scores. In text order, -1 behind the last one.

    Args:
        score: ``(layers, kv_heads, n)``.

    >>> shared_out(torch.tensor([[[0.9, 0.1, 0.8, 0.7], [0.2, 0.1, 0.1, 0.1]]]), 2).tolist()
    [[[0, 2, 3], [0, -1, -1]]]
    """
    layers, kv_heads, count = score.shape
    score = score.nan_to_num(nan=0.0)  # what cannot be compared takes nothing from others
    minimum = score.topk(max(1, round(MINIMUM_SHARE * gists)), dim=-1).indices
    ranked = score.scatter(-1, minimum, torch.inf)
    kept = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    kept[ranked.flatten().topk(gists * layers * kv_heads).indices] = True
    kept = kept.view_as(score)
    slots = int(kept.sum(dim=-1).max())
    places = torch.arange(count, device=score.device).expand_as(score).masked_fill(~kept, count)
    places = places.sort(dim=-1).values[..., :slots]
    return places.masked_fill(places == count, -1)


@dataclass(frozen=True)
class ReconstructionPass:
    """What every layer computed in the reconstruction pass over the chunks of a batch.

    Attributes:
        queries: of each layer, ``(batch, heads, m, head_dim)``; keys: of the text, ``(batch, kv_heads, n, head_dim)``.
        mass: of each layer, the share of attention that the text got, ``(batch, heads, m)``, float32 or wider.
        attention: the most that each token of the text got, ``(layers, batch, kv_heads, n)``, float32.
        asked: tokens read before the reconstruction; start: position of the text.
    """

    queries: list[Tensor]
    keys: list[Tensor]
    mass: list[Tensor]
    attention: Tensor
    asked: int
    start: int

    def of(self, rows: slice, lengths: Sequence[int]) -> Reconstruction:
        """Return the part of some chunks of these lengths, without the padding behind the longest."""
        longest = max(lengths)
        count = self.asked + longest
        return Reconstruction(
            [queries[rows, :, :count] for queries in self.queries],
            [keys[rows, :, :longest] for keys in self.keys],
            [mass[rows, :, :count] for mass in self.mass],
            lengths,
            self.start,
        )


def _reconstruct(batch: TextPass) -> ReconstructionPass:
    """Return the reconstruction pass: the model repeats the chunks.

    The repeated text is given, not generated, so this is one more forward pass of about the length of the chunk.
    """
    model, rows = batch.model, len(batch.chunks)
    ask = torch.tensor(model.encode(REPEAT) + model.encode_template(model.prompt.after_question))
    fed = torch.cat((ask.expand(rows, -1), batch.ids), dim=1)  # (batch, m)
    count = fed.shape[1]
    real = torch.arange(count) < len(ask) + batch.lengths[:, None]  # (batch, m): the rest is padding
    own = torch.ones(count, count, dtype=torch.bool).tril().expand(rows, -1, -1)
    mask = torch.cat((batch.visible()[:, None] & real[:, :, None], own), dim=2)  # (batch, m, slots + m)
    text = slice(batch.start, batch.start + batch.ids.shape[1])
    observed: list[list[list[Tensor]]] = [[[] for _ in range(model.layers)] for _ in range(4)]  # row by row
    to_queries, to_keys, to_mass, to_most = observed

    def observe(layer: int, asked: Tensor, seen: Tensor, attention: Tensor) -> None:
        received = attention[..., text]  # (rows, heads, m, n)
        to_queries[layer].append(asked)
        to_keys[layer].append(seen[:, :, text])
        to_mass[layer].append(received.sum(dim=-1, dtype=torch.promote_types(received.dtype, torch.float32)))
        most = received.amax(dim=2).view(len(received), model.kv_heads, -1, received.shape[3])
        to_most[layer].append(most.amax(dim=2))

    positions = batch.start + batch.lengths[:, None] + torch.arange(count)
    batch.reading.fork().feed(fed, positions=positions, mask=mask, observer=observe)
    queries, keys, mass, most = [[torch.cat(rows) for rows in layers] for layers in observed]
    return ReconstructionPass(queries, keys, mass, torch.stack(most).float(), len(ask), batch.start)


def _anchored(batch: TextPass, tokens_per_gist: int) -> Iterator[GistCache]:
    """Yield each chunk's tokens of highest surprisal, read again behind it."""
    places = [
        anchors(batch.surprisal(row), gist_count(length, tokens_per_gist)).cpu()
        for row, length in enumerate(batch.lengths.tolist())
    ]
    mark = batch.model.gist_mark
    embedded = [batch.model.embed(ids[place]) + mark for ids, place in zip(batch.chunks, places, strict=True)]
    yield from _read_gists(batch, embedded, places)


def _learned(batch: TextPass, tokens_per_gist: int) -> Iterator[GistCache]:
    """Yield learned tokens, read behind the chunk at evenly spread positions."""
    places = [_evenly(length, gist_count(length, tokens_per_gist)) for length in batch.lengths.tolist()]
    vectors = batch.model.gist_vectors(max(len(place) for place in places))
    yield from _read_gists(batch, [vectors[: len(place)] for place in places], places)


def _evenly(source_tokens: int, gists: int) -> Tensor:
    """Return the last position of each of *gists* equal segments, ``(gists,)``.

    >>> _evenly(9, 3).tolist()
    [2, 5, 8]
    """
    return torch.arange(1, gists + 1) * source_tokens // gists - 1


def _read_gists(batch: TextPass, embedded: Sequence[Tensor], places: Sequence[Tensor]) -> Iterator[GistCache]:
    """Yield the caches of gist tokens that see prefix, chunk and each other."""
    embeddings = torch.nn.utils.rnn.pad_sequence(list(embedded), batch_first=True)  # (batch, gists, hidden)
    positions = torch.nn.utils.rnn.pad_sequence(list(places), batch_first=True)  # (batch, gists)
    count = positions.shape[1]
    real = torch.arange(count) < torch.tensor([len(place) for place in places])[:, None]
    seen = torch.cat((batch.visible(), real), dim=1)  # (batch, slots + gists)
    mask = seen[:, None].expand(-1, count, -1)
    reading = batch.reading.fork()
    reading.feed(embeddings=embeddings, positions=batch.start + positions, mask=mask, role="gists")
    kv = reading.kv(batch.reading.slots)  # (layers, 2, batch, kv_heads, gists, head_dim)
    for row, place in enumerate(places):
        taken = kv[:, :, row, :, : len(place)]
        length = int(batch.lengths[row])
        yield batch.model.unrotated(taken, place.to(kv.device), start=batch.start, source_tokens=length)


_PLACE = {"matched": _matched, "adaptive": _adaptive, "selected": _selected, "anchored": _anchored, "learned": _learned}
