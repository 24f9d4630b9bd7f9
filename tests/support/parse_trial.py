"""Hostile files put to the proof: each is read as a build reads it, and what is opened on the way is seen.

`Tripwire` sees whether anybody, C libraries included, opened a file outside; `listen` hears all that the Python code of
the parser worker does with files, processes and the network.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.hostile_files import judge, require_whole
from support.tiny_models import byte_tokenizer

from gistrag.documents import parser_worker
from gistrag.documents.chunking import Chunker
from gistrag.documents.discovery import find, load
from gistrag.documents.parser_worker import MEMORY_BYTES, Worker
from gistrag.documents.text import Text
from gistrag.errors import DocumentError
from gistrag.model.tokenizer import plain_tokenizer

CUT_CHARS_MAX = 20_000  # cutting is no part of the promise, and slow; what is longer is only read


class Trial:
    """A folder for one hostile file at a time, read the way a build reads it, by a worker whose steps are heard.

    Attributes:
        slowest_s: most time a file took; peak_bytes: most memory the worker ever asked for.
    """

    def __init__(self, folder: Path, child: Worker) -> None:
        self.root = folder / "root"
        self.root.mkdir()
        self.tripwire = Tripwire(folder / "outside")
        self.slowest_s = 0.0
        self.peak_bytes = 0
        self._child = child
        self._chunker = Chunker(plain_tokenizer(byte_tokenizer()), chunk_tokens=64)

    def read(self, name: str, data: bytes) -> str:
        """Return ``text`` or the reason of a file, having looked at everything that was promised."""
        path = self.root / name
        path.write_bytes(data)
        started_s = time.monotonic()
        outcome = judge(lambda: self._load(name))
        self.slowest_s = max(self.slowest_s, time.monotonic() - started_s)
        path.unlink()
        self._look_at_the_worker()
        assert not self.tripwire.was_touched(), name
        return outcome

    def _load(self, name: str) -> Text:
        found, skipped, _ = find(self.root, include=["*"])
        if skipped:
            raise DocumentError(skipped[0].reason)
        document = load(self.root, found[0])
        assert self.tripwire.secret not in document.text
        if len(document.text) <= CUT_CHARS_MAX:
            require_whole(document, self._chunker.split(document))
        return Text(text=document.text, kind=document.kind, pages=document.pages)  # type: ignore[arg-type]

    def _look_at_the_worker(self) -> None:
        """Note how much memory the worker has asked for; one that was just stopped took no more than its limit."""
        process = self._child._process
        if process is None:
            return
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert f"Max address space {MEMORY_BYTES} " in re.sub(" +", " ", limits)
        if peak := re.search(r"VmPeak:\s+(\d+) kB", status):
            self.peak_bytes = max(self.peak_bytes, int(peak[1]) * 1024)


@contextmanager
def tried(folder: Path, child: Worker) -> Iterator[Trial]:
    """Give a trial with *child* as the worker; at its end, nothing that the worker opened was out of bounds."""
    with pytest.MonkeyPatch.context() as patch:
        log = listen(folder / "listener")
        patch.syspath_prepend(log.parent)
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        patch.setattr(parser_worker, "_worker", lambda _: child)
        trial = Trial(folder, child)
        try:
            yield trial
        finally:
            child.close()
            trial.tripwire.close()
    if not log.exists():  # the worker never started: a process of the tests may get none of the files with a parser
        assert trial.peak_bytes == 0
        return
    assert escapes(log) == []
    assert 0 < trial.peak_bytes <= MEMORY_BYTES


class Tripwire:
    """Tells whether anybody, a C library included, opened a file of a folder; Linux only, https://man7.org inotify(7).

    Attributes:
        canary: a file in the folder, for hostile documents to point at; secret: what it says.
    """

    OPENED = 0x20

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.canary, self.secret = folder / "canary.txt", secrets.token_hex()
        self.canary.write_text(self.secret)
        system = ctypes.CDLL(None, use_errno=True)
        self._queue: int = system.inotify_init1(os.O_NONBLOCK)
        if system.inotify_add_watch(self._queue, os.fsencode(folder), self.OPENED) < 0:
            raise OSError(ctypes.get_errno(), "no inotify")

    def was_touched(self) -> bool:
        """Return whether a file was opened since the last time."""
        try:
            return bool(os.read(self._queue, 4096))
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Give the queue back."""
        os.close(self._queue)


LISTENER = """
import os, sys
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
told = ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.exec", "os.fork", "os.system",
        "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "pickle.find_class")
def listen(event, arguments):
    if event in told:
        line = f"{{event}}\\t{{arguments[0]!s}}\\t{{arguments[2] if event == 'open' else 0}}\\n"
        os.write(log, line.encode(errors="backslashreplace"))
sys.addaudithook(listen)
"""


def listen(folder: Path) -> Path:
    """Write a module into *folder* that a Python child with the folder on its path loads first; return its log.

    What the child then does with files, processes and the network stands in the log, a line each.
    """
    folder.mkdir()
    log = folder / "log"
    (folder / "sitecustomize.py").write_text(LISTENER.format(log=str(log)))
    return log


def escapes(log: Path) -> list[str]:
    """Return the lines of a log that tell of anything but reading the installed code and what it needs."""
    homes = {
        str(Path(place).resolve()) for place in (sys.prefix, sys.base_prefix, Path(__file__).parents[2], log.parent)
    }
    homes |= {sys.prefix, sys.base_prefix, *filter(None, sys.path)}  # packages installed in place are elsewhere
    return [line for line in log.read_text().splitlines() if not _is_expected(line.split("\t"), homes)]


def _is_expected(entry: list[str], homes: set[str]) -> bool:
    event, what, flags = entry
    writes = int(flags) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if event not in ("open", "os.listdir", "os.scandir"):
        return False
    if what in ("/dev/null", "None") or what.isdigit():  # a number is a file that is open already
        return True
    return not writes and any(Path(what).is_relative_to(home) for home in homes)
