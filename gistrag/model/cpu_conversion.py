"""Converting a model and its adapter for the CPU runtime, once."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gistrag.errors import UnsupportedModelError
from gistrag.kv import gist_file
from gistrag.model.conversion import named, opened
from gistrag.model.cpu_runtime import ANSWERS, FACTS, PREFIX, TEXT, TOKENIZER, CpuRuntime
from gistrag.model.gguf import converted
from gistrag.model.hashing import folder_sha256
from gistrag.settings import CpuWeights

FORMAT = "4"
"""Raised when a conversion of the same model becomes another."""


def open_cpu_runtime(
    model: Path, adapter: Path | None, *, weights: CpuWeights = "int8", traced: Sequence[int] = ()
) -> CpuRuntime:
    """Return the CPU runtime of a model, converted at the first call (some 20 s).

    Args:
        model: folder in the Hugging Face layout, or a GGUF file; adapter: folder of a trained adapter.
        weights: numbers of the weight matrices.
        traced: layers whose attention every answer is traced by; another layer needs a second session.

    Raises:
        UnsupportedModelError: this processor or this model needs the torch runtime.
        ResourceError: the disk is full; UsageError: the cache cannot be written.
    """
    require_processor()
    folder = converted(model) if model.suffix == ".gguf" else model

    def make(target: Path) -> None:
        from gistrag.model.gist_model import GistModel  # torch, which a process that only answers does without

        write(GistModel.load(model, adapter=adapter, device="cpu"), target, weights=weights, traced=traced)

    parts = [FORMAT, weights, folder_sha256(folder), folder_sha256(adapter) if adapter else "none", str(list(traced))]
    runtime = opened("cpu", named(parts), make, CpuRuntime, what="the model for the CPU")
    runtime.model_folder = folder
    return runtime


def require_processor() -> None:
    """Return if this processor multiplies 8-bit numbers quickly.

    Raises:
        UnsupportedModelError: it does not.
    """
    simd: Any = np.show_config(mode="dicts")["SIMD Extensions"]
    if platform.machine().lower() in ("x86_64", "amd64") and {"AVX2", "X86_V3"}.isdisjoint(simd["found"]):
        raise UnsupportedModelError("the CPU runtime needs a processor with AVX2")


def write(model: Any, folder: Path, *, weights: CpuWeights, traced: Sequence[int] = ()) -> None:
    """Write graphs, weights, tokenizer and facts of a `GistModel` into *folder*.

    Raises:
        UnsupportedModelError: the graph cannot express this model.
    """
    from gistrag.model.cpu_graph import with_attention  # onnx
    from gistrag.model.cpu_weights import write_graphs  # torch and onnx
    from gistrag.model.support import local_layers

    write_graphs(model, folder, answers=ANSWERS, text=TEXT, weights=weights)
    if traced:
        (folder / ANSWERS).write_bytes(with_attention((folder / ANSWERS).read_bytes(), traced))
    (folder / PREFIX).write_bytes(gist_file.encode(model.prefix, key=PREFIX, fingerprint=""))
    model.save_tokenizer(folder / TOKENIZER)
    facts = {
        "fingerprint": model.fingerprint,
        "prompt": asdict(model.prompt),
        "window": model.window,
        "stop_ids": sorted(model.stop_ids),
        "line_ends": sorted(model.line_ends),
        "end_id": model.end_id,
        "inv_freq": model.rope.inv_freq.tolist(),
        "scaling": model.rope.scaling,
        "traced": list(traced),
        **{name: getattr(model, name) for name in ("layers", "kv_heads", "head_dim")},
    }
    if model.local_window is not None:
        facts |= {"local_window": model.local_window, "local_layers": local_layers(model.network.config)}
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
