"""Turning keys to a position and back."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import FAMILIES, tiny_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gistrag.kv.rope import Rope
from gistrag.model.gist_model import GistModel


def naive(keys: torch.Tensor, positions: list[int], inv_freq: torch.Tensor) -> torch.Tensor:
    """Rotate pair by pair, one number at a time."""
    turned, half = keys.clone(), keys.shape[-1] // 2
    for n, position in enumerate(positions):
        for pair in range(half):
            angle = torch.tensor(float(position)) * inv_freq[pair]
            first, second = keys[n, pair], keys[n, pair + half]
            turned[n, pair] = first * angle.cos() - second * angle.sin()
            turned[n, pair + half] = second * angle.cos() + first * angle.sin()
    return turned


def test_rotation_equals_its_naive_twin() -> None:
    """The vectorised rotation gives what a loop over pairs gives."""
    rope, positions = Rope(torch.tensor([1.0, 0.1, 0.01])), [0, 1, 7, 900]
    keys = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(rope.rotate(keys, torch.tensor(positions)), naive(keys, positions, rope.inv_freq))


def test_products_of_rotated_keys_are_summed_without_rotating_them() -> None:
    """The closed form gives what rotating every key to every position and multiplying gives; scaling has no part."""
    rope, positions = Rope(torch.tensor([1.0, 0.1, 0.01], dtype=torch.float64), scaling=1.3), torch.tensor([0, 3, 500])
    first, second = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = [Rope(rope.inv_freq).rotate(keys[:, None], positions) for keys in (first, second)]  # (5, positions, 6)

    expected = sum(one.mT @ other for one, other in zip(*(keys.unbind(1) for keys in turned), strict=True))

    torch.testing.assert_close(rope.rotate_products(first.mT @ second, positions), expected)


def test_rotating_by_zero_is_the_identity() -> None:
    """A key at position 0 is the un-rotated key."""
    keys = torch.randn(5, 8)

    assert torch.equal(keys, Rope(torch.rand(4)).rotate(keys, torch.zeros(5, dtype=torch.long)))


def turned_by_the_model(model: GistModel, layer: int, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return what a layer of the network makes of keys."""
    rotary, attention = model.network.model.rotary_emb, model.network.model.layers[layer].self_attn
    if not getattr(attention, "use_rope", True):
        return keys
    kind = [attention.layer_type] if model.network.config.model_type == "gemma3_text" else []
    cos, sin = rotary(keys, positions[None], *kind)
    turned: torch.Tensor = apply_rotary_pos_emb(keys, keys, cos, sin)[1]
    return turned


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rotation_equals_the_models_own(family: str) -> None:
    """Every layer of every supported family rotates as `Rope` does, bit for bit in float32."""
    model = tiny_model(family, dtype=torch.float32)
    keys, positions = torch.randn(model.layers, 2, 9, model.head_dim), torch.arange(9) * 11

    found = model.rope.rotate(keys, positions)

    for layer in range(model.layers):
        assert torch.equal(found[layer], turned_by_the_model(model, layer, keys[layer][None], positions)[0])


def test_layers_may_turn_keys_differently() -> None:
    """Keys of all layers, single keys of named layers, and products of keys turn by the angles of their layer."""
    angles = torch.tensor([[1.0, 0.1], [0.0, 0.0], [0.5, 0.01]], dtype=torch.float64)
    rope, alone = Rope(angles), [Rope(each) for each in angles]
    keys = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = torch.tensor([0, 1, 7, 9, 300])
    products = keys.mT @ keys  # (layers, 2, head_dim, head_dim)
    layers = torch.arange(3)[:, None, None].expand(3, 2, 5).flatten()

    expected = torch.stack([each.rotate(of_layer, positions) for each, of_layer in zip(alone, keys, strict=True)])

    assert torch.equal(rope.rotate(keys, positions), expected)
    assert torch.equal(expected[1], keys[1])
    flat = rope.rotate(keys.reshape(-1, 4), positions.repeat(6), layers)
    assert torch.equal(flat.view_as(keys), expected)
    torch.testing.assert_close(rope.unrotate(expected, positions), keys)
    summed = [each.rotate_products(one, positions) for each, one in zip(alone, products, strict=True)]
    torch.testing.assert_close(rope.rotate_products(products, positions), torch.stack(summed))


def test_unrotating_undoes_a_rotation_in_low_precision() -> None:
    """A key rotated in bf16, with its rounded angles and a scaling, comes back within the rounding of bf16."""
    rope = Rope(1.0 / 10_000 ** (torch.arange(0, 64, 2).float() / 64), scaling=1.3)
    keys, positions = torch.randn(50, 64), torch.arange(50) * 37
    cos, sin = ((positions[:, None] * rope.inv_freq).cos() * 1.3, (positions[:, None] * rope.inv_freq).sin() * 1.3)
    first, second = keys.to(torch.bfloat16).chunk(2, dim=-1)
    c, s = cos.to(torch.bfloat16), sin.to(torch.bfloat16)
    rotated = torch.cat((first * c - second * s, second * c + first * s), dim=-1)

    error = (rope.unrotate(rotated, positions) - keys).abs().max()
    assert error < 0.05  # two roundings of values up to 5 to eight bits


def test_unrotating_is_exact_in_high_precision() -> None:
    """In float64 nothing is lost."""
    rope = Rope(torch.rand(8), scaling=0.7)
    keys, positions = torch.randn(20, 16, dtype=torch.float64), torch.arange(20) * 101

    torch.testing.assert_close(rope.unrotate(rope.rotate(keys, positions), positions), keys, rtol=0, atol=1e-12)
