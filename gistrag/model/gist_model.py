"""The language model: reading text into key-value caches, and answering from them.

A `GistModel` is the torch runtime: it answers on any device, and it alone compresses and is trained. The only way to
run it is a `Reading`. Compression and the words of the prompt live elsewhere.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import threading
from collections.abc import Generator, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gistrag.errors import UsageError
from gistrag.kv.cache import GistCache, Memories, Memory, concatenate
from gistrag.kv.packed import Gists, PackedGists
from gistrag.model.adapter import Adapter, Role
from gistrag.model.attention import ATTENTION
from gistrag.model.gguf import converted, opened
from gistrag.model.hashing import weights_sha256
from gistrag.model.hub import quiet
from gistrag.model.identity import model_identity
from gistrag.model.loading import load_network
from gistrag.model.prompt import chat_prompt
from gistrag.model.reading import Reading, decode_steps
from gistrag.model.runtime import Floats, Runtime, Trace, require_single
from gistrag.model.support import begins_every_text, local_layers, multiplies_16_bits, require_supported, rope_of
from gistrag.model.tokenizer import renderer
from gistrag.settings import AdapterSettings, Layout

logger = logging.getLogger("gistrag")


class GistModel(Runtime[Memory]):
    """A causal language model that can read text into key-value caches and answer from them.

    Attributes:
        network: the transformers model, in evaluation mode, without gradients.
        rope: the angles of its rotary position embedding.
        layers, kv_heads, head_dim: shape of its cache; window: positions it was trained for.
        device: where it computes; dtype: of its weights as they came, in which gists are kept.
        network_dtype: in which it computes: float32 on a processor that multiplies 16-bit numbers slowly.
        weights: sha256 of its weights, which an adapter belongs to.
        adapter: the trained part, None for the base model as it came.
        is_training: gradients flow through what the adapter acts on.

    Raises:
        UnsupportedModelError: a family, attention or RoPE variant that this library has not verified.
    """

    name = "torch"
    out_of_memory = torch.OutOfMemoryError

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        *,
        identity: str,
        weights: str = "",
        quantize: str = "none",
        dtype: torch.dtype | None = None,
    ) -> None:
        require_supported(network.config)
        network.set_attn_implementation(ATTENTION)
        begin, render = begins_every_text(network.config, tokenizer), renderer(tokenizer)
        super().__init__(tokenizer.backend_tokenizer, chat_prompt(render, begin=begin))
        self.network = network.eval().requires_grad_(False)
        self._trained_stop_ids, self.end_id = _end_ids(network.generation_config.eos_token_id, tokenizer.eos_token_id)
        self.line_ends = frozenset() if render else self._line_ends()
        self.stop_ids = self._trained_stop_ids | self.line_ends
        self._identity = identity
        self.weights = weights or identity
        self._quantize = quantize
        self.adapter: Adapter | None = None
        self.is_training = False
        self._turn = threading.RLock()  # whether the adapter acts is state of the network: one reader at a time
        config = network.config
        self.layers: int = config.num_hidden_layers
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.window: int = config.max_position_embeddings
        self.local_window = config.sliding_window if local_layers(config) else None
        self.device: torch.device = network.device
        if self.device.type != "cpu":
            self.piece_tokens = 2048  # a GPU reads many tokens in the time of a few
        self.dtype: torch.dtype = dtype or network.dtype
        self.rope = rope_of(network)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        adapter: str | Path | None = None,
        quantize: Literal["none", "nf4"] = "none",
        device: str | None = None,
    ) -> GistModel:
        """Return the model at *path*: a folder in the Hugging Face layout, or a GGUF file.

        A GGUF file is converted once to bf16 safetensors in the user's cache and loaded from there afterwards.

        Args:
            adapter: folder of a trained adapter.
            quantize: ``"nf4"`` for 4-bit weights with double quantization and bf16 compute.
            device: a torch device; by default a CUDA GPU where there is one.
        """
        network, tokenizer = opened(Path(path), partial(load_network, device=device, quantize=quantize))
        folder = converted(Path(path)) if Path(path).suffix == ".gguf" else Path(path)
        dtype = network.dtype
        if quantize == "none" and network.device.type == "cpu" and not multiplies_16_bits():
            network.float()
        model = cls(
            network,
            tokenizer,
            identity=model_identity(folder),
            weights=weights_sha256(Path(path)),
            quantize=quantize,
            dtype=dtype,
        )
        model.model_folder = folder
        if adapter is not None:
            with quiet:
                model.adapter = Adapter.load(network, Path(adapter), base=model.weights, prefix=model.prompt.prefix)
                model.adapter.compute_in(model.network_dtype)
            model.adapter.merge()
            model.stop_ids, model.line_ends = model._trained_stop_ids, frozenset()
        return model

    def new_adapter(self, *, rank: int, gists: int, seed: int = 0, **settings: Any) -> None:
        """Give the model a new adapter, which changes nothing until it is trained.

        Args:
            rank: of the update of every linear layer.
            gists: learned gist vectors; 1 for anchored gists, which all share one that starts at zero.
            seed: of its random half.
            settings: further fields of `AdapterSettings`.
        """
        placement = settings.get("placement", "anchored")
        vectors = torch.zeros(1, self._table.shape[1]) if placement == "anchored" else self.gist_vectors(gists)
        chosen = AdapterSettings(base=self.weights, prefix=self.prompt.prefix, **settings)
        vectors = vectors.to(self.device, self.dtype)
        self.adapter = Adapter.create(self.network, vectors, chosen, rank=rank, seed=seed)
        self.adapter.compute_in(self.network_dtype)
        self.stop_ids, self.line_ends = self._trained_stop_ids, frozenset()

    def _line_ends(self) -> frozenset[int]:
        """Return the tokens that end a line: a plain language model without an adapter goes on with a next question."""
        begun = (self.encode("\n" * count)[0] for count in range(1, 5))
        return frozenset(token for token in begun if self.decode([token]).strip(" ").startswith("\n"))

    def prepare_training(self) -> None:
        """Make gradients possible; to be called before anything is read.

        bitsandbytes packs 4-bit weights for a CPU at the first reading outside of training, and then passes wrong
        gradients through them.

        Raises:
            UsageError: that has happened.
        """
        states = [getattr(weights, "quant_state", None) for weights in self.network.parameters()]
        if any(getattr(state, "packing_format_for_cpu", False) for state in states):
            raise UsageError("expected a model that has read nothing yet, found its 4-bit weights packed; load it anew")
        if self.adapter:
            self.adapter.unmerge()
        self.network.train()

    @property
    def network_dtype(self) -> torch.dtype:
        """What the network computes in: a cache is widened to it first, and rounded to `dtype` in the end."""
        dtype: torch.dtype = self.network.dtype
        return dtype

    @property
    def kv_bytes_per_slot(self) -> int:
        """Bytes of keys and values that one cache slot takes, in a file and before the network widens it."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def context_bytes_per_slot(self) -> int:
        """Bytes that one slot takes while the network reads it."""
        return self.kv_bytes_per_slot * self.network_dtype.itemsize // self.dtype.itemsize

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a gist depends on: weights, adapter and tokenizer, RoPE geometry, dtype and prompt prefix."""
        shown = " ".join(
            f"{angle:.3g}" for angle in self.rope.inv_freq.flatten().tolist()
        )  # last bits differ by machine
        angles = hashlib.sha256(shown.encode()).hexdigest()[:16]
        return {
            "model": self._identity + (f" {self._quantize}" if self._quantize != "none" else ""),
            **({"adapter": self.adapter.identity} if self.adapter else {}),
            "rope": f"{angles} x {self.rope.scaling:g}",
            "kv_dtype": str(self.dtype).removeprefix("torch."),
            "prefix": hashlib.sha256(self.prompt.prefix.encode()).hexdigest()[:16],
        }

    @property
    def prefix(self) -> GistCache:
        """The cache of the shared prefix, behind which every chunk is compressed."""
        return self._read_prefix[0]

    @property
    def prefix_hidden(self) -> Tensor:
        """Final hidden states of the shared prefix, ``(n, hidden)``."""
        return self._read_prefix[1]

    @cached_property
    def _read_prefix(self) -> tuple[GistCache, Tensor]:
        ids = self.encode_template(self.prompt.prefix)
        reading, positions = self.read(), torch.arange(len(ids))
        hidden = reading.feed(torch.tensor([ids]), positions=positions)
        kv = reading.kv()[:, :, 0]
        return self.unrotated(kv, positions.to(self.device), start=0, source_tokens=len(ids)), hidden[0]

    @property
    def _table(self) -> Tensor:
        table: Tensor = self.network.get_input_embeddings().weight
        return table

    def embed(self, ids: Tensor) -> Tensor:
        """Return the input embeddings of *ids*, ``(..., hidden)``."""
        embeddings: Tensor = self.network.get_input_embeddings()(ids.to(self.device))
        return embeddings

    def gist_vectors(self, count: int) -> Tensor:
        """Return input embeddings of the tokens ``<GIST_0> … <GIST_count-1>``, ``(count, hidden)``.

        Without training they are the mean embedding of the vocabulary plus seeded noise of its spread.
        """
        if self.adapter and self.adapter.settings.placement == "learned" and len(self.adapter.gist_vectors) >= count:
            return self.adapter.gist_vectors[:count].to(self._table.dtype)
        table = self._table * getattr(self.network.get_input_embeddings(), "scalar_embed_scale", 1)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(count, table.shape[1], generator=generator).to(table)
        return table.mean(dim=0) + table.std(dim=0) * noise

    @property
    def gist_mark(self) -> Tensor | float:
        """What is added to the embedding of an anchor token to make it a gist token: ``(hidden,)``, or nothing."""
        return self.adapter.gist_vectors[0] if self.adapter else 0.0

    @contextlib.contextmanager
    def reading_as(self, role: Role) -> Iterator[None]:
        """Let the adapter act, and gradients flow, as *role* wants it."""
        acts = self.adapter is not None and self.adapter.acts_on(role)
        with self._turn:
            if self.adapter:
                self.adapter.switch(role)
            with torch.set_grad_enabled(self.is_training and acts):
                yield

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[GistModel]:
        """Yield the base model, which shares this network; nobody else may use the network meanwhile."""
        with self._turn:
            base = copy.copy(self)
            base.adapter = None
            if self.adapter:
                self.adapter.switch("text")
            yield base

    @property
    def can_widen(self) -> bool:
        """Whether float32 holds more than the weights do, which 4-bit ones cannot be turned into."""
        return self._quantize == "none" and self.network_dtype.itemsize < torch.float32.itemsize

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32 for the length of the block; afterwards every weight is what it was, bit by bit."""
        with self._turn:
            if self.adapter:
                self.adapter.switch("text")
            narrow = [(weights, weights.data) for weights in self.network.parameters()]
            dtype, self.dtype = self.dtype, torch.float32
            self.__dict__.pop("_read_prefix", None)  # read again in either dtype
            try:
                for weights, values in narrow:
                    weights.data = values.float()
                yield
            finally:
                for weights, values in narrow:
                    weights.data = values
                self.dtype = dtype
                self.__dict__.pop("_read_prefix", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the next-token logits of final hidden states, ``(..., vocabulary)``."""
        scores: Tensor = self.network.lm_head(hidden)
        return scores

    def read(self, memory: Memory | None = None, *, batch: int = 1) -> Reading:
        """Return a reading that starts behind *memory*, shared by *batch* rows."""
        if memory is None:
            return Reading(self, None)
        kv = memory.kv[:, :, None].expand(-1, -1, batch, -1, -1, -1)
        visible = None if memory.visible is None else memory.visible[:, None].expand(-1, batch, -1, -1)
        return Reading(self, kv, visible, memory.positions[:, None].expand(-1, batch, -1, -1))

    def read_behind(self, memories: Memories) -> Reading:
        """Return a reading that starts behind a memory for each row."""
        return Reading(self, memories.kv, memories.visible, memories.positions)

    @property
    def device_name(self) -> str:
        """The torch device."""
        return str(self.device)

    @property
    def prefix_slots(self) -> int:
        """Slots of `prefix`."""
        return self.prefix.gists

    def concatenate(self, caches: Sequence[Gists], *, layout: Layout = "spread", start: int = 0) -> Memory:
        """Return the shared prefix and gist caches side by side, on the device of the model."""
        return concatenate(
            [self.prefix, *(_on(self.device, one) for one in caches)], self.rope, layout=layout, start=start
        )

    def read_text_steps(self, memory: Memory, ids: Sequence[int]) -> Generator[None, None, Memory]:
        """Return a memory with *ids* read as text behind it, by the base model."""
        position, reading = memory.next_position, self.read(memory)
        for piece in self.pieces(ids):
            reading.feed(torch.tensor([list(piece)]), positions=position + torch.arange(len(piece)))
            position += len(piece)
            yield
        return reading.memory(position)

    def decode_steps(
        self,
        memories: Sequence[Memory],
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        trace: Trace | None = None,
    ) -> Iterator[dict[int, int]]:
        """Yield the next token of every unfinished row; all rows are computed as one batch.

        A prompt is read in pieces where there is only one.
        """
        require_single(memories, trace)
        return decode_steps(
            self, memories, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, trace=trace
        )

    def attention(self, memory: Memory, ids: Sequence[int], *, layers: Sequence[int]) -> dict[int, list[Floats]]:
        """Return how much each of *ids* attends to the slots of *memory*, see `Runtime.attention`."""
        found: dict[int, list[Floats]] = {}
        reading = self.read(memory)
        positions = memory.next_position + torch.arange(len(ids))
        reading.feed(
            torch.tensor([list(ids)]), positions=positions, observer=reading.watch(layers, found), role="answers"
        )
        return {layer: found[layer] for layer in layers}

    def unrotated(self, kv: Tensor, positions: Tensor, *, start: int, source_tokens: int) -> GistCache:
        """Return keys and values that the model rotated as a cache that can stand anywhere.

        Args:
            kv: ``(layers, 2, kv_heads, gists, head_dim)``, keys rotated to ``start + positions``.
            positions: ``(gists,)`` or ``(layers, kv_heads, gists)``, inside the chunk.
        """
        keys = self.rope.unrotate(kv[:, 0], positions + start).to(self.dtype)
        return GistCache(torch.stack((keys, kv[:, 1].to(self.dtype)), dim=1), positions, source_tokens)


def _end_ids(ids: int | list[int] | None, eos: int | None) -> tuple[frozenset[int], int]:
    """Return the token ids that end an answer, and the one that ends a turn of the chat template.

    Args:
        ids: what the generation settings of the model name; eos: what its tokenizer names.
    """
    listed = ids if isinstance(ids, list) else [ids]
    stop = frozenset(i for i in (*listed, eos) if i is not None)
    end = eos if ids is None or isinstance(ids, list) else ids
    return stop, -1 if end is None else int(end)


def _on(device: torch.device, gists: Gists) -> GistCache:
    """Return gists as tensors on a device."""
    if isinstance(gists, PackedGists):
        return GistCache.unpacked(gists, device)
    if not isinstance(gists, GistCache):
        raise TypeError(f"expected gists of a file or a gist cache, got {type(gists).__name__}")
    return gists.to(device)
