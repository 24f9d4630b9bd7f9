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
from gistrag.model.support import local_layers
from gistrag.settings import CpuWeights

SHARED = "shared.weights"
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


def write_graphs(model: GistModel, folder: Path, *, answers: str, text: str, weights: CpuWeights) -> None:
    """Write the graph that reads questions and answers, and the one that reads text where an adapter differs from it.

    Args:
        answers, text: names of the two files; each has its weight matrices beside it, and both share the rest.

    Raises:
        UnsupportedModelError: weights that are not numbers of 16 bits or more, or an activation of another kind.
    """
    if not all(one.is_floating_point() for one in model.network.parameters()):
        raise UnsupportedModelError("the weights of the model are quantized already")
    if model.head_dim % 16:
        raise UnsupportedModelError(f"expected a head_dim that is a multiple of 16, found {model.head_dim}")
    shape, tables = _shape(model), []
    for inv_freq in _kinds(model):
        angles = torch.arange(model.window)[:, None] * inv_freq.float()
        tables.append((_array(angles.cos() * model.rope.scaling), _array(angles.sin() * model.rope.scaling)))
    names = (answers, text) if model.adapter else (answers,)
    tensors: dict[str, Any] = {}
    with WeightFile(folder / SHARED) as shared:
        for name in names:
            with WeightFile((folder / name).with_suffix(".weights")) as own:
                build = GraphBuilder(shared, own, weights=weights)
                build.reuse(tensors)
                matrix = _matrices(model, merged=name == answers)
                decoder(build, shape, matrix, tables=tables, has_head=name == answers)
                build.save(folder / name)
                tensors = build.shared


def _shape(model: GistModel) -> Shape:
    """Return the shape of a model of any supported family."""
    config = model.network.config
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(f"expected the activation {' or '.join(ACTIVATIONS)}, found {activation!r}")
    kinds, angles = _kinds(model), model.rope.inv_freq
    by_layer = angles if model.rope.is_by_layer else angles.expand(model.layers, -1)
    return Shape(
        layers=model.layers,
        heads=config.num_attention_heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        epsilon=config.rms_norm_eps,
        scale=float(model.network.model.layers[0].self_attn.scaling),
        embedded=float(getattr(model.network.get_input_embeddings(), "embed_scale", 1.0)),
        activation=activation,
        ropes=tuple(
            next((kind for kind, one in enumerate(kinds) if torch.equal(one, layer)), None) for layer in by_layer
        ),
        local=local_layers(config),
    )


def _kinds(model: GistModel) -> list[torch.Tensor]:
    """Return the angles that layers turn by, each once, ``(head_dim / 2,)``; none of layers that turn nothing."""
    angles = model.rope.inv_freq
    if not model.rope.is_by_layer:
        return [angles]
    kinds: list[torch.Tensor] = []
    for layer in angles:
        if layer.any() and not any(torch.equal(layer, one) for one in kinds):
            kinds.append(layer)
    return kinds


def _matrices(model: GistModel, *, merged: bool) -> Callable[[str], Floats | None]:
    """Return what finds a parameter of the network by its name, with the adapter merged in or without."""
    network = model.network
    is_tied = bool(getattr(network.config, "tie_word_embeddings", False))
    is_centred = network.config.model_type == "gemma3_text"

    def matrix(name: str) -> Floats | None:
        if name == "lm_head.weight" and is_tied:
            return None
        owner, _, kind = name.rpartition(".")
        try:
            part = network.get_submodule(owner)
        except AttributeError:  # the family has no such part
            return None
        found = linear_weight(part, merged=merged) if kind == "weight" else _bias(part)
        if is_centred and found is not None and owner.endswith("norm"):
            found = found + 1  # this family keeps by how much a weight differs from 1
        return None if found is None else _array(found)

    return matrix


def _bias(part: Any) -> torch.Tensor | None:
    found: torch.Tensor | None = getattr(part, "base_layer", part).bias
    return found


def _array(tensor: torch.Tensor) -> Floats:
    found: Floats = np.asarray(tensor.detach().float().cpu().numpy(), np.float32)
    return found
