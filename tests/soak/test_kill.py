"""Promise 1: a committed chunk survives kill -9, and a build that is interrupted keeps the last commit."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import fake_compressor
from support.fake_compressor import State, look_into, versions_in, write_documents
from support.process_pool import Job, ProcessPool

from gistrag.engine import Engine
from gistrag.index.store import Store
from gistrag.kv.gist_file import decode, read

OPTIONS = ["--chunk-tokens", "160", "--tokens-per-gist", str(fake_compressor.TOKENS_PER_GIST)]
DELAY_S = 0.01
"""What a fake gist takes; as in a real build, more than what putting it on the disk takes."""
LIMIT_S = 5
"""In which a build ends that is told to; the machine may be busy, left alone the builds here go on for longer."""
AIMED = 0.95
"""Share of kills at a random moment of a random batch; the others are at any moment of a build."""


@dataclass
class KilledBuilds:
    """A folder of documents that changes, its index, and builders that are killed while they sync it.

    Attributes:
        versions: of the documents in the folder now.
        acknowledged: what the index held at the last commit that was reported.
        kills: how many builders were killed, *inside* of them in the middle of a batch.
        batches: the last batch of a build to kill in.
        build_s: how long a build takes.
        batch_s: how long after its beginning a batch is likely to last.
    """

    pool: ProcessPool
    folder: Path
    randomness: random.Random
    ids: Callable[[str], Sequence[int]] | None
    delay_s: float = DELAY_S
    documents: int = 8
    batches: int = 3
    acknowledged: State | None = None
    kills: int = 0
    inside: int = 0
    build_s: float = 1.0
    batch_s: float = 0.1

    def __post_init__(self) -> None:
        self.versions: dict[str, int] = {}

    @property
    def index(self) -> Path:
        return self.folder / "index"

    def change(self) -> None:
        """Add, change and remove some documents."""
        for name in (f"d{number}" for number in range(self.documents)):
            chance = self.randomness.random()
            if chance < 0.6:
                self.versions[name] = self.versions.get(name, 0) + 1
            elif chance < 0.75 and len(self.versions) > 1:
                self.versions.pop(name, None)
        self.versions.setdefault("d0", 1)
        write_documents(self.folder / "docs", self.versions)

    def start(self) -> Job:
        options = OPTIONS if self.delay_s >= 0 else []
        arguments = {"docs": str(self.folder / "docs"), "index": str(self.index)}
        return self.pool.start("build", **arguments, delay_s=self.delay_s, options=options)

    def kill_one(self) -> None:
        """Start a build, kill it at a random moment, and compare the index with what was reported."""
        before = set(versions_in(self.acknowledged or {}).items())
        child, started_s = self.start(), time.monotonic()
        is_aimed = self.randomness.random() < AIMED
        if is_aimed:
            child.await_report("batch", times=self.randomness.randint(1, self.batches))
        time.sleep(self.randomness.uniform(0, self.batch_s if is_aimed else self.build_s))
        was_over = child.has_ended
        child.send(signal.SIGKILL)
        code, told = child.wait(), child.reports()
        if was_over:
            self.build_s = 0.7 * self.build_s + 0.3 * (time.monotonic() - started_s) * 0.8
        else:
            is_inside = bool(told) and told[-1][0] == "batch"
            self.kills += 1
            self.inside += is_inside
            self.batch_s *= (1.03 if is_inside else 0.75) if is_aimed else 1  # settles where nine of ten are inside
            assert code == -signal.SIGKILL, child.errors()
        self.look(told, before | set(self.versions.items()))

    def look(self, told: list[list[object]], possible: set[tuple[str, int]]) -> None:
        """Compare the index with the last commit that was reported."""
        commits = [line[1] for line in told if line[0] == "commit"]
        if commits:
            self.acknowledged = _state(commits[-1])
        seen = look_into(self.index, self.ids) if self.ids else _look_at_seals(self.index)
        assert () == seen.wrong
        if seen.state is None:
            assert self.acknowledged is None
            return
        found = versions_in(seen.state)
        assert possible >= set(found.items())
        for path, chunks in (self.acknowledged or {}).items():
            name = Path(path).stem
            is_newer = found.get(name) == self.versions.get(name)  # the last commit was on its way when it was killed
            assert is_newer or seen.state[path] == chunks
        self.acknowledged = seen.state

    def finish(self) -> None:
        """Let a build end; the index then holds what the folder holds."""
        child, started_s = self.start(), time.monotonic()
        assert child.wait() == 0, child.errors()
        self.build_s = time.monotonic() - started_s
        self.look(child.reports(), set(self.versions.items()))
        assert self.versions == versions_in(self.acknowledged or {})

    def run(self, kills: int, *, finish_every: int = 10) -> None:
        """Kill so many builders."""
        self.change()
        self.finish()
        while self.kills < kills:
            self.change()
            self.kill_one()
            if self.randomness.random() < 1 / finish_every:
                self.finish()
        self.finish()
        print(f"{self.kills} killed, {self.inside} of them inside a batch")


def _state(told: object) -> State:
    assert isinstance(told, dict)
    return {path: tuple((text, has_gist) for text, has_gist in chunks) for path, chunks in told.items()}


def _look_at_seals(index: Path) -> fake_compressor.Seen:
    """Return what a reader finds where the gists are real ones: their hashes and seals say whether they are whole."""
    with Store.open(index) as store, store.snapshot():
        state, wrong = fake_compressor.state_of(store), []
        for row in store.gists.rows():
            try:
                store.gists.load(row.key)
                decode(
                    read(store.gists.path(row.key))[0],
                    index,
                    key=row.key,
                    fingerprint=store.config.gists_by,
                    check_seal=True,
                )
            except Exception as error:
                wrong.append(str(error))
    return fake_compressor.Seen(state, tuple(wrong))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return fake_compressor.engine()


def test_killed_builders_lose_nothing(
    tmp_path: Path, pool: ProcessPool, engine: Engine, randomness: random.Random
) -> None:
    """Builders that add, change and remove are killed at random moments; all that was reported is there, bit by bit."""
    KilledBuilds(pool, tmp_path, randomness, engine.model.encode_passage).run(4, finish_every=4)


@dataclass
class KilledWorkers(KilledBuilds):
    """The same of workers that make gists in the background, each after a build that made none."""

    delay_s: float = 0.02

    def kill_one(self) -> None:
        """Let a build put documents, kill a worker at a random moment, and compare the index with what was reported."""
        self.build()
        child = self.pool.start("work", index=str(self.index), delay_s=self.delay_s)
        child.await_report("batch", times=self.randomness.randint(1, self.batches))
        time.sleep(self.randomness.uniform(0, self.batch_s))
        was_over = child.has_ended
        child.send(signal.SIGKILL)
        child.wait()
        told = child.reports()
        if not was_over:
            self.kills += 1
            self.inside += bool(told) and told[-1][0] == "batch"
        self.look_at_gists(told)

    def build(self) -> None:
        arguments = {"docs": str(self.folder / "docs"), "index": str(self.index), "options": [*OPTIONS, "--no-gists"]}
        child = self.pool.start("build", **arguments, delay_s=self.delay_s)
        assert child.wait() == 0, child.errors()
        self.look(child.reports(), set(self.versions.items()))

    def look_at_gists(self, told: list[list[object]]) -> None:
        """Compare the index with the last commit of a worker: no document differs, and no gist is lost."""
        commits = [_state(line[1]) for line in told if line[0] == "commit"]
        seen = look_into(self.index, self.ids or fake_compressor.ids_of)
        assert ((), self.versions) == (seen.wrong, versions_in(seen.state or {}))
        for path, chunks in (commits[-1] if commits else {}).items():
            assert [text for text, _ in chunks] == [text for text, _ in (seen.state or {})[path]]
            kept = zip(chunks, (seen.state or {})[path], strict=True)
            assert all(found or not had for (_, had), (_, found) in kept)
        self.acknowledged = seen.state

    def finish(self) -> None:
        """Let a worker end; every chunk then has its gist."""
        self.build()
        child = self.pool.start("work", index=str(self.index), delay_s=0.0)
        assert child.wait() == 0, child.errors()
        self.look_at_gists(child.reports())
        assert all(found for chunks in (self.acknowledged or {}).values() for _, found in chunks)


def test_killed_workers_lose_nothing(
    tmp_path: Path, pool: ProcessPool, engine: Engine, randomness: random.Random
) -> None:
    """Workers that make gists in the background are killed at random moments; the gists they reported are there."""
    KilledWorkers(pool, tmp_path, randomness, engine.model.encode_passage).run(4, finish_every=4)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(6))
def test_300_killed_workers_lose_nothing(
    tmp_path: Path, pool: ProcessPool, engine: Engine, randomness: random.Random, part: int
) -> None:
    """300 kills in six lives of an index."""
    KilledWorkers(pool, tmp_path, randomness, engine.model.encode_passage).run(50)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(6))
def test_300_killed_builders_lose_nothing(
    tmp_path: Path, pool: ProcessPool, engine: Engine, randomness: random.Random, part: int
) -> None:
    """300 kills in six lives of an index, most of them inside a batch."""
    killing = KilledBuilds(pool, tmp_path, randomness, engine.model.encode_passage)
    killing.run(50)

    assert killing.inside >= 0.8 * killing.kills


@pytest.mark.soak
@pytest.mark.model
@pytest.mark.parametrize("part", range(5))
def test_50_killed_builders_with_the_real_model_lose_nothing(
    tmp_path: Path, randomness: random.Random, part: int
) -> None:
    """50 kills, in five lives of an index, of builds that compress with the real model."""
    with ProcessPool(tmp_path, models="real") as pool:
        killing = KilledBuilds(pool, tmp_path, randomness, None, delay_s=-1, documents=3, batches=1)
        killing.run(10, finish_every=25)

    assert killing.inside >= 0.8 * killing.kills


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_build(
    tmp_path: Path, pool: ProcessPool, engine: Engine, randomness: random.Random, number: signal.Signals
) -> None:
    """SIGTERM and Ctrl-C end a build at once, with code 130 and one line; the last commit is kept."""
    killing = KilledBuilds(pool, tmp_path, randomness, engine.model.encode_passage, delay_s=0.1)
    write_documents(tmp_path / "docs", {f"d{i}": 1 for i in range(20)})
    killing.versions = {f"d{i}": 1 for i in range(20)}
    child = killing.start()
    child.await_report("commit")

    child.send(number)
    started_s = time.monotonic()
    assert child.wait() == 130
    assert time.monotonic() - started_s < LIMIT_S
    assert "gistrag: interrupted; run the same command again to resume\n" == child.errors()
    killing.look(child.reports(), set(killing.versions.items()))
    last_commit = [line for line in child.reports() if line[0] == "commit"][-1]
    assert killing.acknowledged == _state(last_commit[1])
    killing.delay_s = DELAY_S
    killing.finish()
