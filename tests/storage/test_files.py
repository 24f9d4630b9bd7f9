"""Files of an index are there whole or not at all, and one builder holds the lock."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gistrag.errors import IndexFolderError, IndexLockedError, ResourceError
from gistrag.storage import files

HOLD = """
import sys, time
from pathlib import Path
from gistrag.storage import files
with files.lock(Path(sys.argv[1]), command="gistrag build docs"):
    print("held", flush=True)
    time.sleep(60)
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def hold(path: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock *path*."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert "held\n" == holder.stdout.readline()
    return holder


def release(holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.communicate()


def recorded(name: str, steps: list[str]) -> Callable[..., None]:
    """Return the step *name* of `gistrag.storage.files`, which also notes that it was taken."""
    real = getattr(files, name)

    def step(*given: object) -> None:
        steps.append(name)
        real(*given)

    return step


def test_written_bytes_are_read_back(tmp_path: Path) -> None:
    """A written file holds its bytes, is private, and leaves nothing beside it."""
    path = tmp_path / "a.bin"

    files.write_atomic(path, b"one")
    files.write_atomic(path, b"two")

    assert b"two" == files.read(path)
    assert 0o600 == mode(path)
    assert [path] == list(tmp_path.iterdir())


def test_empty_file_is_read_as_nothing(tmp_path: Path) -> None:
    """An empty file has no bytes."""
    files.make_private(tmp_path / "empty")

    assert b"" == files.read(tmp_path / "empty")
    assert 0o600 == mode(tmp_path / "empty")


def test_steps_come_in_the_order_that_survives_power_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are synced before the rename, the folder after it."""
    steps: list[str] = []
    for name in ("write_all", "sync_file", "rename", "sync_folder"):
        monkeypatch.setattr(files, name, recorded(name, steps))

    files.write_atomic(tmp_path / "a", b"data")

    assert ["write_all", "sync_file", "rename", "sync_folder"] == steps


@pytest.mark.parametrize("step", ["write_all", "sync_file", "rename"])
def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Whatever step fails, the old bytes stay and no temporary file does."""
    path = tmp_path / "a"
    files.write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, step, fail)
    with pytest.raises(IndexFolderError, match=r"could not write .*Input/output error"):
        files.write_atomic(path, b"new")

    assert b"old" == files.read(path)
    assert [path] == list(tmp_path.iterdir())


def test_full_disk_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is told apart from other failures."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_all", fail)

    with pytest.raises(ResourceError, match="no space left to write"):
        files.write_atomic(tmp_path / "a", b"data")


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that takes one byte at a time still gets all of them."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:1]))

    files.write_atomic(tmp_path / "a", b"many bytes")

    assert b"many bytes" == files.read(tmp_path / "a")


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that gives three bytes at a time still gives all of them."""
    files.write_atomic(tmp_path / "a", b"many bytes")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, count, offset: real(descriptor, min(count, 3), offset))

    assert b"many bytes" == files.read(tmp_path / "a")


def test_made_folders_are_private(tmp_path: Path) -> None:
    """Folders are made with those above them, 0700; a second time nothing happens."""
    files.make_folder(tmp_path / "a" / "b")
    files.make_folder(tmp_path / "a" / "b")

    assert [0o700, 0o700] == [mode(tmp_path / "a"), mode(tmp_path / "a" / "b")]


def test_removing_what_is_not_there_is_fine(tmp_path: Path) -> None:
    """A file can be removed twice."""
    files.write_atomic(tmp_path / "a", b"")

    files.remove(tmp_path / "a")
    files.remove(tmp_path / "a")

    assert [] == list(tmp_path.iterdir())


def test_free_bytes_of_a_folder_to_be(tmp_path: Path) -> None:
    """Free space is known before the folder exists."""
    assert files.free_bytes(tmp_path / "not" / "yet") > 0


def test_second_holder_is_told_who_has_it(tmp_path: Path) -> None:
    """A held lock is refused while it is held, naming process and command."""
    holder = hold(tmp_path / "lock")
    try:
        refused = pytest.raises(IndexLockedError, match=rf"process {holder.pid} on .*gistrag build docs")
        with refused, files.lock(tmp_path / "lock", command="other"):
            pass
        assert holder.poll() is None
    finally:
        release(holder)


def test_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    """After kill -9 the next one gets the lock without help."""
    release(hold(tmp_path / "lock"))

    with files.lock(tmp_path / "lock", command="next"):
        assert b"next" in files.read(tmp_path / "lock")


def test_lock_is_free_after_an_error(tmp_path: Path) -> None:
    """A failed build lets go of the lock."""
    with pytest.raises(RuntimeError, match="failed"), files.lock(tmp_path / "lock", command="first"):
        raise RuntimeError("failed")

    with files.lock(tmp_path / "lock", command="second"):
        assert 0o600 == mode(tmp_path / "lock")


def test_a_lock_whose_name_was_removed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder may remove its lock file: whoever opened the old one meanwhile locks the new one instead."""
    path = tmp_path / "lock"
    real, removals = files.fcntl.flock, iter([True, False])

    def remove_first(descriptor: int, operation: int) -> None:
        if next(removals):
            path.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(files.fcntl, "flock", remove_first)
    with files.lock(path, command="first"):
        monkeypatch.undo()
        with pytest.raises(IndexLockedError, match="first"), files.lock(path, command="second"):
            pass
