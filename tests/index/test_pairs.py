"""Chinese, Japanese and Korean words are found by pairs of their letters, and leave no trace when they are deleted."""

from __future__ import annotations

import shutil
import sqlite3
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from support.make_golden import DATA
from support.small_index import DIM, configure, document, entries

from gistrag.index.backup import copy
from gistrag.index.integrity import check, remove_unused
from gistrag.index.pairs import match_of, pairs_of
from gistrag.index.retriever import Retriever, keywords
from gistrag.index.store import Store
from gistrag.rag import GistRAG

KOREAN = [
    "밤에는 택시비를 지급한다.",
    "연차 휴가는 15일이다.",
    "자료를 USB에 옮기지 않는다.",
    "Taxis are paid at night.",
]
OTHERS = ["公司为员工支付出租车费。", "喝茶的时间是下午三点。", "タクシー代は会社が払います。"]


def index(folder: Path, *texts: str) -> Path:
    """Make an index of one document with these chunks, and return its folder."""
    with Store.build(folder) as store:
        configure(store)
        store.replace_document(document(), entries(texts))
    return folder


def found(folder: Path, question: str) -> list[str]:
    """Return the texts that hold a word of the question, best first."""
    with Store.open(folder) as store:
        return [row.text for row in store.chunks(chunk for chunk, _ in store.keyword_search(keywords(question), 9))]


def as_made_before(folder: Path) -> None:
    """Take from an index what a version before this one does not make."""
    with sqlite3.connect(folder / "index.db") as database:
        database.execute("DROP TRIGGER pairs_out")
        database.execute("DROP TABLE pairs")


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("택시비는 얼마인가요?", KOREAN[0]),  # another particle
        ("휴가가 며칠인가요?", KOREAN[1]),
        ("USB 써도 되나요?", KOREAN[2]),  # a particle stands behind it in the text
        ("出租车多少钱？", OTHERS[0]),
        ("茶", OTHERS[1]),  # one letter, at the end of no word
        ("タクシーに乗る", OTHERS[2]),
    ],
)
def test_a_word_is_found_by_its_letters(tmp_path: Path, question: str, expected: str) -> None:
    """A particle, a missing space and a word of one letter hide nothing."""
    assert expected == found(index(tmp_path, *KOREAN, *OTHERS), question)[0]


def test_decomposed_letters_are_the_same(tmp_path: Path) -> None:
    """A question as macOS writes file names, with letters in parts, finds what the composed one finds."""
    folder = index(tmp_path, *KOREAN)

    assert found(folder, "택시비") == found(folder, unicodedata.normalize("NFD", "택시비")) == KOREAN[:1]


def test_english_is_searched_as_before(tmp_path: Path) -> None:
    """A question in Latin letters has the same chunks with the same scores as where there are no pairs."""
    folder = index(tmp_path, *KOREAN, "The taxi fare at night", "Night shifts")
    with Store.open(folder) as store:
        scores = store.keyword_search(keywords("Who pays a taxi at night?"), 9)
    as_made_before(folder)

    with Store.open(folder) as store:
        assert scores == store.keyword_search(keywords("Who pays a taxi at night?"), 9)
    assert len(scores) == 3


def test_mixed_questions_add_up(tmp_path: Path) -> None:
    """A chunk with a Latin word and a Korean one comes before chunks with either; a filter holds for both."""
    folder = index(tmp_path, "KTX train", "요금 안내", "KTX 요금 안내", "아무것도 없다")
    with Store.open(folder) as store:
        scores = dict(store.keyword_search(keywords("KTX 요금"), 9))
        only = dict(store.keyword_search(keywords("KTX 요금"), 9, allowed=[1]))

    assert 3 == max(scores, key=lambda chunk: scores[chunk])
    assert {1, 2, 3} == set(scores)
    assert {1} == set(only)


@pytest.mark.parametrize("question", ['"가', "가*", "가 OR", "NEAR(가 나)", "가나다" * 2000, "가^2", "가:나"])
def test_any_question_is_safe(tmp_path: Path, question: str) -> None:
    """Nothing that is asked is read as a command of the search."""
    assert isinstance(found(index(tmp_path, *KOREAN), question), list)


def test_what_is_looked_for_stands_in_the_table() -> None:
    """Every term of a question about a text is among the pairs of the text, or begins one."""
    text = "회사는 USB를 3개까지 빌려 준다"
    stored = pairs_of(text)

    for term in match_of(keywords(text)).split(" OR "):
        assert any(pair.startswith(term.strip('"*')) for pair in stored), term


def test_headings_are_found(tmp_path: Path) -> None:
    """The heading path counts as text of the chunk."""
    with Store.build(tmp_path) as store:
        configure(store)
        store.replace_document(document(), entries(["Ten."], heading=("경조 휴가",)))

    assert ["Ten."] == found(tmp_path, "휴가는?")


def test_an_index_without_pairs_is_searched_as_it_was(tmp_path: Path) -> None:
    """Whole words only, and with the fusion that it had."""
    folder = index(tmp_path, *KOREAN)
    as_made_before(folder)

    assert [] == found(folder, "택시비")
    assert KOREAN[:1] == found(folder, "택시비를")


def test_a_builder_adds_the_pairs(tmp_path: Path) -> None:
    """Those of every chunk, also of one that an older version put meanwhile; a second time nothing is left to do."""
    folder = index(tmp_path, *KOREAN)
    as_made_before(folder)
    with Store.build(folder) as store:
        store.replace_document(document("b.md"), entries(["새 휴가 규정"]))  # as before: there is no table yet
        store.pairs.prepare()
        store.database.execute("DELETE FROM pairs WHERE rowid = 2")
        assert [2] == store.pairs.differing()
        store.pairs.prepare()
        assert [] == store.pairs.differing()

    assert {KOREAN[1], "새 휴가 규정"} == set(found(folder, "휴가"))


def test_a_golden_index_gets_pairs_by_a_build(tmp_path: Path) -> None:
    """An index of the first format opens without them; a builder of it adds a row for every chunk."""
    folder = Path(shutil.copytree(DATA / "golden-index-1", tmp_path / "index"))
    with Store.open(folder) as store:
        assert not store.pairs.are_stored
    with Store.build(folder) as store:
        store.pairs.prepare()
        assert store.count() == store.database.execute("SELECT count(*) FROM pairs")[0][0]


def test_other_pairs_are_told_and_mended(tmp_path: Path) -> None:
    """The full check counts chunks whose row is missing or of another text; a build that verifies mends them."""
    folder = index(tmp_path, *KOREAN)
    with Store.build(folder) as store:
        store.database.execute("UPDATE pairs SET text = '다른' WHERE rowid = 1")
        store.database.execute("DELETE FROM pairs WHERE rowid = 3")

    with Store.open(folder) as store:
        told = check(store, full=True).database
    with Store.build(folder) as store:
        store.pairs.prepare(verify=True)

    assert ["the keywords of 2 chunks are missing or of another text; run gistrag build"] == told
    with Store.open(folder) as store:
        assert [] == check(store, full=True).database
    assert KOREAN[:1] == found(folder, "택시비")


def test_deleted_words_are_gone(tmp_path: Path) -> None:
    """Not a pair of a deleted document is left in any byte of the folder."""
    with Store.build(tmp_path) as store:
        configure(store)
        for number in range(40):
            store.replace_document(document(f"{number}.md"), entries([f"공통 낱말 {chr(0xB000 + number)}뷁쀍"]))
            store.commit()
        for number in range(20):
            store.remove_document(f"{number}.md")
        remove_unused(store)
    held = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())

    assert [] == [number for number in range(20) if f"{chr(0xB000 + number)}뷁".encode() in held]
    assert f"{chr(0xB000 + 30)}뷁".encode() in held


def test_a_copy_finds_the_same(tmp_path: Path) -> None:
    """A backup holds the pairs."""
    folder = index(tmp_path / "index", *KOREAN)
    with Store.open(folder) as store:
        copy(store, tmp_path / "copy")

    assert KOREAN[:1] == found(tmp_path / "copy", "택시비는?")


class Vectors:
    """An embedder to which every question is the same, or one that knows Korean."""

    def __init__(self, *, is_multilingual: bool) -> None:
        self.is_multilingual = is_multilingual

    def comparable(self, cosine: float) -> float:
        return cosine

    def embed_query(self, question: str, /) -> np.ndarray:
        return np.full(DIM, DIM**-0.5, np.float32)


@pytest.mark.parametrize(("is_multilingual", "first"), [(False, "택시 요금"), (True, "nearest")])
def test_vectors_of_a_multilingual_embedder_count_twice(tmp_path: Path, is_multilingual: bool, first: str) -> None:
    """First by words and second by meaning is as good as the reverse, unless the embedder knows the letters."""
    with Store.build(tmp_path) as store:
        configure(store)
        near, far = entries(["nearest 택시"]), entries(["택시 요금"])
        near[0].vectors[:] = DIM**-0.5
        far[0].vectors[:] = DIM**-0.5 * np.where(np.arange(DIM) < DIM - 1, 1, 0.5)
        store.replace_document(document("far.md"), far)
        store.replace_document(document("near.md"), near)
    with Store.open(tmp_path) as store:
        hits = Retriever(store, Vectors(is_multilingual=is_multilingual)).search("택시 요금", top_k=2)

    assert hits[0].chunk.text.startswith(first)


def test_a_build_of_a_folder_fills_the_table(tmp_path: Path, engine: object) -> None:
    """`GistRAG.from_folder` puts pairs for what it reads, and adds them to an index that has none."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# 규정\n\n택시비를 지급한다.\n", "utf-8")
    options = {"index": tmp_path / "index", "engine": engine, "gists": "none", "chunk_tokens": 96}
    GistRAG.from_folder(tmp_path / "docs", **options).close()
    as_made_before(tmp_path / "index")

    with GistRAG.from_folder(tmp_path / "docs", **options) as rag:
        assert 1 == len(rag.store.keyword_search(["택시비"], 3))
