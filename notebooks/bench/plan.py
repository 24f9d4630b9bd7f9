"""Measure how fast gists are made beside how fast the runtime reads, from which `gistrag build --dry-run` estimates.

    python notebooks/bench/plan.py docs/

prints tokens a second of both over the same documents, medians of the given number of trials, and their ratio, which
is `gistrag.index.plan.MAKING_SHARE`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from gistrag import GistRAG
from gistrag.index.plan import MAKING_SHARE, making_rate


def main() -> None:
    """Build the folder several times and print both rates."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=3)
    given = parser.parse_args()
    trials = [trial(given.folder) for _ in range(given.trials)]
    making, reading = (statistics.median(rates) for rates in zip(*trials, strict=True))
    found = {"making tokens/s": round(making), "reading tokens/s": round(reading), "ratio": round(making / reading, 2)}
    print(json.dumps(found))


def trial(folder: Path) -> tuple[float, float]:
    """Return the tokens a second of making the gists of *folder*, and of reading before it."""
    with (
        tempfile.TemporaryDirectory() as place,
        GistRAG.from_folder(folder, index=Path(place) / "index", gists="none") as rag,
    ):
        reading = making_rate(rag.runtime) / MAKING_SHARE
        pending = sum(rag.store.gists.pending().values())
        rag.model  # noqa: B018  # its loading is no part of the rate
        return pending / rag.sync().seconds, reading


if __name__ == "__main__":
    main()
