"""A child process that reads and cuts files, so that a hostile file costs one reason and nothing else.

    this process: Worker                       child: python -P -m gistrag.documents.parser_child

      name and bytes of one file  ──── stdin ───▶  read, within memory and CPU limits
      its Text, or DocumentError  ◀─── stdout ───  a line of JSON, then UTF-8
      the text of a document      ───────────────▶  cut, within limits that grow with the text
      its chunks                  ◀───────────────
      kill after the wall limit                    ends when stdin closes or the parent is gone

Callers use `guarded_read`, and `gistrag.documents.cutting` to cut. The child takes one file after another. An
exception, a crash or a limit in the child becomes the reason why the file is not a document; a child that ended is
replaced for the next file. The child gets of the environment what it needs, and no keys.

Not here: the formats (`gistrag.documents.readers`). The child is not a sandbox: its limits bound the time and memory of
a parser, not the files that it may open.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from gistrag.documents.text import Part, Text
from gistrag.errors import DocumentError, ResourceError

MEMORY_BYTES = 2**30
CPU_S = 30
WALL_S = 60
CUT_CHARS_PER_S = 50_000
"""Characters that are cut in a second of CPU time at least; a fifth of the speed of prose on a slow processor."""
OUT_OF_MEMORY = 3
"""Exit code of the child."""
KEPT = frozenset(
    ("PATH", "LANG", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "TMPDIR")
)
"""What the child gets of the environment, beside the variables ``LC_…``."""

_log = logging.getLogger("gistrag")


def guarded_read(data: bytes, name: str) -> Text:
    """Return what `gistrag.documents.readers.read` returns, from the parser worker.

    Raises:
        DocumentError: the reason, in one line, why the file is not a document; no other error comes from a file.
        ResourceError: the child cannot start, which has nothing to do with the file.
    """
    return worker().read(data, name)


def worker() -> Worker:
    """Return the worker of this process."""
    return _worker(os.getpid())


@functools.cache
def _worker(pid: int) -> Worker:
    """Return the worker of this process; one for each *pid*, because a fork must not share its parent's pipe."""
    worker = Worker()
    atexit.register(worker.close)
    return worker


# ---------------------------------------------------------------- the parent's side


class Worker:
    """The child and the pipes to it; the child starts at the first file, and again after it ended.

    The child takes at most `MEMORY_BYTES` and ends with this process. Threads can share a worker.

    Args:
        cpu_s: most CPU time for one file, in seconds.
        wall_s: most time for one file, in seconds.
    """

    def __init__(self, *, cpu_s: int = CPU_S, wall_s: float = WALL_S) -> None:
        self.cpu_s = cpu_s
        self.wall_s = wall_s
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._tokenizer = b""  # which the child holds

    def read(self, data: bytes, name: str) -> Text:
        """Return the text of *data*; raise the `DocumentError` from the child, or the one that its end means."""
        head, body = self._ask({"name": name}, data)
        parts = tuple(Part(start, metadata) for start, metadata in head["parts"])
        return Text(
            text=body.decode(), kind=head["kind"], pages=tuple(head["pages"]), metadata=head["metadata"], parts=parts
        )

    def cut(self, text: str, tokenizer: bytes, **about: Any) -> list[dict[str, Any]]:
        """Return the chunks of *text* as values of `gistrag.documents.chunking.Chunk`, without their text.

        Args:
            tokenizer: its JSON.
            about: ``chunk_tokens``; kind, pages, and starts of the parts of the document.

        Raises:
            DocumentError: as for `read`.
            ResourceError: the tokenizer finds no room.
        """
        data, extra_s = text.encode(), len(text) // CUT_CHARS_PER_S
        with self._lock:
            if self._running() and self._tokenizer != tokenizer:
                try:
                    self._exchange({"tokenizer": True}, tokenizer)
                except DocumentError as error:
                    raise ResourceError(f"the parser worker took no tokenizer ({error}); free some memory") from None
                self._tokenizer = tokenizer
            _, body = self._exchange({"cut": about}, data, doing="cutting", extra_s=extra_s)
        chunks: list[dict[str, Any]] = json.loads(body)
        return chunks

    def close(self) -> None:
        """Stop the child, but only in the process that started it, not in a fork of it."""
        if self._owner == os.getpid():
            self._stop()

    def _ask(self, head: Mapping[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        with self._lock:
            return self._exchange(head, data)

    def _exchange(
        self, head: Mapping[str, Any], data: bytes, *, doing: str = "parsing", extra_s: int = 0
    ) -> tuple[dict[str, Any], bytes]:
        """Return the child's answer, head and body; stop a child that does not answer completely.

        Args:
            extra_s: seconds of CPU time beyond the limit; twice as many of wall time.
        """
        process = self._running()
        cpu_s, wall_s = self.cpu_s + extra_s, self.wall_s + 2 * extra_s
        started_s = time.monotonic()
        timer = threading.Timer(wall_s, process.kill)
        timer.start()
        try:
            answer, body = _exchange(process, {**head, "cpu_s": cpu_s}, data)
        except (OSError, EOFError):
            self._stop()
            elapsed_s = time.monotonic() - started_s
            raise DocumentError(_cause(doing, process.returncode, elapsed_s, cpu_s, wall_s)) from None
        except BaseException:  # interrupted before the whole answer was read
            self._stop()
            raise
        finally:
            timer.cancel()
        if "reason" in answer:
            raise DocumentError(answer["reason"])
        return answer, body

    def _running(self) -> subprocess.Popen[bytes]:
        """Return the child; start a new one if none runs."""
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        return self._process or self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        """Start and return a child. It imports from our `sys.path`, never from the current folder (-P)."""
        path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "gistrag.documents.parser_child", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**_environment(), "PYTHONPATH": path},
            )
        except OSError as error:
            raise ResourceError(
                f"could not start the parser worker: {error.strerror}; free memory, or raise the limits on "
                "processes and open files, and run the same command again"
            ) from None
        return self._process

    def _stop(self) -> None:
        process, self._process, self._tokenizer = self._process, None, b""
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except BrokenPipeError:
                pass  # the rest of the request is not needed


def _environment() -> dict[str, str]:
    """Return the environment of the child, in which tokenizers starts no threads: their stacks count as memory."""
    kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith("LC_")}
    return {**kept, "TOKENIZERS_PARALLELISM": "false"}


def _cause(doing: str, code: int, elapsed_s: float, cpu_s: int, wall_s: float) -> str:
    """Return why the child ended."""
    if elapsed_s >= wall_s:
        return f"{doing} took more than {wall_s:g} s"
    if code == -signal.SIGXCPU:
        return f"{doing} took more than {cpu_s} s of CPU time"
    if code in (OUT_OF_MEMORY, -signal.SIGABRT):  # pdfium aborts when it gets no memory
        return f"{doing} needs more than {MEMORY_BYTES // 2**20} MiB of memory"
    _log.debug("the parser ended with %s", code)
    return "the parser crashed"


def _exchange(process: subprocess.Popen[bytes], head: Mapping[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    assert process.stdin is not None
    assert process.stdout is not None
    send(process.stdin, head, body)
    return receive(process.stdout)


# ---------------------------------------------------------------- messages


def send(pipe: IO[bytes], head: Mapping[str, Any], body: bytes) -> None:
    """Write one message: a line of JSON with the size of the body, then the body."""
    pipe.write(json.dumps({**head, "bytes": len(body)}).encode() + b"\n")
    pipe.write(body)
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Return one message; raise EOFError if the other process ended."""
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    head: dict[str, Any] = json.loads(line)
    body = pipe.read(head["bytes"])
    if len(body) < head["bytes"]:
        raise EOFError
    return head, body
