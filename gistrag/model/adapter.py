"""The trained part of a gist model: a LoRA adapter and the gist vectors.

The one door to peft. The frozen base reads text; the adapter acts where gists are made and where answers are read, so
one text pass serves anchors, gists, teacher and text fallback alike::

    text        prefix and passages        base model alone
    gists       gist tokens                base model + adapter, input embeddings + gist vectors
    answers     question and answer        base model + adapter, merged into the weights where memory allows

An adapter folder holds ``adapter_model.safetensors`` and ``adapter_config.json`` as peft writes them,
``gist_vectors.safetensors``, ``gist_settings.json`` (`AdapterSettings`) and a card, ``README.md``.

peft's other kind of adapter that matters here, the CARTRIDGE, is a KV cache; `cartridge_files` writes one.
"""

from __future__ import annotations

import functools
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from gistrag.errors import ModelNotFoundError
from gistrag.model.hashing import folder_sha256
from gistrag.settings import ADAPTER_FILE, AdapterSettings
from gistrag.storage.fingerprint import require_same


def _compiled_when_called(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Stand in for `torch.compile`: compile *function* at its first call, not where it is defined."""
    if function is None:
        return functools.partial(_compiled_when_called, **options)
    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        compiled = compiled or torch.compile(function, **options)
        return compiled(*args, **kwargs)

    return call


@contextmanager
def _lazy_compilation() -> Iterator[None]:
    """Define functions without loading torch's compiler, which takes 1.4 s; they still compile when they are called."""
    kept, torch.compile = torch.compile, _compiled_when_called  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = kept


logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about optional kernels when peft imports it
with _lazy_compilation():  # bitsandbytes decorates four functions that gistrag never calls
    import peft

VECTORS = "gist_vectors.safetensors"
MERGED_BYTES = 2**31
"""Most bytes of weights that are kept a second time with the adapter merged in."""

Role = Literal["text", "gists", "answers"]
"""What the forward pass reads: the adapter is off for text."""


class Adapter:
    """A LoRA adapter inside a network, and the vectors that mark gist tokens.

    Attributes:
        settings: what it was trained for.
        gist_vectors: ``(n, hidden)``; anchored gists add the first to the anchor's embedding, learned gists are them.
        folder: where it was loaded from, None for one that was never saved; identity: hash of its files there.
    """

    def __init__(
        self, wrapped: Any, gist_vectors: Tensor, settings: AdapterSettings, *, folder: Path | None = None
    ) -> None:
        self._wrapped = wrapped
        self._layers = [part for part in wrapped.modules() if isinstance(part, peft.tuners.tuners_utils.BaseTunerLayer)]
        self._state: Literal["off", "on", "merged"] = "on"
        self._dtype = gist_vectors.dtype  # of the files
        self._weights: list[tuple[Any, Tensor, Tensor]] = []  # (parameter, as loaded, with the adapter merged in)
        self.gist_vectors = gist_vectors
        self.settings = settings
        self.folder = folder
        self.identity = folder_sha256(folder) if folder else ""

    @classmethod
    def create(cls, network: Any, gist_vectors: Tensor, settings: AdapterSettings, *, rank: int, seed: int) -> Adapter:
        """Put a new adapter that changes nothing yet into *network*, in the dtype of its weights.

        Args:
            network: a transformers model.
            gist_vectors: where the gist vectors start.
            rank: of the update of every linear layer; alpha is twice the rank.
            seed: of its random half.
        """
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        with _patient(), torch.random.fork_rng():
            torch.manual_seed(seed)
            wrapped = peft.get_peft_model(network, config, autocast_adapter_dtype=False)
        for weights in _weights(wrapped):
            weights.data = weights.data.to(gist_vectors.dtype)
        return cls(wrapped, gist_vectors, settings)

    @classmethod
    def load(cls, network: Any, folder: Path, *, base: str, prefix: str) -> Adapter:
        """Put the adapter saved in *folder* into *network*.

        Args:
            base: sha256 of the network's weights.
            prefix: the shared prefix it will stand behind.

        Raises:
            ModelNotFoundError: no readable adapter there.
            FingerprintMismatchError: it was trained for another base model or prompt.
        """
        settings = AdapterSettings.read(folder)
        expected = {"base model": settings.base[:12], "prefix": settings.prefix}
        require_same(
            expected, {"base model": base[:12], "prefix": prefix}, where=f"the adapter in {folder}", remedy=_OTHER
        )
        try:
            vectors = safetensors.torch.load_file(folder / VECTORS)["gist_vectors"]
            with _patient():
                wrapped = peft.PeftModel.from_pretrained(network, str(folder), autocast_adapter_dtype=False)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ModelNotFoundError(f"the adapter in {folder} cannot be read: {error}") from error
        for weights in _weights(wrapped):
            weights.data = weights.data.to(vectors.dtype)
        return cls(wrapped, vectors.to(network.device), settings, folder=folder)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Compute in *dtype*, whatever the files hold."""
        for weights in _weights(self._wrapped):
            weights.data = weights.data.to(dtype)
        self.gist_vectors = self.gist_vectors.to(dtype)

    def save(self, folder: Path) -> None:
        """Write the adapter into *folder*, which is made where it is missing."""
        for config in self._wrapped.peft_config.values():
            config.base_model_name_or_path = self.settings.base  # peft would write where the model lay on this machine
        own = {name: one.to(self._dtype) for name, one in self._wrapped.state_dict().items() if "lora_" in name}
        self._wrapped.save_pretrained(str(folder), safe_serialization=True, state_dict=own, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty card
        vectors = {"gist_vectors": self.gist_vectors.detach().to(self._dtype).cpu().contiguous()}
        safetensors.torch.save_file(vectors, folder / VECTORS)
        (folder / ADAPTER_FILE).write_text(json.dumps(asdict(self.settings), indent=1, sort_keys=True) + "\n", "utf-8")

    @property
    def rank(self) -> int:
        """Rank of the low-rank updates."""
        return int(next(iter(self._wrapped.peft_config.values())).r)

    def acts_on(self, role: Role) -> bool:
        """Return whether it changes what is read in this role."""
        return role != "text"

    def switch(self, role: Role) -> None:
        """Turn the adapter on or off for what is read next. State of the network: one reader at a time."""
        is_merged = bool(self._weights) and role == "answers"
        wanted: Literal["off", "on", "merged"] = "merged" if is_merged else "on" if self.acts_on(role) else "off"
        if wanted == self._state:
            return
        for layer in self._layers:
            layer.enable_adapters(wanted == "on")
        if "merged" in (wanted, self._state):
            for parameter, plain, merged in self._weights:
                parameter.data = merged if is_merged else plain
        self._state = wanted

    @torch.no_grad()
    def merge(self) -> None:
        """Keep a second copy of the weights with the adapter merged in, and answer with that: a quarter sooner.

        Nothing changes but for the rounding of the weights. Weights that are quantized, or take over `MERGED_BYTES`,
        are left alone.
        """
        weights = [layer.base_layer.weight for layer in self._layers]
        if not all(one.is_floating_point() for one in weights) or sum(map(_bytes, weights)) > MERGED_BYTES:
            return
        self._weights = [
            (one, one.data, one.data + layer.get_delta_weight(layer.active_adapters[0]))
            for one, layer in zip(weights, self._layers, strict=True)
        ]

    def unmerge(self) -> None:
        """Drop the merged copy, before the adapter is trained."""
        self.switch("text")
        self._weights = []

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and tensor of everything that is trained."""
        yield "gist_vectors", self.gist_vectors
        for name, weights in self._wrapped.named_parameters():
            if "lora_" in name:
                yield name, weights


@torch.no_grad()
def linear_weight(layer: Any, *, merged: bool) -> Tensor:
    """Return the weights of a layer in float32, with the adapter merged in or without; of any other part, its own."""
    if not isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
        own: Tensor = layer.weight.float()
        return own
    plain: Tensor = layer.get_base_layer().weight.float()
    return plain + layer.get_delta_weight(layer.active_adapters[0]).float() if merged else plain


def cartridge_files(kv: Tensor, *, base: str) -> dict[str, bytes]:
    """Return the files, by name, of an adapter with which peft puts a KV cache in front of every prompt.

    Args:
        kv: ``(layers, 2, kv_heads, slots, head_dim)``, keys rotated as seen from a prompt that begins at position
            *slots*, where peft will let it begin.
        base: how the base model is called.
    """
    layers, _, kv_heads, slots, head_dim = kv.shape
    config = peft.CartridgeConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base,
        num_virtual_tokens=slots,
        num_layers=layers,
        num_attention_heads=kv_heads,  # of the cache
        token_dim=kv_heads * head_dim,
        num_transformer_submodules=1,
    )
    flat = kv.permute(3, 0, 1, 2, 4).reshape(slots, -1)  # (slots, layers · 2 · kv_heads · head_dim)
    return {
        "adapter_model.safetensors": safetensors.torch.save({"prompt_embeddings": flat.detach().cpu().contiguous()}),
        "adapter_config.json": (json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n").encode(),
    }


@contextmanager
def _patient() -> Iterator[None]:
    """Silence a warning: peft asks transformers for a renamed property."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


_OTHER = "name the adapter of this model with --adapter, or none"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _weights(wrapped: Any) -> list[Any]:
    return [weights for name, weights in wrapped.named_parameters() if "lora_" in name]
