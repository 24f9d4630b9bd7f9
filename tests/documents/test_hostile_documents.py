"""Promise 9: no document can crash, hang or escape. The short form; the long one is `tests/soak/test_documents.py`."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hostile_files import SEEDS, bombs, mutations
from support.parse_trial import Trial, Tripwire, escapes, listen, tried

from gistrag.documents.parser_worker import Worker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks on by means of /proc and inotify")

SEED = 20261125
MUTATIONS = 150


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """A trial with a worker that gives up after a second of CPU time."""
    with tried(tmp_path_factory.mktemp("trial"), Worker(cpu_s=1)) as trial:
        yield trial


@pytest.mark.parametrize("name", SEEDS)
def test_real_files_are_read(trial: Trial, name: str) -> None:
    """What libraries write becomes text, a locked file its reason."""
    expected = "encrypted; save it without a password" if "locked" in name else "text"

    assert trial.read(name, SEEDS[name]) == expected


@pytest.mark.parametrize("name", bombs(""))
def test_bombs_become_text_or_a_reason(trial: Trial, name: str) -> None:
    """Whatever a file does, it costs a second of CPU time and a gibibyte at most, and opens nothing but itself."""
    trial.read(name, bombs(str(trial.tripwire.canary))[name]())


def test_mutated_files_become_text_or_a_reason(trial: Trial) -> None:
    """The same for real files with a few things wrong."""
    print(f"seed: {SEED}")
    files = mutations(random.Random(SEED))

    outcomes = [trial.read(*next(files)) for _ in range(MUTATIONS)]

    assert 0 < outcomes.count("text") < MUTATIONS


def test_the_tripwire_works(tmp_path: Path) -> None:
    """A look at the canary is noticed, so that none means none."""
    tripwire = Tripwire(tmp_path / "outside")
    assert not tripwire.was_touched()

    tripwire.canary.read_text()

    assert tripwire.was_touched()
    tripwire.close()


def test_the_listener_works(tmp_path: Path) -> None:
    """A child that opens another file, makes a folder or starts a program is heard."""
    log = listen(tmp_path / "listener")
    (tmp_path / "other").write_text("x")
    meddling = f"import os; open({str(tmp_path / 'other')!r}); os.mkdir({str(tmp_path / 'new')!r}); os.system('true')"

    subprocess.run([sys.executable, "-c", meddling], env={**os.environ, "PYTHONPATH": str(log.parent)}, check=True)

    assert [line.split("\t")[0] for line in escapes(log)] == ["open", "os.mkdir", "os.system"]
