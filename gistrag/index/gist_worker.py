"""The worker that makes the gists of an index while questions are answered from text: a child process.

::

    this process: GistWorker                   child: python -P -m gistrag.index.background

      ids of chunks just read as text ── stdin ──▶  makes their gists first, then all others, batch by batch
      pause, go                                     computes nothing in between
      one line if it gives up        ◀── stdout ──  ends when no gist is pending, or stdin closes

The child has the lowest priority and a model of its own, so an answer waits neither for a lock of the interpreter nor
long for a core. It may be killed at any moment, and loses at most one batch.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from gistrag.index import schema
from gistrag.index.store import Store
from gistrag.progress import GistProgress

When = Literal["background", "on demand", "now", "none"]
"""When the gists of an index are made: by a worker, all or those that were asked for; by whoever builds; not at all."""

RESTART_S = 30.0
"""A worker that ended is not started again by a question sooner."""
END_S = 5.0
"""How long a worker that is told to end may take to keep its batch."""
IDS_MAX = 256
"""Most ids in a message, which then fits into one write to a pipe."""

logger = logging.getLogger("gistrag")


class GistWorker:
    """The child that makes the gists of one index, and the pipe to it; it ends with this object, or this process.

    Args:
        store: of the index.
        when: the gists are made; a folder that may not be written gets none.
        device: of the model that compresses; places: where model and adapter are, if not where the index says.

    Attributes:
        is_wanted: whether a child makes gists at all.
        error: why the child gave up, in one line; empty where it did not.
    """

    def __init__(
        self,
        store: Store,
        when: When = "none",
        *,
        device: str | None = None,
        places: Mapping[str, str] | None = None,
    ) -> None:
        self.is_wanted = when in ("background", "on demand") and os.access(store.folder, os.W_OK)
        self.error = ""
        self._store, self._when, self._device = store, when, device
        self._places = json.dumps(dict(places or {}))
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[Any, Any] | None = None
        self._started_s = -RESTART_S
        self._questions = 0
        self._is_wanted_again = False

    @property
    def progress(self) -> GistProgress:
        """How far the gists of the index are."""
        chunks, pending = self._store.gists.chunks()
        return GistProgress(done=chunks - pending, chunks=chunks, is_working=self._is_running(), error=self.error)

    def start(self) -> None:
        """Start the child if gists are pending; where they are made on demand, the first `ask` does so."""
        if self.is_wanted and self._when == "background" and self._store.gists.chunks()[1]:
            with self._lock:
                if self._is_running():
                    self._is_wanted_again = True  # it may be about to end
                else:
                    self._start()

    def ask(self, chunk_ids: Sequence[int]) -> None:
        """Let the gists of these chunks be made first."""
        if not self.is_wanted:
            return
        with self._lock:
            if not self._is_running() and not self.error and time.monotonic() - self._started_s >= RESTART_S:
                self._start()
            for start in range(0, len(chunk_ids), IDS_MAX):
                self._send(list(chunk_ids[start : start + IDS_MAX]))

    def ask_for(self, key: str) -> None:
        """Let a gist be made first."""
        self.ask([row[0] for row in self._store.database.execute(schema.CHUNKS_BY_GIST, (key,))])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the child compute nothing during the block, but for `PAUSE_S` seconds at most."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def close(self) -> None:
        """End the child; what it has not committed is lost."""
        with self._lock:
            self._stop()

    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _count(self, step: int) -> None:
        with self._lock:
            before, self._questions = self._questions, self._questions + step
            if not (before and self._questions):
                self._send("pause" if self._questions else "go")

    def _start(self) -> None:
        self._stop()
        self._is_wanted_again = False
        self.error, self._started_s = "", time.monotonic()
        arguments = [str(os.getpid()), str(self._store.folder), self._when, self._device or "", self._places]
        path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gistrag.index.background", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                process_group=0,  # Ctrl-C at the terminal is not for it
            )
        except OSError as error:
            self._give_up(error.strerror or str(error))
            return
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # an answer never waits for the worker
        self._end = weakref.finalize(self, _end, self._process, os.getpid())
        listening = (weakref.ref(self), self._process)
        threading.Thread(target=_listen, args=listening, name="gists", daemon=True).start()
        if self._questions:
            self._send("pause")

    def _stop(self) -> None:
        self._process = None  # so that nobody takes its end for a failure
        if self._end is not None:
            self._end()
            self._end = None

    def _send(self, message: Any) -> None:
        """Send a message; one that the child cannot take now is lost, which costs no more than some order."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError, ValueError):
                os.write(self._process.stdin.fileno(), json.dumps(message).encode() + b"\n")

    def _give_up(self, reason: str) -> None:
        self.error = reason
        logger.warning("no gists are made for %s, it answers from text: %s", self._store.folder, reason)


def _listen(worker: weakref.ref[GistWorker], process: subprocess.Popen[bytes]) -> None:
    """Wait until a child has ended, and let its worker say why if it gave up or was killed."""
    assert process.stdout is not None
    with process.stdout as told:
        lines = told.read().decode(errors="replace").splitlines()
    code = process.wait()
    listener = worker()
    if listener is None or listener._process is not process:  # it was told to end
        return
    if lines:
        listener._give_up(json.loads(lines[-1]))
    elif code:
        listener._give_up(f"the process that makes them ended with code {code}")
    elif listener._is_wanted_again:
        listener.start()


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """End a child, but only in the process that started it, not in a fork of it."""
    if os.getpid() != owner:
        return
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
