"""Promise 9, the long form: real files, bombs and 5,000 mutations through the worker with the limits it really has."""

from __future__ import annotations

import itertools
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hostile_files import SEEDS, bombs, mutations
from support.parse_trial import tried

from gistrag.documents.parser_worker import MEMORY_BYTES, WALL_S, Worker
from gistrag.documents.readers import is_document

MUTATIONS = 1_000
REPOSITORY = Path(__file__).parents[2]
STOPPING_S = 5  # from the end of a file's time to the end of its worker, on a busy machine


def corpus() -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of real files: the seeds, the manual, the code and the tests of this repository."""
    yield from SEEDS.items()
    for folder in ("docs", "gistrag", "tests"):
        paths = (path for path in sorted((REPOSITORY / folder).rglob("*")) if path.is_file() and is_document(path.name))
        yield from ((path.name, path.read_bytes()) for path in paths)


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="looks on by means of /proc and inotify")
@pytest.mark.parametrize("part", ["real files and bombs", *range(1, 6)])
def test_no_document_can_crash_hang_or_escape(tmp_path: Path, randomness: random.Random, part: str | int) -> None:
    """A text or a reason each, within time and memory, and nothing else is opened."""
    outcomes: Counter[str] = Counter()
    with tried(tmp_path, Worker()) as trial:
        if isinstance(part, int):
            files = itertools.islice(mutations(randomness), MUTATIONS)
        else:
            ready = ((name, make()) for name, make in bombs(str(trial.tripwire.canary)).items())
            files = itertools.chain(corpus(), ready)
        for name, data in files:
            outcomes[trial.read(name, data)[:40]] += 1
    print(f"{outcomes.total():,} documents, {outcomes['text']:,} became text, {len(outcomes):,} kinds of outcome")
    print(f"slowest {trial.slowest_s:.1f} s, worker at most {trial.peak_bytes / 2**20:,.0f} MiB of address space")
    print("\n".join(f"{count:6,} {outcome}" for outcome, count in outcomes.most_common(30)))

    assert trial.slowest_s <= WALL_S + STOPPING_S
    assert trial.peak_bytes <= MEMORY_BYTES
