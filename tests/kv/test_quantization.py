"""Keys and values in few bits come back near, in the bytes that were promised."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny_models import tiny_model

from gistrag.compression.compress import compress
from gistrag.kv.cache import GistCache, concatenate, relocate
from gistrag.kv.packed import BITS, stored_bytes
from gistrag.kv.quantization import dequantize, quantize
from gistrag.model.gist_model import GistModel
from gistrag.settings import GistSettings

SHAPE = (2, 2, 3, 5, 8)


def some_kv(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return random keys and values; some channels of the keys are large, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(SHAPE, generator=generator)
    kv[:, 0] = kv[:, 0] * torch.exp(2 * torch.randn(3, 1, 8, generator=generator)) + 5 * torch.randn(8)
    return kv.to(dtype)


def back_and_forth(kv: torch.Tensor, bits: int) -> torch.Tensor:
    return dequantize(quantize(kv, bits), kv.dtype)


def naive(numbers: list[float], bits: int, *, centre: float = 0.0) -> list[float]:
    """Return numbers of one channel or token as they come back, one at a time."""
    most = 2 ** (bits - 1) - 1
    largest = max(abs(number - centre) for number in numbers)
    power = 2.0 ** math.floor(math.log2(largest / most))
    scale = math.ceil(8 * largest / most / power) / 8 * power
    return [round((number - centre) / scale) * scale + centre for number in numbers]


@pytest.mark.parametrize("bits", [8, 4])
def test_as_a_naive_twin_does_it(bits: int) -> None:
    """Keys by channel, around their middle in 4 bits; values by token."""
    kv = some_kv()
    found = back_and_forth(kv, bits)

    for layer, head in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        for channel in range(8):
            keys = kv[layer, 0, head, :, channel]
            middle = ((keys.max() + keys.min()) / 2).bfloat16().item() if bits == 4 else 0.0
            expected = torch.tensor(naive(keys.tolist(), bits, centre=middle))
            torch.testing.assert_close(found[layer, 0, head, :, channel], expected)
        for token in range(5):
            expected = torch.tensor(naive(kv[layer, 1, head, token].tolist(), bits))
            torch.testing.assert_close(found[layer, 1, head, token], expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("seed", range(5))
def test_every_number_comes_back_within_half_its_scale(bits: int, seed: int) -> None:
    """And a scale is at most an eighth larger than what the largest number of its channel or token needs."""
    kv, most = some_kv(seed=seed), 2 ** (bits - 1) - 1
    off = (back_and_forth(kv, bits) - kv).abs()
    keys, values = kv.unbind(dim=1)
    spread = keys.abs().amax(dim=2) if bits == 8 else (keys.amax(dim=2) - keys.amin(dim=2)) / 2 * 1.01 + 0.05
    slack = 1.125 / 2 + 1e-3  # float32 arithmetic, and the centre in bfloat16

    assert (off[:, 0] <= slack * spread[:, :, None] / most).all()
    assert (off[:, 1] <= slack * values.abs().amax(dim=3)[..., None] / most).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("value", [0.0, 1e-30, -3.0, 6e4])
def test_one_number_everywhere(bits: int, value: float) -> None:
    """Nothing is divided by zero and nothing is clipped, however small or large."""
    kv = torch.full(SHAPE, value)

    half_a_step = 1.125 / 2 / (2 ** (bits - 1) - 1)
    torch.testing.assert_close(back_and_forth(kv, bits), kv, rtol=half_a_step, atol=1e-6)


@pytest.mark.parametrize("kind", BITS)
def test_bytes_are_those_that_were_promised(kind: str) -> None:
    """What is planned for a file is what its tensors take."""
    tensors = quantize(some_kv(dtype=torch.bfloat16), BITS[kind])

    assert stored_bytes(SHAPE, kind, itemsize=2) == sum(tensor.nbytes for tensor in tensors.values())
    assert stored_bytes(SHAPE, "auto", itemsize=2) == some_kv(dtype=torch.bfloat16).nbytes


@pytest.mark.parametrize("bits", [8, 4])
def test_bfloat16_is_rounded_once(bits: int) -> None:
    """The quick way through bfloat16 gives what the way through float64 gives, rounded at the end."""
    tensors = quantize(some_kv(dtype=torch.bfloat16), bits)

    assert torch.equal(dequantize(tensors, torch.float64).to(torch.bfloat16), dequantize(tensors, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_they_come_back_as_the_model_wants_them(dtype: torch.dtype) -> None:
    """In the model's own numbers, whichever those are."""
    assert dtype == back_and_forth(some_kv(dtype=dtype), 8).dtype


@pytest.mark.parametrize("name", ["key_scales", "value_scales"])
@pytest.mark.parametrize("bits", [8, 4])
def test_scales_of_another_shape_are_refused(bits: int, name: str) -> None:
    """They would fit by broadcasting and be wrong."""
    tensors = quantize(some_kv(), bits)
    tensors[name] = tensors[name][:, :, :1]

    with pytest.raises(ValueError, match=f"expected {name}"):
        dequantize(tensors, torch.float32)


def test_plain_numbers_are_no_codes() -> None:
    """Keys and values that were never quantized are not taken for some that were."""
    with pytest.raises(ValueError, match="8 or 4 bits"):
        dequantize({"kv": some_kv()}, torch.float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_relocation_moves_the_error_with_the_key(any_model: GistModel, bits: int) -> None:
    """A key is as near to the exact one at any place as it is in its file: rotation is of what was decoded."""
    (exact,) = compress(any_model, [list(b"some text to be read")], GistSettings(tokens_per_gist=2))
    near = GistCache(back_and_forth(exact.kv, bits), exact.positions, exact.source_tokens)

    moved = [relocate(cache, 77, rope=any_model.rope)[:, 0] for cache in (exact, near)]

    stored_off = (exact.kv - near.kv)[:, 0].norm(dim=-1)
    torch.testing.assert_close((moved[0] - moved[1]).norm(dim=-1), stored_off, rtol=1e-6, atol=1e-9)
    assert (stored_off > 0).any()


def test_eight_bits_change_little_of_what_is_read() -> None:
    """The states of a question behind gists in 8 bits are those behind exact ones, to about one part in a hundred."""
    model = tiny_model("llama")
    (exact,) = compress(model, [list(b"the mill stands by the river")], GistSettings(tokens_per_gist=2))
    states = []
    for cache in (exact, GistCache(back_and_forth(exact.kv, 8), exact.positions, exact.source_tokens)):
        memory = concatenate([model.prefix, cache], model.rope)
        question = torch.tensor([model.encode_question("Where?")])
        positions = memory.next_position + torch.arange(question.shape[1])
        states.append(model.read(memory).feed(question, positions=positions))

    assert (states[0] - states[1]).norm() < 0.01 * states[0].norm()
