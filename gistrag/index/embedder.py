"""Embeddings of texts, by which chunks are found. The only module that imports sentence-transformers.

A sentence-embedding model reads a few hundred tokens and silently drops the rest, so a longer text is cut into
overlapping windows and gets one vector for each; the nearest window decides how near a chunk is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from gistrag.model.hashing import folder_sha256
from gistrag.model.hub import quiet

Vectors = NDArray[np.float32]

OVERLAP_TOKENS = 32


class Embedder:
    """A sentence-embedding model.

    Attributes:
        folder: where its files are.
    """

    def __init__(self, folder: str | Path, *, device: str | None = None) -> None:
        self.folder = Path(folder)
        self._device = device

    @cached_property
    def _model(self) -> Any:
        with quiet:
            from sentence_transformers import SentenceTransformer

            return SentenceTransformer(str(self.folder), device=self._device or "cpu", local_files_only=True)

    @cached_property
    def window(self) -> int:
        """Most tokens of a text that the model reads, without the special tokens at both ends."""
        return int(self._model.max_seq_length) - 2

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self._model.tokenizer.backend_tokenizer.to_str())
        tokenizer.no_padding()  # its own setting pads to 128, which would count as tokens
        tokenizer.no_truncation()
        return tokenizer

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a vector depends on: the files of the model and the way long texts are cut."""
        return {"embedder": folder_sha256(self.folder), "windows": f"overlap {OVERLAP_TOKENS}"}

    def embed_query(self, question: str) -> Vectors:
        """Return the normalized vector of a question, ``(dim,)`` float32; what exceeds `window` is cut off."""
        vector: Vectors = self._model.encode_query(question, normalize_embeddings=True, show_progress_bar=False)
        return vector.astype(np.float32, copy=False)

    def embed_documents(self, texts: Sequence[str]) -> list[Vectors]:
        """Return for each text the normalized vectors of its windows, ``(windows, dim)`` float32."""
        windows = [self.windows(text) for text in texts]
        flat = [window for group in windows for window in group]
        if not flat:
            return []
        vectors = self._model.encode_document(flat, normalize_embeddings=True, show_progress_bar=False)
        ends = np.cumsum([len(group) for group in windows])
        return np.split(vectors.astype(np.float32, copy=False), ends[:-1])

    def windows(self, text: str) -> list[str]:
        """Return *text* cut into pieces that the model reads whole, overlapping by `OVERLAP_TOKENS`."""
        spans = self._tokenizer.encode(text, add_special_tokens=False).offsets
        if len(spans) <= self.window:
            return [text]
        starts = range(0, len(spans) - OVERLAP_TOKENS, self.window - OVERLAP_TOKENS)  # the last one ends the text
        return [text[spans[i][0] : spans[min(i + self.window, len(spans)) - 1][1]] for i in starts]


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
