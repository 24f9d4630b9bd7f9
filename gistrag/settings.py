"""The settings an index is made with, and those an adapter was trained with.

An index is only ever read with the settings it was written with; they are saved inside it and inherited by
whoever opens it. Nothing here is global, and nothing reads the environment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from gistrag.errors import ModelNotFoundError, UsageError

Placement = Literal["matched", "adaptive", "selected", "anchored", "learned"]
MADE: tuple[Placement, ...] = ("anchored", "learned")
"""Placements whose gists are read behind the chunk; the others keep some of its own keys and values."""
Mode = Literal["gist", "text", "hybrid"]
Layout = Literal["spread", "packed"]
"""Where gist caches stand in a prompt, see `gistrag.kv.cache`."""
RuntimeName = Literal["auto", "torch", "cpu"]
"""What runs the model, see `gistrag.model.runtime`; ``auto`` is ``cpu`` where no GPU is, and the model allows it."""
CpuWeights = Literal["int8", "float32"]
"""Numbers of the weight matrices in the CPU runtime; float32 agrees with torch more closely, and is slower."""
KvCacheDtype = Literal["auto", "int8", "int4"]
"""``int4`` serves indexes that were made with it; it is not offered, since its answers were never measured."""

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_EMBEDDER = "all-minilm-l6-v2"
MULTILINGUAL_EMBEDDER = "multilingual-e5-small"
AUTO = "auto"
"""Of an embedder: one of these two, by the documents of a new index, which stores which."""
ADAPTER_FILE = "gist_settings.json"


TOP_K_MAX = 10_000
"""Most chunks that a search returns."""
QUESTION_CHARS_MAX = 2**16
NEW_TOKENS_MAX = 2**31 - 1
SEED_MAX = 2**63 - 1


def require_between(name: str, value: float, low: float, high: float) -> None:
    """Return if a number lies in its range.

    Raises:
        UsageError: it does not, or it is no number.

    >>> require_between("top_k", 3, 1, TOP_K_MAX)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        bound = f"at least {low}" if value < low else f"at most {high:,}"
        raise UsageError(f"{name} must be {bound}, got {value}")


def require_question(question: object) -> str:
    """Return a question, with each half character, which a terminal may pass, replaced; called before any search.

    Raises:
        UsageError: an empty one, one of more than `QUESTION_CHARS_MAX` characters, or no text at all.
    """
    if not isinstance(question, str):
        raise UsageError(f"expected a question in words, got {type(question).__name__}")
    if not question.strip():
        raise UsageError("the question is empty; ask something")
    if len(question) > QUESTION_CHARS_MAX:
        raise UsageError(
            f"a question has at most {QUESTION_CHARS_MAX:,} characters, got {len(question):,}; make its text a document"
        )
    return question.encode("utf-8", "replace").decode()


HELD_OUT = 0.1
"""Share of the articles of a question file that is kept out of training."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """What an adapter was trained for, saved beside its weights.

    Attributes:
        base: sha256 of the weights of its base model, see `gistrag.model.hashing.weights_sha256`.
        placement: where the gists it makes come from.
        index_placement, tokens_per_gist: what answers best with it, the defaults of an index built with it.
        rates: all tokens per gist it was trained at.
        prefix: the shared prefix it was trained behind.
        held_out: share of the articles that was kept out of its training, see `gistrag.qa.dataset.split_by_article`.
        recipe: what made it; not interpreted.
    """

    base: str
    placement: Placement = "anchored"
    index_placement: Placement = "matched"
    tokens_per_gist: int = 4
    rates: tuple[int, ...] = (2, 4, 8, 16)
    prefix: str = ""
    held_out: float = HELD_OUT
    recipe: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> AdapterSettings:
        """Return the settings saved in the folder of an adapter.

        Raises:
            ModelNotFoundError: no adapter of this library there.
        """
        try:
            values = json.loads((folder / ADAPTER_FILE).read_text("utf-8"))
            acts_on_text = values.pop("everywhere", False)  # an experiment of version 0.1
            settings = cls(**{**values, "rates": tuple(values["rates"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelNotFoundError(
                f"expected a gist adapter in {folder}, found no readable {ADAPTER_FILE} there; make one with gistrag "
                "train"
            ) from error
        if acts_on_text:
            raise ModelNotFoundError(
                f"the adapter in {folder} was trained to act on text as well, which is no longer supported; train it "
                "again"
            )
        return settings


@dataclass(frozen=True, kw_only=True)
class GistSettings:
    """How a chunk becomes a gist cache.

    Attributes:
        placement: where the gist tokens come from; see `gistrag.compression.compress`.
        tokens_per_gist: source tokens one gist token stands for, at least 1. 1 keeps the uncompressed KV cache.
        kv_cache_dtype: numbers in gist files: ``"auto"`` those of the model, ``"int8"`` half the bytes and answers as
            good.
        making: version of the placement, see `gistrag.compression.making.MAKINGS`; None for the newest.

    Raises:
        UsageError: a value outside its range.

    >>> GistSettings().tokens_per_gist
    4
    """

    placement: Placement = "matched"
    tokens_per_gist: int = 4
    kv_cache_dtype: KvCacheDtype = "int8"
    making: int | None = None

    def __post_init__(self) -> None:
        if self.placement not in get_args(Placement):
            raise UsageError(f"placement must be one of {', '.join(get_args(Placement))}, got {self.placement!r}")
        if self.tokens_per_gist < 1:
            raise UsageError(f"tokens_per_gist must be at least 1, got {self.tokens_per_gist}")
        if self.kv_cache_dtype not in get_args(KvCacheDtype):
            raise UsageError(f"kv_cache_dtype must be auto or int8, got {self.kv_cache_dtype!r}")


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """The settings of an index; everything else follows from the model.

    Attributes:
        model: hub id, local folder or catalogue name of the model that compresses and answers.
        embedder: hub id, local folder or catalogue name of the sentence-embedding model.
        adapter: folder or catalogue name of the trained adapter, or ``"none"``.
        placement: where a chunk's gists come from; see `gistrag.compression.compress`.
        tokens_per_gist: source tokens one gist stands for, at least 1. 1 keeps the full KV cache.
        chunk_tokens: most tokens of the model's own tokenizer in one chunk.
        quantize: ``"nf4"`` loads the model in 4 bits (bitsandbytes), ``"none"`` as it is stored.
        kv_cache_dtype: numbers of gist files: ``"auto"`` for those of the model, ``"int8"`` for half of the bytes and
            answers as good, ``"int4"`` for a quarter.

    Raises:
        UsageError: a value outside its range.

    >>> IndexSettings().tokens_per_gist
    4
    """

    model: str = DEFAULT_MODEL
    embedder: str = DEFAULT_EMBEDDER
    adapter: str = "none"
    placement: Placement = "matched"
    tokens_per_gist: int = 4
    chunk_tokens: int = 256
    quantize: Literal["none", "nf4"] = "none"
    kv_cache_dtype: KvCacheDtype = "int8"

    def __post_init__(self) -> None:
        if self.chunk_tokens < 16:
            raise UsageError(f"chunk_tokens must be at least 16, got {self.chunk_tokens}")
        if self.quantize not in ("none", "nf4"):
            raise UsageError(f"quantize must be none or nf4, got {self.quantize!r}")
        _ = self.gists

    @property
    def gists(self) -> GistSettings:
        """How the chunks of this index become gist caches."""
        return GistSettings(
            placement=self.placement, tokens_per_gist=self.tokens_per_gist, kv_cache_dtype=self.kv_cache_dtype
        )

    def to_json(self) -> str:
        """Return the settings as one line of JSON with sorted keys."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def fitting(cls, given: Mapping[str, Any], adapter: AdapterSettings | None) -> IndexSettings:
        """Return the settings *given*, and for the rest what the adapter was trained for.

        Raises:
            UsageError: a value outside its range, or gists that this adapter does not make.
        """
        if adapter is None:
            return cls(**given)
        settings = cls(**{"placement": adapter.index_placement, "tokens_per_gist": adapter.tokens_per_gist, **given})
        if settings.placement in MADE and settings.placement != adapter.placement:
            raise UsageError(
                f"the adapter {settings.adapter} makes {adapter.placement} gists, but {settings.placement} was "
                "requested; leave the placement out, or name --adapter none"
            )
        return settings

    @classmethod
    def from_json(cls, line: str) -> IndexSettings:
        """Return the settings saved by `to_json`."""
        values: dict[str, Any] = json.loads(line)
        values.pop("min_quality", None)  # of version 0.1
        return cls(**{"kv_cache_dtype": "auto", **values})  # indexes made before it could be chosen
