"""`gistrag backup` copies an index as of one commit, whatever happens meanwhile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.small_index import cache, configure, document, entries, gist_file, make

from gistrag.cli import exit_codes
from gistrag.cli.main import main as run_command
from gistrag.errors import IndexLockedError, ResourceError, UsageError
from gistrag.index import backup, database
from gistrag.index.gist_store import GistStore
from gistrag.index.integrity import remove_unused
from gistrag.index.schema import GistRow
from gistrag.index.store import Store
from gistrag.kv.cache import GistCache
from gistrag.storage import files


def add(folder: Path, path: str, seed: int) -> str:
    """Put a document with a gist of its own into an index and return the gist's key."""
    with Store.build(folder) as opened:
        if opened.is_new:
            configure(opened)
        key = opened.gists.key([seed])
        opened.gists.put({key: cache(seed=seed)})
        opened.replace_document(document(path), entries([f"text {seed}"], key=key))
        remove_unused(opened)
    return key


def copy(folder: Path, target: Path) -> backup.Copied:
    with Store.open(folder) as opened:
        return backup.copy(opened, target)


def texts(folder: Path) -> dict[str, list[str]]:
    with Store.open(folder) as opened:
        return {row.path: [chunk.text for chunk in opened.chunks_of(row.path)] for row in opened.documents()}


def test_copy_is_the_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The copy holds the same documents, chunks and gists, is private, and is sound to the last bit."""
    key = make(tmp_path / "index", "one", "two")

    assert 0 == run_command(["backup", str(tmp_path / "copy"), "--index", str(tmp_path / "index"), "--json"])
    done = json.loads(capsys.readouterr().out)
    assert (1, 0, []) == (done["gists"], done["kept"], done["damaged"])
    assert texts(tmp_path / "index") == texts(tmp_path / "copy")
    with Store.open(tmp_path / "copy") as copied:
        assert torch.equal(cache().kv, GistCache.unpacked(copied.gists.load(key)).kv)
        assert [1] == [found for found, _ in copied.keyword_search(["one"], 3)]
    assert {0o600} == {
        path.stat().st_mode & 0o777 for path in (tmp_path / "copy").rglob("*") if path.suffix in (".db", ".safetensors")
    }
    assert 0 == run_command(["verify", "--index", str(tmp_path / "copy"), "--full"])


def test_second_copy_takes_what_is_new(tmp_path: Path) -> None:
    """Into an earlier copy only new gists are copied, and what was removed since is removed there too."""
    make(tmp_path / "index")
    copy(tmp_path / "index", tmp_path / "copy")
    add(tmp_path / "index", "b.md", 2)
    first = copy(tmp_path / "index", tmp_path / "copy")
    with Store.build(tmp_path / "index") as opened:
        opened.remove_document("a.md")
        remove_unused(opened)
    second = copy(tmp_path / "index", tmp_path / "copy")

    assert [(1, 1), (0, 1)] == [(done.gists, done.kept) for done in (first, second)]
    assert {"b.md": ["text 2"]} == texts(tmp_path / "copy")
    assert 1 == len(list((tmp_path / "copy").rglob("*.safetensors")))


def test_copy_can_be_built_on_and_copied_back(tmp_path: Path) -> None:
    """A copy is an index like any other."""
    make(tmp_path / "index")
    copy(tmp_path / "index", tmp_path / "copy")
    shutil.rmtree(tmp_path / "index")
    add(tmp_path / "copy", "b.md", 2)

    copy(tmp_path / "copy", tmp_path / "index")
    assert {"a.md", "b.md"} == set(texts(tmp_path / "index"))
    assert 0 == run_command(["verify", "--index", str(tmp_path / "index"), "--full"])


def test_copy_during_a_build_is_of_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a build removes and adds between two files of a copy, the copy is whole: of the newer commit."""
    for number in range(4):
        add(tmp_path / "index", f"{number}.md", number)
    real, calls = GistStore.read, []

    def meanwhile(gists: GistStore, row: GistRow) -> bytes:
        calls.append(row.key)
        if len(calls) in (2, 4):
            with Store.build(tmp_path / "index") as builder:
                builder.remove_document(f"{len(calls)}.md" if len(calls) == 2 else "3.md")
                remove_unused(builder)
            add(tmp_path / "index", f"new{len(calls)}.md", 10 + len(calls))
        return real(gists, row)

    monkeypatch.setattr(GistStore, "read", meanwhile)
    done = copy(tmp_path / "index", tmp_path / "copy")
    monkeypatch.undo()

    assert [] == done.damaged
    assert texts(tmp_path / "index") == texts(tmp_path / "copy")
    with Store.open(tmp_path / "copy") as copied:
        assert 4 == len([copied.gists.load(row.key) for row in copied.gists.rows()])
    assert 0 == run_command(["verify", "--index", str(tmp_path / "copy"), "--full"])


def test_builds_that_outrun_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files go faster than they are copied, the copy is refused and an earlier one stays as it was."""
    make(tmp_path / "index")
    copy(tmp_path / "index", tmp_path / "copy")
    before = texts(tmp_path / "copy")
    count, is_building = 0, False
    real = GistStore.rows

    def outrun(gists: GistStore) -> list[GistRow]:
        nonlocal count, is_building
        rows = real(gists)
        if gists.path("").is_relative_to(tmp_path / "index") and not is_building:
            count, is_building = count + 1, True
            with Store.build(tmp_path / "index") as builder:
                builder.remove_document(f"{count - 1}.md")
                remove_unused(builder)
            add(tmp_path / "index", f"{count}.md", count)
            is_building = False
        return rows

    monkeypatch.setattr(GistStore, "rows", outrun)
    monkeypatch.setattr(database, "BUSY_S", 0.0)  # the builder here waits for a snapshot that waits for the builder
    with pytest.raises(IndexLockedError, match="faster than they were copied"):
        copy(tmp_path / "index", tmp_path / "copy")
    assert before == texts(tmp_path / "copy")


@pytest.mark.parametrize("harm", ["flip", "missing"])
def test_damaged_gist_is_left_out(tmp_path: Path, harm: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The copy is made, the damaged file is named, and the code is 4."""
    make(tmp_path / "index")
    path = gist_file(tmp_path / "index")
    if harm == "flip":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    else:
        path.unlink()

    assert exit_codes.DAMAGED == run_command(["backup", str(tmp_path / "copy"), "--index", str(tmp_path / "index")])
    assert path.stem in capsys.readouterr().out
    assert texts(tmp_path / "index") == texts(tmp_path / "copy")


@pytest.mark.parametrize("found", ["documents", "another index", "a file", "the index", "inside the index"])
def test_something_else_is_not_overwritten(tmp_path: Path, found: str) -> None:
    """What is no copy of this index stays as it is."""
    make(tmp_path / "index")
    target = tmp_path / "copy"
    if found == "documents":
        target.mkdir()
        (target / "a.md").write_text("mine")
    elif found == "another index":
        make(target)
    elif found == "a file":
        target.write_text("mine")
    else:
        target = tmp_path / "index" / ("gists" if found == "inside the index" else ".")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "-shm" not in path.name}

    with pytest.raises(UsageError):
        copy(tmp_path / "index", target)
    assert before == {path: path.read_bytes() for path in before}


def test_stopped_first_copy_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that ended before its database was there is no index, and the same command completes it."""
    make(tmp_path / "index")
    with monkeypatch.context() as patch:
        patch.setattr(backup, "put_database", lambda store, folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            copy(tmp_path / "index", tmp_path / "copy")

    done = copy(tmp_path / "index", tmp_path / "copy")
    assert (0, 1) == (done.gists, done.kept)
    assert texts(tmp_path / "index") == texts(tmp_path / "copy")


def test_disk_too_small_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that would not fit says both numbers and makes nothing."""
    make(tmp_path / "index")
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)

    with pytest.raises(ResourceError, match=r"needs [\d,]+ bytes .* has 1,000"):
        copy(tmp_path / "index", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_two_copies_to_one_place(tmp_path: Path) -> None:
    """A second copy at the same time is refused by the lock."""
    make(tmp_path / "index")
    copy(tmp_path / "index", tmp_path / "copy")
    locked = files.lock(tmp_path / "copy" / "lock", command="gistrag backup")
    with locked, pytest.raises(IndexLockedError, match="gistrag backup"):
        copy(tmp_path / "index", tmp_path / "copy")
