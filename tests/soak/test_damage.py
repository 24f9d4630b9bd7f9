"""Promises 4 and 5: whatever happens to the files is noticed; the right gist reaches the model, or none."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support import fake_compressor
from support.fake_compressor import is_right, retrieved, write_documents

from gistrag.engine import Engine
from gistrag.errors import CorruptGistError, FingerprintMismatchError, GistRAGError
from gistrag.index.integrity import check
from gistrag.index.store import Store
from gistrag.kv.packed import PackedGists
from gistrag.rag import GistRAG

Randomness = random.Random
SETTINGS = {"chunk_tokens": 160, "tokens_per_gist": fake_compressor.TOKENS_PER_GIST}
VERSIONS = {"a": 1, "b": 1, "c": 1, "d": 1}
PAGE_BYTES = 4096


@dataclass
class Indexes:
    """An index as three folders: ``old``, ``new`` after its documents changed, and a copy to be damaged.

    Attributes:
        texts: of all chunks that were ever committed.
        chunks: how many there are now.
    """

    folder: Path
    engine: Engine
    texts: set[str] = field(default_factory=set)
    chunks: int = 0

    def __post_init__(self) -> None:
        write_documents(self.folder / "docs", VERSIONS)
        self.build(self.folder / "new")
        shutil.copytree(self.folder / "new", self.folder / "old")
        write_documents(self.folder / "docs", {**VERSIONS, "b": 2, "e": 1})
        self.build(self.folder / "new")
        for index in (self.folder / "old", self.folder / "new"):
            with Store.open(index) as store:
                self.chunks = store.count()
                for row in store.documents():
                    self.texts |= {chunk.text for chunk in store.chunks_of(row.path)}

    def build(self, index: Path) -> None:
        GistRAG.from_folder(self.folder / "docs", index=index, engine=self.engine, gists="now", **SETTINGS).close()

    def fresh(self) -> Path:
        """Return a copy of the newer index."""
        index = self.folder / "index"
        shutil.rmtree(index, ignore_errors=True)
        return shutil.copytree(self.folder / "new", index)

    def outcome(self, index: Path) -> str:
        """Return how a reader uses a damaged index, and raise where anything damaged reaches the model.

        ``"refused"``: it does not open or answer. ``"text"``: chunks are read from their text.
        ``"fewer"``: chunks are left out, or all where none can be found.
        ``"whole"``: every chunk is answered from its gist.
        """
        try:
            with GistRAG.open(index, engine=self.engine) as rag:
                passages, usage = retrieved(rag, "part 1 of the harbour crane", top_k=99)
        except GistRAGError:
            return "refused"
        for passage in passages:
            assert is_right(passage, self.engine), passage.source
            assert passage.text in self.texts, passage.source
        if usage.text_fallbacks:
            return "text"
        return "whole" if len(passages) == self.chunks else "fewer"

    def is_noticed(self, index: Path) -> bool:
        """Return whether ``gistrag verify --full`` reports damage."""
        try:
            with Store.open(index) as store, store.snapshot():
                return not check(store, full=True).is_sound
        except GistRAGError:
            return True


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Indexes]:
    with fake_compressor.fake_compression():
        yield Indexes(tmp_path_factory.mktemp("indexes"), fake_compressor.engine())


# Damage


def flip(path: Path, randomness: Randomness) -> None:
    """Change one to eight bits."""
    data = bytearray(path.read_bytes())
    for _ in range(randomness.choice((1, 1, 2, 8))):
        data[randomness.randrange(len(data))] ^= 1 << randomness.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, randomness: Randomness) -> None:
    path.write_bytes(path.read_bytes()[: randomness.randrange(path.stat().st_size)])


def extend(path: Path, randomness: Randomness) -> None:
    path.write_bytes(path.read_bytes() + randomness.randbytes(randomness.choice((1, 100, PAGE_BYTES))))


def zero(path: Path, randomness: Randomness) -> None:
    """Fill a stretch with zeros that was not all zeros."""
    data = bytearray(path.read_bytes())
    start = randomness.randrange(len(data))
    end = min(len(data), start + randomness.choice((16, 512, PAGE_BYTES)))
    if any(data[start:end]):
        data[start:end] = bytes(end - start)
        path.write_bytes(data)
    else:
        zero(path, randomness)


def swap(path: Path, randomness: Randomness) -> None:
    """Exchange a gist with another, or two pages of a larger file."""
    if path.suffix == ".safetensors":
        other = randomness.choice([one for one in gists_of(path.parents[2]) if one != path])
        mine, its = path.read_bytes(), other.read_bytes()
        path.write_bytes(its)
        other.write_bytes(mine)
        return
    data = path.read_bytes()
    size = min(PAGE_BYTES, len(data) // 4)
    one, other_start = (size * number for number in sorted(randomness.sample(range(len(data) // size), 2)))
    head, middle = data[one : one + size], data[other_start : other_start + size]
    if head == middle:
        swap(path, randomness)
        return
    data = data[:one] + middle + data[one + size : other_start] + head + data[other_start + size :]
    path.write_bytes(data)


def roll_back(path: Path, randomness: Randomness) -> None:
    """Put what was there before the last build in place of a file, or of all gists."""
    old = path.parents[2 if path.suffix == ".safetensors" else 0].with_name("old")
    if path.suffix == ".safetensors":
        shutil.rmtree(path.parents[1])
        shutil.copytree(old / "gists", path.parents[1])
    else:
        path.write_bytes((next(old.glob("faiss-*")) if path.suffix == ".idx" else old / path.name).read_bytes())


def remove(path: Path, randomness: Randomness) -> None:
    path.unlink()


HARM = (flip, truncate, extend, zero, swap, roll_back, remove)


def gists_of(index: Path) -> list[Path]:
    return sorted((index / "gists").rglob("*.safetensors"))


def victim(index: Path, kind: str, randomness: Randomness) -> Path:
    """Return a file to harm."""
    if kind == "gist":
        return randomness.choice(gists_of(index))
    return index / "index.db" if kind == "database" else next(index.glob("faiss-*"))


EXPECTED = {
    "gist": {"text"},
    "faiss": {"whole"},  # the vectors in the database serve
    "database": {"refused", "text", "fewer", "whole"},
}


def harmed(indexes: Indexes, kind: str, harm: Callable[[Path, Randomness], None], randomness: Randomness) -> str:
    """Damage an index and return how a reader used it; raise where the damage went unnoticed or was used."""
    index = indexes.fresh()
    path = victim(index, kind, randomness)
    before = path.read_bytes()
    harm(path, randomness)
    taken = indexes.outcome(index)
    assert taken in EXPECTED[kind], f"{harm.__name__} of a {kind}: {taken}"
    assert indexes.is_noticed(index), f"{harm.__name__} of a {kind}, {taken}: {_places(before, path)}"
    return taken


def _places(before: bytes, path: Path) -> list[int]:
    after = path.read_bytes() if path.exists() else b""
    return [place for place, (old, new) in enumerate(zip(before, after, strict=False)) if old != new][:10]


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("harm", HARM, ids=lambda harm: harm.__name__)
def test_damage_is_noticed(
    indexes: Indexes, kind: str, harm: Callable[[Path, Randomness], None], randomness: Randomness
) -> None:
    """A damaged file is reported, nothing of it reaches the model, and the question is still answered."""
    for _ in range(2):
        harmed(indexes, kind, harm, randomness)


@pytest.mark.parametrize("place", [b"CREATE TABLE", b"CREATE INDEX", b"AUTOINCREMENT", b"REFERENCES", b"settings"])
def test_a_schema_that_is_no_text_is_damage(indexes: Indexes, place: bytes) -> None:
    """A bit of the schema that makes SQLite's own message no UTF-8 is damage in one line, as any other."""
    index = indexes.fresh()
    path = index / "index.db"
    data = path.read_bytes()
    assert place in data
    path.write_bytes(data.replace(place, b"\xa0".join((place[:3], place[4:]))))

    assert "refused" == indexes.outcome(index)
    assert indexes.is_noticed(index)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(4))
def test_2000_damages_are_noticed(indexes: Indexes, randomness: Randomness, part: int) -> None:
    """2,000 mutations of all kinds, in four parts."""
    taken: Counter[tuple[str, str]] = Counter()
    for _ in range(500):
        kind, harm = randomness.choice([*EXPECTED]), randomness.choice(HARM)
        taken[kind, harmed(indexes, kind, harm, randomness)] += 1
    print("\n".join(f"{count:6,} {kind} {how}" for (kind, how), count in sorted(taken.items())))


@pytest.mark.parametrize("kind", ["gist", "rows", "other bits"])
def test_damage_is_repaired_by_the_build_that_verify_names(indexes: Indexes, kind: str, randomness: Randomness) -> None:
    """After ``gistrag build --verify`` everything is as it was."""
    index = indexes.fresh()
    if kind == "gist":
        flip(victim(index, "gist", randomness), randomness)
    else:
        path = index / "index.db"
        data = path.read_bytes()
        path.write_bytes(data.replace(b"harbour", b"hXrbour") if kind == "rows" else flipped_vector(data, index))
    assert indexes.is_noticed(index)

    GistRAG.from_folder(
        indexes.folder / "docs", index=index, engine=indexes.engine, verify=True, gists="now", **SETTINGS
    ).close()
    assert not indexes.is_noticed(index)
    assert "whole" == indexes.outcome(index)


def flipped_vector(data: bytes, index: Path) -> bytes:
    """Return index.db with a bit of a vector changed, which no row hash covers."""
    with Store.open(index) as store:
        vector = store.vectors.rows().vectors[0].tobytes()
    place = data.index(vector[:16])
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


# Only the right gist


def swaps(indexes: Indexes, foreign: Path, count: int, randomness: Randomness) -> None:
    """Put gists of this and of another index under each other's names; every one is refused, and only there."""
    index = indexes.fresh()
    mine, its = gists_of(index), gists_of(foreign)
    with Store.open(index) as store:
        for _ in range(count):
            path = randomness.choice(mine)
            before = path.read_bytes()
            other = randomness.choice([one for one in (*mine, *its) if one != path])
            path.write_bytes(other.read_bytes())
            with pytest.raises(CorruptGistError):
                store.gists.load(path.stem)
            path.write_bytes(before)
            assert store.gists.load(path.stem)


@pytest.fixture(scope="module")
def foreign(indexes: Indexes) -> Path:
    """An index of the same documents, made by itself."""
    indexes.build(indexes.folder / "foreign")
    return indexes.folder / "foreign"


def test_swapped_gists_are_refused(indexes: Indexes, foreign: Path, randomness: Randomness) -> None:
    """A sound gist under the name of another is no gist."""
    swaps(indexes, foreign, 30, randomness)


@pytest.mark.soak
def test_1000_swapped_gists_are_refused(indexes: Indexes, foreign: Path, randomness: Randomness) -> None:
    """1,000 swaps."""
    swaps(indexes, foreign, 1000, randomness)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_every_chunk_has_its_gist(indexes: Indexes, k: int) -> None:
    """Of a sound index exactly k gists are loaded and nothing is read as text."""
    with GistRAG.open(indexes.fresh(), engine=indexes.engine) as rag:
        passages, usage = retrieved(rag, "harbour lantern", top_k=k)

    assert k == sum(isinstance(passage.content, PackedGists) for passage in passages)
    assert usage.text_fallbacks == 0
    assert all(is_right(passage, indexes.engine) for passage in passages)


@pytest.mark.parametrize("part", ["model", "adapter", "rope", "kv_dtype", "prefix", "tokens_per_gist", "placement"])
def test_engine_of_another_making_is_refused(indexes: Indexes, part: str) -> None:
    """Whatever a gist depends on, an engine that differs in it does not open the index; the difference is named."""
    index, real = indexes.fresh(), Engine.gist_fingerprint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "gist_fingerprint", lambda *given, **named: {**real(*given, **named), part: "another"})

        with pytest.raises(FingerprintMismatchError, match=f"with {part} .* 'another'; run `gistrag build --rebuild`"):
            GistRAG.open(index, engine=indexes.engine)
