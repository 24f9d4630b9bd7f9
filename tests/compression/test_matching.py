"""Matched gists: what the queries of the reconstruction get from them is near to what they got from the text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gistrag.compression import matching, placements
from gistrag.compression.compress import compress
from gistrag.compression.matching import Reconstruction, _solved, match
from gistrag.compression.placements import TextPass
from gistrag.kv import gist_file
from gistrag.kv.cache import GistCache, concatenate
from gistrag.kv.rope import Rope
from gistrag.model.gist_model import GistModel
from gistrag.settings import GistSettings

TEXTS = [list(b"a first chunk of some length"), list(b"short"), list(b"a third chunk, the longest of the three by far")]


def received(seen: Reconstruction, layer: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return what every query of a layer gets from what stands in the text's place, ``(heads, m, head_dim)``.

    Everything else, prefix and reconstruction, keeps the attention that it had beside the text.

    Args:
        keys, values: one list for each head that shares them; keys rotated.
    """
    out = []
    queries = seen.queries[layer][0]
    group = len(queries) // len(keys)
    for head, query in enumerate(queries):
        own, value, text = (each[head // group].double() for each in (keys, values, seen.keys[layer][0]))
        query, mass, width = query.double(), seen.mass[layer][0, head].double(), query.shape[1] ** 0.5
        others = (query @ text.T / width).exp().sum(dim=1) * (1 - mass) / mass
        scores = (query @ own.T / width).exp()
        out.append(scores / (scores.sum(dim=1) + others)[:, None] @ value)
    return torch.stack(out)


def error(model: GistModel, text: TextPass, row: int, cache: GistCache) -> float:
    """Return how far what a cache gives is from what the text gives, relative, over all layers."""
    length = len(text.chunks[row])
    seen = text.reconstruction.of(slice(row, row + 1), [length])
    whole = text.reading.kv(text.start)[:, :, row, :, :length]
    at = cache.positions.clamp(min=0) + text.start
    turned = model.rope.rotate(cache.kv[:, 0], at)
    wrong = right = 0.0
    for layer in range(model.layers):
        held = cache.visible[layer]
        keys = [turned[layer, head][some] for head, some in enumerate(held)]
        values = [cache.kv[layer, 1, head][some] for head, some in enumerate(held)]
        wanted = received(seen, layer, whole[layer, 0], whole[layer, 1])
        wrong += float((received(seen, layer, keys, values) - wanted).square().sum())
        right += float(wanted.square().sum())
    return (wrong / right) ** 0.5


@pytest.mark.parametrize("rate", [2, 4, 8])
def test_matched_gists_give_what_the_text_gives(
    any_model: GistModel, rate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What their queries get is nearer to it than from the same tokens unmatched, even in a model of random weights.

    There every token gets about the same, and the longest values would be a choice that cannot stand for the rest.
    """
    monkeypatch.setattr(matching, "WHOLE", 1.1)
    monkeypatch.setattr(placements, "importance", lambda attention, values: attention)
    text = TextPass(any_model, TEXTS)
    kept, matched = text.compress("adaptive", rate), text.compress("matched", rate)

    for row in range(len(TEXTS)):
        assert torch.equal(kept[row].positions, matched[row].positions)
        assert error(any_model, text, row, matched[row]) < 0.95 * error(any_model, text, row, kept[row])


@pytest.mark.model
@pytest.mark.parametrize("rate", [4, 16])
def test_matched_gists_of_the_real_model_give_what_the_text_gives(default_model: GistModel, rate: int) -> None:
    """With the tokens that it needs, too, what its queries get is nearer to what the text gives."""
    manual = (Path(__file__).parents[2] / "docs" / "limits.md").read_text("utf-8")
    text = TextPass(default_model, [default_model.encode(manual)[:200]])
    kept, matched = text.compress("adaptive", rate)[0], text.compress("matched", rate)[0]

    assert error(default_model, text, 0, matched) < 0.95 * error(default_model, text, 0, kept)


def test_queries_in_16_bits_that_nearly_agree_have_a_direction_in_common() -> None:
    """The direction is found where rounding products to 16 bits would make them those of no queries at all."""
    torch.manual_seed(0)
    rope = Rope(10_000.0 ** -(torch.arange(32) / 32))
    shared = torch.zeros(200, 1, 64)
    shared[..., 20:32] = 30 * torch.rand(200, 1, 12)  # the slowest channels, as in the default model
    queries = (shared + 0.1 * torch.randn(200, 200, 64)).to(torch.bfloat16)
    keys, mass = torch.zeros(1, 200, 9, 64, dtype=torch.bfloat16), torch.ones(1, 200, 200)
    seen = Reconstruction([queries[None]], [keys], [mass], [9], 0)

    direction = matching._common(seen, rope, torch.float32)[0]

    products = seen.of(0)[0].float() @ direction[..., None]
    torch.testing.assert_close(products, torch.ones_like(products), rtol=0, atol=0.25)


def test_where_nothing_is_left_out_nothing_changes(any_model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matching a whole chunk to itself leaves it as it is, which is why a head that keeps nearly all is not matched."""
    monkeypatch.setattr(matching, "WHOLE", 1.1)
    text = TextPass(any_model, TEXTS)
    values = text.reading.kv(text.start)[:, 1]
    for row, whole in enumerate(text.compress("selected", 1)):
        every = whole.positions.expand(any_model.layers, any_model.kv_heads, -1)
        cache = replace(whole, positions=every)

        own, length = slice(row, row + 1), len(TEXTS[row])
        matched = match([cache], values[:, own, :, :length], text.reconstruction.of(own, [length]), any_model.rope)[0]

        torch.testing.assert_close(matched.kv, cache.kv, rtol=0, atol=1e-9)


def test_a_matched_gist_is_stored_like_any_other(model: GistModel, tmp_path: Path) -> None:
    """Bit by bit, its holes included, and the same memory is made of it."""
    path = tmp_path / "gist.safetensors"
    cache = compress(model, TEXTS, GistSettings(placement="matched", tokens_per_gist=3))[2]
    assert cache.is_ragged

    data = gist_file.encode(cache, key="k", fingerprint="f")
    back = GistCache.unpacked(gist_file.decode(data, path, key="k", fingerprint="f"))

    assert torch.equal(cache.kv, back.kv)
    assert torch.equal(concatenate([cache], model.rope).kv, concatenate([back], model.rope).kv)


def test_a_gist_that_is_not_finite_stays_so(model: GistModel) -> None:
    """Nothing is raised for numbers that cannot be matched: what comes out is seen not to be usable."""
    text = TextPass(model, TEXTS[:1])
    cache = text.compress("adaptive", 3)[0]
    values = text.reading.kv(text.start)[:, 1] * torch.nan

    assert not match([cache], values, text.reconstruction.of(slice(0, 1), [len(TEXTS[0])]), model.rope)[0].is_finite


def test_matched_together_is_matched_alone(any_model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU all chunks of a batch are matched at once, on a CPU one after the other: padding changes nothing."""
    alone = TextPass(any_model, TEXTS).compress("matched", 3)
    monkeypatch.setattr(TextPass, "together", lambda text: iter([slice(0, len(text.chunks))]))

    together = TextPass(any_model, TEXTS).compress("matched", 3)

    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.positions, other.positions)
        torch.testing.assert_close(one.kv, other.kv, rtol=0, atol=1e-9)


def test_many_large_systems_are_solved_with_two_threads() -> None:
    """Torch's batched LU returned rubbish for these, without an error."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        half = torch.randn(90, 400, 176)
        curvature, hold, aim = half.transpose(1, 2) @ half, torch.full((90, 176), 40.0), torch.randn(90, 176, 64)
        solution = _solved(curvature, aim, hold, torch.zeros_like(aim))
    finally:
        torch.set_num_threads(before)

    exact = torch.linalg.solve(curvature.double() + 40 * torch.eye(176).double(), aim.double())
    torch.testing.assert_close(solution.double(), exact, rtol=0, atol=1e-5)


def test_what_has_no_solution_stays_as_it_is() -> None:
    """Rounding may leave a head with a system that is not positive definite; the others are solved all the same."""
    curvature = torch.stack((torch.eye(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.full((2, 2), torch.nan)))
    start = torch.full((3, 2, 1), 5.0)

    solution = _solved(curvature, torch.ones(3, 2, 1), torch.full((3, 1), 0.5), start)

    torch.testing.assert_close(solution, torch.tensor([3.5 / 1.5, 5.0, 5.0])[:, None, None].expand(3, 2, 1))
