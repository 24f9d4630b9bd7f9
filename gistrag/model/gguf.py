"""GGUF files: converted once to safetensors, since gistrag needs weights that can be saved and trained."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gistrag.model import conversion
from gistrag.model.hashing import file_sha256
from gistrag.model.hub import quiet

_Loaded = TypeVar("_Loaded")


def converted(gguf: Path) -> Path:
    """Return the folder of bf16 safetensors made from a GGUF file, converting it on the first call (some 20 s).

    Raises:
        ResourceError, UsageError: as for `gistrag.model.conversion.conversion`.
    """
    return conversion.conversion(*_names(gguf), partial(_convert, gguf), what=_what(gguf))


def opened(path: Path, load: Callable[[Path], _Loaded]) -> _Loaded:
    """Return what *load* makes of a model: a folder, or a GGUF file, converted again if that is damaged."""
    if path.suffix != ".gguf":
        return load(path)
    return conversion.opened(*_names(path), partial(_convert, path), load, what=_what(path))


def _names(gguf: Path) -> tuple[str, str]:
    return "models", file_sha256(gguf)[:32]


def _what(gguf: Path) -> str:
    return f"{gguf.name} to safetensors"


def _convert(gguf: Path, folder: Path) -> None:
    import torch  # only here: a process that only answers does without
    import transformers

    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()  # a bar that transformers cannot switch off
    with quiet, contextlib.redirect_stderr(shown):
        source: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **source)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            dtype=torch.bfloat16,
            quantization_config=transformers.GgufConfig(dequantize=True),
            **source,
        )
        network.config.quantization_config = None
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
