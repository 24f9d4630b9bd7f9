"""Promise 6: readers during a build are answered, in time, from whole commits."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from support.fake_compressor import TOKENS_PER_GIST, write_documents
from support.process_pool import Job, ProcessPool

OPTIONS = ["--chunk-tokens", "160", "--tokens-per-gist", str(TOKENS_PER_GIST)]
READERS = 4


def build(pool: ProcessPool, folder: Path, delay_s: float) -> Job:
    arguments = {"docs": str(folder / "docs"), "index": str(folder / "index"), "options": OPTIONS}
    return pool.start("build", **arguments, delay_s=delay_s)


def documents(step: int) -> dict[str, int]:
    """Return the documents of a folder that grows, shrinks and changes: some stay, some get a new version each step."""
    return {f"d{i}": 1 + (step if i % 3 == 0 else 0) for i in range(12) if (i + step) % 5}


def read(pool: ProcessPool, folder: Path, questions: int, *, until: str = "") -> list[dict[str, Any]]:
    """Let readers ask at the same time and return what each told."""
    index = str(folder / "index")
    readers = [pool.start("read", index=index, questions=questions, seed=i, until=until) for i in range(READERS)]
    return results(readers)


def results(readers: list[Job]) -> list[dict[str, Any]]:
    for reader in readers:
        assert reader.wait() == 0, reader.errors()
    return [reader.reports()[-1][1] for reader in readers]


def latencies(told: list[dict[str, Any]]) -> list[float]:
    return sorted(latency_s for one in told for latency_s in one["latencies_s"])


def p99(sorted_s: list[float]) -> float:
    return sorted_s[int(0.99 * (len(sorted_s) - 1))]


def read_during_builds(pool: ProcessPool, folder: Path, questions: int) -> tuple[list[dict[str, Any]], int]:
    """Let readers ask while builds add, change and remove; return what they told and how many builds there were."""
    index, until, builds = str(folder / "index"), folder / "enough", 0
    readers = [pool.start("read", index=index, questions=10**6, seed=i, until=str(until)) for i in range(READERS)]
    asked, started_s = 0, time.monotonic()
    while asked < questions and time.monotonic() - started_s < 600:
        builds += 1
        write_documents(folder / "docs", documents(builds))
        builder = build(pool, folder, 0.01)
        assert builder.wait() == 0, builder.errors()
        asked = sum(reader.reports()[-1][1] if reader.reports() else 0 for reader in readers)
    until.touch()
    return results(readers), builds


def report(name: str, told: list[dict[str, Any]]) -> float:
    """Print how long questions took and return the 99th percentile in seconds."""
    all_s = latencies(told)
    median_ms, p99_ms = statistics.median(all_s) * 1e3, p99(all_s) * 1e3
    print(f"{name}: {len(all_s):,} questions, median {median_ms:.1f} ms, p99 {p99_ms:.1f} ms")
    return p99(all_s)


def prepare(pool: ProcessPool, folder: Path) -> None:
    write_documents(folder / "docs", documents(0))
    builder = build(pool, folder, 0.0)
    assert builder.wait() == 0, builder.errors()


def test_readers_during_builds(tmp_path: Path, pool: ProcessPool) -> None:
    """Four processes read while builds come and go: no error, nothing wrong, whole documents."""
    prepare(pool, tmp_path)

    told, builds = read_during_builds(pool, tmp_path, 100)
    assert builds
    assert 0 == sum(one["wrong"] for one in told)


def read_beside_a_worker(pool: ProcessPool, folder: Path, questions: int) -> tuple[list[dict[str, Any]], int]:
    """Let readers ask while gists are made in the background, of documents that builds add, change and remove."""
    index, until, workers = str(folder / "index"), folder / "enough", 0
    readers = [pool.start("read", index=index, questions=10**6, seed=i, until=str(until)) for i in range(READERS)]
    asked, started_s = 0, time.monotonic()
    while asked < questions and time.monotonic() - started_s < 600:
        workers += 1
        write_documents(folder / "docs", documents(workers))
        options = [*OPTIONS, "--no-gists"]
        builder = pool.start("build", docs=str(folder / "docs"), index=index, options=options, delay_s=0.0)
        assert builder.wait() == 0, builder.errors()
        worker = pool.start("work", index=index, delay_s=0.01)
        assert worker.wait() == 0, worker.errors()
        asked = sum(reader.reports()[-1][1] if reader.reports() else 0 for reader in readers)
    until.touch()
    return results(readers), workers


def test_readers_beside_a_worker(tmp_path: Path, pool: ProcessPool) -> None:
    """Four processes read while gists come in the background: no error, nothing wrong."""
    prepare(pool, tmp_path)

    told, workers = read_beside_a_worker(pool, tmp_path, 100)
    assert workers
    assert 0 == sum(one["wrong"] for one in told)


@pytest.mark.soak
def test_10000_questions_beside_a_worker(tmp_path: Path, pool: ProcessPool) -> None:
    """10,000 questions, 99 % of them answered within twice the time of an index at rest."""
    prepare(pool, tmp_path)
    idle_s = report("at rest", read(pool, tmp_path, 1000))
    told, workers = read_beside_a_worker(pool, tmp_path, 10_000)
    during_s = report(f"beside {workers} workers", told)

    assert 0 == sum(one["wrong"] for one in told)
    assert during_s <= 2 * idle_s


@pytest.mark.soak
def test_10000_questions_during_builds(tmp_path: Path, pool: ProcessPool) -> None:
    """10,000 questions, 99 % of them answered within twice the time of an index at rest."""
    prepare(pool, tmp_path)
    idle_s = report("at rest", read(pool, tmp_path, 1000))
    told, builds = read_during_builds(pool, tmp_path, 10_000)
    during_s = report(f"during {builds} builds", told)

    assert 0 == sum(one["wrong"] for one in told)
    assert len(latencies(told)) >= 10_000
    print(f"{sum(one['fallbacks'] for one in told)} chunks were read as text, their gist just removed")
    assert during_s <= 2 * idle_s
