"""A file of JSON lines survives a kill, and one run writes it at a time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gistrag.errors import IndexLockedError, ResourceError, UsageError
from gistrag.storage import files, jsonl
from gistrag.storage.jsonl import JsonLines

HOLD = """
import sys, time
from pathlib import Path
from gistrag.storage.jsonl import JsonLines
with JsonLines(Path(sys.argv[1]), command="gistrag evaluate"):
    print("held", flush=True)
    time.sleep(60)
"""


def fill(path: Path, *records: object) -> None:
    """Append records to the file at *path*."""
    with JsonLines(path, command="test") as file:
        file.append(*records)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_records_are_read_back(path: Path) -> None:
    """What was appended is there for the next run, whatever characters it holds."""
    records = [{"said": "zwölf\u2028"}, ["a\nb"], 3]

    fill(path, *records)

    with JsonLines(path, command="test") as file:
        assert file.records == records


def test_a_missing_file_has_no_records(path: Path) -> None:
    """Reading makes no file."""
    assert jsonl.read(path) == []
    assert not path.exists()


@pytest.mark.parametrize("cut", [1, 5, 8])
def test_half_a_line_is_removed(path: Path, cut: int) -> None:
    """Wherever a kill cuts a line, the file goes on behind the last whole one."""
    path.write_bytes(b'{"a": 1}\n' + b'{"b": 2}\n'[:cut])

    fill(path, {"c": 3})

    assert path.read_bytes() == b'{"a": 1}\n{"c": 3}\n'


def test_reading_leaves_half_a_line_where_it_is(path: Path) -> None:
    """Whoever writes may be in the middle of it."""
    path.write_bytes(b'{"a": 1}\n{"b"')

    assert jsonl.read(path) == [{"a": 1}]
    assert path.read_bytes() == b'{"a": 1}\n{"b"'


def test_lines_of_another_kind_stay(path: Path) -> None:
    """A remark that somebody typed is passed over and kept."""
    path.write_bytes(b'{"a": 1}\n# a remark\n')

    fill(path, {"b": 2})

    assert path.read_bytes() == b'{"a": 1}\n# a remark\n{"b": 2}\n'
    assert jsonl.read(path) == [{"a": 1}, {"b": 2}]


def test_records_are_replaced_at_once(path: Path) -> None:
    """What comes after a replacement follows it."""
    with JsonLines(path, command="test") as file:
        file.append(1, 2, 3)
        file.replace([1])
        file.append(4)

    assert jsonl.read(path) == [1, 4]


def test_a_full_disk_leaves_no_half_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An append that fails adds nothing, and the next one succeeds."""
    real = files.write_all

    def full(descriptor: int, data: bytes) -> None:
        real(descriptor, data[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with JsonLines(path, command="test") as file:
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_all", full)
            with pytest.raises(ResourceError, match="no space left to write"):
                file.append({"a": 1})
        file.append({"b": 2})

    assert path.read_bytes() == b'{"b": 2}\n'


def test_records_are_on_the_disk_when_append_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each append is synced, however many records it adds."""
    synced: list[int] = []
    with JsonLines(path, command="test") as file:
        monkeypatch.setattr(files, "sync_file", synced.append)
        file.append(1, 2, 3)
        file.append(4)

    assert len(synced) == 2


def test_a_second_run_is_refused(path: Path) -> None:
    """The message names the file, the process and its command."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        refused = rf"rows\.jsonl is in use by process {holder.pid} on .*gistrag evaluate"
        with pytest.raises(IndexLockedError, match=refused), JsonLines(path, command="other"):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()

    fill(path, 1)
    assert jsonl.read(path) == [1]


def test_a_closed_file_leaves_nothing_beside_it(path: Path) -> None:
    """The lock goes with the run."""
    fill(path, 1)

    assert list(path.parent.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A missing folder, and a folder in the way."""
    for place in (tmp_path / "missing" / "rows.jsonl", tmp_path):
        with pytest.raises(UsageError, match=r"cannot write .*(No such file|Is a directory)"):
            JsonLines(place, command="test")
