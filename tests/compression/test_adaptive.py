"""Heads that share one budget: what each keeps, that nothing looks at a hole, and files without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_models import tiny_model

from gistrag.compression.compress import compress
from gistrag.compression.making import gist_count
from gistrag.compression.placements import shared_out
from gistrag.errors import CorruptGistError
from gistrag.kv import gist_file
from gistrag.kv.cache import GistCache, Memory, concatenate
from gistrag.model.attention import _attended, _attention
from gistrag.model.generation import generate, generate_batch, read_text
from gistrag.model.gist_model import GistModel
from gistrag.settings import GistSettings

TEXTS = [list(b"a first chunk of some length"), list(b"short"), list(b"a third chunk, the longest of the three by far")]
QUESTION = list(b"what does it say?")
PATH = Path("gist.safetensors")


def adaptive(model: GistModel, rate: int = 3) -> list[GistCache]:
    """Return caches with holes."""
    caches = compress(model, TEXTS, GistSettings(placement="adaptive", tokens_per_gist=rate))
    assert any(cache.is_ragged for cache in caches)
    return caches


def read(model: GistModel, memory: Memory) -> torch.Tensor:
    """Return the logits of the question behind a memory, ``(n, vocabulary)``."""
    positions = memory.next_position + torch.arange(len(QUESTION))
    return model.logits(model.read(memory).feed(torch.tensor([QUESTION]), positions=positions))[0]


def poisoned(cache: GistCache) -> GistCache:
    """Return the cache with something else in its holes."""
    holes = ~cache.visible[:, None, :, :, None]
    return replace(cache, kv=torch.where(holes, 7.0 + torch.arange(cache.kv.numel()).view_as(cache.kv) % 5, cache.kv))


@pytest.mark.parametrize("rate", [2, 3, 8])
def test_heads_share_the_budget(any_model: GistModel, rate: int) -> None:
    """All heads together keep exactly what equal budgets would, in text order, and none goes empty-handed."""
    for text, cache in zip(
        TEXTS, compress(any_model, TEXTS, GistSettings(placement="adaptive", tokens_per_gist=rate)), strict=True
    ):
        kept = [head[head >= 0] for head in cache.positions.flatten(0, 1)]
        assert gist_count(len(text), rate) == cache.gists
        assert gist_count(len(text), rate) * any_model.layers * any_model.kv_heads == sum(map(len, kept))
        assert all(len(head) and (head.diff() > 0).all() and head.max() < len(text) for head in kept)
        assert all(
            (head[len(some) :] == -1).all() for head, some in zip(cache.positions.flatten(0, 1), kept, strict=True)
        )


def test_need_decides_and_every_head_has_a_tenth_for_sure() -> None:
    """Twenty gists for two heads: two each for minimum, and the others to the head that needs them."""
    score = torch.stack((torch.arange(40.0) + 100, torch.arange(40.0)))[None]

    first, second = shared_out(score, 20)[0]

    assert list(range(2, 40)) == first.tolist()
    assert [38, 39] + [-1] * 36 == second.tolist()


def test_what_is_kept_is_the_chunks_own(model: GistModel) -> None:
    """Every kept key and value is one of the full cache, untouched; a hole repeats the first one of its head."""
    full = compress(model, TEXTS, GistSettings(placement="adaptive", tokens_per_gist=1))
    for whole, cache in zip(full, adaptive(model), strict=True):
        for layer, head in torch.cartesian_prod(torch.arange(model.layers), torch.arange(model.kv_heads)).tolist():
            places = cache.positions[layer, head]
            places = torch.where(places < 0, places[0], places)
            assert torch.equal(whole.kv[layer, :, head, places], cache.kv[layer, :, head])


@pytest.mark.parametrize("layout", ["spread", "packed"])
def test_nothing_looks_at_a_hole(any_model: GistModel, layout: str) -> None:
    """Whatever stands in the holes of any layer and head, the logits are the same, to the last bit."""
    caches = adaptive(any_model)

    memories = [
        concatenate([any_model.prefix, *chosen], any_model.rope, layout=layout)
        for chosen in (caches, [poisoned(cache) for cache in caches])
    ]

    assert not torch.equal(memories[0].kv, memories[1].kv)
    assert torch.equal(read(any_model, memories[0]), read(any_model, memories[1]))


def test_a_hole_of_all_heads_is_no_slot(any_model: GistModel) -> None:
    """Holes at the same place everywhere are the cache without that slot."""
    cache = compress(any_model, TEXTS, GistSettings(placement="selected", tokens_per_gist=2))[0]
    positions = cache.positions.clone()
    positions[..., -3:] = -1
    holed, short = (
        replace(cache, positions=positions),
        GistCache(cache.kv[:, :, :, :-3], cache.positions[..., :-3], cache.source_tokens),
    )

    with_holes, without = (concatenate([any_model.prefix, one], any_model.rope) for one in (holed, short))

    torch.testing.assert_close(read(any_model, with_holes), read(any_model, without), rtol=0, atol=1e-12)


def test_a_slot_that_a_layer_left_empty_is_not_carried(model: GistModel) -> None:
    """Every layer carries as many slots as the fullest of its heads, and forks and batches read behind the same."""
    cache = adaptive(model)[2]
    memory = concatenate([cache], model.rope)

    reading = model.read(memory)

    fullest = (cache.positions >= 0).sum(dim=-1).amax(dim=-1)
    assert fullest.tolist() == [layer.keys.shape[2] for layer in reading._cache.layers]
    assert fullest.float().mean().item() == pytest.approx(memory.carried_slots)
    again = reading.fork().memory(memory.next_position)
    assert torch.equal(memory.visible, again.visible)
    seen = memory.visible[:, None, :, :, None].expand_as(memory.kv)
    assert torch.equal(memory.kv[seen], again.kv[seen])


def test_answers_are_the_same_alone_and_beside_others(any_model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, as a batch and side by side, also with text read behind the holes."""
    monkeypatch.setitem(any_model.__dict__, "stop_ids", frozenset())
    caches = adaptive(any_model)
    memories = [concatenate([any_model.prefix, *caches[:count]], any_model.rope) for count in (0, 1, 3)]
    memories.append(read_text(any_model, memories[1], TEXTS[2]))
    poison = [concatenate([any_model.prefix, *map(poisoned, caches[:count])], any_model.rope) for count in (0, 1, 3)]
    poison.append(read_text(any_model, poison[1], TEXTS[2]))

    alone = [list(generate(any_model, memory, QUESTION, max_new_tokens=12)) for memory in memories]
    batch = generate_batch(any_model, poison, [QUESTION] * 4, max_new_tokens=12)

    assert batch == alone


def test_attention_with_gradients_is_torchs_own() -> None:
    """The faster product for training has the same masks by head, the same output and the same gradients."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, n, 8).double().requires_grad_() for heads, n in ((6, 5), (2, 9), (2, 9)))
    mask = torch.rand(2, 2, 5, 9) > 0.3
    mask[..., 0] = True
    repeated = [one.repeat_interleave(3, dim=1) for one in (key, value, mask)]

    ours = _attended(_attention(query, key, mask), value)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated[:2], attn_mask=repeated[2])

    torch.testing.assert_close(ours, expected.transpose(1, 2))
    grads = [
        torch.autograd.grad(out.square().sum(), (query, key, value), retain_graph=True) for out in (ours, expected)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_a_file_holds_no_holes(model: GistModel) -> None:
    """A gist comes back bit by bit, and its file is as small as one of equal budgets."""
    for cache, even in zip(
        adaptive(model), compress(model, TEXTS, GistSettings(placement="selected", tokens_per_gist=3)), strict=True
    ):
        data = gist_file.encode(cache, key="k", fingerprint="f")
        found = GistCache.unpacked(gist_file.decode(data, PATH, key="k", fingerprint="f", check_seal=True))

        assert torch.equal(cache.positions, found.positions)
        assert torch.equal(cache.kv, found.kv)
        room = 200 + 4 * model.layers * model.kv_heads  # the counts, and their line in the header
        assert len(data) <= len(gist_file.encode(even, key="k", fingerprint="f")) + room


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_file_holds_no_holes_either(kind: str) -> None:
    """What comes back of each head is what the same head without holes would be."""
    model = tiny_model(dtype=torch.float32)
    for cache in adaptive(model):
        data = gist_file.encode(cache, key="k", fingerprint="f", kv_cache_dtype=kind)
        found = GistCache.unpacked(gist_file.decode(data, PATH, key="k", fingerprint="f", check_seal=True))

        assert torch.equal(cache.positions, found.positions)
        error = (cache.kv - found.kv).abs().amax(dim=(0, 1, 2, 3, 4))
        assert error <= cache.kv.abs().max() * (1.1 / 127 if kind == "int8" else 1.1 / 7)


@pytest.mark.parametrize("counts", [[[1, 2], [1, 1], [1, 9]], [[0, 1], [1, 1], [1, 1]], [1, 2, 3]])
def test_counts_that_do_not_fit_are_noticed(model: GistModel, counts: list[list[int]]) -> None:
    """A file whose rows are not those its counts promise is damaged."""
    import safetensors.torch

    data = gist_file.encode(adaptive(model)[0], key="k", fingerprint="f")
    tensors = {**safetensors.torch.load(data), "counts": torch.tensor(counts, dtype=torch.int32)}
    header = {
        "format": "3",
        "key": "k",
        "fingerprint": "f",
        "source_tokens": "28",
        "dtype": "torch.float64",
        "sha256": "",
    }

    with pytest.raises(CorruptGistError):
        gist_file.decode(safetensors.torch.save(tensors, header), PATH, key="k", fingerprint="f")
