"""Training is serving: the project's one theorem, and joining caches, which is exact for every placement.

One masked pass over ``[prefix chunk gists]…[question]`` gives the same logits as compressing every chunk alone,
relocating and concatenating the caches, and reading the question behind them. Gists that are a part of the chunk's own
cache (matched, adaptive, selected) have no such pass; for them a forward pass written out head by head shows that every
head attends to the tokens it keeps, each at its place in the text, and to nothing else.
"""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from support.mask import by_layer, gist_mask
from support.tiny_models import FAMILIES, tiny_model

from gistrag.compression.compress import compress
from gistrag.compression.making import gist_count
from gistrag.compression.placements import anchors
from gistrag.errors import ModelNotFoundError
from gistrag.kv.cache import GistCache, concatenate
from gistrag.model.gist_model import GistModel
from gistrag.model.hub import find
from gistrag.settings import GistSettings

RATE = 4
CHUNKS = [
    b"the first chunk speaks of mills",
    b"another one, shorter",
    b"a third",
    b"x" * 40,
    b"the last of five chunks",
]


@pytest.fixture(params=[*sorted(FAMILIES), "gemma3 nearby"])
def any_model(request: pytest.FixtureRequest) -> GistModel:
    """A tiny model of each family, and one whose windows end within the prefix and between the chunks."""
    family, _, is_nearby = request.param.partition(" ")
    return tiny_model(family, **({"sliding_window": 48} if is_nearby else {}))


def served(model: GistModel, chunks: list[list[int]], question: list[int], placement: str) -> torch.Tensor:
    """Return the logits of the question behind separately compressed, relocated, concatenated caches."""
    return read_question(
        model, compress(model, chunks, GistSettings(placement=placement, tokens_per_gist=RATE)), question
    )


def read_question(model: GistModel, caches: list[GistCache], question: list[int]) -> torch.Tensor:
    """Return the logits of the question behind the prefix and the caches."""
    memory = concatenate([model.prefix, *caches], model.rope)
    positions = memory.next_position + torch.arange(len(question))
    return model.logits(model.read(memory).feed(torch.tensor([question]), positions=positions))[0]


def surprisal(model: GistModel, prefix: list[int], chunk: list[int]) -> torch.Tensor:
    """Return the negative log-likelihood of a chunk's tokens, by a plain forward pass of transformers."""
    logits = model.network(torch.tensor([prefix + chunk])).logits[0, len(prefix) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(chunk), reduction="none")


def masked(model: GistModel, chunks: list[list[int]], question: list[int], placement: str) -> torch.Tensor:
    """Return the logits of the question in one masked pass, all positions and anchors worked out here."""
    prefix = model.encode_template(model.prompt.prefix)
    embeddings, positions, sizes, offset = [], [], [], len(prefix)
    for chunk in chunks:
        ids, count = torch.tensor(chunk), gist_count(len(chunk), RATE)
        if placement == "anchored":
            places = anchors(surprisal(model, prefix, chunk), count)
            gists = model.embed(ids[places])
        else:
            places = torch.tensor([(i + 1) * len(chunk) // count - 1 for i in range(count)])
            gists = model.gist_vectors(count)
        embeddings += [model.embed(torch.tensor(prefix + chunk)), gists]
        positions += [offset + torch.arange(-len(prefix), len(chunk)), offset + places]
        sizes.append((len(chunk), count))
        offset += len(chunk)
    embeddings.append(model.embed(torch.tensor(question)))
    positions.append(offset + torch.arange(len(question)))
    places, mask = torch.cat(positions), gist_mask(len(prefix), sizes, len(question))
    hidden = model.network.model(
        inputs_embeds=torch.cat(embeddings)[None],
        position_ids=places[None],
        attention_mask=by_layer(model.network.config, mask, places),
    ).last_hidden_state
    return model.logits(hidden)[0, -len(question) :]


@pytest.mark.parametrize("placement", ["anchored", "learned"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_training_is_serving(any_model: GistModel, count: int, placement: str) -> None:
    """In float64, the masked pass and the served caches agree to twelve digits, for every family."""
    chunks, question = [list(chunk) for chunk in CHUNKS[:count]], list(b"what does it say?")

    one_pass = masked(any_model, chunks, question, placement)
    caches = served(any_model, chunks, question, placement)

    torch.testing.assert_close(caches, one_pass, rtol=0, atol=1e-12)


@pytest.mark.model
@pytest.mark.parametrize("placement", ["anchored", "learned"])
def test_training_is_serving_with_gemma(placement: str) -> None:
    """In float32 the two agree for Gemma 3 270M too, with passages that reach beyond its windows of 512 positions."""
    try:
        path = find("gemma3-270m", download=False).path
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    model = GistModel.load(path, device="cpu")
    model.network.float()
    model.dtype = torch.float32
    words = "the mill grinds rye in the morning and oats at night while the miller writes every sack into a book "
    chunks = [model.encode_passage(f"{number} {words * 7}") for number in range(5)]
    question = model.encode_question("What does the mill grind at night?")

    one_pass = masked(model, chunks, question, placement)
    caches = served(model, chunks, question, placement)

    assert sum(map(len, chunks)) > 600
    torch.testing.assert_close(caches, one_pass, rtol=0, atol=2e-3)  # logits of up to 30, 18 layers deep


def test_training_is_serving_in_bf16() -> None:
    """In bf16 the two agree within its rounding: eight bits of mantissa, three layers deep."""
    model = tiny_model(dtype=torch.bfloat16)
    chunks, question = [list(chunk) for chunk in CHUNKS], list(b"what does it say?")

    one_pass = masked(model, chunks, question, "learned")
    caches = served(model, chunks, question, "learned")

    torch.testing.assert_close(caches, one_pass, rtol=0, atol=0.02)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_full_caches_are_block_attention(any_model: GistModel, count: int) -> None:
    """Every token kept, the served caches equal one pass in which no chunk sees another."""
    chunks, question = [list(chunk) for chunk in CHUNKS[:count]], list(b"what does it say?")
    prefix = any_model.encode_template(any_model.prompt.prefix)
    ids = [token for chunk in chunks for token in (*prefix, *chunk)]
    starts = accumulate([0, *map(len, chunks)])
    spans = [torch.arange(len(prefix) + len(chunk)) for chunk in chunks]
    positions = torch.cat([start + span for start, span in zip(starts, spans, strict=False)])
    asked = positions[-1] + 1 + torch.arange(len(question))
    mask = gist_mask(len(prefix), [(len(chunk), 0) for chunk in chunks], len(question))
    text = torch.cat([torch.tensor([False] * len(prefix) + [True] * len(chunk)) for chunk in chunks])
    mask[len(ids) :, : len(ids)] |= text  # the question sees all text

    caches = compress(any_model, chunks, GistSettings(placement="selected", tokens_per_gist=1))
    logits = read_question(any_model, caches, question)

    places = torch.cat((positions, asked))
    expected = any_model.network(
        torch.tensor([ids + question]),
        position_ids=places[None],
        attention_mask=by_layer(any_model.network.config, mask, places),
    ).logits[0, -len(question) :]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_text_is_read_as_the_network_reads_it(family: str) -> None:
    """Text behind the prefix and a question behind it give what the network gives in one pass, windows included."""
    model = tiny_model(family, **({"sliding_window": 48} if family == "gemma3" else {}))
    prefix, text = model.encode_template(model.prompt.prefix), [token for chunk in CHUNKS for token in chunk]
    question = list(b"what does it say?")

    memory = model.read_text(concatenate([model.prefix], model.rope), text)
    places = memory.next_position + torch.arange(len(question))
    reading = model.read(memory)
    first = model.logits(reading.feed(torch.tensor([question[:5]]), positions=places[:5]))[0]
    one_by_one = [model.logits(reading.feed(torch.tensor([[token]]), positions=places[at : at + 1]))[0]
                  for at, token in enumerate(question[5:], 5)]  # fmt: skip

    expected = model.network(torch.tensor([prefix + text + question])).logits[0, -len(question) :]
    torch.testing.assert_close(torch.cat([first, *one_by_one]), expected, rtol=0, atol=1e-12)


def turned(vectors: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Return vectors ``(n, head_dim)`` rotated to *positions*: pairs of channels as complex numbers."""
    first, second = vectors.chunk(2, dim=-1)
    rotated = torch.complex(first, second) * torch.polar(torch.ones_like(first), positions[:, None].double() * inv_freq)
    return torch.cat((rotated.real, rotated.imag), dim=-1)


def by_hand(model: GistModel, caches: list[GistCache], question: list[int]) -> torch.Tensor:
    """Return the logits of the question behind caches, by a llama's forward pass one head at a time."""
    starts = list(accumulate((cache.source_tokens for cache in caches), initial=0))
    places = starts.pop() + torch.arange(len(question))
    inv_freq, width, group = model.rope.inv_freq, model.head_dim, model.network.config.num_attention_heads // 2
    hidden = model.embed(torch.tensor(question))
    for number, layer in enumerate(model.network.model.layers):
        normed, attention, heads = layer.input_layernorm(hidden), layer.self_attn, []
        project = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
        queries, keys, values = (each.view(len(question), -1, width) for each in project)
        for head in range(queries.shape[1]):
            kv_head = head // group
            seen_keys, seen_values = [], []
            for start, cache in zip(starts, caches, strict=True):
                positions = cache.positions.expand(model.layers, model.kv_heads, -1)[number, kv_head]
                kept = positions >= 0
                own = cache.kv[number, :, kv_head, kept]
                seen_keys.append(turned(own[0], start + positions[kept], inv_freq))
                seen_values.append(own[1])
            memory = sum(map(len, seen_keys))
            all_keys = torch.cat([*seen_keys, turned(keys[:, kv_head], places, inv_freq)])
            scores = turned(queries[:, head], places, inv_freq) @ all_keys.T / width**0.5
            allowed = torch.ones_like(scores, dtype=torch.bool).tril(memory)
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
            heads.append(weights @ torch.cat([*seen_values, values[:, kv_head]]))
        hidden = hidden + attention.o_proj(torch.cat(heads, dim=-1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.logits(model.network.model.norm(hidden))


@pytest.mark.parametrize("placement", ["matched", "adaptive", "selected"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_joined_caches_are_read_at_their_places(model: GistModel, count: int, placement: str) -> None:
    """Each head attends to the tokens it keeps of every chunk, at their positions, to twelve digits."""
    chunks, question = [list(chunk) for chunk in CHUNKS[:count]], list(b"what does it say?")
    caches = compress(model, chunks, GistSettings(placement=placement, tokens_per_gist=RATE))

    joined = read_question(model, caches, question)

    assert any(cache.is_ragged for cache in caches) == (placement != "selected")
    torch.testing.assert_close(joined, by_hand(model, [model.prefix, *caches], question), rtol=0, atol=1e-12)
