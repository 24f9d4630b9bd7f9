"""A child process that parses files, so that a hostile file costs one reason and nothing else.

    this process: Worker                       child: python -P -m gistrag.documents.parser_worker

      name and bytes of one file  ──── stdin ───▶  parse, within memory and CPU limits
      its Text, or DocumentError  ◀─── stdout ───  a line of JSON, then UTF-8
      kill after the wall limit                    ends when stdin closes or the parent is gone

Callers use `guarded_read`; plain text has no parser and is read in this process. The child reads one file after
another. An exception, a crash or a limit in the child becomes the reason why the file is not a document; a child that
ended is replaced for the next file.

Not here: the formats (`gistrag.documents.readers`). The child is not a sandbox: its limits bound the time and memory of
a parser, not the files that it may open.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from gistrag.documents.readers import has_parser, read
from gistrag.documents.text import Part, Text, one_line
from gistrag.errors import DocumentError, ResourceError

MEMORY_BYTES = 2**30
CPU_S = 30
WALL_S = 60

_log = logging.getLogger("gistrag")
_OUT_OF_MEMORY = 3  # exit code of the child


def guarded_read(data: bytes, name: str) -> Text:
    """Return what `gistrag.documents.readers.read` returns, from the parser worker if the format has a parser.

    Raises:
        DocumentError: the reason, in one line, why the file is not a document; no other error comes from a file.
        ResourceError: the child cannot start, which has nothing to do with the file.
    """
    return _worker(os.getpid()).read(data, name) if has_parser(name) else read(data, name)


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

    def read(self, data: bytes, name: str) -> Text:
        """Return the text of *data*; raise the `DocumentError` from the child, or the one that its end means."""
        with self._lock:
            head, body = self._ask(data, name)
        if "reason" in head:
            raise DocumentError(head["reason"])
        parts = tuple(Part(start, metadata) for start, metadata in head["parts"])
        return Text(
            text=body.decode(), kind=head["kind"], pages=tuple(head["pages"]), metadata=head["metadata"], parts=parts
        )

    def close(self) -> None:
        """Stop the child, but only in the process that started it, not in a fork of it."""
        if self._owner == os.getpid():
            self._stop()

    def _ask(self, data: bytes, name: str) -> tuple[dict[str, Any], bytes]:
        """Return the child's answer, head and body; stop a child that does not answer completely."""
        process = self._running()
        started_s = time.monotonic()
        timer = threading.Timer(self.wall_s, process.kill)
        timer.start()
        try:
            return _exchange(process, {"name": name}, data)
        except (OSError, EOFError):
            self._stop()
            raise DocumentError(self._cause(process, time.monotonic() - started_s)) from None
        except BaseException:  # interrupted before the whole answer was read
            self._stop()
            raise
        finally:
            timer.cancel()

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
                [sys.executable, "-P", "-m", "gistrag.documents.parser_worker", str(os.getpid()), str(self.cpu_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        except OSError as error:
            raise ResourceError(
                f"could not start the parser worker: {error.strerror}; free memory, or raise the limits on "
                "processes and open files, and run the same command again"
            ) from None
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
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

    def _cause(self, process: subprocess.Popen[bytes], elapsed_s: float) -> str:
        """Return why the child ended."""
        code = process.returncode
        if elapsed_s >= self.wall_s:
            return f"parsing took more than {self.wall_s:g} s"
        if code == -signal.SIGXCPU:
            return f"parsing took more than {self.cpu_s} s of CPU time"
        if code in (_OUT_OF_MEMORY, -signal.SIGABRT):  # pdfium aborts when it gets no memory
            return f"parsing needs more than {MEMORY_BYTES // 2**20} MiB of memory"
        _log.debug("the parser ended with %s", code)
        return "the parser crashed"


def _exchange(process: subprocess.Popen[bytes], head: Mapping[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    assert process.stdin is not None
    assert process.stdout is not None
    _send(process.stdin, head, body)
    return _receive(process.stdout)


# ---------------------------------------------------------------- messages


def _send(pipe: IO[bytes], head: Mapping[str, Any], body: bytes) -> None:
    """Write one message: a line of JSON with the size of the body, then the body."""
    pipe.write(json.dumps({**head, "bytes": len(body)}).encode() + b"\n")
    pipe.write(body)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Return one message; raise EOFError if the other process ended."""
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    head: dict[str, Any] = json.loads(line)
    body = pipe.read(head["bytes"])
    if len(body) < head["bytes"]:
        raise EOFError
    return head, body


# ---------------------------------------------------------------- the child's side


def _serve(parent: int, cpu_s: int) -> None:
    """Answer requests on stdin until it closes. This is all that the child does."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # so that the output of a parser does not reach the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit(resource.RLIMIT_CORE, 0)
    if sys.platform == "linux":  # other kernels refuse it or count something else
        _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    while True:
        try:
            head, body = _receive(requests)
        except EOFError:
            return
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + cpu_s)
        _send(replies, *_answer(body, head["name"]))


def _limit(which: int, most: int) -> None:
    """Set a soft limit, at most the hard limit."""
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def _answer(data: bytes, name: str) -> tuple[dict[str, Any], bytes]:
    """Return the text of *data* as a message, or the reason why the file is not a document."""
    try:
        text = read(data, name)
        parts = [(part.start, dict(part.metadata)) for part in text.parts]
        head = {"kind": text.kind, "pages": text.pages, "metadata": dict(text.metadata), "parts": parts}
        return head, text.text.encode()
    except DocumentError as error:
        return {"reason": str(error)}, b""
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except Exception as error:  # the author of a parser did not expect these bytes
        return {"reason": f"cannot be parsed: {type(error).__name__}: {_printable(str(error))}"[:200]}, b""


def _printable(text: str) -> str:
    """Return *text* on one line, with control characters and unpaired surrogates escaped."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in one_line(text))


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
