"""Embeddings of texts, by which chunks are found.

A sentence-embedding model reads a few hundred tokens and silently drops the rest, so a longer text is cut into
overlapping windows and gets one vector for each; the nearest window decides how near a chunk is.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gistrag.errors import ResourceError, UnsupportedModelError, UsageError
from gistrag.index.encoders import E5Encoder, Encoder, Kind, SentenceEncoder, Vectors, graph_encoder
from gistrag.model.hashing import file_sha256
from gistrag.model.hub import quiet
from gistrag.model.identity import model_identity

logger = logging.getLogger("gistrag")

OVERLAP_TOKENS = 32


class Embedder:
    """A sentence-embedding model.

    Attributes:
        folder: where its files are; or the one file that holds it.
        name: by which it was found, None where it was not asked for by name.
    """

    def __init__(self, folder: str | Path, *, device: str | None = None, name: str | None = None) -> None:
        self.folder, self.name = Path(folder), name
        self._device = device or "cpu"
        self._last: tuple[str | None, Vectors] = (None, np.empty(0, np.float32))  # question and vector

    @cached_property
    def _encoder(self) -> Encoder:
        if self.folder.is_file():
            return E5Encoder(self.folder)
        if self._device == "cpu":
            try:
                return graph_encoder(self.folder)
            except (UnsupportedModelError, ImportError, OSError, ResourceError, UsageError) as error:
                logger.warning("embedding with torch, which takes seconds to load: %s", error)
        return SentenceEncoder(self.folder, device=self._device)

    @property
    def window(self) -> int:
        """Most tokens of a text that the model reads, without the special tokens at both ends."""
        return self._encoder.tokens_max - 2

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a vector depends on: the model and the way long texts are cut."""
        model = file_sha256(self.folder) if self.folder.is_file() else model_identity(self.folder)
        return {"embedder": model, "windows": f"overlap {OVERLAP_TOKENS}"}

    @property
    def is_multilingual(self) -> bool:
        """Whether it is known to read Chinese, Japanese and Korean."""
        return self._encoder.is_multilingual

    def comparable(self, cosine: float) -> float:
        """Return a cosine on the scale of the default embedder, by which follow-ups and confidence are judged."""
        slope, offset = self._encoder.cosine_line
        return slope * cosine + offset

    def embed_query(self, question: str) -> Vectors:
        """Return the normalized vector of a question, ``(dim,)`` float32; what exceeds `window` is cut off."""
        question = unicodedata.normalize("NFC", question)
        asked, vector = self._last
        if asked != question:  # an answer is judged by the vector it was searched with
            vector = self._encoder.encode([question], "query")[0]
            self._last = (question, vector)
        return vector

    def embed_documents(self, texts: Sequence[str]) -> list[Vectors]:
        """Return for each text the normalized vectors of its windows, ``(windows, dim)`` float32."""
        windows = [self.windows(text) for text in texts]
        flat = [window for group in windows for window in group]
        if not flat:
            return []
        ends = np.cumsum([len(group) for group in windows])
        return np.split(self._encoder.encode(flat, "document"), ends[:-1])

    def embed(self, texts: Sequence[str], kind: Kind) -> Vectors:
        """Return one normalized vector for each text, ``(n, dim)``: of a longer text the mean of its windows."""
        windows = [self.windows(text) for text in texts]
        flat = self._encoder.encode([window for group in windows for window in group], kind)
        ends = np.cumsum([len(group) for group in windows])
        means = np.stack([part.mean(0) for part in np.split(flat, ends[:-1])])
        normalized: Vectors = means / np.linalg.norm(means, axis=1, keepdims=True)
        return normalized

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text, without the special ones."""
        return self._encoder.count_tokens(text)

    def windows(self, text: str) -> list[str]:
        """Return *text* cut into pieces that the model reads whole, overlapping by about `OVERLAP_TOKENS`."""
        return self._encoder.windows(text, overlap=OVERLAP_TOKENS)

    def unknown_share(self, words: Sequence[str]) -> float:
        """Return the share of words that stand outside of the vocabulary; 0 of a model that knows no unknown word."""
        tokenizer = getattr(self._encoder, "tokenizer", None)
        unknown = tokenizer.token_to_id("[UNK]") if tokenizer and words else None
        if tokenizer is None or unknown is None:
            return 0.0
        read = tokenizer.encode_batch(list(words), add_special_tokens=False)
        return sum(unknown in one.ids for one in read) / len(words)


class Reranker:
    """A cross-encoder that scores a question against each text; slower and sharper than vectors."""

    def __init__(self, folder: str | Path, *, device: str | None = None) -> None:
        self.folder = Path(folder)
        self._device = device

    @cached_property
    def _model(self) -> Any:
        with quiet:
            from sentence_transformers import CrossEncoder

            return CrossEncoder(str(self.folder), device=self._device or "cpu", local_files_only=True)

    def rank(self, question: str, texts: Sequence[str]) -> list[float]:
        """Return the relevance of each text, in the order given; higher is better."""
        scores = self._model.predict([(question, text) for text in texts], show_progress_bar=False)
        return [float(score) for score in scores]
