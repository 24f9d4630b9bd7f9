"""Nearest vectors by inner product.

A `VectorIndex` maps normalized vectors to chunk ids, exactly: every vector is compared. Several vectors may share one
chunk, which then counts with its best. It never changes once built, and knows no file, no database and no embedder.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from gistrag.errors import FingerprintMismatchError

HALF_PRECISION_FROM = 200_000
"""Vectors from which float16 is kept: half the memory, scores differ in the fourth digit."""


class VectorIndex:
    """Chunk ids by the nearness of their vectors."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def build(cls, ids: npt.NDArray[np.int64], vectors: npt.NDArray[np.float32]) -> VectorIndex:
        """Return an index of *vectors* ``(n, dim)``, normalized, that stand for the chunks *ids* ``(n,)``.

        >>> import numpy as np
        >>> index = VectorIndex.build(np.array([7, 9]), np.eye(2, dtype=np.float32))
        >>> index.search(np.array([0, 1], dtype=np.float32), 1)
        [(9, 1.0)]
        """
        faiss = _faiss()
        count, dim = vectors.shape
        if count < HALF_PRECISION_FROM:
            flat = faiss.IndexFlatIP(dim)
        else:
            flat = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        index = faiss.IndexIDMap2(flat)
        if count:
            index.add_with_ids(np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(ids, np.int64))
        return cls(index)

    @classmethod
    def from_bytes(cls, data: bytes) -> VectorIndex:
        """Return the index saved by `to_bytes`; the caller has checked that the bytes are those."""
        return cls(_faiss().deserialize_index(np.frombuffer(data, np.uint8)))

    def to_bytes(self) -> bytes:
        """Return the index as bytes, the same for the same vectors in the same order."""
        data: bytes = _faiss().serialize_index(self._index).tobytes()
        return data

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def search(
        self, vector: npt.NDArray[np.float32], k: int, *, allowed: Collection[int] | None = None
    ) -> list[tuple[int, float]]:
        """Return up to *k* chunk ids with the score of their best vector, best first, equal scores by id.

        Args:
            vector: ``(dim,)``, normalized.
            k: how many chunks.
            allowed: the only ids that may be returned; None for all.

        Raises:
            FingerprintMismatchError: the vector has another length than those of the index.
        """
        if not len(self) or (allowed is not None and not allowed):
            return []
        if vector.shape != (self._index.d,):
            raise FingerprintMismatchError(
                f"the index holds vectors of {self._index.d} numbers, the question has {vector.shape}; "
                "open the index with the embedder that made it"
            )
        best: dict[int, float] = {}
        fetch = 2 * k  # several vectors of one chunk may fill the first places
        while True:
            best = self._best(vector, min(fetch, len(self)), allowed)
            if len(best) >= k or fetch >= len(self):
                return sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))[:k]
            fetch *= 4

    def _best(self, vector: npt.NDArray[np.float32], fetch: int, allowed: Collection[int] | None) -> dict[int, float]:
        faiss = _faiss()
        only = None
        if allowed is not None:
            selector = faiss.IDSelectorBatch(np.fromiter(allowed, np.int64, len(allowed)))
            only = faiss.SearchParameters(sel=selector)
        scores, ids = self._index.search(np.ascontiguousarray(vector[None], np.float32), fetch, params=only)
        best: dict[int, float] = {}
        for chunk_id, score in zip(ids[0].tolist(), scores[0].tolist(), strict=True):
            if chunk_id >= 0:  # faiss fills up with -1
                best.setdefault(chunk_id, score)
        return best


def _faiss() -> Any:
    """Return faiss; on macOS imported after torch, because each brings its own OpenMP and the other order crashes."""
    if sys.platform == "darwin":
        import torch  # noqa: F401
    import faiss

    return faiss
