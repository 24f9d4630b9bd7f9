"""What a model must be for its caches to be moved and joined, and what this processor computes well."""

from __future__ import annotations

from typing import Any

import torch

from gistrag.errors import UnsupportedModelError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def multiplies_16_bits() -> bool:
    """Return whether this processor multiplies matrices of 16-bit numbers about as fast as of 32 bits.

    One without AVX-512, as in many laptops and desktops, does not: a Zen 3 takes nine times as long.
    """
    return torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "SVE"))


def require_supported(config: Any) -> None:
    """Return if a model of this configuration can be relocated and concatenated.

    Raises:
        UnsupportedModelError: says which property is not verified.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(f"expected a model of {', '.join(FAMILIES)}, found {config.model_type!r}")
    if windowed or layer_types != {"full_attention"}:
        raise UnsupportedModelError(f"expected full attention in every layer, found {sorted(layer_types)}, sliding "
                                    f"window {getattr(config, 'sliding_window', None)}")  # fmt: skip
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise UnsupportedModelError(f"expected RoPE of {', '.join(ROPE_TYPES)}, found {rope.get('rope_type')!r}")
