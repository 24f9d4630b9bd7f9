"""Loading a network and its tokenizer: bf16 safetensors, or 4-bit weights by bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from gistrag.model.hub import quiet
from gistrag.model.support import require_supported


def load_network(folder: Path, *, device: str | None, quantize: str) -> tuple[Any, Any]:
    """Return the transformers model in *folder*, and its tokenizer; no code of the folder is run.

    Args:
        device: a torch device; a CUDA GPU by default, where one is present.
        quantize: ``"nf4"`` for 4-bit weights with double quantization and bf16 compute, ``"none"`` for bf16.

    Raises:
        UnsupportedModelError: a family, attention or RoPE variant that this library has not verified.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with quiet:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        require_supported(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.bfloat16,
            device_map=device,
            quantization_config=_nf4() if quantize == "nf4" else None,
            trust_remote_code=False,
            use_safetensors=True,
        )
    return network, tokenizer


def _nf4() -> Any:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
