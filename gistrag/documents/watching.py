"""Noticing that the files of a folder have changed, by looking at names, sizes and times now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from gistrag.documents.discovery import FoundFile, find

INTERVAL_S = 2.0


def changes_of(
    folder: Path, *, include: Sequence[str] = (), exclude: Sequence[str] = (), interval_s: float = INTERVAL_S
) -> Iterator[None]:
    """Yield each time that documents were added, changed or removed, once they have stayed the same for an interval.

    Raises:
        UsageError: the folder is gone.
    """
    last, is_dirty = find(folder, include=include, exclude=exclude), False
    while True:
        time.sleep(interval_s)
        now = find(folder, include=include, exclude=exclude, known=_stamps(last[0]))
        if is_dirty and now == last:
            is_dirty = False
            yield
        is_dirty, last = is_dirty or now != last, now


def _stamps(files: Sequence[FoundFile]) -> dict[str, tuple[int, int, str]]:
    return {file.path: (file.size, file.mtime_ns, file.sha256) for file in files}
