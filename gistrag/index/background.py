"""The child process that makes the gists of an index in the background, see `gistrag.index.gist_worker`.

It holds ``gists.lock`` as long as it lives, so each index has at most one, and the lock of builders only while it keeps
a batch: builders wait for that moment, and the child waits for builders.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from torch.nn.modules.module import register_module_forward_pre_hook

from gistrag.errors import GistRAGError, IndexLockedError
from gistrag.index import manifest
from gistrag.index.database import nothing_built
from gistrag.index.fingerprint import gist_fingerprint
from gistrag.index.gist_maker import BATCH_CHUNKS, keep, make, require_space, token_ids
from gistrag.index.schema import StoredChunk
from gistrag.index.store import BACKGROUND, Store, pending_chunks
from gistrag.kv.cache import GistCache
from gistrag.model.gist_model import GistModel
from gistrag.model.hub import find, find_adapter
from gistrag.storage import files
from gistrag.storage.fingerprint import require_same

LOCK = "gists.lock"
BATCH_TOKENS = 2048
"""Small, so that what was asked for comes soon."""
NICENESS = 19
PAUSE_S = 30.0
"""Longest pause: an answer that nobody reads on does not stop the work."""
RETRY_S = 0.5


class Inbox:
    """What the parent sent: chunks that were asked for, and whether to pause.

    Attributes:
        keeping: held while a batch is kept; when the parent is gone the process ends, but not inside of that.
    """

    def __init__(self, source: IO[bytes], parent: int) -> None:
        self.keeping = threading.Lock()
        self._asked: dict[int, None] = {}
        self._changed = threading.Condition()
        self._paused_until_s = 0.0
        threading.Thread(target=self._read, args=(source,), daemon=True).start()
        threading.Thread(target=self._end_with, args=(parent,), daemon=True).start()

    def asked(self) -> list[int]:
        """Return the chunks that were asked for, the last ones first."""
        with self._changed:
            return [*reversed(self._asked)]

    def done(self, chunk_ids: Iterable[int]) -> None:
        """Forget chunks that were asked for."""
        with self._changed:
            for chunk_id in chunk_ids:
                self._asked.pop(chunk_id, None)

    def await_asked(self) -> None:
        """Return when a chunk is asked for."""
        with self._changed:
            self._changed.wait_for(lambda: self._asked)

    def await_go(self) -> None:
        """Return when no question is being answered."""
        while (rest_s := self._paused_until_s - time.monotonic()) > 0:
            with self._changed:
                self._changed.wait(rest_s)

    def _read(self, source: IO[bytes]) -> None:
        for line in source:
            message = json.loads(line)
            with self._changed:
                if isinstance(message, list):
                    for chunk_id in reversed(message):
                        self._asked.pop(chunk_id, None)
                        self._asked[chunk_id] = None
                else:
                    self._paused_until_s = time.monotonic() + PAUSE_S if message == "pause" else 0.0
                self._changed.notify_all()
        self._exit()

    def _end_with(self, parent: int) -> None:
        """End with the parent, even if a fork of it still holds the pipe."""
        while os.getppid() == parent:
            time.sleep(RETRY_S)
        self._exit()

    def _exit(self) -> None:
        with self.keeping:
            os._exit(0)


def work(
    folder: Path,
    inbox: Inbox,
    *,
    on_demand: bool,
    device: str | None = None,
    places: Mapping[str, Any] | None = None,
) -> None:
    """Make the gists of an index, those that were asked for first; return when none is pending.

    Raises:
        GistRAGError: no gists can be made.
    """
    model, made_by = None, ""
    while True:
        with Store.open(folder) as store:
            chunks = _next(store, inbox, on_demand=on_demand)
            if chunks:
                if model is None or made_by != store.config.gists_by:
                    model, made_by = _loaded(store, inbox, device, places or {}), store.config.gists_by
                wanted, settings = token_ids(model, chunks, tokens_max=BATCH_TOKENS), store.config.gists
        if chunks and model:
            _await_turn(folder)
            _keep(folder, make(model, wanted, settings), inbox)
        elif on_demand:
            inbox.await_asked()
        else:
            return


def _next(store: Store, inbox: Inbox, *, on_demand: bool) -> list[StoredChunk]:
    """Return the chunks whose gists are made next: those that were asked for, the last ones first, then the others."""
    asked = inbox.asked()[:BATCH_CHUNKS]
    chunks = pending_chunks(store, asked, most=BATCH_CHUNKS)
    inbox.done(set(asked) - {chunk.id for chunk in chunks})
    if chunks or on_demand:
        return sorted(chunks, key=lambda chunk: asked.index(chunk.id))
    return pending_chunks(store, most=BATCH_CHUNKS)


def _loaded(store: Store, inbox: Inbox, device: str | None, places: Mapping[str, Any]) -> GistModel:
    """Return the model that the index is made with; it computes nothing while a question is answered.

    Args:
        places: where model and adapter are, if not where the index says.

    Raises:
        ModelNotFoundError: it is not on this machine.
        FingerprintMismatchError: the one on this machine differs.
        ResourceError: the disk is too small for the gists.
    """
    settings = replace(store.settings, **places)
    path = find(settings.model).path
    adapter = find_adapter(settings.adapter, path)
    model = GistModel.load(path, adapter=adapter, quantize=settings.quantize, device=device)
    stored = {name: value for name, value in store.config.gist_fingerprint.items() if name != "min_quality"}
    where, remedy = f"the index in {store.folder}", "run gistrag build with those models"
    require_same(stored, gist_fingerprint(model, settings, made_with=stored), where=where, remedy=remedy)
    require_space(store, model)
    register_module_forward_pre_hook(lambda *_: inbox.await_go())
    return model


def _await_turn(folder: Path) -> None:
    """Return when no builder is at work, who may be making the same gists."""
    while True:
        try:
            with files.lock(folder / "lock", command=BACKGROUND):
                return
        except IndexLockedError:
            time.sleep(RETRY_S)


def _keep(folder: Path, made: Mapping[str, GistCache | None], inbox: Inbox) -> None:
    """Put those gists into the index that are still pending there, as soon as no builder holds it.

    Raises:
        IncompleteIndexError: the index is gone.
    """
    while True:
        if not files.exists(folder / "index.db"):
            raise nothing_built(folder)
        try:
            with Store.build(folder, command=BACKGROUND) as store, inbox.keeping:
                keep(store, {key: cache for key, cache in made.items() if store.gists.is_pending(key)})
                store.commit()
                if not store.gists.pending():
                    manifest.write(store)
            return
        except IndexLockedError:
            time.sleep(RETRY_S)


def _main(parent: int, folder: Path, when: str, device: str, places: str) -> None:
    """Work until nothing is left to do; an error is one line for the parent."""
    source, told = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # what a library prints is no message
    os.nice(NICENESS)
    try:
        with files.lock(folder / LOCK, command=BACKGROUND):
            inbox, on_demand = Inbox(source, parent), when == "on demand"
            work(folder, inbox, on_demand=on_demand, device=device or None, places=json.loads(places))
    except IndexLockedError:
        pass  # another process makes them
    except Exception as error:  # whatever it is, answers come from text
        reason = str(error) if isinstance(error, GistRAGError) else f"{type(error).__name__}: {error}"
        told.write(json.dumps(" ".join(reason.split())))
    told.close()
    os._exit(0)  # threads of libraries are not waited for


if __name__ == "__main__":
    _main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:6])
