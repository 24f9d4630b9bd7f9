"""The parameters of a torch model as the two graphs of the CPU runtime: with its adapter, and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gistrag.errors import UnsupportedModelError
from gistrag.kv.packed import Floats
from gistrag.model.adapter import linear_weight
from gistrag.model.cpu_graph import GraphBuilder, Shape, WeightFile, decoder
from gistrag.model.gist_model import GistModel
from gistrag.settings import CpuWeights

SHARED = "shared.weights"


def write_graphs(model: GistModel, folder: Path, *, answers: str, text: str, weights: CpuWeights) -> None:
    """Write the graph that reads questions and answers, and the one that reads text where an adapter differs from it.

    Args:
        answers, text: names of the two files; each has its weight matrices beside it, and both share the rest.

    Raises:
        UnsupportedModelError: weights that are not numbers of 16 bits or more, or another activation than SiLU.
    """
    config = model.network.config
    if getattr(config, "hidden_act", "silu") != "silu":
        raise UnsupportedModelError(f"expected the activation silu, found {config.hidden_act!r}")
    if not all(one.is_floating_point() for one in model.network.parameters()):
        raise UnsupportedModelError("the weights of the model are quantized already")
    if model.head_dim % 16:
        raise UnsupportedModelError(f"expected a head_dim that is a multiple of 16, found {model.head_dim}")
    shape = Shape(
        layers=model.layers,
        heads=config.num_attention_heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        epsilon=config.rms_norm_eps,
    )
    angles = torch.arange(model.window)[:, None] * model.rope.inv_freq.float()
    cos, sin = (_array(table * model.rope.scaling) for table in (angles.cos(), angles.sin()))
    names = (answers, text) if model.adapter else (answers,)
    tensors: dict[str, Any] = {}
    with WeightFile(folder / SHARED) as shared:
        for name in names:
            with WeightFile((folder / name).with_suffix(".weights")) as own:
                build = GraphBuilder(shared, own, weights=weights)
                build.reuse(tensors)
                matrix = _matrices(model, merged=name == answers)
                decoder(build, shape, matrix, cos=cos, sin=sin, has_head=name == answers)
                build.save(folder / name)
                tensors = build.shared


def _matrices(model: GistModel, *, merged: bool) -> Callable[[str], Floats | None]:
    """Return what finds a parameter of the network by its name, with the adapter merged in or without."""
    network = model.network
    is_tied = bool(getattr(network.config, "tie_word_embeddings", False))

    def matrix(name: str) -> Floats | None:
        if name == "lm_head.weight" and is_tied:
            return None
        owner, _, kind = name.rpartition(".")
        try:
            part = network.get_submodule(owner)
        except AttributeError:  # the family has no such part
            return None
        found = linear_weight(part, merged=merged) if kind == "weight" else _bias(part)
        return None if found is None else _array(found)

    return matrix


def _bias(part: Any) -> torch.Tensor | None:
    found: torch.Tensor | None = getattr(part, "base_layer", part).bias
    return found


def _array(tensor: torch.Tensor) -> Floats:
    found: Floats = np.asarray(tensor.detach().float().cpu().numpy(), np.float32)
    return found
