"""The network as one ONNX graph for a CPU: 8-bit weights, and a memory that is attended to where it lies.

::

    ids ─ embed ─┬─ norm ─ queries, keys, values ─ attention ─ output ─┬─ norm ─ gate, up ─ down ─┬─ … ─ norm ─ logits
                 └──────────────────────────────────────────────── + ──┴────────────────────── + ─┘
                                                      │
                            keys and values of the layer: input and output are the same buffer

Heads of a memory keep different numbers of tokens. `GroupQueryAttention` knows batches whose rows have different
lengths, so a key-value head is a row of its batch: it has its own length, and no padding slot is ever looked at. A
step writes keys and values of the tokens it reads behind those of each head, and nothing else is copied.

Weights are 8-bit in blocks of 32 along the inputs with one float32 scale (`MatMulNBits`, whose kernels round the
activations to 8 bits as well). They are written tensor by tensor, so a large model is never held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gistrag.kv.packed import Array, Floats
from gistrag.settings import CpuWeights

BLOCK = 32
_PAGE = 4096
_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.uint8): TensorProto.UINT8,
}
FUSED = "com.microsoft"
OPSETS = {"": 21, FUSED: 1}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a decoder of the families in `gistrag.model.support.FAMILIES`.

    Attributes:
        layers, heads, kv_heads, head_dim: of attention; epsilon: of every RMS norm.
        scale: of attention scores; embedded: factor on embeddings; activation: of the feed-forward network.
        ropes: the number of each layer's table of angles, None in a layer that turns nothing.
        local: layers with a window; what is near enough comes as an input, since slots are not positions.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    scale: float
    embedded: float
    activation: str
    ropes: tuple[int | None, ...]
    local: tuple[int, ...] = ()


class WeightFile:
    """A file that tensors are appended to, each at the start of a page; the graph refers to them by offset."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, array: Array) -> TensorProto:
        """Append an array and return the tensor that refers to it."""
        self._file.write(b"\0" * (-self._file.tell() % _PAGE))
        offset, data = self._file.tell(), np.ascontiguousarray(array)
        self._file.write(data.data)
        return self.again(name, data.shape, data.dtype, offset=offset, length=data.nbytes)

    def again(self, name: str, shape: Sequence[int], dtype: np.dtype[Any], *, offset: int, length: int) -> TensorProto:
        """Return a tensor that refers to bytes of the file."""
        tensor = TensorProto(name=name, dims=shape, data_type=_TYPES[dtype], data_location=TensorProto.EXTERNAL)
        for key, value in {"location": self.path.name, "offset": offset, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class GraphBuilder:
    """Collects nodes and tensors of one graph.

    Args:
        shared: file of the tensors that two graphs have in common; own: of those that only this one has.
        weights: numbers of the weight matrices.
    """

    def __init__(self, shared: WeightFile, own: WeightFile, *, weights: CpuWeights) -> None:
        self._shared, self._own, self._weights = shared, own, weights
        self._nodes: list[Any] = []
        self._tensors: dict[str, TensorProto] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def input(self, name: str, kind: Any, shape: Sequence[int | str]) -> str:
        """Add an input of the graph."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        """Make a result an output of the graph."""
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def constant(self, name: str, array: Array) -> str:
        """Add a tensor, once; whole numbers are shapes, which the graph itself has to hold."""
        if name not in self._tensors:
            is_shape = array.dtype == np.int64
            self._tensors[name] = numpy_helper.from_array(array, name) if is_shape else self._shared.add(name, array)
        return name

    def reuse(self, tensors: Mapping[str, TensorProto]) -> None:
        """Take over tensors of the shared file that another graph has written."""
        self._tensors |= tensors

    @property
    def shared(self) -> dict[str, TensorProto]:
        """The tensors in the shared file."""
        return {
            name: tensor
            for name, tensor in self._tensors.items()
            if any(entry.value == self._shared.path.name for entry in tensor.external_data)
        }

    def node(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **settings: Any
    ) -> str:
        """Add an operation and return its first output."""
        self._nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **settings))
        return outputs[0]

    def linear(self, into: str, name: str, matrix: Floats, bias: Floats | None = None) -> str:
        """Add ``into @ matrix.T + bias`` and return its output."""
        added = [] if bias is None else [self.constant(f"{name}_bias", bias)]
        outputs, inputs = matrix.shape
        if self._weights == "float32":
            self._tensors[f"{name}_w"] = self._own.add(f"{name}_w", matrix.T)
            product = self.node("MatMul", [into, f"{name}_w"], [name if bias is None else f"{name}_product"])
            return self.node("Add", [product, *added], [name]) if added else product
        codes, scales = quantized(matrix)
        for suffix, array in (("_q", codes), ("_s", scales)):
            self._tensors[name + suffix] = self._own.add(name + suffix, array)
        given = [into, f"{name}_q", f"{name}_s", *(["", "", *added] if added else [])]
        return self.node("MatMulNBits", given, [name], domain=FUSED, **_eight_bits(inputs, outputs))

    def embedding(self, ids: str, table: Floats) -> str:
        """Add the embedding of *ids* and return its output."""
        if self._weights == "float32":
            return self.node("Gather", [self.constant("embed", table), ids], ["embedded"])
        if "embed_q" not in self._tensors:
            codes, scales = quantized(table)
            self.constant("embed_q", codes.reshape(len(table), -1)[:, : table.shape[1]])
            self.constant("embed_s", scales)
        settings = {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        return self.node("GatherBlockQuantized", ["embed_q", ids, "embed_s"], ["embedded"], domain=FUSED, **settings)

    def tied_head(self, into: str, table: Floats) -> str:
        """Add the logits of a model whose output matrix is its embedding table, which is stored once."""
        if self._weights == "float32":
            return self.linear(into, "logits", table)
        codes = self._tensors["embed_q"]
        place = {entry.key: int(entry.value) for entry in codes.external_data if entry.key != "location"}
        blocks = -(-table.shape[1] // BLOCK)
        shape = (len(table), blocks, BLOCK)
        self._tensors["head_q"] = self._shared.again("head_q", shape, np.dtype(np.uint8), **place)
        settings = _eight_bits(table.shape[1], len(table))
        return self.node("MatMulNBits", [into, "head_q", "embed_s"], ["logits"], domain=FUSED, **settings)

    def save(self, path: Path) -> None:
        """Write the graph."""
        graph = helper.make_graph(self._nodes, "gistrag", self._inputs, self._outputs, list(self._tensors.values()))
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def _eight_bits(inputs: int, outputs: int) -> dict[str, int]:
    return {"K": inputs, "N": outputs, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}


def quantized(matrix: Floats) -> tuple[Array, Floats]:
    """Return a matrix in 8 bits: codes ``(outputs, blocks, 32)`` uint8 around 128, and scales ``(outputs, blocks)``."""
    outputs, inputs = matrix.shape
    blocks = np.pad(matrix, ((0, 0), (0, -inputs % BLOCK))).reshape(outputs, -1, BLOCK)
    scales = np.abs(blocks).max(axis=-1) / 127
    scales[scales == 0] = 1
    codes = np.rint(blocks / scales[..., None]).astype(np.int16) + 128
    return codes.astype(np.uint8), scales.astype(np.float32)


Matrix = Callable[[str], "Floats | None"]
"""Returns a parameter of the network by its name there, float32; None where it has none."""


def decoder(
    build: GraphBuilder, shape: Shape, matrix: Matrix, *, tables: Sequence[tuple[Floats, Floats]], has_head: bool
) -> None:
    """Add all layers of a decoder.

    Args:
        matrix: the parameters, as the adapter makes them for what is read.
        tables: cosine and sine of every position, ``(window, head_dim / 2)``, times the attention scaling; one pair
            for each kind of layer.
        has_head: whether the graph ends in logits; one that reads text ends in keys and values.
    """
    build.input("ids", TensorProto.INT64, [1, "n"])
    build.input("positions", TensorProto.INT64, [shape.kv_heads, "n"])
    build.input("slots", TensorProto.INT32, [])
    build.input("counts", TensorProto.INT32, [shape.kv_heads])
    for kind, (cos, sin) in enumerate(tables):
        build.constant(_of_kind("cos", kind), cos)
        build.constant(_of_kind("sin", kind), sin)
    width = (shape.heads // shape.kv_heads + 2) * shape.head_dim
    build.constant("by_head", np.array([-1, shape.kv_heads, width], np.int64))
    build.constant("as_batch", np.array([shape.kv_heads, -1, width], np.int64))
    build.constant("side_by_side", np.array([1, -1, shape.heads * shape.head_dim], np.int64))
    norm: dict[str, Any] = {"epsilon": shape.epsilon}
    carried = build.embedding("ids", required(matrix, "model.embed_tokens.weight"))
    if shape.embedded != 1:
        factor = build.constant("embedding_scale", np.array(shape.embedded, np.float32))
        carried = build.node("Mul", [carried, factor], ["embedded_scaled"])
    normed = _normed(build, shape, matrix, "model.layers.0.input_layernorm.weight", carried, "normed")
    for layer in range(shape.layers):
        attended = attention(build, shape, matrix, layer, normed)
        name = f"model.layers.{layer}.post_attention_layernorm.weight"
        is_sandwiched = matrix(f"model.layers.{layer}.pre_feedforward_layernorm.weight") is not None
        if is_sandwiched:  # what a layer adds is normalized too
            attended = _normed(build, shape, matrix, name, attended, f"attended_normed{layer}")
            name = f"model.layers.{layer}.pre_feedforward_layernorm.weight"
        names = [f"mlp_in{layer}", "", "", f"between{layer}"]
        given = [carried, attended, _vector(build, matrix, name)]
        inner = build.node("SkipSimplifiedLayerNormalization", given, names, domain=FUSED, **norm)
        made = feed_forward(build, shape, matrix, layer, inner)
        if is_sandwiched:
            name = f"model.layers.{layer}.post_feedforward_layernorm.weight"
            made = _normed(build, shape, matrix, name, made, f"made_normed{layer}")
        last = layer + 1 == shape.layers
        following = "model.norm.weight" if last else f"model.layers.{layer + 1}.input_layernorm.weight"
        names = [f"normed{layer}", "", "", f"carried{layer}"]
        skip = [f"between{layer}", made, _vector(build, matrix, following)]
        normed = build.node("SkipSimplifiedLayerNormalization", skip, names, domain=FUSED, **norm)
        carried = f"carried{layer}"
    if has_head:
        head(build, matrix, normed)


def _of_kind(name: str, kind: int) -> str:
    return f"{name}{kind or ''}"


def _normed(build: GraphBuilder, shape: Shape, matrix: Matrix, weight: str, given: str, name: str) -> str:
    """Add an RMS norm and return its output."""
    settings: dict[str, Any] = {"axis": -1, "stash_type": 1, "epsilon": shape.epsilon}
    return build.node("SimplifiedLayerNormalization", [given, _vector(build, matrix, weight)], [name], **settings)


def attention(build: GraphBuilder, shape: Shape, matrix: Matrix, layer: int, normed: str) -> str:
    """Add the attention of one layer and return its output, ``(1, n, hidden)``."""
    asked = queries_keys_values(build, shape, matrix, layer, normed)
    buffer: list[int | str] = [shape.kv_heads, 1, "capacity", shape.head_dim]
    past = [build.input(f"{kind}{layer}", TensorProto.FLOAT, buffer) for kind in ("keys", "values")]
    ends = build.input(f"ends{layer}", TensorProto.INT32, [shape.kv_heads])
    kind = shape.ropes[layer]
    turn = ["", "", ""] if kind is None else [_of_kind("cos", kind), _of_kind("sin", kind), "positions"]
    near = ""
    if layer in shape.local:
        near = build.input(f"near{layer}", TensorProto.FLOAT, [shape.kv_heads, 1, "n", "slots_filled"])
    inputs = [*asked, *past, ends, "slots", *turn, near, *[""] * 5, "counts"]
    outputs = [f"attended{layer}", f"new_keys{layer}", f"new_values{layer}"]
    settings = {"num_heads": shape.heads // shape.kv_heads, "kv_num_heads": 1, "do_rotary": int(kind is not None)}
    attended = build.node("GroupQueryAttention", inputs, outputs, domain=FUSED, scale=shape.scale, **settings)
    for output in outputs[1:]:
        build.output(output, buffer)
    back = build.node("Transpose", [attended], [f"attended_turned{layer}"], perm=[1, 0, 2])
    flat = build.node("Reshape", [back, "side_by_side"], [f"attended_flat{layer}"])
    name = f"model.layers.{layer}.self_attn.o_proj"
    return build.linear(flat, f"attention_out{layer}", required(matrix, f"{name}.weight"), matrix(f"{name}.bias"))


def queries_keys_values(build: GraphBuilder, shape: Shape, matrix: Matrix, layer: int, normed: str) -> list[str]:
    """Add queries, keys and values, ``(kv_heads, n, …)``, and return the three inputs of attention.

    All three are one product, and stay one input where the family does not normalize queries and keys.
    """
    name = f"model.layers.{layer}.self_attn."

    def by_head(kind: str) -> tuple[Floats, Floats | None]:
        weight, bias = required(matrix, f"{name}{kind}_proj.weight"), matrix(f"{name}{kind}_proj.bias")
        return (
            weight.reshape(shape.kv_heads, -1, weight.shape[1]),
            None if bias is None else bias.reshape(shape.kv_heads, -1),
        )

    weights, biases = zip(*(by_head(kind) for kind in "qkv"), strict=True)
    joined = np.concatenate(weights, axis=1).reshape(-1, weights[0].shape[-1])
    given = [bias for bias in biases if bias is not None]
    bias = np.concatenate(given, axis=1).reshape(-1) if given else None
    qkv = build.linear(normed, f"qkv{layer}", joined, bias)
    rows = build.node("Reshape", [qkv, "by_head"], [f"qkv_rows{layer}"])
    turned = build.node("Transpose", [rows], [f"qkv_turned{layer}"], perm=[1, 0, 2])
    if matrix(f"{name}q_norm.weight") is None:
        return [turned, "", ""]
    group = shape.heads // shape.kv_heads * shape.head_dim
    widths = build.constant("widths", np.array([group, shape.head_dim, shape.head_dim], np.int64))
    build.constant("one_head", np.array([shape.kv_heads, -1, shape.head_dim], np.int64))
    build.constant("one_group", np.array([shape.kv_heads, -1, group], np.int64))
    parts = [f"{kind}{layer}" for kind in ("queries", "own_keys", "own_values")]
    build.node("Split", [turned, widths], parts, axis=2)
    heads = build.node("Reshape", [parts[0], "one_head"], [f"query_heads{layer}"])
    normal: dict[str, Any] = {"axis": -1, "stash_type": 1, "epsilon": shape.epsilon}
    scales = [_vector(build, matrix, f"{name}{kind}_norm.weight") for kind in "qk"]
    heads = build.node("SimplifiedLayerNormalization", [heads, scales[0]], [f"query_normed{layer}"], **normal)
    keys = build.node("SimplifiedLayerNormalization", [parts[1], scales[1]], [f"keys_normed{layer}"], **normal)
    return [build.node("Reshape", [heads, "one_group"], [f"query_groups{layer}"]), keys, parts[2]]


def feed_forward(build: GraphBuilder, shape: Shape, matrix: Matrix, layer: int, inner: str) -> str:
    """Add the gated feed-forward network of one layer and return its output, ``(1, n, hidden)``."""

    def projected(given: str, kind: str) -> str:
        name = f"model.layers.{layer}.mlp.{kind}_proj"
        return build.linear(given, f"{kind}{layer}", required(matrix, f"{name}.weight"), matrix(f"{name}.bias"))

    gate, up = projected(inner, "gate"), projected(inner, "up")
    if shape.activation == "silu":  # x · sigmoid(x)
        active = build.node("QuickGelu", [gate], [f"silu{layer}"], domain=FUSED, alpha=1.0)
    else:
        active = build.node("Gelu", [gate], [f"gelu{layer}"], approximate="tanh")
    return projected(build.node("Mul", [active, up], [f"gated{layer}"]), "down")


def head(build: GraphBuilder, matrix: Matrix, normed: str) -> None:
    """Add the logits behind the last token, ``(1, 1, vocabulary)``."""
    last = build.node("Gather", [normed, build.constant("last", np.array([-1], np.int64))], ["last_state"], axis=1)
    own = matrix("lm_head.weight")
    table = required(matrix, "model.embed_tokens.weight")
    if own is None and table.shape[1] % BLOCK == 0:
        build.tied_head(last, table)
    else:
        build.linear(last, "logits", table if own is None else own)
    build.output("logits", [1, 1, len(table)])


def _vector(build: GraphBuilder, matrix: Matrix, name: str) -> str:
    return build.constant(name, required(matrix, name))


def required(matrix: Matrix, name: str) -> Floats:
    """Return a parameter that every network has."""
    found = matrix(name)
    if found is None:
        raise KeyError(name)
    return found


def with_attention(graph: bytes, layers: Sequence[int]) -> bytes:
    """Return a graph that also gives the attention of some layers, ``attention<layer>``, unless it does already.

    The output is ``(kv_heads, heads / kv_heads, n, slots)``, after the softmax.
    """
    model = onnx.load_from_string(graph)
    wanted = set(layers) - {int(one.name.removeprefix("attention")) for one in model.graph.output
                            if one.name.startswith("attention")}  # fmt: skip
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention" and (layer := int(node.output[0].removeprefix("attended"))) in wanted:
            node.output.append(f"attention{layer}")
            node.attribute.append(helper.make_attribute("qk_output", 2))
            shape = [None, None, None, None]
            model.graph.output.append(helper.make_tensor_value_info(f"attention{layer}", TensorProto.FLOAT, shape))
    extended: bytes = model.SerializeToString()
    return extended
