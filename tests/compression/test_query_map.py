"""Predicted reconstruction passes: the attention they promise, and when a chunk is read a second time instead."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_models import tiny_model

from gistrag.compression import placements, query_map
from gistrag.compression.compress import compress
from gistrag.compression.making import making
from gistrag.compression.placements import TextPass
from gistrag.compression.query_map import QueryMap, path_of, predicted
from gistrag.model.gist_model import GistModel
from gistrag.model.hub import ENTRIES
from gistrag.settings import GistSettings

TEXTS = [list(b"a first chunk of some length"), list(b"short"), list(b"a third chunk, the longest of the three by far")]


def random_map(model: GistModel, *, rank: int = 8) -> QueryMap:
    """Return a map of the shape of a model, always the same one."""
    torch.manual_seed(1)
    heads = model.network.config.num_attention_heads
    features, made = 4 * model.kv_heads * model.head_dim, heads * (model.head_dim + 1)
    shapes = (
        (model.layers, 1, features),
        (model.layers, features, rank),
        (model.layers, rank, made),
        (model.layers, 1, made),
    )
    return QueryMap(*(0.3 * torch.randn(shape).to(model.network_dtype) for shape in shapes))


@pytest.fixture
def mapped(any_model: GistModel, monkeypatch: pytest.MonkeyPatch) -> GistModel:
    """A model that has a map."""
    fitted = random_map(any_model)
    monkeypatch.setattr(placements, "query_map", lambda model: fitted)
    return any_model


def test_a_query_is_made_of_a_token_and_the_next(model: GistModel) -> None:
    """One token after the other, from un-rotated keys and values of all heads of the layer."""
    fitted = random_map(model)
    kv = torch.randn(model.layers, 2, 2, model.kv_heads, 5, model.head_dim).double()

    queries, rest = fitted.predict(kv)

    for layer, row, token in ((0, 0, 0), (1, 1, 3), (2, 0, 4)):
        seen = [kv[layer, :, row, :, token].flatten()]
        seen.append(kv[layer, :, row, :, token + 1].flatten() if token < 4 else torch.zeros_like(seen[0]))
        made = (torch.cat(seen) - fitted.mean[layer, 0]) @ fitted.down[layer] @ fitted.up[layer] + fitted.bias[layer, 0]
        torch.testing.assert_close(
            torch.cat((queries[layer, row, :, token].flatten(), rest[layer, row, :, token])), made
        )


def test_attention_is_a_softmax_over_chunk_prefix_and_rest(any_model: GistModel) -> None:
    """What each token gets, its sum and its greatest are those of a softmax, one query after the other."""
    text, fitted = TextPass(any_model, TEXTS[:1]), random_map(any_model)
    count, start = len(TEXTS[0]), text.start
    whole = text.reading.kv()[:, 0, 0]  # (layers, kv_heads, slots, head_dim)

    seen, most = predicted(any_model, fitted, text.kv, [count])

    plain = text.kv.clone()
    plain[:, 0] = any_model.rope.unrotate(text.kv[:, 0], start + torch.arange(count))
    queries, rest = fitted.predict(plain)
    turned = any_model.rope.rotate(queries, start + count + torch.arange(count))
    group = turned.shape[2] // any_model.kv_heads
    for layer in range(any_model.layers):
        expected = []
        for head in range(turned.shape[2]):
            scores = turned[layer, 0, head] @ whole[layer, head // group].T * any_model.head_dim**-0.5
            every = torch.cat((scores, rest[layer, 0, head][:, None]), dim=1).softmax(dim=1)
            expected.append(every[:, start : start + count])
        wanted = torch.stack(expected)  # (heads, m, n)
        by_head = wanted.unflatten(0, (any_model.kv_heads, group)).flatten(1, 2)
        torch.testing.assert_close(seen.received(layer)[0], by_head.mT)
        torch.testing.assert_close(seen.mass[layer][0], wanted.sum(dim=2))
        torch.testing.assert_close(most[layer, 0], by_head.amax(dim=1).float())


def test_predicted_together_is_predicted_alone(mapped: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU all chunks of a batch are predicted at once, on a CPU one after the other: padding changes nothing."""
    alone = TextPass(mapped, TEXTS).compress("matched", 3)
    monkeypatch.setattr(TextPass, "together", lambda text: iter([slice(0, len(text.chunks))]))

    together = TextPass(mapped, TEXTS).compress("matched", 3)

    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.positions, other.positions)
        torch.testing.assert_close(one.kv, other.kv, rtol=0, atol=1e-9)


def test_attention_that_is_not_kept_is_computed_again(mapped: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long chunk would take more memory than there is; its gists are the same."""
    kept = compress(mapped, TEXTS)
    monkeypatch.setattr(query_map, "KEPT_BYTES", 0)

    again = compress(mapped, TEXTS)

    for one, other in zip(kept, again, strict=True):
        assert torch.equal(one.positions, other.positions)
        torch.testing.assert_close(one.kv, other.kv, rtol=0, atol=1e-9)


def test_a_chunk_is_read_once_where_the_model_has_a_map(mapped: GistModel) -> None:
    """The reconstruction pass is not made."""
    text = TextPass(mapped, TEXTS)

    text.compress("matched", 3)

    assert "reconstruction" not in text.__dict__


def test_a_chunk_is_read_twice_for_fewer_gists(mapped: GistModel) -> None:
    """Where few tokens are kept, a prediction is not exact enough to choose them."""
    text = TextPass(mapped, TEXTS)

    text.compress("matched", placements.PREDICTED_UP_TO + 1)

    assert "reconstruction" in text.__dict__


def test_a_chunk_is_read_twice_by_an_older_making_or_without_a_map(
    any_model: GistModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both give the gists that every model got before there were maps."""
    plain = compress(any_model, TEXTS)
    fitted = random_map(any_model)
    monkeypatch.setattr(placements, "query_map", lambda model: fitted)

    older, newest = (compress(any_model, TEXTS, GistSettings(making=version)) for version in (3, None))

    assert all(torch.equal(one.kv, other.kv) for one, other in zip(plain, older, strict=True))
    assert not any(torch.equal(one.kv, other.kv) for one, other in zip(plain, newest, strict=True))


def test_a_prediction_in_16_bits_is_finite() -> None:
    """Scores far above that of the rest do not overflow."""
    model = tiny_model(dtype=torch.bfloat16)
    fitted = random_map(model)
    loud = replace(fitted, up=fitted.up * 100)
    text = TextPass(model, TEXTS)

    seen, most = predicted(model, loud, text.kv, list(map(len, TEXTS)))

    assert all(bool(mass.isfinite().all()) for mass in seen.mass)
    assert bool(most.isfinite().all())
    assert float(most.max()) <= 1.01


def test_the_version_of_gists_stays_if_it_can_still_be_made() -> None:
    """What cannot be made any more, or never was, becomes the newest."""
    assert {"making": "3"} == making("matched", {"making": "3"})
    assert {"making": "4"} == making("matched", {"making": "1"}) == making("matched", {}) == making("matched")


def test_the_default_model_has_a_map() -> None:
    """The map that comes with the library belongs to its weights; nothing else has one."""
    (entry,) = (entry for entry in ENTRIES if entry.kind == "model")

    path = path_of(entry.sha256)

    assert path is not None
    assert "smollm2-135m-instruct.safetensors" == path.name
    assert path_of("of another model") is None


@pytest.mark.model
def test_the_map_of_the_default_model_foretells_its_reconstruction(default_model: GistModel) -> None:
    """The most that each token gets goes up and down with what it gets in the reconstruction pass."""
    ids = default_model.encode("The mill by the river grinds wheat, and the miller keeps bees behind the house. " * 8)
    text = TextPass(default_model, [ids])
    fitted = query_map.query_map(default_model)
    assert fitted is not None

    _, most = predicted(default_model, fitted, text.kv, [len(ids)])

    real = text.reconstruction.attention
    together = torch.corrcoef(torch.stack((most.flatten(), real.flatten())))[0, 1]
    assert together > 0.7
