"""The memory a training step needs, estimated before it starts.

A sum of what is known: weights, adapter with gradient and optimizer, the text pass without gradient, and what the
gist pass and the rows that are read together must remember for their gradients. Nothing is loaded for it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gistrag.settings import MADE
from gistrag.training.sampler import Mixture
from gistrag.training.trainer import Recipe

NF4_BYTES = 0.5625  # four bits, and one doubly quantised scale for 64 weights


@dataclass(frozen=True)
class Shape:
    """What of a model's configuration decides memory."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    is_tied: bool

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Return the shape in a transformers configuration."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads,
            config.num_key_value_heads, head_dim, config.vocab_size, bool(config.tie_word_embeddings),
        )  # fmt: skip

    @property
    def linear(self) -> int:
        """Weights in the linear layers."""
        return self.layers * sum(rows * columns for rows, columns in self._matrices())

    @property
    def embedding(self) -> int:
        """Weights in the embeddings."""
        return self.vocabulary * self.hidden * (1 if self.is_tied else 2)

    def adapter(self, rank: int) -> int:
        """Return the weights of a LoRA adapter on all linear layers."""
        return self.layers * rank * sum(rows + columns for rows, columns in self._matrices())

    def _matrices(self) -> list[tuple[int, int]]:
        attention, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (self.hidden, attention), (self.hidden, keys), (self.hidden, keys), (attention, self.hidden),
            (self.hidden, self.intermediate), (self.hidden, self.intermediate), (self.intermediate, self.hidden),
        ]  # fmt: skip

    @property
    def remembered(self) -> int:
        """Numbers that one token with gradient makes a layer remember, for linear layers and their adapters."""
        attention = self.heads * self.head_dim
        return 6 * self.hidden + 3 * attention + 2 * self.kv_heads * self.head_dim + 5 * self.intermediate


@dataclass(frozen=True)
class Plan:
    """Bytes of one training step."""

    weights: float
    adapter: float
    text: float
    gists: float
    rows: float
    logits: float

    @property
    def total(self) -> float:
        """Bytes of everything."""
        return float(sum(asdict(self).values()))


def plan(shape: Shape, recipe: Recipe, *, quantize: str = "none") -> Plan:
    """Return the estimated memory of a training step at the lowest rate of the recipe, in bytes.

    Args:
        quantize: ``"nf4"`` for a base in 4 bits.
    """
    mixture = recipe.mixture
    text_tokens = recipe.batches * mixture.contexts * mixture.chunk_tokens
    gist_tokens = text_tokens / min(mixture.rates) if recipe.placement in MADE else 0.0
    row_tokens = recipe.rows_together * mixture.question_tokens
    slots = recipe.rows_together * len(mixture.chunks) * mixture.chunk_tokens
    kv_bytes = 2 * shape.layers * 2 * shape.kv_heads * shape.head_dim
    query_bytes = 2 * shape.layers * shape.heads * shape.head_dim
    repetition = 0.0 if recipe.placement in MADE else text_tokens * (kv_bytes + query_bytes)
    labels = recipe.rows_together * _labels(mixture)
    return Plan(
        weights=shape.linear * (NF4_BYTES if quantize == "nf4" else 2) + 2 * shape.embedding,
        adapter=shape.adapter(recipe.rank) * (2 + 2 + 4 * 4),  # bf16 with gradient; float32 with gradient and moments
        text=3 * text_tokens * kv_bytes + repetition + 2 * text_tokens * shape.intermediate * 3,
        gists=2 * gist_tokens * shape.layers * shape.remembered
        + 2 * gist_tokens * shape.layers * shape.heads * 2 * mixture.chunk_tokens,
        rows=2 * row_tokens * shape.layers * shape.remembered
        + 2 * row_tokens * shape.layers * shape.heads * 2 * len(mixture.chunks) * mixture.chunk_tokens
        + 3 * slots * kv_bytes
        + 2 * slots * query_bytes,  # keys and values, repeated for the heads that share them
        logits=labels * shape.vocabulary * 4 * 4,
    )


def _labels(mixture: Mixture) -> float:
    """Return about how many tokens of a row are learned."""
    return mixture.continued + (mixture.question_tokens - mixture.continued) / 4
