"""Promise 9, the long form: 5,000 hostile documents through the parser worker with the limits it really has."""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import SEEDS, bombs, mutations
from trial import tried

from gistrag.readers import is_document
from gistrag.worker import MEMORY_BYTES, WALL_S, Worker

DOCUMENTS = 5_000
REPOSITORY = Path(__file__).parents[2]
STOPPING_S = 5  # from the end of a file's time to the end of its worker, on a busy machine


def corpus() -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of real files: the seeds, the manual, the code and the tests of this repository."""
    yield from SEEDS.items()
    for folder in ("docs", "gistrag", "tests"):
        paths = (path for path in sorted((REPOSITORY / folder).glob("*")) if path.is_file() and is_document(path.name))
        yield from ((path.name, path.read_bytes()) for path in paths)


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="looks on by means of /proc and inotify")
def test_no_document_can_crash_hang_or_escape(tmp_path: Path, randomness: random.Random) -> None:
    """Corpus, bombs and mutations: a text or a reason each, within time and memory, and nothing else is opened."""
    outcomes: Counter[str] = Counter()
    with tried(tmp_path, Worker()) as trial:
        ready = ((name, make()) for name, make in bombs(str(trial.tripwire.canary)).items())
        for name, data in itertools.islice(itertools.chain(corpus(), ready, mutations(randomness)), DOCUMENTS):
            outcomes[trial.read(name, data)[:40]] += 1
    print(f"{outcomes.total():,} documents, {outcomes['text']:,} became text, {len(outcomes):,} kinds of outcome")
    print(f"slowest {trial.slowest_s:.1f} s, worker at most {trial.peak_bytes / 2**20:,.0f} MiB of address space")
    print("\n".join(f"{count:6,} {outcome}" for outcome, count in outcomes.most_common(30)))

    assert outcomes.total() == DOCUMENTS
    assert trial.slowest_s <= WALL_S + STOPPING_S
    assert trial.peak_bytes <= MEMORY_BYTES
