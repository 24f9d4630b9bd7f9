"""Promise 7: one builder at a time, whatever happens to it."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from support.fake_compressor import TOKENS_PER_GIST, versions_in, write_documents
from support.process_pool import ProcessPool

OPTIONS = ["--chunk-tokens", "160", "--tokens-per-gist", str(TOKENS_PER_GIST)]


def pairs(folder: Path, pool: ProcessPool, count: int) -> list[list[int]]:
    """Start builds of one index two at a time and return how each pair ended; those that met."""
    ended = []
    for number in range(count):
        write_documents(folder / "docs", {"a": number + 1, "b": number + 1})
        arguments = {"docs": str(folder / "docs"), "index": str(folder / "index"), "delay_s": 0.05, "options": OPTIONS}
        children = [pool.start("build", **arguments) for _ in range(2)]
        codes = sorted(child.wait() for child in children)
        commits = [line[1] for child in children for line in child.reports() if line[0] == "commit"]
        assert {"a": number + 1, "b": number + 1} == versions_in(commits[-1])
        told = "".join(child.errors() for child in children)
        assert (codes == [0, 0] and told == "") or (codes == [0, 6] and told.count("is in use by process") == 1)
        ended.append(codes)
    return ended


def test_one_of_two_builds(tmp_path: Path, pool: ProcessPool) -> None:
    """Of two builds at the same time one works, the other ends with code 6 and says who is at work."""
    assert [0, 6] in pairs(tmp_path, pool, 3)


@pytest.mark.soak
def test_one_of_two_builds_50_times(tmp_path: Path, pool: ProcessPool) -> None:
    """50 pairs, nearly all of which meet."""
    ended = pairs(tmp_path, pool, 50)
    print(f"{ended.count([0, 6])} of 50 pairs met")

    assert ended.count([0, 6]) >= 40


def test_killed_builder_frees_the_lock(tmp_path: Path, pool: ProcessPool, randomness: random.Random) -> None:
    """After kill -9 the next build begins at once."""
    write_documents(tmp_path / "docs", {f"d{i}": 1 for i in range(9)})
    arguments = {"docs": str(tmp_path / "docs"), "index": str(tmp_path / "index"), "options": OPTIONS}
    for _ in range(3):
        child = pool.start("build", **arguments, delay_s=1.0)
        child.await_report("batch")
        time.sleep(randomness.uniform(0, 0.05))
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL

    assert pool.start("build", **arguments, delay_s=0.0).wait() == 0
