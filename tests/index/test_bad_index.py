"""What a command makes of bad questions, bad settings and an index that is not as it should be, row by row.

The real commands run, with a tiny model in place of the default one. Bad documents are in test_bad_input.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.io_trace import Operation, Watch, watched
from support.tiny_models import HashEmbedder, tiny_model

from gistrag.cli import main
from gistrag.compression import compress as compression
from gistrag.compression import compress as making_gists
from gistrag.engine import Engine
from gistrag.index.schema import FORMAT_VERSION
from gistrag.index.store import Store
from gistrag.kv.cache import GistCache
from gistrag.model.gist_model import GistModel
from gistrag.settings import GistSettings
from gistrag.storage import files

TEXTS = {
    "mill.md": "The mill stands by the river and grinds the wheat of the whole valley.",
    "bees.md": "Bees gather nectar in spring and keep the honey in combs of wax for winter.",
}


@dataclass
class House:
    """A folder of documents with its index, and commands on them.

    Attributes:
        engine: what the commands load; loads: how often they did.
    """

    folder: Path
    engine: Engine
    capsys: pytest.CaptureFixture[str]
    loads: int = 0

    @property
    def docs(self) -> Path:
        return self.folder / "docs"

    @property
    def index(self) -> Path:
        return self.folder / "index"

    def build(self, *options: str) -> tuple[int, str]:
        return self.run("build", str(self.docs), "--index", str(self.index), "--quiet", *options)

    def query(self, *options: str, question: str = "honey") -> tuple[int, str]:
        short = () if "--max-new-tokens" in options else ("--max-new-tokens", "1")
        return self.run("query", question, "--index", str(self.index), "--json", "--quiet", *short, *options)

    def run(self, *arguments: str) -> tuple[int, str]:
        """Return the exit code and what was printed: the result, or the line that says why there is none."""
        code, told = main.main(arguments), self.capsys.readouterr()
        assert "Traceback" not in told.err
        assert code == 0 or told.err.count("\n") == 1, told.err
        return code, told.err if code else told.out

    def load(self, *_: object, **__: object) -> Engine:
        self.loads += 1
        return self.engine

    def held(self) -> dict[str, str]:
        """Return the documents of the index."""
        with Store.open(self.index) as store:
            return {row.path: store.chunks_of(row.path)[0].text for row in store.documents()}


@pytest.fixture
def house(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> House:
    """A house with two documents, indexed."""
    one = House(tmp_path, engine, capsys)
    monkeypatch.setattr(Engine, "load", one.load)
    one.docs.mkdir()
    for name, text in TEXTS.items():
        (one.docs / name).write_text(text)
    assert one.build("--adapter", "none", "--placement", "selected", "--tokens-per-gist", "2")[0] == 0
    one.loads = 0
    return one


@pytest.mark.parametrize(
    ("question", "options", "code", "told"),
    [
        ("", (), 2, "the question is empty"),
        ("  \n", (), 2, "the question is empty"),
        ("honey", ("--top-k", "0"), 2, "--top-k"),
        ("honey", ("--top-k", "-3"), 2, "--top-k"),
        ("honey", ("--max-new-tokens", "0"), 2, "--max-new-tokens"),
        ("honey", ("--temperature", "-1"), 2, "--temperature"),
        ("honey", ("--temperature", "nan"), 2, "--temperature"),
        ("honey", ("--scope", "none.md"), 2, "no document 'none.md'"),
        ("honey", ("--filter", "size=3"), 2, "filters are path, kind, heading, date"),
        ("honey", ("--filter", "path=" + "*" * 100_000), 2, "a filter on path has at most 4,096 characters"),
        ("honey", ("--scope", "caf\udce9"), 2, "half a character"),
        ("honey", ("--filter", "path=caf\udce9"), 2, "half a character"),
        ("honey " * 400, (), 2, "the model's context window has 1024"),
        ("honey", ("--max-new-tokens", "5000"), 2, "the model's context window has 1024"),
    ],
)
def test_a_question_that_makes_no_sense(
    house: House, question: str, options: tuple[str, ...], code: int, told: str
) -> None:
    """A question or number out of range is refused in one line that names it; nothing is cut silently."""
    found = house.query(*options, question=question)

    assert code == found[0]
    assert told in found[1]


@pytest.mark.parametrize("command", ["query", "search"])
def test_a_question_longer_than_any_model_reads(house: House, command: str) -> None:
    """It is refused before a model is loaded or anything is searched."""
    code, told = house.run(command, "x" * 2**20, "--index", str(house.index), "--quiet")

    assert (2, 0) == (code, house.loads)
    assert "a question has at most 65,536 characters, got 1,048,576" in told


def test_half_a_character_in_a_question(house: House) -> None:
    """A terminal of another encoding passes it; the rest of the question is answered."""
    assert 0 == house.query(question="honey caf\udce9")[0]


def test_more_chunks_than_there_are(house: House) -> None:
    """Asked for more chunks than the index has, an answer rests on all of them."""
    code, told = house.query("--top-k", "99")

    assert (0, 2) == (code, len(json.loads(told)["sources"]))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--tokens-per-gist", "0"), "--tokens-per-gist"),
        (("--chunk-tokens", "5"), "--chunk-tokens"),
        (("--placement", "random"), "selected"),
        (("--quantize", "int3"), "nf4"),
        (("--chunk-tokens", "100000", "--rebuild"), "chunk_tokens must be at most"),
    ],
)
def test_a_setting_out_of_range(house: House, options: tuple[str, ...], told: str) -> None:
    """A setting that cannot be is refused, and the index stays as it was."""
    found = house.build(*options)

    assert 2 == found[0]
    assert told in found[1]
    assert TEXTS == house.held()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--tokens-per-gist", "7"), "tokens_per_gist '2', this one has '7'"),
        (("--chunk-tokens", "99"), "chunk_tokens '256', this one has '99'"),
        (("--placement", "anchored"), "placement 'selected', this one has 'anchored'"),
        (("--model", "another"), "this one has 'another'"),
        (("--embedder", "another"), "this one has 'another'"),
        (("--adapter", "another"), "adapter 'none', this one has 'another'"),
    ],
)
def test_an_index_made_with_other_settings(house: House, options: tuple[str, ...], told: str) -> None:
    """Both values and the command that mends it are named; the code is 4 and nothing was loaded."""
    found = house.build(*options)

    assert (4, 0) == (found[0], house.loads)
    assert told in found[1]
    assert "run `gistrag build --rebuild`" in found[1]


@pytest.mark.parametrize("other", ["model", "embedder"])
def test_an_index_made_by_other_models(house: House, other: str) -> None:
    """Models on this machine that are not those the index was made with are refused by queries and builds alike."""
    if other == "model":
        house.engine = Engine(tiny_model(hidden_size=64), HashEmbedder())  # type: ignore[arg-type]
    else:
        house.engine = Engine(house.engine.model, HashEmbedder("another"))  # type: ignore[arg-type]

    if other == "model":
        house.engine.model._identity = "another"
    for code, told in (house.query(), house.build()):
        assert 4 == code
        assert "this one has 'another'" in told
        assert "run `gistrag build --rebuild`" in told


@pytest.mark.parametrize("command", ["query", "build"])
@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("newer format", f"format {FORMAT_VERSION + 1}, this gistrag reads up to {FORMAT_VERSION}"),
        ("not a database", "is damaged"),
        ("another program's", "is not an index of gistrag"),
        ("cut short", "is damaged"),
    ],
)
def test_a_database_that_is_none(house: House, command: str, harm: str, told: str) -> None:
    """A database that this version cannot read is refused in one line, with code 4, and left as it is."""
    path = house.index / "index.db"
    if harm in ("newer format", "another program's"):
        database = sqlite3.connect(path)
        name = "user_version" if harm == "newer format" else "application_id"
        database.execute(f"PRAGMA {name} = {FORMAT_VERSION + 1}")
        database.close()
    else:
        path.write_bytes(b"no database" * 999 if harm == "not a database" else path.read_bytes()[:5000])
    before = path.read_bytes()

    found = house.query() if command == "query" else house.build()
    assert 4 == found[0]
    assert told in found[1]
    assert before == path.read_bytes()


def test_no_index(house: House) -> None:
    """A query of a folder without an index names the command that makes one, and makes nothing."""
    shutil.rmtree(house.index)

    code, told = house.query()
    assert 4 == code
    assert "run gistrag build" in told
    assert not house.index.exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gist_that_is_not_finite(house: House, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """It would poison every answer: its chunk is stored without one and read as text."""
    real = making_gists.compress

    def poisoned(*given: Any, **options: Any) -> list[GistCache]:
        caches = real(*given, **options)
        for one in caches:
            one.kv[-1, -1, -1, -1, -1] = value
        return caches

    monkeypatch.setattr(making_gists, "compress", poisoned)
    (house.docs / "new.md").write_text("Salt was carried over the pass by mules.")

    code, told = house.build()
    assert (0, 1, 0) == (code, json.loads(told)["without_gist"], json.loads(told)["gists_made"])
    answer = json.loads(house.query("--top-k", "3")[1])
    assert [False, False, True] == sorted(source["as_text"] for source in answer["sources"])


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_disk_that_is_full(house: House, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """The bytes that are needed are named where they are known; the index serves on, from text if need be."""
    (house.docs / "new.md").write_text("Salt was carried over the pass by mules.")
    if when == "before":
        monkeypatch.setattr(files, "free_bytes", lambda path: 100)
        code, told = house.build()
        assert "the gists need " in told
        assert " has 100 " in told
    else:
        code, told = _refusing(house, errno.ENOSPC, ("create", "write"), house.build)
        assert "no space left" in told

    assert 5 == code
    assert (sorted({*TEXTS, "new.md"}) if when == "before" else sorted(TEXTS)) == sorted(house.held())
    assert 0 == json.loads(house.query()[1])["usage"]["text_fallbacks"]


def _refusing(
    house: House, number: int, kinds: Sequence[str], command: Callable[[], tuple[int, str]]
) -> tuple[int, str]:
    """Run a command on an index whose files the system does not let it change."""

    def refuse(operation: Operation) -> None:
        if operation.kind in kinds and operation.path != "lock":
            raise OSError(number, os.strerror(number))

    with watched(Watch(house.index, before=refuse)):
        return command()


@pytest.mark.parametrize("room", ["for one chunk", "for none"])
def test_a_gpu_that_is_full(house: House, monkeypatch: pytest.MonkeyPatch, room: str) -> None:
    """A batch that does not fit is halved down to one chunk; if not even that fits, code 5 and the index serves on."""
    real, sizes = compression._compress, []

    def compress(model: GistModel, chunks: Sequence[Sequence[int]], settings: GistSettings) -> list[GistCache]:
        sizes.append(len(chunks))
        if room == "for none" or len(chunks) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, chunks, settings)

    monkeypatch.setattr(compression, "_compress", compress)
    for name in ("salt", "rye", "rope"):
        (house.docs / f"{name}.md").write_text(f"The {name} was carried over the pass by mules.")

    code, told = house.build()
    assert 1 in sizes
    if room == "for none":
        assert 5 == code
        assert "not enough memory" in told
        assert TEXTS.items() < house.held().items()
    else:
        assert (0, 3) == (code, json.loads(told)["gists_made"])


def test_a_folder_that_is_read_only(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query works and changes nothing; a build is refused before any work."""
    for left in house.index.glob("index.db-*"):
        left.unlink()
    monkeypatch.setattr(os, "access", lambda path, mode, **_: mode != os.W_OK)
    changing = ("create", "write", "truncate", "rename", "remove", "make folder", "sync")
    before = sorted(house.index.rglob("*"))

    code, told = _refusing(house, errno.EROFS, changing, house.query)
    assert code == 0, told
    assert (0, 0) == (code, json.loads(told)["usage"]["text_fallbacks"])
    assert before == sorted(house.index.rglob("*"))
    house.loads = 0
    (house.docs / "new.md").write_text("Salt.")
    (house.index / "lock").unlink()
    with watched(Watch(house.index, before=_read_only)):
        code, told = house.build()
    assert (4, 0) == (code, house.loads)
    assert "Read-only file system" in told


def _read_only(operation: Operation) -> None:
    if operation.changes:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_folder_that_moved(house: House) -> None:
    """Paths are relative: moved together, documents and index go on as before, and nothing is computed again."""
    house.folder = Path(shutil.move(house.folder, house.folder.with_name("elsewhere")))

    assert 0 == json.loads(house.query()[1])["usage"]["text_fallbacks"]
    assert 2 == json.loads(house.build()[1])["unchanged"]
