"""A vector index gives what a matrix product gives."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from gistrag.errors import FingerprintMismatchError
from gistrag.index import vector_index
from gistrag.index.vector_index import VectorIndex

Matrix = npt.NDArray[np.float32]


def rows(count: int, dim: int = 16, *, seed: int = 0) -> Matrix:
    """Return random normalized vectors."""
    matrix = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    result: Matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    return result


def naive(ids: npt.NDArray[np.int64], matrix: Matrix, vector: Matrix, k: int) -> list[int]:
    """Return the ids by their best score, the slow way."""
    best: dict[int, float] = {}
    for chunk_id, score in zip(ids.tolist(), (matrix @ vector).tolist(), strict=True):
        best[chunk_id] = max(score, best.get(chunk_id, -2.0))
    return sorted(best, key=lambda chunk_id: (-best[chunk_id], chunk_id))[:k]


@pytest.mark.parametrize("k", [1, 5, 40, 1000])
@pytest.mark.parametrize("half", [False, True])
def test_search_equals_the_matrix_product(k: int, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks come by their best vector, also where several vectors share one, in float32 and in float16."""
    monkeypatch.setattr(vector_index, "HALF_PRECISION_FROM", 1 if half else 1000)
    matrix, ids = rows(120), np.arange(120) // 3 + 7
    if half:
        matrix = matrix.astype(np.float16).astype(np.float32)  # so that rounding cannot change the order

    found = VectorIndex.build(ids, matrix).search(matrix[4], k)

    assert naive(ids, matrix, matrix[4], k) == [chunk_id for chunk_id, _ in found]
    assert 8 == found[0][0]
    assert found[0][1] == pytest.approx(1.0, abs=1e-3)  # float16 keeps three digits


def test_one_chunk_that_fills_the_first_places_leaves_room() -> None:
    """A chunk with hundreds of near vectors is one result."""
    matrix = np.concatenate([np.repeat(rows(1), 300, axis=0), rows(3, seed=1)])
    ids = np.array([1] * 300 + [2, 3, 4])

    found = VectorIndex.build(ids, matrix).search(matrix[0], 4)

    assert [1, 2, 3, 4] == sorted(chunk_id for chunk_id, _ in found)


def test_equal_scores_come_by_id() -> None:
    """Ties are broken by the smaller id."""
    matrix = np.repeat(rows(1), 3, axis=0)

    found = VectorIndex.build(np.array([9, 3, 5]), matrix).search(matrix[0], 3)

    assert [3, 5, 9] == [chunk_id for chunk_id, _ in found]


@pytest.mark.parametrize(("allowed", "expected"), [({3, 5}, {3, 5}), (set(), set()), ({99}, set())])
def test_only_allowed_ids_come_back(allowed: set[int], expected: set[int]) -> None:
    """A filter is exact, and never filled up with -1."""
    index = VectorIndex.build(np.arange(20), rows(20))

    assert expected == {chunk_id for chunk_id, _ in index.search(rows(1)[0], 10, allowed=allowed)}


def test_bytes_give_the_same_index() -> None:
    """An index survives its bytes, and equal vectors give equal bytes."""
    index = VectorIndex.build(np.arange(30), rows(30))
    data = index.to_bytes()

    assert index.search(rows(1)[0], 30) == VectorIndex.from_bytes(data).search(rows(1)[0], 30)
    assert data == VectorIndex.build(np.arange(30), rows(30)).to_bytes()
    assert 30 == len(VectorIndex.from_bytes(data))


def test_empty_index_finds_nothing() -> None:
    """No vectors, no results, whatever the question's length."""
    index = VectorIndex.build(np.empty(0, np.int64), np.empty((0, 0), np.float32))

    assert [] == VectorIndex.from_bytes(index.to_bytes()).search(rows(1)[0], 5)


def test_vector_of_another_embedder_is_refused() -> None:
    """A question of another length names both lengths."""
    index = VectorIndex.build(np.arange(2), rows(2, dim=16))

    with pytest.raises(FingerprintMismatchError, match=r"16 numbers.*8"):
        index.search(rows(1, dim=8)[0], 1)
