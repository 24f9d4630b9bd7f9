"""The child of `gistrag.documents.parser_worker`: reads and cuts one file after the other, within limits.

It answers three messages: ``name``, the bytes of a file, with its text; ``tokenizer``, its JSON, with nothing; and
``cut``, a text, with its chunks.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers

from gistrag.documents.chunking import Chunker
from gistrag.documents.discovery import Document
from gistrag.documents.parser_worker import MEMORY_BYTES, OUT_OF_MEMORY, receive, send
from gistrag.documents.readers import read
from gistrag.documents.text import Part, one_line
from gistrag.errors import DocumentError

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER and CLONE_NEWNET of Linux


def _serve(parent: int) -> None:
    """Answer requests on stdin until it closes. This is all that the child does."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # so that the output of a parser does not reach the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit(resource.RLIMIT_CORE, 0)
    leave_network()
    child = _Child()
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    while True:
        try:
            head, body = receive(requests)
        except EOFError:
            return
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + head["cpu_s"])
        send(replies, *_answer(child, head, body))


def _limit(which: int, most: int) -> None:
    """Set a soft limit, at most the hard limit."""
    hard = resource.getrlimit(which)[1]
    resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def leave_network() -> bool:
    """Leave the network where the kernel allows it, and return whether it did: no address can be reached then."""
    if sys.platform != "linux":
        return False
    system = ctypes.CDLL(None)
    return any(system.unshare(flags) == 0 for flags in (_NEW_NETWORK, _NEW_USER | _NEW_NETWORK))


class _Child:
    """Reads files, and cuts texts with the tokenizer that it was given last."""

    def __init__(self) -> None:
        self._tokenizer: tokenizers.Tokenizer | None = None
        self._tokenizer_bytes = 0
        self._limit_memory()

    def _limit_memory(self) -> None:
        if sys.platform == "linux":  # other kernels refuse it or count something else
            _limit(resource.RLIMIT_AS, MEMORY_BYTES + self._tokenizer_bytes)

    def read(self, data: bytes, name: str) -> tuple[dict[str, Any], bytes]:
        """Return the text of a file as a message."""
        text = read(data, name)
        parts = [(part.start, dict(part.metadata)) for part in text.parts]
        head = {"kind": text.kind, "pages": text.pages, "metadata": dict(text.metadata), "parts": parts}
        return head, text.text.encode()

    def load(self, tokenizer: bytes) -> None:
        """Take a tokenizer in; its memory counts for no document."""
        self._tokenizer = None
        _limit(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS)[1])
        before = _used_bytes()
        self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer)
        self._tokenizer.encode_special_tokens = True  # which the JSON does not hold
        self._tokenizer_bytes = _used_bytes() - before
        self._limit_memory()

    def cut(self, text: str, about: Mapping[str, Any]) -> bytes:
        """Return the chunks of a text as JSON."""
        assert self._tokenizer is not None
        document = Document(
            path="",
            sha256="",
            size=0,
            mtime_ns=0,
            kind=about["kind"],
            text=text,
            pages=tuple(about["pages"]),
            parts=tuple(Part(start, {}) for start in about["parts"]),
        )
        chunks = Chunker(self._tokenizer, chunk_tokens=about["chunk_tokens"]).split(document)
        return json.dumps([{**asdict(chunk), "text": ""} for chunk in chunks]).encode()


def _used_bytes() -> int:
    """Return the address space of this process, 0 where nothing tells it."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return 0


def _answer(child: _Child, head: Mapping[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the answer to a message, or the reason why the file is not a document."""
    try:
        if "name" in head:
            return child.read(data, head["name"])
        if "cut" in head:
            return {}, child.cut(data.decode(), head["cut"])
        child.load(data)
        return {}, b""
    except DocumentError as error:
        return {"reason": str(error)}, b""
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception as error:  # the author of a parser did not expect these bytes
        return {"reason": f"cannot be parsed: {type(error).__name__}: {_printable(str(error))}"[:200]}, b""


def _printable(text: str) -> str:
    """Return *text* on one line, with control characters and unpaired surrogates escaped."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in one_line(text))


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
