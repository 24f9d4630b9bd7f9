"""Folders that are added in the page: each becomes an index of its own, served as soon as it can be asked.

::

    POST /v1/folders {"path": "notes"}  ── checked ──▶  one build at a time, in a thread  ──▶  a new model of the API
    GET  /v1/folders                    ◀── how far it is, or the error that ended it, in one line

Only folders below one root can be added, no hidden ones, and no link leads out. The index of ``ROOT/notes`` is
``ROOT/.gistrag/notes``; a later server opens it again. This module knows no HTTP; who may ask is decided before.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

from gistrag.configure import source_folder
from gistrag.engine import Engine
from gistrag.errors import GistRAGError, UsageError
from gistrag.index.gist_worker import When
from gistrag.rag import GistRAG
from gistrag.server.registry import Record

logger = logging.getLogger("gistrag")

HOME = ".gistrag"
CHOICES_MAX = 200
NAME_CHARACTERS = 64


class BusyError(Exception):
    """A build is under way."""


class _StoppedError(Exception):
    """The server ends."""


@dataclass(frozen=True, kw_only=True)
class Build:
    """The build of a folder.

    Attributes:
        path: of the folder, below the root; name: of its index.
        state: ``"ready"`` from when the index can be asked.
        documents: how many are read; of: how many are new or changed.
        skipped: files that are no documents.
        error: why it failed, in one line.
    """

    path: str
    name: str
    state: Literal["reading", "ready", "failed"] = "reading"
    documents: int = 0
    of: int = 0
    skipped: int = 0
    error: str = ""


class Folders:
    """Adds folders below a root to the indexes of a server.

    Args:
        root: the folder that all must lie in.
        registry: the served indexes by name; new ones are put in, in the event loop.
        engine: the models of all of them.
        gists: when those of added folders are made, see `GistRAG.open`; device: where.

    Raises:
        UsageError: the root is no folder.
    """

    def __init__(
        self,
        root: Path,
        registry: dict[str, GistRAG],
        engine: Engine,
        *,
        gists: When = "background",
        device: str | None = None,
    ) -> None:
        if not root.is_dir():
            raise UsageError(f"expected a folder at {root}, found none; check --allow-build")
        self._root, self._registry = root.resolve(), registry
        self._how: dict[str, Any] = {"engine": engine, "gists": gists, "device": device}
        self._build: Build | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        self._reopen()

    def record(self) -> Record:
        """Return the JSON record of the build that is under way or was the last, and of folders that may be added."""
        return {"build": asdict(self._build) if self._build else None, "choices": list(self._choices())}

    def add(self, path: str) -> Record:
        """Begin to build the index of a folder, or to bring it up to date; call this in an event loop.

        Raises:
            UsageError: no such folder below the root.
            BusyError: another build is under way.
        """
        folder = self._folder(path)
        if self._build and self._build.state == "reading":
            raise BusyError(f"the folder {self._build.path} is being read; add the next one when that is done")
        inner = folder.relative_to(self._root).as_posix()
        self._build = Build(path=inner, name=self._name(folder))
        self._task = asyncio.create_task(self._run(folder, self._build.name))
        return self.record()

    async def close(self) -> None:
        """End a build that is under way; what it has committed stays."""
        self._is_closed = True
        if self._task:
            await self._task

    # The progress of a build, see gistrag.progress.ReadingProgress

    def read(self, *, documents: int, of: int) -> None:
        """Note how far a build is; end it if the server ends."""
        if self._is_closed:
            raise _StoppedError
        self._note(documents=documents, of=of)

    def plan(self, *, chunks: int, tokens: int, gist_bytes: int) -> None:
        """Note nothing: gists are made in the background."""

    def advance(self, *, chunks: int, tokens: int) -> None:
        """Note nothing."""

    def _note(self, **changes: object) -> None:
        assert self._build is not None
        self._build = replace(self._build, **changes)  # type: ignore[arg-type]  # fields of Build

    async def _run(self, folder: Path, name: str) -> None:
        try:
            rag, skipped = await asyncio.to_thread(self._built, folder, name)
        except _StoppedError:
            self._note(state="failed", error="stopped")
        except GistRAGError as error:
            self._note(state="failed", error=str(error).replace(str(self._root), self._root.name))
        except Exception:
            logger.exception("cannot build an index of %s", folder)
            self._note(state="failed", error="internal error; see the server log")
        else:
            self._registry[name] = rag
            self._note(state="ready", skipped=skipped)

    def _built(self, folder: Path, name: str) -> tuple[GistRAG, int]:
        """Return the index of a folder, built or brought up to date, and how many files are no documents."""
        known = self._registry.get(name)
        if known and self._how["gists"] == "background":  # its worker goes on with the new gists
            return known, len(known.sync(progress=self).skipped)
        rag = GistRAG.from_folder(folder, index=self._root / HOME / name, progress=self, **self._how)
        skipped = len(rag.report.skipped) if rag.report else 0
        if known:
            rag.close()
        elif not rag.store.count():
            rag.close()
            raise UsageError(f"nothing to read in {folder}; gistrag inspect names the files that were skipped")
        return known or rag, skipped

    def _folder(self, path: str) -> Path:
        """Return the folder that a client names, without links.

        Raises:
            UsageError: it is none, or not below the root, or hidden.
        """
        expected = f"expected the path of a folder in {self._root.name}, got {path!r}"
        try:
            folder = (self._root / path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            raise UsageError(expected) from None
        is_inside = folder.is_relative_to(self._root)
        parts = folder.relative_to(self._root).parts if is_inside else ()
        if not is_inside or not folder.is_dir() or any(part.startswith(".") for part in parts):
            raise UsageError(expected)
        return folder

    def _name(self, folder: Path) -> str:
        """Return the name of the index of a folder: its own, or a new one made of its path."""
        inner = folder.relative_to(self._root).as_posix() if folder != self._root else folder.name
        wanted = re.sub(r"[^\w.-]+", "-", inner).strip(".-")[:NAME_CHARACTERS] or "documents"
        names = (wanted if number == 1 else f"{wanted}-{number}" for number in count(1))
        return next(name for name in names if name not in self._registry or self._is_of(name, folder))

    def _is_of(self, name: str, folder: Path) -> bool:
        store = self._registry[name].store
        return store.folder.parent == self._root / HOME and source_folder(store).resolve() == folder

    def _choices(self) -> Iterator[str]:
        """Yield folders right below the root, by name."""
        try:
            entries = sorted(os.scandir(self._root), key=lambda entry: entry.name)
        except OSError:
            return
        folders = [one.name for one in entries if one.is_dir(follow_symlinks=False) and not one.name.startswith(".")]
        yield from folders[:CHOICES_MAX]

    def _reopen(self) -> None:
        """Serve the indexes that were made before; one that cannot be opened is left out, with a warning."""
        for found in sorted((self._root / HOME).glob("*/index.db")):
            name = found.parent.name
            if name in self._registry:
                continue
            try:
                self._registry[name] = GistRAG.open(found.parent, **self._how)
            except GistRAGError as error:
                logger.warning("%s is not served: %s", name, error)
