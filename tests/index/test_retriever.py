"""A search joins meaning and words, and is right whatever state the faiss file is in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from gistrag.documents.chunking import Chunk
from gistrag.documents.discovery import Document
from gistrag.errors import UsageError
from gistrag.index import retriever
from gistrag.index.integrity import remove_unused
from gistrag.index.retriever import Retriever, VectorSearch, fuse, keywords, write_vector_file
from gistrag.index.store import IndexedChunk, Store
from gistrag.index.vector_index import VectorIndex
from gistrag.settings import IndexSettings

DIM = 16


class Embedder:
    """Puts a text where the sum of its words' random directions points."""

    is_multilingual = False

    def comparable(self, cosine: float) -> float:
        return cosine

    def embed_query(self, question: str, /) -> npt.NDArray[np.float32]:
        total = np.full(DIM, 1e-3)
        for word in question.lower().split():
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
            total += np.random.default_rng(seed).standard_normal(DIM)
        vector: npt.NDArray[np.float32] = (total / np.linalg.norm(total)).astype(np.float32)
        return vector


class ShortestFirst:
    """Judges a text by its length."""

    def rank(self, question: str, texts: Sequence[str], /) -> list[float]:
        return [-float(len(text)) for text in texts]


def put(store: Store, path: str, *texts: str) -> None:
    """Put a document with one chunk a text."""
    embed = Embedder().embed_query
    entries = [
        IndexedChunk(
            chunk=Chunk(ordinal=i, start=0, end=len(text), text=text, heading=(), page=None, tokens=1),
            gist_key=None,
            vectors=embed(text)[None],
        )
        for i, text in enumerate(texts)
    ]
    kind = "pdf" if path.endswith("pdf") else "text"
    store.replace_document(Document(path=path, sha256="", size=0, mtime_ns=0, kind=kind, text=""), entries)


def configure(store: Store, *, embedder: Mapping[str, str]) -> None:
    store.configure(IndexSettings(), source="docs", gist_fingerprint={}, embedder_fingerprint=embedder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An index of six chunks in three documents, with its faiss file."""
    with Store.build(tmp_path) as store:
        configure(store, embedder={"embedder": "e"})
        put(store, "a.txt", "cats purr", "dogs bark loudly", "birds sing")
        put(store, "b.txt", "the invoice number is INV-2041", "cats purr")
        put(store, "c.pdf", "cats sleep all day")
        write_vector_file(store)
    return tmp_path


def texts(folder: Path, question: str, *, top_k: int = 3, **given: object) -> list[str]:
    """Return the texts a fresh reader finds."""
    with Store.open(folder) as store:
        return [hit.chunk.text for hit in Retriever(store, Embedder()).search(question, top_k=top_k, **given)]  # type: ignore[arg-type]


def nearest(folder: Path, question: str, k: int = 3) -> list[int]:
    """Return the chunk ids a fresh reader finds by meaning."""
    with Store.open(folder) as store:
        return [row[0] for row in VectorSearch(store).nearest(Embedder().embed_query(question), k)]


def faiss_file(folder: Path) -> Path:
    return next(folder.glob("faiss-*.idx"))


def test_best_chunk_is_first_and_says_why(folder: Path) -> None:
    """A hit carries both scores, and a fused one that follows from the ranks."""
    with Store.open(folder) as store:
        hits = Retriever(store, Embedder()).search("dogs bark loudly", top_k=1)

    assert ["dogs bark loudly"] == [hit.chunk.text for hit in hits]
    assert hits[0].dense == pytest.approx(1.0, abs=1e-5)  # the same text, float32
    assert (hits[0].keyword or 0) > 0
    assert 2 / 61 == hits[0].score


def test_rare_word_is_found_by_itself(folder: Path) -> None:
    """An identifier that means nothing to vectors is found as a word, and has no dense rank if out of reach."""
    assert "the invoice number is INV-2041" == texts(folder, "what is inv-2041?")[0]


def test_equal_chunks_come_by_id(folder: Path) -> None:
    """Two documents with the same text come in the order they were put, every time."""
    with Store.open(folder) as store:
        found = [[hit.chunk.id for hit in Retriever(store, Embedder()).search("cats purr", top_k=2)] for _ in range(3)]

    assert [[1, 5]] * 3 == found


def test_more_than_there_is_gives_all(folder: Path) -> None:
    """A top_k beyond the index gives every chunk once."""
    with Store.open(folder) as store:
        hits = Retriever(store, Embedder()).search("purr", top_k=1000)

    assert [1, 2, 3, 4, 5, 6] == sorted(hit.chunk.id for hit in hits)


def test_empty_index_gives_nothing(tmp_path: Path) -> None:
    """No documents, no hits, no error."""
    with Store.build(tmp_path) as store:
        configure(store, embedder={})
        write_vector_file(store)

    assert [] == texts(tmp_path, "anything")


@pytest.mark.parametrize(
    ("question", "top_k", "said"), [("", 1, "empty"), (" \n", 1, "empty"), ("a", 0, "top_k"), ("a", -1, "top_k")]
)
def test_senseless_search_is_refused(folder: Path, question: str, top_k: int, said: str) -> None:
    """An empty question and a top_k below 1 are named."""
    with pytest.raises(UsageError, match=said):
        texts(folder, question, top_k=top_k)


@pytest.mark.parametrize("question", ['"', "*", "NEAR(cats", "cats AND", "?!…", "日本語", "a-b:c", "the is of", "😀"])
def test_any_question_is_safe(folder: Path, question: str) -> None:
    """Whatever a person types is searched for, and something is found by meaning."""
    assert 3 == len(texts(folder, question))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"filters": {"kind": "pdf"}}, ["cats sleep all day"]),
        ({"filters": {"path": "b.*"}}, ["cats purr", "the invoice number is INV-2041"]),
        ({"scope": "c.pdf"}, ["cats sleep all day"]),
        ({"filters": {"path": "nothing"}}, []),
    ],
)
def test_filters_hold_for_both_lists(folder: Path, given: dict[str, object], expected: list[str]) -> None:
    """What a filter or scope leaves out comes back neither by meaning nor by word."""
    assert expected == texts(folder, "cats purr", top_k=9, **given)


def test_reranker_has_the_last_word(folder: Path) -> None:
    """A reranker orders the candidates, and its score is the hit's."""
    with Store.open(folder) as store:
        hits = Retriever(store, Embedder(), reranker=ShortestFirst()).search("cats", top_k=3)

    assert [(1, -9.0), (5, -9.0), (3, -10.0)] == [(hit.chunk.id, hit.score) for hit in hits]


def test_fusion_prefers_what_both_lists_have() -> None:
    """Second in both lists beats first in one; ties go to the smaller id."""
    assert [2, 1, 9] == list(fuse([9, 2], [1, 2]))


def test_keywords_leave_stop_words_out_unless_there_is_nothing_else() -> None:
    """Words that are everywhere find nothing; a question made of them is still one."""
    assert ["gist"] == keywords("What is a GIST? a gist!")
    assert ["who", "is", "it"] == keywords("Who is it?")
    assert [] == keywords("?!")


# The faiss file


def test_snapshot_is_used_and_not_written_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sound file is loaded instead of the vectors, and a build without changes leaves it."""
    stamp = faiss_file(folder).stat().st_mtime_ns
    with Store.build(folder) as store:
        write_vector_file(store)
    assert stamp == faiss_file(folder).stat().st_mtime_ns

    monkeypatch.setattr(VectorIndex, "build", None)
    assert [2] == nearest(folder, "dogs bark loudly", 1)


def test_snapshot_is_named_by_its_content(folder: Path) -> None:
    """The name is the hash, as recorded."""
    digest = hashlib.sha256(faiss_file(folder).read_bytes()).hexdigest()

    assert f"faiss-{digest}.idx" == faiss_file(folder).name


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_snapshot_is_replaced(folder: Path, kind: str) -> None:
    """A reader answers the same without the file and writes nothing; the next build makes it again."""
    name = faiss_file(folder).name
    expected = nearest(folder, "cats", 6)
    DAMAGE[kind](faiss_file(folder))
    damaged = {path: path.read_bytes() for path in folder.glob("faiss-*")}

    assert expected == nearest(folder, "cats", 6)
    assert damaged == {path: path.read_bytes() for path in folder.glob("faiss-*")}
    with Store.build(folder) as store:
        write_vector_file(store)
    assert name == faiss_file(folder).name == f"faiss-{hashlib.sha256(faiss_file(folder).read_bytes()).hexdigest()}.idx"


def test_newer_and_removed_chunks_are_right_with_an_old_snapshot(folder: Path) -> None:
    """Rows after the snapshot are found, removed ones are not, before a build writes a new one."""
    with Store.build(folder) as store:
        put(store, "d.txt", "dogs bark loudly")
        store.remove_document("a.txt")

    assert 7 == nearest(folder, "dogs bark loudly", 1)[0]
    assert [4, 5, 6, 7] == sorted(nearest(folder, "dogs bark loudly", 6))


def test_removed_chunks_never_crowd_out_others(tmp_path: Path) -> None:
    """However many near chunks are gone, k others come back."""
    with Store.build(tmp_path) as store:
        configure(store, embedder={})
        put(store, "old.txt", *["exactly this"] * 100)
        put(store, "new.txt", "one", "two", "three")
        write_vector_file(store)
        store.remove_document("old.txt")

    assert [101, 102, 103] == sorted(nearest(tmp_path, "exactly this", 3))


def test_open_reader_follows_builds(folder: Path) -> None:
    """One reader finds what each later build put, with and without a new snapshot, and after gc."""
    with Store.open(folder) as reader:
        search = VectorSearch(reader)
        question = Embedder().embed_query("whales dive deep")
        found = []
        for number, snapshot in enumerate([False, True, False, True]):
            with Store.build(folder) as store:
                put(store, f"{number}.txt", "whales dive deep")
                if snapshot:
                    write_vector_file(store)
                    remove_unused(store)
            found.append([chunk_id for chunk_id, _ in search.nearest(question, number + 1)])

    assert [[7], [7, 8], [7, 8, 9], [7, 8, 9, 10]] == found
    assert 1 == len(list(folder.glob("faiss-*")))


def test_vectors_of_another_embedder_are_not_compared(folder: Path) -> None:
    """After a change of embedder only chunks embedded anew are found by meaning, the others by their words."""
    with Store.open(folder) as reader:
        search = Retriever(reader, Embedder())
        search.search("cats", top_k=1)
        with Store.build(folder) as store:
            configure(store, embedder={"embedder": "other"})
            put(store, "c.pdf", "cats sleep all day")
            write_vector_file(store)

        assert [7] == nearest(folder, "dogs bark loudly", 9)
        assert "dogs bark loudly" == texts(folder, "dogs bark loudly")[0]
        assert 7 not in [hit.chunk.id for hit in search.search("sleep", top_k=9) if hit.dense is not None]


def test_lists_are_deep_enough_for_the_fusion(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each list goes four times as deep as asked."""
    monkeypatch.setattr(retriever, "DEPTH_MIN", 1)
    asked: list[int] = []

    def keyword_search(words: Sequence[str], k: int, **_: object) -> list[tuple[int, float]]:
        asked.append(k)
        return []

    with Store.open(folder) as store:
        monkeypatch.setattr(store, "keyword_search", keyword_search)
        Retriever(store, Embedder()).search("cats", top_k=7)

    assert [28] == asked


class Scaled(Embedder):
    """Has cosines of a scale of its own."""

    def comparable(self, cosine: float) -> float:
        return 10 * cosine


def test_fit_is_on_the_scale_of_the_default_embedder(folder: Path) -> None:
    """What rules compare is brought to one scale; the cosine of a hit is that of the embedder."""
    with Store.open(folder) as store:
        plain, scaled = Retriever(store, Embedder()), Retriever(store, Scaled())

        assert scaled.fit("cats purr").dense == pytest.approx(10 * plain.fit("cats purr").dense)
        assert scaled.fit("cats purr").keyword == plain.fit("cats purr").keyword
        assert scaled.search("cats purr", top_k=1) == plain.search("cats purr", top_k=1)
