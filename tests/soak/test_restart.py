"""Promise 3: whatever was left behind, the next command needs no hands."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import fake_compressor
from support.fake_compressor import look_into, versions_in, write_documents
from support.process_pool import ProcessPool

from gistrag.engine import Engine
from gistrag.errors import IncompleteIndexError
from gistrag.index.integrity import unreferenced
from gistrag.rag import GistRAG

SETTINGS = {"chunk_tokens": 160, "tokens_per_gist": fake_compressor.TOKENS_PER_GIST}
VERSIONS = {"a": 1, "b": 1}
NAME = "0" * 64


def gist(index: Path) -> Path:
    return min((index / "gists").rglob("*.safetensors"))


def vectors(index: Path) -> Path:
    return next(index.glob("faiss-*.idx"))


def put_in(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def without_gists(index: Path) -> None:
    shutil.rmtree(index / "gists")


LEFT: dict[str, Callable[[Path], object]] = {
    "half a gist": lambda index: put_in(gist(index).with_name(f".{gist(index).name}.12-34.tmp"), b"half"),
    "half a vector file": lambda index: put_in(index / f".{vectors(index).name}.12-34.tmp", b"half"),
    "half a manifest": lambda index: put_in(index / ".manifest.json.12-34.tmp", b"{"),
    "a gist of no chunk": lambda index: put_in(index / "gists" / "00" / f"{NAME}.safetensors", b"gist"),
    "an older vector file": lambda index: put_in(index / f"faiss-{NAME}.idx", b"old"),
    "no vector file": lambda index: vectors(index).unlink(),
    "an empty vector file": lambda index: vectors(index).write_bytes(b""),
    "a damaged vector file": lambda index: vectors(index).write_bytes(b"IxFI" * 99),
    "an empty log": lambda index: (index / "index.db-wal").write_bytes(b""),
    "a log of noise": lambda index: (index / "index.db-wal").write_bytes(b"\7" * 9000),
    "shared memory of noise": lambda index: (index / "index.db-shm").write_bytes(b"\7" * 32768),
    "an empty journal": lambda index: (index / "index.db-journal").write_bytes(b""),
    "a journal of zeros": lambda index: (index / "index.db-journal").write_bytes(bytes(512)),
    "no lock": lambda index: (index / "lock").unlink(),
    "a lock of noise": lambda index: (index / "lock").write_bytes(b"\xff\0{"),
    "a lock of a dead process": lambda index: (index / "lock").write_text('{"pid": 999999999}'),
    "no manifest": lambda index: (index / "manifest.json").unlink(),
    "a manifest of noise": lambda index: (index / "manifest.json").write_bytes(b"\xff[1"),
    "no gists": without_gists,
    "an empty gist": lambda index: gist(index).write_bytes(b""),
    "a pipe in place of a gist": lambda index: pipe(gist(index)),
    "strange files": lambda index: put_in(index / "gists" / "ab" / "notes.txt", b"mine"),
}


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with fake_compressor.fake_compression():
        yield fake_compressor.engine()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Path:
    """A folder of documents and its index."""
    folder = tmp_path_factory.mktemp("template")
    write_documents(folder / "docs", VERSIONS)
    GistRAG.from_folder(folder / "docs", index=folder / "index", engine=engine, gists="now", **SETTINGS).close()
    return folder


@pytest.mark.parametrize("left", LEFT)
def test_what_is_left_needs_no_hands(tmp_path: Path, template: Path, engine: Engine, left: str) -> None:
    """A query is answered and a build mends what there is to mend, whatever lies in the folder."""
    shutil.copytree(template, tmp_path / "now")
    docs, index = tmp_path / "now" / "docs", tmp_path / "now" / "index"
    LEFT[left](index)

    with GistRAG.open(index, engine=engine) as rag:
        assert 2 == len(rag.query("the crane", top_k=2, max_new_tokens=1).sources)
    with GistRAG.from_folder(docs, index=index, engine=engine, gists="now") as rag:
        assert 0 == rag.query("the crane", top_k=9, max_new_tokens=1).usage.text_fallbacks
        assert [] == unreferenced(rag.store)
    seen = look_into(index, engine.model.encode_passage)
    assert ((), VERSIONS) == (seen.wrong, versions_in(seen.state or {}))
    assert (index / "gists" / "ab" / "notes.txt").exists() == (left == "strange files")


@pytest.mark.parametrize("left", ["nothing", "an empty database", "a lock", "gists"])
def test_first_build_that_was_stopped_early(tmp_path: Path, template: Path, engine: Engine, left: str) -> None:
    """What the very first build leaves before its first commit is no index yet, and the next build makes one."""
    index = tmp_path / "index"
    index.mkdir(mode=0o700)
    if left == "an empty database":
        (index / "index.db").touch(0o600)
    elif left == "a lock":
        (index / "lock").write_bytes(b"")
    elif left == "gists":
        shutil.copytree(template / "index" / "gists", index / "gists")

    with pytest.raises(IncompleteIndexError):
        GistRAG.open(index, engine=engine)
    GistRAG.from_folder(template / "docs", index=index, engine=engine, gists="now", **SETTINGS).close()
    assert VERSIONS == versions_in(look_into(index, engine.model.encode_passage).state or {})


def test_log_that_a_kill_left(tmp_path: Path, pool: ProcessPool, engine: Engine) -> None:
    """Commits that are only in the write-ahead log of a killed build are read, and a damaged log costs no more."""
    write_documents(tmp_path / "docs", {f"d{number}": 1 for number in range(6)})
    options = ["--chunk-tokens", "160", "--tokens-per-gist", str(fake_compressor.TOKENS_PER_GIST)]
    arguments = {"docs": str(tmp_path / "docs"), "index": str(tmp_path / "index"), "options": options}
    child = pool.start("build", **arguments, delay_s=0.5)
    child.await_report("commit")
    child.send(signal.SIGKILL)
    child.wait()
    log = tmp_path / "index" / "index.db-wal"
    assert log.stat().st_size

    seen = look_into(tmp_path / "index", engine.model.encode_passage)
    assert () == seen.wrong
    assert seen.state
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    log.write_bytes(data)
    for leftover in (tmp_path / "index").glob("index.db-shm"):
        leftover.unlink()
    try:
        assert () == look_into(tmp_path / "index", engine.model.encode_passage).wrong
    finally:
        assert 0 == pool.start("build", **arguments, delay_s=0.0).wait()
    seen = look_into(tmp_path / "index", engine.model.encode_passage)
    assert ((), 6) == (seen.wrong, len(seen.state or {}))
