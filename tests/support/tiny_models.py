"""Small random models and an embedder without one, for tests that need no words to make sense."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gistrag.model.gist_model import GistModel

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
FAMILIES = {
    "gemma3": transformers.Gemma3TextConfig,
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
    "smollm3": transformers.SmolLM3Config,
}
OWN_SHAPE = {
    "gemma3": {
        "head_dim": 16,
        "sliding_window": 512,
        "query_pre_attn_scalar": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mistral": {"sliding_window": None},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}
"""What a family needs, or what lets a test see its peculiarities in three layers."""


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


class ExactRotary(torch.nn.Module):
    """The rotary embedding of transformers without its rounding of angles to float32."""

    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__()
        for name, angles in original.named_buffers():
            setattr(self, name, angles)
        self.attention_scaling = getattr(original, "attention_scaling", 1.0)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, kind: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None] * getattr(self, f"{kind}_inv_freq" if kind else "inv_freq")
        twice = torch.cat((angles, angles), dim=-1)
        return (twice.cos() * self.attention_scaling).to(x.dtype), (twice.sin() * self.attention_scaling).to(x.dtype)


def tiny_network(family: str = "llama", *, dtype: torch.dtype = torch.float64, **changes: object) -> torch.nn.Module:
    """Return a small random model of a family, always the same one."""
    torch.manual_seed(0)
    shape = {**SHAPE, **OWN_SHAPE.get(family, {}), **changes}
    config = FAMILIES[family](**shape)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype)


def tiny_model(family: str = "llama", *, dtype: torch.dtype = torch.float64, **changes: object) -> GistModel:
    """Return a small random `GistModel`; float64, so that equality can be asked for to twelve digits."""
    network = tiny_network(family, dtype=dtype, **changes)
    if dtype == torch.float64:
        network.model.rotary_emb = ExactRotary(network.model.rotary_emb)
    return GistModel(network, byte_tokenizer(), identity=f"tiny {family}")


class HashEmbedder:
    """An embedder without a model: a text is the sum of a direction for each of its words."""

    DIM = 64
    folder = name = None
    is_multilingual = False
    WINDOW_WORDS = 16

    def __init__(self, name: str = "hash") -> None:
        self.fingerprint = {"embedder": name}

    def embed_query(self, question: str) -> npt.NDArray[np.float32]:
        """Return the normalized vector of a text, ``(dim,)``."""
        words = re.findall(r"\w+", question.lower()) or [""]
        seeds = [int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little") for word in words]
        vector = sum(np.random.default_rng(seed).standard_normal(self.DIM) for seed in seeds)
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    def comparable(self, cosine: float) -> float:
        """Return the cosine as it is."""
        return cosine

    def embed_documents(self, texts: Sequence[str]) -> list[npt.NDArray[np.float32]]:
        """Return one vector for every `WINDOW_WORDS` words of each text, ``(parts, dim)``."""
        return [np.stack([self.embed_query(window) for window in self._windows(text)]) for text in texts]

    def embed(self, texts: Sequence[str], kind: str) -> npt.NDArray[np.float32]:
        """Return one vector for each text, ``(n, dim)``."""
        return np.stack([self.embed_query(text) for text in texts])

    def count_tokens(self, text: str) -> int:
        """Return the words of a text."""
        return len(text.split())

    def unknown_share(self, words: Sequence[str]) -> float:
        """Return 0: every word has a direction."""
        return 0.0

    def _windows(self, text: str) -> list[str]:
        words = text.split()
        return [" ".join(words[i : i + self.WINDOW_WORDS]) for i in range(0, max(len(words), 1), self.WINDOW_WORDS)]


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compute tiny models in one thread: on a busy machine, waiting for a second one takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if request.node.get_closest_marker("model") else 1)
    yield
    torch.set_num_threads(threads)
