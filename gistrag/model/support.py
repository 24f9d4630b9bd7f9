"""What a model must be for its caches to be moved and joined, and what this processor computes well."""

from __future__ import annotations

from typing import Any

import torch

from gistrag.errors import UnsupportedModelError
from gistrag.kv.rope import Rope

FAMILIES = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
PLAIN_ROPE_TYPES = ("default", "linear")
"""Those that leave the length of a key as it is, which layers that differ in their angles need."""
LAYER_TYPES = ("full_attention", "sliding_attention")


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
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(f"expected a model of {', '.join(FAMILIES)}, found {config.model_type!r}")
    if config.model_type != "gemma3_text":
        _require_full_attention(config)
    ropes = _ropes(config)
    allowed = PLAIN_ROPE_TYPES if config.model_type in ("gemma3_text", "smollm3") else ROPE_TYPES
    for rope in ropes:
        if rope.get("rope_type", "default") not in allowed:
            raise UnsupportedModelError(f"expected RoPE of {', '.join(allowed)}, found {rope.get('rope_type')!r}")
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if getattr(config, name, None):
            raise UnsupportedModelError(f"expected a model without {name}, found {getattr(config, name)}")


def _require_full_attention(config: Any) -> None:
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if windowed or layer_types != {"full_attention"}:
        raise UnsupportedModelError(f"expected full attention in every layer, found {sorted(layer_types)}, sliding "
                                    f"window {getattr(config, 'sliding_window', None)}")  # fmt: skip


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Return the rotary embeddings of a configuration: one, or one for each type of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    by_type = [given[kind] for kind in LAYER_TYPES if kind in given]
    return by_type or [given]


def local_layers(config: Any) -> tuple[int, ...]:
    """Return the layers that look no further back than ``config.sliding_window`` positions."""
    types = getattr(config, "layer_types", None) or ()
    return tuple(layer for layer, kind in enumerate(types) if kind == "sliding_attention")


def rope_of(network: Any) -> Rope:
    """Return the angles by which a network turns its keys, of every layer where layers differ."""
    rotary, config = network.model.rotary_emb, network.config
    if config.model_type == "gemma3_text":
        angles = torch.stack([getattr(rotary, f"{kind}_inv_freq") for kind in config.layer_types])
        return Rope(_wide(angles))
    if 0 in (getattr(config, "no_rope_layers", None) or ()):
        turns = torch.tensor(config.no_rope_layers[: config.num_hidden_layers])
        return Rope(_wide(rotary.inv_freq) * turns.to(rotary.inv_freq.device)[:, None])
    return Rope(_wide(rotary.inv_freq), float(rotary.attention_scaling))


def _wide(angles: torch.Tensor) -> torch.Tensor:
    return angles.to(torch.promote_types(angles.dtype, torch.float32))


def begins_every_text(config: Any, tokenizer: Any) -> str:
    """Return the token that a plain prompt of this family begins with: Gemma reads nothing well without it."""
    return str(tokenizer.bos_token) if config.model_type == "gemma3_text" else ""
