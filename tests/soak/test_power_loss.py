"""Promise 2: whatever moment power is lost at, and whatever the disk made of it, the last commit stands."""

from __future__ import annotations

import hashlib
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from support import fake_compressor
from support.crash_simulator import CHOICES, Disk, Image, write_image
from support.fake_compressor import State, gist_of, ids_of, look_into, put, state_of
from support.io_trace import Operation, Watch, watched
from support.tiny_models import tiny_model

from gistrag.index import backup, schema
from gistrag.index.background import _keep as keep
from gistrag.index.integrity import remove_unused
from gistrag.index.retriever import write_vector_file
from gistrag.index.store import Store
from gistrag.rag import GistRAG
from gistrag.storage import files

if TYPE_CHECKING:
    from gistrag.index.background import Inbox


@dataclass(frozen=True)
class Commit:
    """A moment in the log: a commit of *state* begins, or was acknowledged."""

    state: State
    is_done: bool


Log = list[Operation | Commit]
Ids = Callable[[str], Sequence[int]]


@contextmanager
def recorded(folder: Path) -> Iterator[Log]:
    """Give the log of all operations in *folder*, with the commits among them."""
    log: Log = []
    real, real_copy = Store.commit, backup.put_database

    def commit(self: Store) -> None:
        if self.folder != folder:
            real(self)
        elif self.database.in_transaction:
            log.append(Commit(state_of(self), is_done=False))
            real(self)
            log.append(Commit(state_of(self), is_done=True))

    def put_database(store: Store, target: Path) -> None:
        log.append(Commit(state_of(store), is_done=False))
        real_copy(store, target)
        log.append(Commit(state_of(store), is_done=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "commit", commit)
        patch.setattr(backup, "put_database", put_database)
        with watched(Watch(folder, after=lambda operation: log.append(operation) if operation.changes else None)):
            yield log


def life_of_an_index(folder: Path) -> None:
    """Add, make again, change, remove and clean up, in two builds."""
    with Store.build(folder) as store:
        fake_compressor.configure(store)
        put(store, "a.txt", ["the first of a", "the second of a"])
        store.commit()
        put(store, "b.txt", ["the only one of b"])
    with Store.build(folder) as store:
        store.gists.put({store.gists.key(ids_of("the first of a")): gist_of(ids_of("the first of a"))})
        put(store, "a.txt", ["the first of a", "the second of a, changed"])
        store.commit()
        store.remove_document("b.txt")
        put(store, "c.txt", ["the only one of c"])
        remove_unused(store)


def builds_of_a_folder(folder: Path) -> None:
    """The same through real builds of a folder of documents."""
    docs, engine = folder.parent / "docs", fake_compressor.engine()
    changes = ({"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 1, "d": 1}, {"d": 1, "e": 3})
    with fake_compressor.fake_compression():
        for versions in changes:
            fake_compressor.write_documents(docs, versions)
            settings = {"chunk_tokens": 160, "tokens_per_gist": fake_compressor.TOKENS_PER_GIST}
            GistRAG.from_folder(docs, index=folder, engine=engine, gists="now", **settings).close()


def gists_in_the_background(folder: Path) -> None:
    """Documents first, their gists later, a batch at a time, of which one is not wanted any more."""
    texts, keys = ["the first of a", "the second of a", "the only one of b"], list[str]()
    with Store.build(folder) as store:
        fake_compressor.configure(store)
        put(store, "a.txt", texts[:2], are_gists_pending=True)
        store.commit()
        put(store, "b.txt", texts[2:], are_gists_pending=True)
        keys = [store.gists.key(ids_of(text)) for text in texts]
    made = {key: gist_of(ids_of(text)) for key, text in zip(keys, texts, strict=True)}
    inbox = cast("Inbox", SimpleNamespace(keeping=threading.Lock()))
    keep(folder, {keys[0]: made[keys[0]]}, inbox)
    with Store.build(folder) as store:
        store.remove_document("b.txt")
        remove_unused(store)
    keep(folder, {key: made[key] for key in keys[1:]}, inbox)


def copies_of_an_index(folder: Path) -> None:
    """Two backups into one folder, of an index that changed in between."""
    for texts in (["the first of a", "the second of a"], ["the first of a", "the second of a, changed"]):
        with Store.build(folder.with_name("source")) as store:
            if store.is_new:
                fake_compressor.configure(store)
            put(store, "a.txt", texts)
            write_vector_file(store)
            remove_unused(store)
        copy_again(folder)


def copy_again(folder: Path) -> None:
    """Back the index up into *folder*."""
    with Store.open(folder.with_name("source")) as store:
        backup.copy(store, folder)


def build_again(folder: Path) -> None:
    """Take up an index as a build does."""
    with Store.build(folder) as store:
        if store.is_new:
            fake_compressor.configure(store)
        remove_unused(store)


def crashes(log: Log, moments: Iterable[int]) -> Iterator[tuple[str, Image, list[State | None]]]:
    """Yield every folder that a crash can leave, each once, with the states that may be found in it."""
    disk, safe = Disk(), 0
    wanted, seen = set(moments), set[bytes]()
    states: list[State | None] = [None]
    for moment, entry in enumerate(log):
        if isinstance(entry, Commit):
            if entry.is_done:
                safe = len(states) - 1
            else:
                states.append(entry.state)
        else:
            disk.do(entry)
        if moment not in wanted:
            continue
        for choice in CHOICES:
            image = disk.crash(*choice)
            digest = hashlib.sha256(repr((sorted(image.items()), safe, len(states))).encode()).digest()
            if digest not in seen:
                seen.add(digest)
                yield f"after {moment} {entry} with bytes and names {choice}", image, states[safe:]


def problem(
    image: Image, folder: Path, allowed: list[State | None], again: Callable[[Path], None] | None, ids: Ids
) -> str:
    """Return what is wrong with a crashed folder, nothing if a reader and a builder are well served by it.

    Args:
        again: the command that is run on it next; a build leaves the state as it is, a backup brings the newest one.
        ids: gives the token ids of a text.
    """
    shutil.rmtree(folder, ignore_errors=True)
    write_image(image, folder)
    try:
        seen = look_into(folder, ids)
        if seen.wrong or seen.state not in allowed:
            return f"{seen}, expected one of {allowed}"
        if again:
            again(folder)
            after, expected = look_into(folder, ids), seen.state or {}
            if again is copy_again:
                expected = look_into(folder.with_name("source")).state or {}
            if after.wrong or after.state != expected:
                return f"after the next command {after}, expected {expected}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def violations(
    log: Log,
    folder: Path,
    *,
    moments: Iterable[int],
    builds_every: int,
    again: Callable[[Path], None] = build_again,
    ids: Ids = ids_of,
) -> Iterator[str]:
    """Yield what is wrong with each crashed folder that is wrong; the next command takes up one in *builds_every*."""
    count = 0
    for count, (moment, image, allowed) in enumerate(crashes(log, moments), 1):
        if told := problem(image, folder, allowed, None if count % builds_every else again, ids):
            yield f"{moment}: {told}"
    print(f"{len(log)} operations and commits, {count} different crashes")


def record(folder: Path, life: Callable[[Path], None] = life_of_an_index) -> Log:
    with recorded(folder) as log:
        life(folder)
    return log


def some(log: Log, randomness: random.Random, share: float) -> list[int]:
    """Return a share of the moments of a log, and those beside each commit."""
    commits = [moment for moment, entry in enumerate(log) if isinstance(entry, Commit)]
    near = {moment + step for moment in commits for step in (-1, 0, 1)}
    return sorted(near | {moment for moment in range(len(log)) if randomness.random() < share})


# The tests


def test_log_tells_all(tmp_path: Path) -> None:
    """Played back to the end, the log gives every byte of the real folder: no operation escapes it."""
    log = record(tmp_path / "index")

    disk = Disk()
    for entry in log:
        if isinstance(entry, Operation):
            disk.do(entry)
    image = disk.crash("kept", "kept")
    real = {str(path.relative_to(tmp_path / "index")): path for path in (tmp_path / "index").rglob("*")}
    assert {path: None if found.is_dir() else found.read_bytes() for path, found in real.items()} == {
        path: data for path, data in image.items() if path != "."
    }


def test_power_loss_leaves_the_last_commit(tmp_path: Path, randomness: random.Random) -> None:
    """One moment in thirty of an index's life and all around its commits, with every choice of bytes and names."""
    log = record(tmp_path / "index")

    moments = some(log, randomness, 0.03)
    assert [] == list(violations(log, tmp_path / "crashed", moments=moments, builds_every=10))


def test_power_loss_while_gists_follow(tmp_path: Path, randomness: random.Random) -> None:
    """The same while gists are made in the background."""
    log = record(tmp_path / "index", gists_in_the_background)

    moments = some(log, randomness, 0.03)
    assert [] == list(violations(log, tmp_path / "crashed", moments=moments, builds_every=10))


def test_power_loss_during_a_backup(tmp_path: Path, randomness: random.Random) -> None:
    """A backup is the index of one moment or none yet, an earlier one stands, and the next goes on without hands."""
    log = record(tmp_path / "index", copies_of_an_index)

    moments = some(log, randomness, 0.03)
    found = violations(log, tmp_path / "crashed", moments=moments, builds_every=5, again=copy_again)
    assert [] == list(found)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("life", "ids"),
    [(life_of_an_index, ids_of), (gists_in_the_background, ids_of), (builds_of_a_folder, tiny_model().encode_passage)],
)
def test_power_loss_at_every_moment(tmp_path: Path, life: Callable[[Path], None], ids: Ids) -> None:
    """Every prefix of the log, with every choice of bytes and names."""
    log = record(tmp_path / "index", life)

    found = violations(log, tmp_path / "crashed", moments=range(len(log)), builds_every=4, ids=ids)
    assert [] == list(found)


@pytest.mark.soak
def test_power_loss_at_every_moment_of_a_backup(tmp_path: Path) -> None:
    """The same for two backups into one folder, each crash followed by another backup."""
    log = record(tmp_path / "index", copies_of_an_index)

    found = violations(log, tmp_path / "crashed", moments=range(len(log)), builds_every=1, again=copy_again)
    assert [] == list(found)


# Builders that are wrong on purpose


def without_sync(patch: pytest.MonkeyPatch) -> None:
    """Gists are renamed before their bytes are on the disk."""
    patch.setattr(files, "sync_file", lambda descriptor: None)


def without_folder_sync(patch: pytest.MonkeyPatch) -> None:
    """The names of gists may be lost after the commit."""
    patch.setattr(files, "sync_folder", lambda path: None)


def commit_first(patch: pytest.MonkeyPatch) -> None:
    """Rows are committed before their gists are written."""
    late: list[tuple[Path, bytes]] = []
    write, commit = files.write_atomic, Store.commit

    def commit_then_write(self: Store) -> None:
        commit(self)
        while late:
            write(*late.pop())

    patch.setattr(files, "write_atomic", lambda path, data: late.append((path, data)))
    patch.setattr(Store, "commit", commit_then_write)


def in_place(patch: pytest.MonkeyPatch) -> None:
    """A gist is written over the one that is there."""

    def write(path: Path, data: bytes) -> None:
        files.write_new(path, data)
        files.sync_folder(path.parent)

    patch.setattr(files, "write_atomic", write)


def careless_database(patch: pytest.MonkeyPatch) -> None:
    """SQLite does not wait for the disk at a commit."""
    changed = [line.replace("synchronous = FULL", "synchronous = NORMAL") for line in schema.BUILDER_PRAGMAS]
    patch.setattr(schema, "BUILDER_PRAGMAS", changed)


@pytest.mark.parametrize(
    "mutant",
    [without_sync, without_folder_sync, commit_first, in_place, careless_database],
    ids=lambda one: one.__name__,
)
def test_wrong_order_is_found(
    tmp_path: Path, mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each builder that leaves out or swaps a step loses something: the test above would notice."""
    mutant(monkeypatch)
    log = record(tmp_path / "index")
    monkeypatch.undo()

    assert next(violations(log, tmp_path / "crashed", moments=range(len(log)), builds_every=10**9), "")
