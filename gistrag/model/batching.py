"""Groups of sequences that are computed together: of similar length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches_by_length(lengths: Sequence[int], *, budget: int, rows_max: int | None = None) -> Iterator[list[int]]:
    """Yield the numbers of all rows, shortest first, in batches that hold at most *budget* tokens with padding.

    A row longer than *budget* gets a batch of its own.

    Args:
        lengths: tokens of each row.
        rows_max: most rows of a batch.

    >>> list(batches_by_length([9, 2, 3, 2], budget=8))
    [[1, 3], [2], [0]]
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batch and (lengths[row] * (len(batch) + 1) > budget or len(batch) == rows_max):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
