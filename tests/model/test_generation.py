"""Answering from an external cache, token by token."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.tiny_models import tiny_model

from gistrag.compression.compress import compress
from gistrag.errors import ContextOverflowError
from gistrag.kv.cache import Memory, concatenate
from gistrag.model.generation import decode_stream, generate, generate_batch, generate_steps, read_text_steps
from gistrag.model.gist_model import GistModel
from gistrag.settings import GistSettings

QUESTION = list(b"what does it say?")


def memory_of(model: GistModel) -> Memory:
    """Return two chunks at a quarter of their length behind the prefix: fewer slots than positions."""
    caches = compress(
        model,
        [list(b"a chunk to answer from"), list(b"and another one")],
        GistSettings(placement="selected", tokens_per_gist=4),
    )
    return concatenate([model.prefix, *caches], model.rope)


def manual_greedy(model: GistModel, memory: Memory, count: int) -> list[int]:
    """Return the likeliest continuation, every token from a fresh full pass with mask and positions spelt out."""
    said: list[int] = []
    while len(said) < count:
        ids = torch.tensor([QUESTION + said])
        cache = transformers.DynamicCache([(layer[0][None], layer[1][None]) for layer in memory.kv])
        visible = torch.ones(ids.shape[1], memory.slots + ids.shape[1], dtype=torch.bool).tril(memory.slots)
        logits = model.network(
            ids,
            past_key_values=cache,
            position_ids=(memory.next_position + torch.arange(ids.shape[1]))[None],
            attention_mask=visible[None, None],
        ).logits[0, -1]
        said.append(int(logits.argmax()))
    return said


def test_generate_is_the_manual_greedy_loop(any_model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token what a loop of full passes gives, in every family."""
    monkeypatch.setitem(any_model.__dict__, "stop_ids", frozenset())
    memory = memory_of(any_model)

    assert manual_greedy(any_model, memory, 24) == list(generate(any_model, memory, QUESTION, max_new_tokens=24))


def test_steps_stop_between_pieces(model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each piece of a text, and between two pieces of a prompt; the tokens are those of `generate`."""
    monkeypatch.setitem(model.__dict__, "stop_ids", frozenset())
    monkeypatch.setattr(model, "piece_tokens", 4)
    memory, ids = memory_of(model), list(b"another passage")
    assert len(list(read_text_steps(model, memory, ids))) == 4

    steps = list(generate_steps(model, memory, QUESTION, max_new_tokens=6))

    assert steps[:4] == [None] * 4
    assert steps[4:] == list(generate(model, memory, QUESTION, max_new_tokens=6))


def test_generate_is_what_transformers_generates(any_model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token for token what `transformers.generate` gives when it is told mask and positions."""
    monkeypatch.setitem(any_model.__dict__, "stop_ids", frozenset())
    memory, ids = memory_of(any_model), torch.tensor([QUESTION])
    cache = transformers.DynamicCache([(layer[0][None], layer[1][None]) for layer in memory.kv])
    any_model.network.generation_config.eos_token_id = None

    expected = any_model.network.generate(
        ids,
        past_key_values=cache,
        attention_mask=torch.ones(1, memory.slots + ids.shape[1], dtype=torch.long),
        position_ids=(memory.next_position + torch.arange(ids.shape[1]))[None],
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
    )

    assert expected[0, ids.shape[1] :].tolist() == list(generate(any_model, memory, QUESTION, max_new_tokens=24))


def test_together_is_one_by_one(any_model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers computed side by side are those computed alone, whatever the lengths beside them."""
    memories = [memory_of(any_model), concatenate([any_model.prefix], any_model.rope)]
    prompts = [QUESTION, list(b"and a rather longer question than the other?")]
    monkeypatch.setitem(any_model.__dict__, "stop_ids", frozenset())
    alone = [
        list(generate(any_model, memory, prompt, max_new_tokens=16))
        for memory, prompt in zip(memories, prompts, strict=True)
    ]
    stop = alone[0][7]
    monkeypatch.setitem(any_model.__dict__, "stop_ids", frozenset({stop}))

    expected = [said[: said.index(stop)] if stop in said else said for said in alone]
    assert expected == generate_batch(any_model, memories, prompts, max_new_tokens=16)


def test_a_memory_serves_many_answers(model: GistModel) -> None:
    """Answering does not change the memory."""
    memory = memory_of(model)
    before = memory.kv.clone()

    first, second = (list(generate(model, memory, QUESTION, max_new_tokens=8)) for _ in range(2))

    assert first == second
    assert torch.equal(before, memory.kv)


def test_work_begins_at_the_first_next(model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calling `generate` computes nothing; closing it ends the work."""
    steps = []
    original = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (steps.append(1), original(hidden))[1])

    tokens = generate(model, memory_of(model), QUESTION)
    assert not steps
    next(tokens)
    tokens.close()

    assert len(steps) == 1


def test_stop_tokens_end_an_answer(model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token that ends an answer is not part of it."""
    monkeypatch.setitem(model.__dict__, "stop_ids", frozenset())
    memory = memory_of(model)
    said = list(generate(model, memory, QUESTION, max_new_tokens=12))
    monkeypatch.setitem(model.__dict__, "stop_ids", frozenset({said[5]}))

    assert said[: said.index(said[5])] == list(generate(model, memory, QUESTION, max_new_tokens=12))


def test_a_seed_repeats_a_drawn_answer(model: GistModel) -> None:
    """Same seed, same tokens; another seed, other tokens."""
    memory = memory_of(model)

    draws = [
        list(generate(model, memory, QUESTION, temperature=1.0, seed=seed, max_new_tokens=20)) for seed in (1, 1, 2)
    ]

    assert draws[0] == draws[1] != draws[2]


def test_a_prompt_without_room_raises_with_both_numbers(model: GistModel) -> None:
    """Too long a prompt is refused, never cut."""
    memory = memory_of(model)
    ids = [0] * model.window

    with pytest.raises(ContextOverflowError, match=rf"{memory.next_position + len(ids)} .* {model.window}"):
        next(generate(model, memory, ids))


def test_an_answer_stays_in_the_window() -> None:
    """Generation ends where the model's positions end."""
    model = tiny_model(max_position_embeddings=160)
    model.__dict__["stop_ids"] = frozenset()
    memory = concatenate([model.prefix], model.rope)
    ids = [65] * (155 - memory.next_position)

    assert len(list(generate(model, memory, ids, max_new_tokens=100))) == 5


def test_pieces_join_to_the_text(model: GistModel) -> None:
    """A character of several tokens is held back until it is whole; nothing is lost."""
    ids = model.encode("Grüße, 北京 🙂 and more")

    pieces = list(decode_stream(model, ids))

    assert "".join(pieces) == "Grüße, 北京 🙂 and more"
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_is_never_shown(model: GistModel) -> None:
    """An answer that is cut inside a character ends before it."""
    ids = model.encode("ok 🙂")[:-1]

    pieces = list(decode_stream(model, ids))

    assert "".join(pieces) == "ok "


def test_tiny_temperatures_take_the_likeliest(model: GistModel) -> None:
    """A temperature that no division stands gives what 0 gives, and a negative seed is a seed."""
    memory = model.concatenate([])
    expected = list(generate(model, memory, QUESTION, max_new_tokens=5))

    assert list(generate(model, memory, QUESTION, temperature=1e-40, max_new_tokens=5)) == expected
    assert len(list(generate(model, memory, QUESTION, temperature=1.0, seed=-5, max_new_tokens=5))) > 0


def test_no_half_of_a_hangul_letter_is_shown(model: GistModel) -> None:
    """One that is never finished is left out, in the middle as at the end; what comes behind it is shown."""
    ids = model.encode("연차를 받")
    broken = [*ids[:-1], *model.encode("은 25일"), *model.encode("일")[:-1]]

    pieces = list(decode_stream(model, broken))

    assert len(ids) > len("연차를 받")  # a letter takes several tokens
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == "연차를 은 25일"
