"""What was committed is read back bit by bit; what is damaged, missing or foreign is refused."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from support.io_trace import Operation, Watch, watched
from support.small_index import GISTS_BY, cache, configure, document, entries, gist_file, make

from gistrag.documents.discovery import Skipped
from gistrag.errors import (
    CorruptGistError,
    GistNotFoundError,
    IncompleteIndexError,
    IndexFolderError,
    IndexLockedError,
    ResourceError,
    UsageError,
)
from gistrag.index import database, gist_store, schema
from gistrag.index.chunk_rows import damaged_documents
from gistrag.index.integrity import remove_unused, unreferenced
from gistrag.index.store import Store
from gistrag.kv.cache import GistCache
from gistrag.kv.packed import BITS, stored_bytes
from gistrag.kv.quantization import dequantize, quantize
from gistrag.settings import IndexSettings
from gistrag.storage import files


def recorded(name: str, steps: list[str]) -> Callable[..., None]:
    """Return the step *name* of `gistrag.storage.files`, which also notes that it was taken."""
    real = getattr(files, name)

    def step(*given: object) -> None:
        steps.append(name)
        real(*given)

    return step


def open_either(folder: Path, *, builds: bool) -> None:
    """Open and close an index, to write or to read."""
    if builds:
        with Store.build(folder):
            pass
    else:
        Store.open(folder).close()


def rewrite(path: Path, data: bytes) -> None:
    """Change a file in place, as a broken disk would."""
    path.write_bytes(data)


def everything_in(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


# Gists


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gist_comes_back_bit_by_bit(tmp_path: Path, per_head: bool, dtype: torch.dtype) -> None:
    """Every bit of keys, values and positions is what was put, special values too."""
    put = cache(per_head=per_head, dtype=dtype)
    put.kv.view(-1)[:3] = torch.tensor([-0.0, torch.finfo(dtype).tiny, torch.finfo(dtype).max]).to(dtype)
    with Store.build(tmp_path) as opened:
        configure(opened)
        key = opened.gists.key([1])
        opened.gists.put({key: put})
        got = GistCache.unpacked(opened.gists.load(key))

    assert torch.equal(put.kv.view(torch.uint8), got.kv.view(torch.uint8))
    assert (put.kv.dtype, torch.int64, 10) == (got.kv.dtype, got.positions.dtype, got.source_tokens)
    assert torch.equal(put.positions, got.positions)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantized_gist_comes_back_near(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """In the numbers of the model, as its bits allow; positions exactly, and the file is smaller."""
    put, bits = cache(per_head=True, dtype=dtype), BITS[kind]
    with Store.build(tmp_path) as opened:
        configure(opened, kv_cache_dtype=kind)
        key = opened.gists.key([1])
        opened.gists.put({key: put})
        got, data = GistCache.unpacked(opened.gists.load(key)), opened.gists.path(key).read_bytes()

    assert torch.equal(dequantize(quantize(put.kv, bits), dtype), got.kv)
    assert torch.equal(put.positions, got.positions)
    assert (b'"format":"2"' in data, dtype) == (True, got.kv.dtype)
    assert stored_bytes(put.kv.shape, kind, itemsize=2) < put.kv.nbytes


def test_plain_gist_has_the_format_it_always_had(tmp_path: Path) -> None:
    """Whoever could read a file of an index that is not quantized still can."""
    make(tmp_path)

    assert b'"format":"1"' in gist_file(tmp_path).read_bytes()


def test_positions_of_a_long_chunk_come_back(tmp_path: Path) -> None:
    """Positions beyond 16 bits are kept."""
    put = GistCache(torch.ones(1, 2, 1, 2, 4), torch.tensor([0, 99_999]), 100_000)
    with Store.build(tmp_path) as opened:
        configure(opened)
        opened.gists.put({"0" * 64: put})

        assert torch.equal(put.positions, GistCache.unpacked(opened.gists.load("0" * 64)).positions)


@pytest.mark.parametrize(
    "wrong",
    [
        GistCache(torch.ones(2, 2, 3, 4), torch.arange(4), 10),
        GistCache(torch.ones(2, 3, 3, 4, 8), torch.arange(4), 10),
        GistCache(torch.ones(2, 2, 3, 0, 8), torch.arange(0), 10),
        GistCache(torch.ones(2, 2, 3, 4, 8), torch.arange(5), 10),
        GistCache(torch.ones(2, 2, 3, 4, 8), torch.arange(4), 3),
        GistCache(torch.ones(2, 2, 3, 4, 8, dtype=torch.int32), torch.arange(4), 10),
    ],
)
def test_misshapen_cache_is_not_stored(tmp_path: Path, wrong: GistCache) -> None:
    """What is no gist cache is refused before a byte is written."""
    with Store.build(tmp_path) as opened:
        configure(opened)
        with pytest.raises(CorruptGistError, match="cannot be stored"):
            opened.gists.put({"0" * 64: wrong})

        assert not opened.gists.path("0" * 64).exists()


def test_key_depends_on_tokens_model_and_index(tmp_path: Path) -> None:
    """A key is the same for the same tokens only within one index and one model."""
    keys = []
    for name in ("one", "two"):
        with Store.build(tmp_path / name) as opened:
            configure(opened)
            keys += [opened.gists.key([1, 2]), opened.gists.key([1, 2]), opened.gists.key([12])]
            configure(opened, gist_fingerprint={"base": "b"})
            keys.append(opened.gists.key([1, 2]))

    assert keys[0] == keys[1]
    assert 6 == len(set(keys))
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in keys)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "first bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "header bit": lambda data: data[:40] + bytes([data[40] ^ 4]) + data[41:],
    "payload bit": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "truncated": lambda data: data[:-7],
    "empty": lambda data: b"",
    "extended": lambda data: data + b"\0",
    "zeroed": lambda data: bytes(len(data)),
    "half zeroed": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
}


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "int4"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed(tmp_path: Path, kind: str, kv_cache_dtype: str) -> None:
    """A gist file that changed in any way is refused."""
    key = make(tmp_path, kv_cache_dtype=kv_cache_dtype)
    rewrite(gist_file(tmp_path), DAMAGE[kind](gist_file(tmp_path).read_bytes()))

    with Store.open(tmp_path) as opened, pytest.raises(CorruptGistError, match=key):
        GistCache.unpacked(opened.gists.load(key))


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int4"])
def test_every_flipped_bit_is_noticed_without_its_row(tmp_path: Path, kv_cache_dtype: str) -> None:
    """Adopting a file needs no row: its own seal finds any flipped bit that says something."""
    make(tmp_path, kv_cache_dtype=kv_cache_dtype)
    path = gist_file(tmp_path)
    data = path.read_bytes()
    adopted = []
    with Store.build(tmp_path) as opened:
        opened.remove_document("a.md")
        opened.database.execute(schema.DROP_UNUSED_GISTS)
        for place in range(0, len(data), 7):
            rewrite(path, data[:place] + bytes([data[place] ^ 2]) + data[place + 1 :])
            if opened.gists.reuse(path.stem):
                adopted.append(chr(data[place]))
                opened.database.execute(schema.DROP_UNUSED_GISTS)

    assert {" "} >= set(adopted)  # the header is padded with spaces, which say nothing


def test_damage_after_a_good_read_is_noticed(tmp_path: Path) -> None:
    """A file is hashed again once it changed, and not before."""
    key = make(tmp_path)
    path = gist_file(tmp_path)
    os.utime(path, ns=(1, 1))  # old enough to be remembered
    with Store.open(tmp_path) as opened:
        GistCache.unpacked(opened.gists.load(key))
        GistCache.unpacked(opened.gists.load(key))
        assert key in opened.gists._verified
        rewrite(path, DAMAGE["payload bit"](path.read_bytes()))
        os.utime(path, ns=(1, 1))

        with pytest.raises(CorruptGistError):
            GistCache.unpacked(opened.gists.load(key))


def test_damage_that_leaves_no_trace_is_noticed_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits that change without the file system knowing are noticed when the hash has stood for ten minutes."""
    key = make(tmp_path)
    path = gist_file(tmp_path)
    os.utime(path, ns=(1, 1))
    real, stamp, now_s = files.read_stamped, files.stamp(path), time.monotonic()
    monkeypatch.setattr(files, "read_stamped", lambda path, **options: (real(path, **options)[0], stamp))
    with Store.open(tmp_path) as opened:
        GistCache.unpacked(opened.gists.load(key))
        rewrite(path, DAMAGE["payload bit"](path.read_bytes()))
        GistCache.unpacked(opened.gists.load(key))
        monkeypatch.setattr(time, "monotonic", lambda: now_s + gist_store.VERIFIED_S + 60)

        with pytest.raises(CorruptGistError):
            GistCache.unpacked(opened.gists.load(key))


def test_same_gist_is_the_same_bytes(tmp_path: Path) -> None:
    """A gist that is made again replaces its file by an equal one, so the rows that name it stay right."""
    key = make(tmp_path)
    before = gist_file(tmp_path).read_bytes()
    for _ in range(9):
        with Store.build(tmp_path) as opened:
            opened.gists.put({key: cache()})

        assert before == gist_file(tmp_path).read_bytes()


def test_huge_file_is_not_read(tmp_path: Path) -> None:
    """A file that grew to a terabyte of nothing is refused by its size."""
    key = make(tmp_path)
    with gist_file(tmp_path).open("r+b") as file:
        file.truncate(2**40)

    with Store.open(tmp_path) as opened, pytest.raises(CorruptGistError, match="at most"):
        GistCache.unpacked(opened.gists.load(key))


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nowhere"])
def test_what_is_no_file_is_no_gist(tmp_path: Path, kind: str) -> None:
    """Something else under the name of a gist is refused at once, as a missing or unreadable file."""
    key = make(tmp_path)
    path = gist_file(tmp_path)
    path.unlink()
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link to nowhere": lambda: path.symlink_to("none")}[kind]()

    with Store.open(tmp_path) as opened, pytest.raises((CorruptGistError, GistNotFoundError), match=key):
        GistCache.unpacked(opened.gists.load(key))


def test_swapped_files_are_noticed(tmp_path: Path) -> None:
    """Two sound files under each other's names are both refused, with and without a row."""
    with Store.build(tmp_path) as opened:
        configure(opened)
        keys = [opened.gists.key([1]), opened.gists.key([2])]
        for seed, key in enumerate(keys):
            opened.gists.put({key: cache(seed=seed)})
        one, two = (opened.gists.path(key) for key in keys)
        first, second = one.read_bytes(), two.read_bytes()
        rewrite(one, second)
        rewrite(two, first)

        for key in keys:
            with pytest.raises(CorruptGistError):
                GistCache.unpacked(opened.gists.load(key))
        opened.database.execute(schema.DROP_UNUSED_GISTS)
        assert [False, False] == [opened.gists.reuse(key) for key in keys]


def test_missing_gist_is_told_apart(tmp_path: Path) -> None:
    """No row and no file both mean: not found."""
    key = make(tmp_path)
    gist_file(tmp_path).unlink()

    with Store.open(tmp_path) as opened:
        for name in (key, "f" * 64):
            with pytest.raises(GistNotFoundError, match=name):
                GistCache.unpacked(opened.gists.load(name))


def test_gist_of_another_model_is_refused(tmp_path: Path) -> None:
    """After a change of model the old gists are neither loaded nor adopted, and their document says so."""
    key = make(tmp_path)
    with Store.build(tmp_path) as opened:
        configure(opened, gist_fingerprint={"base": "b"})
        row = opened.documents()[0]

        assert (False, True) == (row.gists_current, row.vectors_current)
        assert not opened.gists.reuse(key)
        with pytest.raises(CorruptGistError, match="fingerprint"):
            GistCache.unpacked(opened.gists.load(key))


def test_reader_keeps_to_the_model_it_was_opened_with(tmp_path: Path) -> None:
    """A gist made by another model while a reader is open never reaches that reader's model."""
    make(tmp_path)
    with Store.open(tmp_path) as reader:
        with Store.build(tmp_path) as opened:
            configure(opened, gist_fingerprint={"base": "b"})
            key = opened.gists.key([1, 2, 3])
            opened.gists.put({key: cache()})
            opened.replace_document(document(), entries(["hello"], key=key))

        assert key == reader.chunks_of("a.md")[0].gist_key
        with pytest.raises(CorruptGistError, match="fingerprint"):
            GistCache.unpacked(reader.gists.load(key))


def test_duplicates_share_a_file(tmp_path: Path) -> None:
    """A gist is stored once and goes with the last document that needs it."""
    key = make(tmp_path)
    with Store.build(tmp_path) as opened:
        assert opened.gists.reuse(key)
        opened.replace_document(document("b.md"), entries(["hello world"], key=key))
        opened.remove_document("a.md")
        remove_unused(opened)
        assert GistCache.unpacked(opened.gists.load(key)).source_tokens == 10
        opened.remove_document("b.md")
        remove_unused(opened)

    assert [] == list((tmp_path / "gists").rglob("*.safetensors"))


def test_eight_gists_load_in_milliseconds(tmp_path: Path) -> None:
    """Eight gists of 0.4 MB are read and hashed fast enough not to be felt."""
    put = GistCache(torch.randn(30, 2, 3, 18, 64).bfloat16(), torch.arange(18), 256)
    with Store.build(tmp_path) as opened:
        configure(opened)
        keys = [opened.gists.key([i]) for i in range(8)]
        for key in keys:
            opened.gists.put({key: put})
    with Store.open(tmp_path) as reader:
        durations_s = []
        for _ in range(5):
            started_s = time.process_time()
            for key in keys:
                GistCache.unpacked(reader.gists.load(key))
            durations_s.append(time.process_time() - started_s)

        assert min(durations_s) < 0.1  # some 10 ms on an idle core; the machine may be busy
        assert reader.gists.bytes_read > 5 * 8 * 400_000


# Documents


def test_rows_come_back(tmp_path: Path) -> None:
    """Documents, chunks, skipped files, settings and totals are what was put."""
    key = make(tmp_path, "one", "two")
    with Store.build(tmp_path) as opened:
        opened.set_skipped([Skipped(path="b.bin", sha256="", reason="no text")])
        opened.replace_document(document("c.pdf", kind="pdf"), entries(["zwölf"], heading=("Über", "uns")))
        opened.mark_stale("c.pdf")
    with Store.open(tmp_path) as reader:
        first, second = reader.documents()
        chunks = reader.chunks([2, 99, 1, 3])
        stats = reader.stats()

        assert ("a.md", 2, 6, False, True, True) == (
            first.path, first.chunks, first.tokens, first.stale, first.gists_current, first.vectors_current
        )  # fmt: skip
        assert ("c.pdf", True) == (second.path, second.stale)
        assert ["two", "one", "zwölf"] == [chunk.text for chunk in chunks]
        assert (("Über", "uns"), None, None) == (chunks[2].heading, chunks[2].gist_key, chunks[2].page)
        assert ("a.md", 1, 1, 4, key) == (
            chunks[0].path, chunks[0].ordinal, chunks[0].start, chunks[0].end, chunks[0].gist_key
        )  # fmt: skip
        assert [Skipped(path="b.bin", sha256="", reason="no text")] == reader.skipped()
        assert (2, 1, 1, 3, 9, 1, 4) == (
            stats.documents, stats.stale, stats.skipped, stats.chunks, stats.tokens, stats.gist_files, stats.gists
        )  # fmt: skip
        assert {"markdown": 1, "pdf": 1} == stats.kinds
        assert gist_file(tmp_path).stat().st_size == stats.gist_bytes == reader.gists.rows()[0].size
        assert (IndexSettings(kv_cache_dtype="auto"), "docs", GISTS_BY) == (
            reader.settings,
            reader.config.source,
            reader.config.gist_fingerprint,
        )
        assert ([], [], []) == (reader.database.integrity(), damaged_documents(reader.database), unreferenced(reader))


def test_ids_are_never_reused(tmp_path: Path) -> None:
    """A replaced or removed chunk's id stays empty for ever, also over builds."""
    make(tmp_path, "one", "two")
    for _ in range(2):
        with Store.build(tmp_path) as opened:
            opened.replace_document(document(), entries(["new"]))
    with Store.build(tmp_path) as opened:
        opened.remove_document("a.md")
    with Store.build(tmp_path) as opened:
        opened.replace_document(document(), entries(["last"]))

        assert [5] == [chunk.id for chunk in opened.chunks_of("a.md")]
        assert set() == opened.present([1, 2, 3, 4])
        assert 2 * 5 == opened.vectors.last_id()


def test_failed_replacement_leaves_the_document(tmp_path: Path) -> None:
    """A document is replaced whole or not at all, and the transaction goes on."""
    make(tmp_path, "old")
    with Store.build(tmp_path) as opened:
        opened.mark_seen("a.md", size=9, mtime_ns=9)
        twice = entries(["new"]) * 2  # the same ordinal twice
        with pytest.raises(IndexFolderError, match="UNIQUE"):
            opened.replace_document(document(), twice)

        assert ["old"] == [chunk.text for chunk in opened.chunks_of("a.md")]
        assert 9 == opened.documents()[0].mtime_ns


def test_renamed_document_keeps_its_chunks(tmp_path: Path) -> None:
    """A rename changes the path and no id."""
    make(tmp_path)
    with Store.build(tmp_path) as opened:
        opened.rename_document("a.md", "b/c.md")

        assert [(1, "b/c.md")] == [(chunk.id, chunk.path) for chunk in opened.chunks_of("b/c.md")]
        assert [] == opened.chunks_of("a.md")


@pytest.mark.parametrize(
    ("filters", "scope", "expected"),
    [
        ({}, None, None),
        ({"path": "*.md"}, None, {1, 2}),
        ({"path": "guides/*"}, None, {2}),
        ({"kind": "pdf"}, None, {3}),
        ({"heading": "ÜBER"}, None, {2}),
        ({"path": "*", "kind": "markdown", "heading": "uns"}, None, {2}),
        ({"path": "'; DROP TABLE chunks; --"}, None, set()),
        ({}, "a.md", {1}),
        ({"kind": "pdf"}, "a.md", set()),
    ],
)
def test_filters_must_all_hold(
    tmp_path: Path, filters: dict[str, str], scope: str | None, expected: set[int] | None
) -> None:
    """Path, kind and heading select chunks, and a scope one document."""
    make(tmp_path)
    with Store.build(tmp_path) as opened:
        opened.replace_document(document("guides/b.md"), entries(["two"], heading=("Über uns",)))
        opened.replace_document(document("c.pdf", kind="pdf"), entries(["three"]))

        assert expected == opened.select(filters, scope)


@pytest.mark.parametrize(("filters", "scope", "said"), [({"size": "1"}, None, "size"), ({}, "no.md", "no.md")])
def test_unknown_filter_or_scope_is_refused(
    tmp_path: Path, filters: dict[str, str], scope: str | None, said: str
) -> None:
    """What cannot be asked for is named."""
    make(tmp_path)
    with Store.open(tmp_path) as reader, pytest.raises(UsageError, match=said):
        reader.select(filters, scope)


def test_keywords_find_stems_and_headings(tmp_path: Path) -> None:
    """Words are found in their other forms, without accents, and in headings."""
    make(tmp_path, "the runner was running", "a café")
    with Store.build(tmp_path) as opened:
        opened.replace_document(document("b.md"), entries(["nothing"], heading=("Installation",)))

        assert [1] == [chunk_id for chunk_id, _ in opened.keyword_search(["run"], 9)]
        assert [2] == [chunk_id for chunk_id, _ in opened.keyword_search(["CAFE"], 9)]
        assert [3] == [chunk_id for chunk_id, _ in opened.keyword_search(["install"], 9)]
        assert [] == opened.keyword_search(["run"], 9, allowed={2})
        assert opened.keyword_search(["run", "cafe"], 9)[0][1] > 0


@pytest.mark.parametrize(
    "word", ['"', '""', "*", "NEAR(", "AND", "heading:", "^a", "-", "ß", "é", "\u0301", "日本", "a b"]
)
def test_any_word_is_safe(tmp_path: Path, word: str) -> None:
    """Nothing a person types is taken for syntax."""
    make(tmp_path, "plain text")
    with Store.open(tmp_path) as reader:
        assert [] == reader.keyword_search([word, '"' + word], 3)


def test_thousands_of_words_are_safe(tmp_path: Path) -> None:
    """A pasted page is a question too."""
    make(tmp_path, "plain text")
    with Store.open(tmp_path) as reader:
        assert [1] == [row[0] for row in reader.keyword_search([*(f"w{i}" for i in range(5000)), "plain"], 3)]


# Trust in what is there


def test_index_is_private(tmp_path: Path) -> None:
    """Folders are 0700 and files 0600, those of SQLite too."""
    with Store.build(tmp_path / "index") as opened:
        configure(opened)
        opened.gists.put({"0" * 64: cache()})
        opened.replace_document(document(), entries(["hello"], key="0" * 64))
        paths = [tmp_path / "index", *(tmp_path / "index").rglob("*")]
        modes = {(path.is_dir(), oct(stat.S_IMODE(path.stat().st_mode))) for path in paths}

    assert {(True, "0o700"), (False, "0o600")} == modes


@pytest.mark.parametrize(
    ("mode", "owner", "group", "user", "expected"),
    [
        (0o700, 1000, 1000, 1000, ""),
        (0o755, 1000, 1000, 1000, ""),
        (0o775, 1000, 1000, 1000, ""),  # the group of the user alone
        (0o775, 1000, 100, 1000, "group 100"),
        (0o775, 1000, 0, 1000, ""),
        (0o777, 1000, 1000, 1000, "everybody"),
        (0o777, 1000, 1000, 0, "everybody"),
        (0o755, 0, 0, 1000, ""),
        (0o755, 1001, 1001, 1000, "user 1001"),
        (0o755, 1001, 1001, 0, ""),  # a folder mounted into a container
    ],
)
def test_who_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, owner: int, group: int, user: int, expected: str
) -> None:
    """Besides the user and root, others who can change a folder are named."""
    status = os.stat_result((mode | stat.S_IFDIR, 1, 1, 1, owner, group, 0, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda path: status)
    monkeypatch.setattr(os, "geteuid", lambda: user)

    assert expected == files.writers(tmp_path)


@pytest.mark.parametrize("builds", [False, True])
def test_index_that_everybody_may_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever writes a gist steers the model: a mode that lets anybody do so is named with its remedy; root is told."""
    make(tmp_path)
    tmp_path.chmod(0o777)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid or 1)
    with pytest.raises(IndexFolderError, match=f"everybody may write .* chmod -R go-w {tmp_path}"):
        open_either(tmp_path, builds=builds)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    open_either(tmp_path, builds=builds)
    assert "everybody may write" in caplog.text


def test_index_of_another_user_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An index that somebody else owns is read, and who that is is told once."""
    make(tmp_path)
    monkeypatch.setattr(files, "writers", lambda path: "user 1234")
    for _ in range(2):
        Store.open(tmp_path).close()

    assert 1 == caplog.text.count("user 1234 may write")


@pytest.mark.parametrize("name", ["index.db", "lock"])
def test_links_lead_nowhere(tmp_path: Path, name: str) -> None:
    """A database or lock that is a link is refused, and what it points to stays as it is."""
    make(tmp_path / "index")
    (tmp_path / "mine").write_bytes((tmp_path / "index" / name).read_bytes())
    before = (tmp_path / "mine").read_bytes()
    (tmp_path / "index" / name).unlink()
    (tmp_path / "index" / name).symlink_to(tmp_path / "mine")

    with pytest.raises(IndexFolderError):
        open_either(tmp_path / "index", builds=True)
    assert before == (tmp_path / "mine").read_bytes()


def test_settings_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    """Settings that this version does not know are one line with the next step."""
    make(tmp_path)
    with Store.build(tmp_path) as opened:
        opened.database.set_sealed("config", {**opened.config.values, "settings": '{"flavour": "sweet"}'})

    with Store.open(tmp_path) as reader, pytest.raises(IndexFolderError, match=r"another version .* upgrade gistrag"):
        _ = reader.settings


@pytest.mark.parametrize("place", ["database.commits", "gists.checked_ns", "patterns"])
def test_damaged_setting_is_named(tmp_path: Path, place: str) -> None:
    """A setting that is not what it should be is damage in index.db."""
    make(tmp_path)
    name = place.rpartition(".")[2]
    with Store.build(tmp_path) as opened:
        opened.database.set(name, "12x")
        with pytest.raises(IndexFolderError, match="is damaged"):
            attrgetter(place)(opened)
        opened.database.set(name, "")


def test_reader_on_a_full_disk(tmp_path: Path) -> None:
    """Where there is no room for the files by which readers follow a builder, an index at rest is read all the same."""
    key = make(tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(operation: Operation) -> None:
        if operation.kind in ("create", "write"):
            raise full

    with watched(Watch(tmp_path, before=refuse)), Store.open(tmp_path) as reader, reader.snapshot():
        assert torch.equal(cache().kv, GistCache.unpacked(reader.gists.load(key)).kv)


@pytest.mark.parametrize("content", [None, b""])
def test_nothing_built_is_incomplete(tmp_path: Path, content: bytes | None) -> None:
    """A folder without a commit says so, and stays as it is."""
    if content is not None:
        (tmp_path / "index.db").write_bytes(content)

    with pytest.raises(IncompleteIndexError, match="gistrag build"):
        Store.open(tmp_path)
    assert (content is not None) == (tmp_path / "index.db").exists()


def test_first_build_is_invisible_until_it_commits(tmp_path: Path) -> None:
    """A reader never meets a half-made index."""
    with Store.build(tmp_path) as opened:
        configure(opened)
        with pytest.raises(IncompleteIndexError):
            Store.open(tmp_path)
        opened.commit()
        Store.open(tmp_path).close()


def test_failed_first_build_leaves_nothing_to_read(tmp_path: Path) -> None:
    """After an error before the first commit the next build begins anew."""
    with pytest.raises(UsageError), Store.build(tmp_path) as opened:  # noqa: PT012  the build is what fails
        configure(opened)
        opened.select({"no": "such filter"})

    make(tmp_path)
    with Store.open(tmp_path) as reader:
        assert 1 == reader.count()


@pytest.mark.parametrize("content", [b"not a database" * 400, bytes(4096), os.urandom(8192)])
@pytest.mark.parametrize("builds", [False, True])
def test_no_database_is_one_line(tmp_path: Path, content: bytes, builds: bool) -> None:
    """A file that is no index is refused in one line, by readers and builders, and not changed."""
    (tmp_path / "index.db").write_bytes(content)

    with pytest.raises(IndexFolderError) as caught:
        open_either(tmp_path, builds=builds)
    assert "\n" not in str(caught.value)
    assert content == (tmp_path / "index.db").read_bytes()


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    """A SQLite file of something else is left alone."""
    connection = sqlite3.connect(tmp_path / "index.db")
    connection.execute("CREATE TABLE chunks (id)")
    connection.close()

    with pytest.raises(IndexFolderError, match="not an index of gistrag"), Store.build(tmp_path):
        pass


@pytest.mark.parametrize("builds", [False, True])
def test_newer_format_is_refused(tmp_path: Path, builds: bool) -> None:
    """A newer format is named beside what this version reads."""
    make(tmp_path)
    connection = sqlite3.connect(tmp_path / "index.db")
    connection.execute("PRAGMA user_version = 7")
    connection.close()

    with pytest.raises(IndexFolderError, match=f"format 7, .* up to {schema.FORMAT_VERSION}"):
        open_either(tmp_path, builds=builds)


def test_schema_says_its_format(tmp_path: Path) -> None:
    """The numbers in the file are those the code compares."""
    make(tmp_path)
    with Store.open(tmp_path) as reader:
        assert [(schema.FORMAT_VERSION,)] == reader.database.execute("PRAGMA user_version")
        assert [(schema.APPLICATION_ID,)] == reader.database.execute("PRAGMA application_id")


def test_changed_letter_in_a_chunk_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SQLite does not notice a changed letter; the row's hash does, and the chunk never reaches a model."""
    make(tmp_path, "the password is swordfish", "other")
    data = (tmp_path / "index.db").read_bytes()
    for letter in (b"S", b"\xff"):
        rewrite(tmp_path / "index.db", data.replace(b"swordfish", letter + b"wordfish"))
        with Store.open(tmp_path) as reader:
            assert ["other"] == [chunk.text for chunk in reader.chunks([1, 2])]
            assert ["a.md"] == damaged_documents(reader.database)
    assert "damaged" in caplog.text


def test_changed_letter_in_the_settings_is_refused(tmp_path: Path) -> None:
    """An index whose making cannot be trusted is not opened."""
    make(tmp_path)
    data = (tmp_path / "index.db").read_bytes()
    rewrite(tmp_path / "index.db", data.replace(b"tokens_per_gist", b"tokens_per_mist"))

    with pytest.raises(IndexFolderError, match="differs from its hash"):
        Store.open(tmp_path)


def test_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    """When SQLite runs out of space the build stops and the last commit stands."""
    make(tmp_path, "old")
    with pytest.raises(ResourceError, match="no space"), Store.build(tmp_path) as opened:  # noqa: PT012  as above
        opened.database.execute("PRAGMA max_page_count = 1")
        opened.replace_document(document(), entries(["x" * 100_000]))

    with Store.open(tmp_path) as reader:
        assert ["old"] == [chunk.text for chunk in reader.chunks_of("a.md")]


def test_deleted_means_gone(tmp_path: Path) -> None:
    """After remove, gc and close no byte of the text is left in any file, nor the gist."""
    make(tmp_path, "kept words")
    with Store.build(tmp_path) as opened:
        key = opened.gists.key([9])
        opened.gists.put({key: cache(seed=9)})
        secret = entries(["canary zanzibarquux " * 50], key=key, heading=("Zanzibarquux",))
        opened.replace_document(document("secret-name.md"), secret)
    assert b"zanzibarquux" in everything_in(tmp_path)

    with Store.build(tmp_path) as opened:
        opened.remove_document("secret-name.md")
        assert 1 == remove_unused(opened)

    left = everything_in(tmp_path).lower()
    assert [] == [word for word in (b"zanzibarquux", b"anzibarquu", b"secret-name") if word in left]
    assert 1 == len(list((tmp_path / "gists").rglob("*.safetensors")))
    with Store.open(tmp_path) as reader:
        assert [(1,)] == [(chunk_id,) for chunk_id, _ in reader.keyword_search(["kept"], 5)]


def test_gc_removes_leftovers_only(tmp_path: Path) -> None:
    """Half-written files, gists without a row and old faiss files go; everything else stays."""
    make(tmp_path)
    name = "0" * 64
    strays = [
        tmp_path / f"faiss-{name}.idx",
        tmp_path / f".faiss-{name}.idx.12-34.tmp",
        tmp_path / "gists" / "00" / f"{name}.safetensors",
        gist_file(tmp_path).parent / f".{name}.safetensors.12-34.tmp",
    ]
    for path in strays:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "gists" / "00" / "notes.md").write_text("mine")
    with Store.open(tmp_path) as reader:
        assert sorted(strays) == unreferenced(reader)
    with Store.build(tmp_path) as opened:
        assert 4 == remove_unused(opened)

    assert not any(path.exists() for path in strays)
    assert gist_file(tmp_path).exists()
    assert (tmp_path / "README.md").exists()


def test_check_time_is_kept(tmp_path: Path) -> None:
    """When the gists were last checked is known to the next build."""
    make(tmp_path)
    with Store.build(tmp_path) as opened:
        assert 0 == opened.gists.checked_ns
        opened.gists.set_checked()
    with Store.open(tmp_path) as reader:
        assert 0 < reader.gists.checked_ns <= time.time_ns()


# Builders and readers

BUILD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from support.small_index import *
from gistrag.index.store import Store
from pathlib import Path
with Store.build(Path(sys.argv[1]), command="gistrag build docs") as opened:
    configure(opened)
    opened.replace_document(document("first.md"), entries(["committed"]))
    opened.commit()
    opened.gists.put({opened.gists.key([5]): cache(seed=5)})
    opened.replace_document(document("second.md"), entries(["lost"], key=opened.gists.key([5])))
    print("at work", flush=True)
    time.sleep(60)
"""


def start_build(folder: Path) -> subprocess.Popen[str]:
    """Start a process that commits one document and hangs before the second."""
    command = [sys.executable, "-c", BUILD, str(folder), str(Path(__file__).parents[1])]
    builder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert builder.stdout is not None
    assert "at work\n" == builder.stdout.readline()
    return builder


def test_killed_build_keeps_its_commit_and_its_gists(tmp_path: Path) -> None:
    """While it runs a second is refused; after kill -9 the commit stands, the lock is free, its gist is adopted."""
    builder = start_build(tmp_path)
    try:
        with pytest.raises(IndexLockedError, match=f"process {builder.pid} .*gistrag build docs"):
            open_either(tmp_path, builds=True)
        assert builder.poll() is None
    finally:
        builder.send_signal(signal.SIGKILL)
        builder.communicate()

    with Store.open(tmp_path) as reader:
        assert ["first.md"] == [row.path for row in reader.documents()]
    with Store.build(tmp_path) as opened:
        key = opened.gists.key([5])
        with pytest.raises(GistNotFoundError):
            GistCache.unpacked(opened.gists.load(key))
        assert opened.gists.reuse(key)
        assert torch.equal(cache(seed=5).kv, GistCache.unpacked(opened.gists.load(key)).kv)


def test_gist_is_on_disk_before_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the row is written the file was renamed and its folder synced."""
    steps: list[str] = []
    for name in ("write_new", "rename", "sync_folder"):
        monkeypatch.setattr(files, name, recorded(name, steps))
    with Store.build(tmp_path) as opened:
        configure(opened)
        opened.database._connection.set_trace_callback(lambda sql: steps.append("row") if "INTO gists" in sql else None)
        steps.clear()
        opened.gists.put({"0" * 64: cache()})
        opened.database._connection.set_trace_callback(None)

    assert ["write_new", "rename", "sync_folder", "row"] == steps[-4:]


def test_reader_sees_one_state_within_a_snapshot(tmp_path: Path) -> None:
    """A query sees the state it began with, the next one the newest commit; uncommitted work is never seen."""
    make(tmp_path, "old")
    with Store.open(tmp_path) as reader, Store.build(tmp_path) as opened:
        with reader.snapshot():
            assert 1 == reader.count()
            opened.replace_document(document(), entries(["new", "newer"]))
            opened.commit()
            with reader.snapshot():
                assert ["old"] == [chunk.text for chunk in reader.chunks_of("a.md")]
        opened.replace_document(document(), entries(["not yet"]))

        assert ["new", "newer"] == [chunk.text for chunk in reader.chunks_of("a.md")]


def test_readers_in_threads_during_builds(tmp_path: Path) -> None:
    """Threads that share a reader always see whole documents while builds replace them."""
    make(tmp_path, "0", "0", "0")
    seen: list[set[str]] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def read(reader: Store) -> None:
        try:
            while not done.is_set():
                with reader.snapshot():
                    ids = [chunk.id for chunk in reader.chunks_of("a.md")]
                    chunks = reader.chunks(ids)
                seen.append({chunk.text for chunk in chunks} | {str(len(chunks))})
        except BaseException as error:
            failures.append(error)

    with Store.open(tmp_path) as reader:
        threads = [threading.Thread(target=read, args=(reader,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(10, 15):
            with Store.build(tmp_path) as opened:
                for _ in range(5):
                    opened.replace_document(document(), entries([str(number)] * 3))
                    opened.commit()
        done.set()
        for thread in threads:
            thread.join()

    assert [] == failures
    assert [] == [texts for texts in seen if len(texts) != 2 or "3" not in texts]


def test_reader_leaves_the_database_as_it_was(tmp_path: Path) -> None:
    """Reading changes no byte of the index."""
    key = make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with Store.open(tmp_path) as reader, reader.snapshot():
        GistCache.unpacked(reader.gists.load(key))
        reader.keyword_search(["hello"], 3)
        with pytest.raises(IndexFolderError, match="readonly"):
            reader.remove_document("a.md")

    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize(
    ("wal", "shm", "expected"),
    [(None, False, True), (None, True, True), (b"", False, True), (b"frames", False, False), (b"frames", True, False),
     (b"", True, False)],
)  # fmt: skip
def test_database_is_called_immutable_only_where_nobody_writes(
    tmp_path: Path, wal: bytes | None, shm: bool, expected: bool
) -> None:
    """Immutable would ignore commits in a write-ahead log; so it is used only where there are none."""
    if wal is not None:
        (tmp_path / "index.db-wal").write_bytes(wal)
    if shm:
        (tmp_path / "index.db-shm").write_bytes(b"")

    assert expected == database.is_quiet_in(tmp_path)


def test_read_only_folder_is_read_and_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index nobody may write is read without making a file, and a changed one is opened again."""
    key = make(tmp_path, "old")
    files_before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, "access", lambda *_: False)
    with Store.open(tmp_path) as reader:
        assert reader.database.is_immutable
        with reader.snapshot():
            assert torch.equal(cache().kv, GistCache.unpacked(reader.gists.load(key)).kv)
        assert files_before == sorted(tmp_path.iterdir())
        with Store.build(tmp_path) as opened:
            opened.replace_document(document(), entries(["new"]))
        with reader.snapshot():
            assert ["new"] == [chunk.text for chunk in reader.chunks_of("a.md")]


def test_moved_index_is_read(tmp_path: Path) -> None:
    """An index is read wherever it is, under any name."""
    key = make(tmp_path / "one")
    moved = tmp_path / "zwei ?#%41 'x'"
    shutil.move(tmp_path / "one", moved)

    with Store.open(moved) as reader:
        assert torch.equal(cache().kv, GistCache.unpacked(reader.gists.load(key)).kv)


ELSEWHERE = """
import sys
sys.path.insert(0, {tests!r})
from support.small_index import document, entries
from gistrag.index.store import Store
with Store.build({folder!r}) as store:
    store.replace_document(document({path!r}), entries(["from elsewhere"]))
"""


def test_hashing_keeps_the_locks_of_readers(tmp_path: Path) -> None:
    """After index.db was hashed in its process, a reader still follows builders in others.

    Closing any descriptor of a file drops the locks that SQLite holds on it; a builder that ends would then take the
    write-ahead log away from the reader.
    """
    make(tmp_path)
    with Store.open(tmp_path) as reader:
        assert ["a.md"] == [row.path for row in reader.documents()]
        with Store.build(tmp_path) as builder:
            assert builder.database.sha256()
        assert ["a.md"] == [row.path for row in reader.documents()]
        for path in ("b.md", "c.md", "d.md"):
            code = ELSEWHERE.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path), path=path)
            subprocess.run([sys.executable, "-c", code], check=True)
            assert path == reader.documents()[-1].path
