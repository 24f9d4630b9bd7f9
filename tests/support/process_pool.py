"""A pool of builders and readers in processes of their own, which a test can kill in any way.

One server process loads the models once and forks a child for each job. A fork of the test process itself would inherit
the locks of its threads, and a new process for each job would take seconds to load.

    python -m support.process_pool fake | real       reads jobs from standard input, a line of JSON each

A job reports what happens in lines of a file of its own, so what it reported before a kill is not lost.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

BATCH_CHUNKS = 6
BATCH_TOKENS = 400
"""Of a batch in the background."""
TESTS = Path(__file__).parents[1]


class Job:
    """A running job."""

    def __init__(self, pool: ProcessPool, pid: int, log: Path) -> None:
        self.pid = pid
        self._pool, self._log = pool, log

    def reports(self) -> list[Any]:
        """Return what the job has reported; a line that a kill cut off is left out."""
        lines = self._log.read_bytes().split(b"\n")[:-1] if self._log.exists() else []
        return [json.loads(line) for line in lines]

    def await_report(self, what: str, *, times: int = 1, limit_s: float = 120.0) -> None:
        """Return when the job has reported *what* so many times, or has ended."""
        end_s = time.monotonic() + limit_s
        while sum(line[0] == what for line in self.reports()) < times and not self.has_ended:
            assert time.monotonic() < end_s, f"{self.reports()} {self.errors()}"
            time.sleep(0.005)

    @property
    def has_ended(self) -> bool:
        """Whether the process ended and nobody has read its exit code yet; known on Linux only."""
        status = Path(f"/proc/{self.pid}/stat")
        return status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z"

    def errors(self) -> str:
        """Return what the job wrote to standard error."""
        return self._log.with_suffix(".err").read_text("utf-8")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the job, which may have ended."""
        os.kill(self.pid, number)  # it stays a zombie until `wait`, so the number is its own

    def wait(self) -> int:
        """Return the job's exit code, or minus the number of the signal that killed it."""
        return int(self._pool.ask({"wait": self.pid})["code"])


class ProcessPool:
    """The server process, which lives as long as a ``with`` block.

    Args:
        folder: for the reports of the jobs.
        models: ``"fake"`` or ``"real"``.
    """

    def __init__(self, folder: Path, *, models: str = "fake") -> None:
        self._folder, self._models, self._count = folder, models, 0

    def __enter__(self) -> Self:
        path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.process_pool", self._models],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self._folder,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to one request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(self, job: str, **arguments: Any) -> Job:
        """Start a job, a function of this module, and return it."""
        self._count += 1
        log = self._folder / f"reports-{self._count}.jsonl"
        request = {"job": job, "log": str(log), "arguments": arguments}
        return Job(self, int(self.ask(request)["pid"]), log)


# In the server process


def build(
    report: Callable[..., None], engine: Any, *, docs: str, index: str, delay_s: float, options: list[str]
) -> int:
    """Run ``gistrag build`` with models that are loaded already; report batches and commits."""
    from support import fake_compressor

    from gistrag.cli import main
    from gistrag.compression import compress as making_gists
    from gistrag.engine import Engine
    from gistrag.index import gist_maker
    from gistrag.index.store import Store

    compress = making_gists.compress if delay_s < 0 else fake_compressor.fake_compress(delay_s)
    commit = Store.commit

    def reporting_compress(*given: Any, **more: Any) -> Any:
        report("batch")
        return compress(*given, **more)

    def reporting_commit(self: Store) -> None:
        commit(self)
        report("commit", fake_compressor.state_of(self))

    making_gists.compress, Store.commit = reporting_compress, reporting_commit  # type: ignore[method-assign]
    gist_maker.BATCH_CHUNKS = BATCH_CHUNKS
    Engine.load = classmethod(lambda *_, **__: engine)  # type: ignore[method-assign, assignment]
    return main.main(["build", docs, "--index", index, "--quiet", "--json", *options])


def work(report: Callable[..., None], engine: Any, *, index: str, delay_s: float) -> int:
    """Make gists in the background with a model that is loaded already; report batches and commits."""
    from support import fake_compressor

    from gistrag.compression import compress as making_gists
    from gistrag.index import background
    from gistrag.index.store import Store

    compress, commit = fake_compressor.fake_compress(delay_s), Store.commit

    def reporting_compress(*given: Any, **more: Any) -> Any:
        report("batch")
        return compress(*given, **more)

    def reporting_commit(self: Store) -> None:
        commit(self)
        report("commit", fake_compressor.state_of(self))

    making_gists.compress, Store.commit = reporting_compress, reporting_commit  # type: ignore[method-assign]
    background._loaded = lambda *_: engine.model
    background.BATCH_TOKENS = BATCH_TOKENS
    reading, _ = os.pipe()
    background.work(Path(index), background.Inbox(os.fdopen(reading, "rb"), os.getppid()), on_demand=False)
    return 0


def read(report: Callable[..., None], engine: Any, *, index: str, questions: int, seed: int, until: str) -> int:
    """Ask questions up to the point where a model would answer, and report how long each took.

    Ends after so many questions, or when there is a file *until*.
    """
    import random

    from support import fake_compressor

    from gistrag.rag import GistRAG

    randomness, fallbacks, latencies_s, wrong = random.Random(seed), 0, [], 0
    with GistRAG.open(index, engine=engine) as rag:
        for number in range(questions):
            if number % 20 == 0:
                report("asked", number)
                if until and Path(until).exists():
                    break
            question = randomness.choice(("rye and honey", "salt of the harbour", "part 2", "the lantern crane"))
            started_s = time.perf_counter()
            passages, usage = fake_compressor.retrieved(rag, question, top_k=4)
            latencies_s.append(time.perf_counter() - started_s)
            fallbacks += usage.text_fallbacks
            wrong += sum(not fake_compressor.is_right(passage, engine) for passage in passages)
    report("done", {"latencies_s": latencies_s, "fallbacks": fallbacks, "wrong": wrong})
    return 0


def _serve(models: str) -> None:
    """Fork a child for each job and wait for those that are asked about, until standard input closes."""
    engine = _load(models)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = {"code": os.waitstatus_to_exitcode(status)}
        else:
            answer = {"pid": _fork(request, engine)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _load(models: str) -> Any:
    import torch

    torch.set_num_threads(1)
    from support import fake_compressor

    if models == "fake":
        return fake_compressor.engine()
    from gistrag.engine import Engine
    from gistrag.settings import IndexSettings

    return Engine.load(IndexSettings())


def _fork(request: dict[str, Any], engine: Any) -> int:
    import torch

    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)  # torch makes its pool anew after a fork, and two threads may not do so at once
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(os.open(Path(request["log"]).with_suffix(".err"), os.O_WRONLY | os.O_CREAT, 0o600), 2)
        reports = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

        def report(*what: Any) -> None:
            os.write(reports, json.dumps(what).encode() + b"\n")

        code = globals()[request["job"]](report, engine, **request["arguments"])
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
