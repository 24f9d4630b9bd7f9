"""Keys and values in 8 bits, as gist files hold them; 4 bits for files of older indexes.

Some channels of a head's keys are large for every token, so keys have a scale for each channel; values have one for
each token (KIVI, Liu et al. 2024, arXiv 2402.02750). The keys are un-rotated: rotation would spread a large channel
over its pair (KVQuant, Hooper et al. 2024, arXiv 2401.18079). A scale is one byte: 8 to 15 eighths of a power of two,
rounded up so that nothing is clipped; whole numbers times such scales are exact in bfloat16 but for one rounding at the
end. In 4 bits the middle of each key channel is taken out first and kept with the scales.

Pure functions on tensors: nothing here knows a file, a model or a position.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gistrag.kv.packed import SCALE_OF_ONE


def quantize(kv: Tensor, bits: int) -> dict[str, Tensor]:
    """Return keys and values in *bits* bits, with the scales that dequantize them.

    Every number is dequantized to within half its scale. A scale is at most an eighth larger than the largest number
    of its channel or token needs.

    Args:
        kv: ``(layers, 2, kv_heads, gists, head_dim)``, un-rotated keys at 0, values at 1; finite.
        bits: 8 or 4.

    Returns:
        ``kv`` int8 of the same shape, or uint8 ``(…, head_dim / 2)`` with two numbers a byte; ``key_scales``
        ``(layers, kv_heads, head_dim)`` and ``value_scales`` ``(layers, kv_heads, gists)`` uint8; with 4 bits also
        ``key_centres`` ``(layers, kv_heads, head_dim)`` bfloat16.
    """
    keys, values = kv.float().unbind(dim=1)  # (layers, kv_heads, gists, head_dim)
    found: dict[str, Tensor] = {}
    if bits == 4:
        found["key_centres"] = ((keys.amax(dim=2) + keys.amin(dim=2)) / 2).to(torch.bfloat16)
        keys = keys - found["key_centres"].float()[:, :, None]
    most = 2 ** (bits - 1) - 1
    found["key_scales"] = _scale_bytes(keys.abs().amax(dim=2) / most)
    found["value_scales"] = _scale_bytes(values.abs().amax(dim=3) / most)
    scaled = torch.stack((keys / _scales(found["key_scales"])[:, :, None],
                          values / _scales(found["value_scales"])[..., None]), dim=1)  # fmt: skip
    codes = scaled.round().clamp(-most, most).to(torch.int8)
    return {"kv": codes if bits == 8 else _packed(codes), **found}


def dequantize(tensors: Mapping[str, Tensor], dtype: torch.dtype, *, counts: Tensor | None = None) -> Tensor:
    """Return the keys and values that `quantize` took, nearly, as *dtype*.

    Args:
        counts: ``(layers, kv_heads)``, where keys and values are one row of what the heads keep, ``(kept, 2,
            head_dim)``, and the scales of values ``(kept,)``.

    Raises:
        ValueError: shapes or types that `quantize` does not give; LookupError where something is missing.
    """
    codes, bits = tensors["kv"], {torch.int8: 8, torch.uint8: 4}.get(tensors["kv"].dtype)
    if bits is None or codes.ndim != (5 if counts is None else 3):
        raise ValueError(f"expected keys and values in 8 or 4 bits, got {tuple(codes.shape)} of {codes.dtype}")
    tokens = tuple(codes[:, 0, ..., 0].shape)  # (layers, kv_heads, gists) or (kept,)
    heads = tokens[:2] if counts is None else tuple(counts.shape)
    shapes = {"key_scales": (*heads, codes.shape[-1] * 8 // bits), "value_scales": tokens}
    for name, expected in shapes.items():
        if tuple(tensors[name].shape) != expected or tensors[name].dtype != torch.uint8:
            raise ValueError(
                f"expected {name} {expected} uint8, got {tuple(tensors[name].shape)} {tensors[name].dtype}"
            )
    wide = dtype if dtype == torch.bfloat16 else torch.promote_types(dtype, torch.float32)
    kv = codes.to(wide) if bits == 8 else _unpacked(codes, wide)

    def by_token(of_head: Tensor) -> Tensor:
        if counts is None:
            return of_head[:, :, None]
        return of_head.flatten(0, 1).repeat_interleave(counts.flatten(), dim=0)

    kv[:, 0] *= by_token(_scales(tensors["key_scales"]).to(wide))
    kv[:, 1] *= _scales(tensors["value_scales"]).to(wide)[..., None]
    if bits == 4:
        kv[:, 0] += by_token(tensors["key_centres"].to(wide))
    return kv.to(dtype)


def _scale_bytes(least: Tensor) -> Tensor:
    """Return the bytes of the smallest scales that are not below *least*."""
    mantissa, exponent = torch.frexp(least)  # least = mantissa · 2**exponent, mantissa in [1/2, 1)
    eighths = (mantissa * 16).ceil() - 8
    return (8 * (exponent - 1) + eighths + SCALE_OF_ONE).clamp(0, 255).where(least > 0, 0).to(torch.uint8)


def _scales(stored: Tensor) -> Tensor:
    """Return scales as float32.

    >>> _scales(torch.tensor([144, 145, 152, 140], dtype=torch.uint8)).tolist()
    [1.0, 1.125, 2.0, 0.75]
    """
    steps = stored.int() - SCALE_OF_ONE
    return torch.ldexp(1 + (steps % 8) / 8, steps.div(8, rounding_mode="floor"))


def _packed(codes: Tensor) -> Tensor:
    """Return codes from -7 to 7 two a byte, the first half of them in the low halves.

    >>> _packed(torch.tensor([-7, 7], dtype=torch.int8)).tolist()
    [241]
    """
    low, high = (codes + 8).to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def _unpacked(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the codes that `_packed` took."""
    return torch.cat((packed & 15, packed >> 4), dim=-1).to(dtype).sub_(8)
