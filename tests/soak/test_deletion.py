"""Promise 12: deleted means gone, from every byte of the folder."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import fake_compressor
from support.small_index import vectors_of

from gistrag.cli import exit_codes
from gistrag.cli.main import main as run_command
from gistrag.engine import Engine
from gistrag.index.store import Store
from gistrag.rag import GistRAG

SETTINGS = {"chunk_tokens": 160, "tokens_per_gist": fake_compressor.TOKENS_PER_GIST}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with fake_compressor.fake_compression():
        yield fake_compressor.engine()


def secret(number: int, randomness: random.Random) -> str:
    """Return a text, its heading and words, that holds a canary many times."""
    filler = " ".join(randomness.choice(("rye", "honey", "salt")) for _ in range(randomness.randrange(5, 120)))
    return f"# Heading of quokka{number}zebu\n\nThe quokka{number}zebu says {filler} quokka{number}zebu."


def everything_in(folder: Path) -> bytes:
    """Return all names and bytes in a folder."""
    paths = sorted(folder.rglob("*"))
    names = "\n".join(str(path.relative_to(folder)) for path in paths).encode()
    return b"\n".join([names, *(path.read_bytes() for path in paths if path.is_file())])


def traces(index: Path, canaries: list[str], gone: list[bytes]) -> list[str]:
    """Return what is left of deleted documents: their words, their gists, their vectors."""
    held = everything_in(index)
    folded = held.lower()
    words = [canary for canary in canaries if canary.encode() in folded]
    return [*words, *(data[:8].hex() for data in gone if data in held)]


def bits_of(index: Path, path: str) -> list[bytes]:
    """Return a stretch of every gist and vector of a document."""
    found = []
    with Store.open(index) as store:
        for chunk in store.chunks_of(path):
            found.append(vectors_of(store, chunk.id)[0].tobytes()[:24])
            if chunk.gist_key:
                found += [store.gists.load(chunk.gist_key).arrays["kv"].tobytes()[:24], chunk.gist_key.encode()]
    return found


def life(folder: Path, engine: Engine, rounds: int, randomness: random.Random) -> Iterator[list[str]]:
    """Add, change and delete documents, and yield after each build what is left of those that are gone."""
    docs, index, gone = folder / "docs", folder / "index", list[bytes]()
    docs.mkdir()
    alive: dict[str, int] = {}
    count = 0
    for _ in range(rounds):
        for name in (f"d{number}" for number in range(8)):
            chance, before = randomness.random(), alive.get(name)
            if chance < 0.5:
                count += 1
                alive[name] = count
                (docs / f"{name}quokka{count}zebu.md").write_text(secret(count, randomness))
            elif chance < 0.8:
                alive.pop(name, None)
            if before is not None and alive.get(name) != before:
                old = f"{name}quokka{before}zebu.md"
                gone += bits_of(index, old)
                (docs / old).unlink()
        GistRAG.from_folder(docs, index=index, engine=engine, gists="now", **SETTINGS).close()
        left = {f"quokka{number}zebu" for number in alive.values()}
        yield traces(index, [f"quokka{n}zebu" for n in range(1, count + 1) if f"quokka{n}zebu" not in left], gone)


def test_deleted_documents_are_gone(tmp_path: Path, engine: Engine, randomness: random.Random) -> None:
    """After a build no byte of the folder holds a word, a name, a gist or a vector of what was deleted or changed."""
    for left in life(tmp_path, engine, 4, randomness):
        assert [] == left


@pytest.mark.soak
def test_deleted_documents_are_gone_in_200_builds(tmp_path: Path, engine: Engine, randomness: random.Random) -> None:
    """200 builds."""
    for left in life(tmp_path, engine, 200, randomness):
        assert [] == left


def test_deleted_document_is_gone_after_gc_where_a_reader_was_in_the_way(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A reader in the middle of a question keeps the log from being emptied: it is told, and gc does it later."""
    docs, index = tmp_path / "docs", tmp_path / "index"
    docs.mkdir()
    (docs / "kept.txt").write_text("A text that stays.")
    (docs / "secret.txt").write_text("The quokka1zebu.")
    GistRAG.from_folder(docs, index=index, engine=engine, gists="now", **SETTINGS).close()
    (docs / "secret.txt").unlink()
    monkeypatch.setattr("gistrag.index.database.BUSY_S", 0.1)
    with Store.open(index) as reader, reader.snapshot():
        assert 2 == len(reader.documents())
        GistRAG.from_folder(docs, index=index, engine=engine, gists="now", **SETTINGS).close()
        assert exit_codes.LOCKED == run_command(["gc", "--index", str(index)])
    assert "until gistrag gc" in caplog.text
    assert b"quokka1zebu" in everything_in(index)

    assert 0 == run_command(["gc", "--index", str(index)])
    assert b"quokka1zebu" not in everything_in(index)
