"""Giving caches their place and putting them side by side."""

from __future__ import annotations

import pytest
import torch

from gistrag.compression.compress import compress
from gistrag.kv.cache import GistCache, concatenate, relocate
from gistrag.kv.rope import Rope
from gistrag.model.gist_model import GistModel
from gistrag.settings import GistSettings

ROPE = Rope(torch.tensor([1.0, 0.01]))


def some_cache(gists: int, *, per_head: bool = False, source_tokens: int = 10, seed: int = 0) -> GistCache:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, gists) if per_head else (gists,)
    positions = torch.rand(*shape[:-1], source_tokens, generator=generator).argsort()[..., :gists].sort().values
    return GistCache(torch.randn(2, 2, 3, gists, 4, generator=generator), positions, source_tokens)


def read(model: GistModel, caches: list[GistCache], question: list[int]) -> torch.Tensor:
    memory = concatenate([model.prefix, *caches], model.rope)
    positions = memory.next_position + torch.arange(len(question))
    return model.read(memory).feed(torch.tensor([question]), positions=positions)


@pytest.mark.parametrize("per_head", [False, True])
def test_relocation_rotates_keys_and_leaves_values(per_head: bool) -> None:
    """Each key is turned to its own position plus the offset, gist by gist; no value changes."""
    cache = some_cache(3, per_head=per_head)

    moved = relocate(cache, 7, rope=ROPE)

    assert torch.equal(cache.kv[:, 1], moved[:, 1])
    for layer, head, gist in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3)).tolist():
        position = cache.positions[layer, head, gist] if per_head else cache.positions[gist]
        expected = ROPE.rotate(cache.kv[layer, 0, head, gist][None], position[None] + 7)[0]
        torch.testing.assert_close(moved[layer, 0, head, gist], expected)


def test_relocation_equals_recomputation(any_model: GistModel) -> None:
    """A cache moved by an offset is the cache of the same text read that much further on, prefix included."""
    text, offset = torch.tensor([list(b"some text to be read")]), 55
    cache = compress(any_model, [text[0].tolist()], GistSettings(tokens_per_gist=1))[0]
    prefix = torch.tensor([any_model.encode_template(any_model.prompt.prefix)])
    start = prefix.shape[1]

    reading = any_model.read()
    reading.feed(torch.cat((prefix, text), dim=1), positions=offset + torch.arange(start + text.shape[1]))

    recomputed = reading.kv(start)[:, :, 0]
    torch.testing.assert_close(relocate(cache, start + offset, rope=any_model.rope), recomputed, rtol=0, atol=1e-12)


def test_one_cache_concatenated_is_the_cache() -> None:
    """Retrieving one chunk is the direct case: relocation to position 0."""
    cache = some_cache(4)

    memory = concatenate([cache], ROPE)

    assert torch.equal(relocate(cache, 0, rope=ROPE), memory.kv)
    assert (cache.source_tokens, cache.gists) == (memory.next_position, memory.slots)


def test_spread_caches_take_the_span_of_their_text() -> None:
    """The second cache begins where the text of the first would end."""
    first, second = some_cache(2, source_tokens=9), some_cache(3, source_tokens=20, seed=1)

    memory = concatenate([first, second], ROPE)

    assert torch.equal(relocate(second, 9, rope=ROPE), memory.kv[:, :, :, 2:])
    assert (5, 29) == (memory.slots, memory.next_position)


def test_packed_caches_take_one_position_a_gist() -> None:
    """Packed gists stand in consecutive positions, whatever text they come from."""
    first, second = some_cache(2, source_tokens=900, per_head=True), some_cache(3, source_tokens=800)

    memory = concatenate([first, second], ROPE, layout="packed")

    expected = ROPE.rotate(torch.cat((first.kv[:, 0], second.kv[:, 0]), dim=2), torch.arange(5))
    torch.testing.assert_close(memory.kv[:, 0], expected)
    assert memory.next_position == 5


def test_chunks_in_another_order_are_the_same_caches_elsewhere() -> None:
    """Permuting the caches permutes the slots; values are the same, keys only stand elsewhere."""
    first, second = some_cache(2), some_cache(2, seed=1)

    one, other = concatenate([first, second], ROPE), concatenate([second, first], ROPE)

    assert torch.equal(one.kv[:, 1, :, :2], other.kv[:, 1, :, 2:])
    torch.testing.assert_close(ROPE.unrotate(one.kv[:, 0, :, :2], first.positions), first.kv[:, 0])
    torch.testing.assert_close(ROPE.unrotate(other.kv[:, 0, :, 2:], first.positions + 10), first.kv[:, 0])


def test_twins_may_be_swapped(model: GistModel) -> None:
    """Two chunks of equal text give the same answer in either order."""
    cache, twin = compress(model, [list(b"a chunk"), list(b"a chunk")])
    question = list(b"what?")

    assert torch.equal(read(model, [cache, twin], question), read(model, [twin, cache], question))


def test_keys_are_rounded_once() -> None:
    """A bf16 cache is rotated in float32 and rounded once, so it stays within half a unit of the exact key."""
    exact = some_cache(4)
    cache = GistCache(exact.kv.bfloat16(), exact.positions, exact.source_tokens)

    moved = relocate(cache, 1000, rope=ROPE)[:, 0].double()

    true = ROPE.rotate(cache.kv[:, 0].double(), cache.positions + 1000)
    assert ((moved - true).abs() <= true.abs() * 2**-8).all()


@pytest.mark.parametrize("caches", [[], [some_cache(2), GistCache(torch.zeros(3, 2, 3, 2, 4), torch.arange(2), 2)]])
def test_caches_of_different_models_are_refused(caches: list[GistCache]) -> None:
    """No cache, or caches of different shape, raise with the shapes found."""
    with pytest.raises(ValueError, match="expected caches of one model"):
        concatenate(caches, ROPE)


def test_a_cache_moves_to_the_device_of_its_model() -> None:
    """What is loaded from disk is put beside the model before it is joined with the model's own prefix."""
    cache = some_cache(3).to(torch.device("meta"))
    rope = Rope(torch.ones(2, device="meta"))

    assert concatenate([cache, cache], rope).kv.device.type == "meta"
