"""GGUF files: converted once to safetensors, since gistrag needs weights that can be saved and trained."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from gistrag.model.hashing import cache_folder, file_sha256
from gistrag.model.hub import quiet

logger = logging.getLogger("gistrag")


def converted(gguf: Path) -> Path:
    """Return the folder of bf16 safetensors made from a GGUF file, converting it on the first call (some 20 s).

    The folder is named by the sha256 of the file, and appears in one step when it is whole.
    """
    target = cache_folder() / "models" / file_sha256(gguf)[:32]
    if target.is_dir():
        return target
    logger.info("converting %s to safetensors, once", gguf.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
        _convert(gguf, Path(scratch) / "model")
        try:
            (Path(scratch) / "model").rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, and its result is the same
                raise
    return target


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
