"""Noticing that files have changed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from gistrag.documents.watching import changes_of
from gistrag.errors import UsageError


def test_a_change_is_told_once_it_has_settled(tmp_path: Path) -> None:
    """A file that is written in pieces is told of once, and one that is no document not at all."""
    (tmp_path / "a.md").write_text("one")
    told: list[None] = []
    watched = changes_of(tmp_path, interval_s=0.15)
    done = threading.Event()

    def watch() -> None:
        for _ in watched:
            told.append(None)
            if len(told) == 2:
                done.set()
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    done.wait(0.3)
    (tmp_path / "photo.png").write_text("no document")
    (tmp_path / "b.md").write_text("two")
    (tmp_path / "b.md").write_text("two and more")
    done.wait(1.0)
    assert len(told) == 1
    (tmp_path / "a.md").unlink()

    assert done.wait(5.0)


def test_a_folder_that_is_gone_ends_the_watch(tmp_path: Path) -> None:
    """A folder that cannot be read any more is an error, not a folder without documents."""
    (tmp_path / "docs").mkdir()
    watched = changes_of(tmp_path / "docs", interval_s=0.01)
    threading.Timer(0.05, (tmp_path / "docs").rmdir).start()

    with pytest.raises(UsageError):
        next(watched)
