"""From tokens to gists: placements, alone or in batches."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import tiny_model

from gistrag.compression import compress as compression
from gistrag.compression import placements
from gistrag.compression.compress import compress
from gistrag.compression.making import gist_count
from gistrag.compression.placements import anchors
from gistrag.model.gist_model import GistModel
from gistrag.settings import GistSettings

TEXTS = [list(b"a first chunk of some length"), list(b"short"), list(b"a third chunk, the longest of the three by far")]
PLACEMENTS = ["selected", "anchored", "learned"]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("rate", [1, 2, 3, 8])
def test_gists_have_the_promised_shape(model: GistModel, placement: str, rate: int) -> None:
    """A chunk of n tokens has ceil(n / rate) gists at ascending positions inside it."""
    for text, cache in zip(
        TEXTS, compress(model, TEXTS, GistSettings(placement=placement, tokens_per_gist=rate)), strict=True
    ):
        count = gist_count(len(text), rate)
        assert (model.layers, 2, model.kv_heads, count, model.head_dim) == cache.kv.shape
        assert cache.source_tokens == len(text)
        assert (cache.positions.diff() > 0).all()
        assert cache.positions.min() >= 0
        assert cache.positions.max() < len(text)


@pytest.mark.parametrize("placement", ["matched", "adaptive", *PLACEMENTS])
def test_batched_equals_single(any_model: GistModel, placement: str) -> None:
    """Chunks compressed together are what each is alone: padding is never seen."""
    together = compress(any_model, TEXTS, GistSettings(placement=placement, tokens_per_gist=2))
    alone = [compress(any_model, [text], GistSettings(placement=placement, tokens_per_gist=2))[0] for text in TEXTS]

    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.positions, other.positions)
        torch.testing.assert_close(one.kv, other.kv, rtol=0, atol=1e-10)


def test_order_and_number_survive_batching(model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the chunks are grouped by length, caches come back in the order given."""
    monkeypatch.setattr(compression, "BATCH_TOKENS", 30)
    texts = [TEXTS[i] for i in (2, 0, 1, 0, 2)]

    caches = compress(model, texts, GistSettings(tokens_per_gist=2))

    assert [len(text) for text in texts] == [cache.source_tokens for cache in caches]


def test_selected_at_one_is_the_full_cache(model: GistModel) -> None:
    """At one token per gist nothing is left out."""
    cache = compress(model, [TEXTS[0]], GistSettings(tokens_per_gist=1))[0]

    assert torch.equal(torch.arange(len(TEXTS[0])), cache.positions)


def test_selected_keeps_entries_of_the_full_cache(model: GistModel) -> None:
    """Every kept key and value is one of the chunk's own, untouched."""
    full = compress(model, [TEXTS[0]], GistSettings(tokens_per_gist=1))[0]
    kept = compress(model, [TEXTS[0]], GistSettings(placement="selected", tokens_per_gist=4))[0]

    for layer in range(model.layers):
        for head in range(model.kv_heads):
            assert torch.equal(full.kv[layer, :, head, kept.positions[layer, head]], kept.kv[layer, :, head])


def test_selected_keeps_what_repeating_hears_most_of(any_model: GistModel) -> None:
    """Each head keeps the tokens with the most attention of a naive reconstruction, times the norm of their values."""
    text = TEXTS[0]
    kept = compress(any_model, [text], GistSettings(placement="selected", tokens_per_gist=4))[0].positions
    prefix = any_model.encode_template(any_model.prompt.prefix)
    ask = any_model.encode(placements.REPEAT) + any_model.encode_template(any_model.prompt.after_question)
    network = any_model.network
    network.set_attn_implementation("eager")
    try:
        read = network(torch.tensor([prefix + text + ask + text]), output_attentions=True)
    finally:
        network.set_attn_implementation("gistrag_sdpa")

    start, end = len(prefix), len(prefix) + len(text)
    for layer, attention in enumerate(read.attentions):
        lengths = read.past_key_values.layers[layer].values[0, :, start:end].norm(dim=-1)  # (kv_heads, n)
        received = attention[0, :, end:, start:end].amax(dim=1)  # (heads, n)
        score = received.view(any_model.kv_heads, -1, len(text)).amax(dim=1) * lengths
        expected = score.topk(gist_count(len(text), 4)).indices.sort().values
        assert torch.equal(expected, kept[layer])


def test_anchors_are_the_most_surprising_tokens() -> None:
    """Most surprising first, ties to the earlier token, in the order of the text."""
    assert [1, 2, 4] == anchors(torch.tensor([1.0, 5.0, 5.0, 2.0, 9.0, 5.0]), 3).tolist()


@pytest.mark.parametrize("placement", ["matched", "adaptive", *PLACEMENTS])
def test_another_chunk_in_the_batch_changes_nothing(model: GistModel, placement: str) -> None:
    """The gists of chunk A are the same whatever chunk B says."""
    with_b = compress(model, [TEXTS[0], list(b"something else entirely ....")], GistSettings(placement=placement))[0]
    with_c = compress(model, [TEXTS[0], list(b"and now for another message.")], GistSettings(placement=placement))[0]

    torch.testing.assert_close(with_b.kv, with_c.kv, rtol=0, atol=1e-12)


def test_a_batch_that_does_not_fit_memory_is_halved(model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, the batch is tried again in halves, and the result is the same."""
    expected = compress(model, TEXTS)
    original = placements.TextPass.__init__

    def greedy(self: object, model: GistModel, chunks: list[list[int]], **named: object) -> None:
        if len(chunks) > 1:
            raise torch.OutOfMemoryError("no room for two")
        original(self, model, chunks, **named)

    monkeypatch.setattr(placements.TextPass, "__init__", greedy)
    for one, other in zip(expected, compress(model, TEXTS), strict=True):
        torch.testing.assert_close(one.kv, other.kv, rtol=0, atol=1e-10)


def test_one_chunk_that_does_not_fit_memory_raises(model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing left to halve."""

    def never(self: object, model: GistModel, chunks: list[list[int]], **named: object) -> None:
        raise torch.OutOfMemoryError("no room at all")

    monkeypatch.setattr(placements.TextPass, "__init__", never)
    with pytest.raises(torch.OutOfMemoryError):
        compress(model, TEXTS)


def test_compression_works_in_bf16() -> None:
    """In the dtype models are stored in, gists have that dtype and are finite."""
    model = tiny_model(dtype=torch.bfloat16)

    for placement in ("matched", "adaptive", *PLACEMENTS):
        cache = compress(model, TEXTS, GistSettings(placement=placement))[0]
        assert cache.kv.dtype == torch.bfloat16
        assert cache.kv.isfinite().all()


def overflowing(scale_down: float) -> GistModel:
    """Return a float16 model whose middle layer leaves the range of float16 and comes back by *scale_down*."""
    model = tiny_model(dtype=torch.float16)
    mlp = model.network.model.layers[1].mlp
    mlp.gate_proj.weight.mul_(3e4)
    mlp.up_proj.weight.mul_(3e4)
    mlp.down_proj.weight.mul_(scale_down)
    return model


@pytest.mark.parametrize("placement", ["matched", "adaptive", *PLACEMENTS])
def test_a_gist_that_is_not_finite_is_made_again_in_float32(placement: str) -> None:
    """What overflows float16 on the way is computed in float32; the model is then what it was, bit by bit."""
    model = overflowing(1e-4)
    before = [weights.clone() for weights in model.network.parameters()]
    settings = GistSettings(placement=placement, tokens_per_gist=2)
    assert not any(cache.is_finite for cache in compression._compress_all(model, TEXTS, settings))

    caches = compress(model, TEXTS, GistSettings(placement=placement))

    assert all(cache.is_finite and cache.kv.dtype == torch.float16 for cache in caches)
    assert all(torch.equal(old, new) for old, new in zip(before, model.network.parameters(), strict=True))
    assert (torch.float16, torch.float16) == (model.dtype, model.prefix.kv.dtype)


def test_a_gist_that_float32_cannot_save_stays_as_it_is(model: GistModel) -> None:
    """Values that no float16 holds, and weights that cannot be widened, are left to the caller to refuse."""
    too_large, four_bits = overflowing(1e-4), overflowing(1e-4)
    too_large.network.model.layers[0].self_attn.v_proj.weight.fill_(6e4)
    four_bits._quantize = "nf4"

    assert not any(cache.is_finite for cache in compress(too_large, TEXTS))
    assert not any(cache.is_finite for cache in compress(four_bits, TEXTS))
    assert not model.can_widen
