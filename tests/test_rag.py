"""The public surface: building, opening, keeping in step, and refusing what would harm an index."""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import HashEmbedder, byte_tokenizer, tiny_model, tiny_network

from gistrag import progress
from gistrag.compression import making, placements
from gistrag.compression.placements import TextPass
from gistrag.engine import Engine
from gistrag.errors import (
    FingerprintMismatchError,
    IncompleteIndexError,
    IndexFolderError,
    IndexLockedError,
    UsageError,
)
from gistrag.index.builder import SyncReport
from gistrag.index.store import Store
from gistrag.model.gist_model import GistModel
from gistrag.qa.phrases import phrase
from gistrag.rag import GistRAG
from gistrag.settings import AdapterSettings, IndexSettings

TEXTS = {
    "mills.md": "The mill stands by the river and grinds the wheat of the whole valley.",
    "bees.md": "Bees gather nectar in spring and keep the honey in combs of wax for winter.",
}
REMEDY = "run `gistrag build --rebuild` to make it again, or name another --index"


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder of two documents."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, "utf-8")
    return folder


@pytest.fixture(scope="module")
def other_model() -> GistModel:
    """A model of another identity."""
    return GistModel(tiny_network(), byte_tokenizer(), identity="another tiny llama")


def build(docs: Path, engine: Engine, **options: Any) -> SyncReport:
    """Build the index beside *docs* and return what was done."""
    with GistRAG.from_folder(docs, index=docs.parent / "index", engine=engine, gists="now", **options) as rag:
        assert rag.report is not None
        return rag.report


def paths(index: Path) -> list[str]:
    """Return the documents of an index."""
    with Store.open(index) as store:
        return [row.path for row in store.documents()]


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and time of every file that a reader has no business with."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in {".db-shm", ".db-wal"})
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_bar_of_our_own_goes_away_with_the_build(docs: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal; somebody else's progress is left to them."""
    bars: list[str] = []

    class Shown(progress.TerminalProgress):
        def __exit__(self, *given: Any) -> None:
            bars.append("gone")
            super().__exit__(*given)

    monkeypatch.setattr(progress, "TerminalProgress", Shown)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    options = {"index": docs.parent / "index", "engine": engine}
    GistRAG.from_folder(docs, gists="now", **options).close()
    GistRAG.from_folder(docs, progress=Shown(), gists="now", **options).close()

    assert ["gone"] == bars


def test_from_folder_builds_and_answers(docs: Path, engine: Engine) -> None:
    """The object that comes back can be asked, says what was done, and knows its settings."""
    with GistRAG.from_folder(docs, index=docs.parent / "index", engine=engine, tokens_per_gist=3, gists="now") as rag:
        answer = rag.query("Where is the honey?", top_k=1, max_new_tokens=2)

        assert ["bees.md"] == [source.path for source in answer.sources]
        assert f"GistRAG({str(docs.parent / 'index')!r}, documents=2, chunks=2)" == repr(rag)
        assert rag.report is not None
        assert ["bees.md", "mills.md"] == rag.report.added
        assert 3 == rag.store.settings.tokens_per_gist


def test_second_build_inherits_the_settings(docs: Path, engine: Engine) -> None:
    """Settings that are left out, or None, are those of the index."""
    build(docs, engine, tokens_per_gist=3, chunk_tokens=64)

    assert 2 == build(docs, engine, tokens_per_gist=None).unchanged
    with Store.open(docs.parent / "index") as store:
        assert IndexSettings(tokens_per_gist=3, chunk_tokens=64) == store.settings


def test_empty_folder(tmp_path: Path, engine: Engine) -> None:
    """A folder without documents gives a valid, empty index that says so."""
    (tmp_path / "docs").mkdir()

    report = build(tmp_path / "docs", engine)

    assert SyncReport(seconds=report.seconds) == report
    with GistRAG.open(tmp_path / "index", engine=engine) as rag:
        assert (phrase("no documents", "en"), ()) == (rag.query("honey").text, rag.query("honey").sources)
        assert [] == rag.retrieve("honey")
        with pytest.raises(UsageError, match=r"no document 'a\.md'"):
            rag.query("honey", scope="a.md")


def test_folder_that_becomes_empty(docs: Path, engine: Engine) -> None:
    """When all documents are gone so are their gists, and the index stays valid."""
    build(docs, engine)
    for name in TEXTS:
        (docs / name).unlink()

    assert sorted(TEXTS) == build(docs, engine).removed
    assert [] == paths(docs.parent / "index")
    assert [] == [path for path in (docs.parent / "index" / "gists").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("missing", {}, "expected a folder of documents at .*missing, found nothing; check the path"),
        ("docs/bees.md", {"include": ["*.md"]}, "include patterns choose from a folder, and .*bees.md is a file"),
        ("docs", {"tokens_per_gist": 0}, "tokens_per_gist must be at least 1, got 0"),
        ("docs", {"placement": "middle"}, "placement must be one of "),
        ("docs", {"include": ["!"]}, "include .*'!'"),
        ("docs", {"exclude": "!"}, "exclude .*'!'"),
    ],
)
def test_refused_before_anything_is_made(
    docs: Path, engine: Engine, folder: str, options: dict[str, Any], message: str
) -> None:
    """What makes no sense is refused, and no index folder appears."""
    before = state(docs.parent)

    with pytest.raises(UsageError, match=message):
        GistRAG.from_folder(docs.parent / folder, index=docs.parent / "index", engine=engine, gists="now", **options)

    assert before == state(docs.parent)
    assert not (docs.parent / "index").exists()


def test_index_among_the_documents_is_refused(docs: Path, engine: Engine) -> None:
    """The folder of documents cannot be its own index; a folder inside it can."""
    with pytest.raises(UsageError, match=r"expected another folder for the index than .*docs, found the same"):
        GistRAG.from_folder(docs, index=docs, engine=engine, gists="now")

    assert set(TEXTS) == {path.name for path in docs.iterdir()}
    for _ in range(2):
        GistRAG.from_folder(docs, index=docs / "index", engine=engine, gists="now").close()
    assert sorted(TEXTS) == paths(docs / "index")


def test_open_needs_an_index(tmp_path: Path, engine: Engine) -> None:
    """Where nothing was built the error says how to."""
    with pytest.raises(IncompleteIndexError, match="run gistrag build"):
        GistRAG.open(tmp_path / "index", engine=engine)

    assert [] == list(tmp_path.iterdir())


def test_open_never_writes(docs: Path, engine: Engine) -> None:
    """Opening, asking and closing change no byte and no time of any file."""
    build(docs, engine)
    before = state(docs.parent / "index")

    with GistRAG.open(docs.parent / "index", engine=engine) as rag:
        rag.query("honey", max_new_tokens=2)
        rag.retrieve("honey")

    assert before == state(docs.parent / "index")


def test_read_only_index_can_be_asked(docs: Path, engine: Engine) -> None:
    """An index in a read-only folder answers."""
    build(docs, engine)
    index = docs.parent / "index"
    folders = [index, *(path for path in index.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o500)

    with GistRAG.open(index, engine=engine) as rag:
        answer = rag.query("honey", top_k=2, max_new_tokens=2)

    for folder in folders:
        folder.chmod(0o700)
    assert (2, 0) == (len(answer.sources), answer.usage.text_fallbacks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_gist": 2}, "was made with tokens_per_gist '4', this one has '2'"),
        ({"chunk_tokens": 32}, "was made with chunk_tokens '256', this one has '32'"),
        ({"placement": "anchored"}, "was made with placement 'matched', this one has 'anchored'"),
    ],
)
def test_other_settings_are_refused(docs: Path, engine: Engine, settings: dict[str, Any], message: str) -> None:
    """A build with other settings names both and the remedy, and changes nothing."""
    build(docs, engine)
    before = state(docs.parent / "index")["index.db"]

    with pytest.raises(FingerprintMismatchError, match=f"{message}; {REMEDY}"):
        build(docs, engine, **settings)

    assert before == state(docs.parent / "index")["index.db"]


def test_other_model_is_refused(docs: Path, engine: Engine, other_model: GistModel) -> None:
    """An index is neither built nor read with a model that did not make it."""
    build(docs, engine)
    other = Engine(other_model, engine.embedder)
    message = f"was made with model 'tiny llama', this one has 'another tiny llama'; {REMEDY}"

    with pytest.raises(FingerprintMismatchError, match=message):
        build(docs, other)
    with pytest.raises(FingerprintMismatchError, match=message):
        GistRAG.open(docs.parent / "index", engine=other)


def test_other_embedder_is_refused(docs: Path, engine: Engine) -> None:
    """An index is neither built nor read with an embedder that did not make it."""
    build(docs, engine)
    other = Engine(engine.model, HashEmbedder("other"))  # type: ignore[arg-type]
    message = f"was made with embedder 'hash', this one has 'other'; {REMEDY}"

    with pytest.raises(FingerprintMismatchError, match=message):
        build(docs, other)
    with pytest.raises(FingerprintMismatchError, match=message):
        GistRAG.open(docs.parent / "index", engine=other)


@pytest.mark.parametrize(
    "settings",
    [{"tokens_per_gist": 2}, {"placement": "anchored"}, {"chunk_tokens": 32}, {"kv_cache_dtype": "int4"}],
)
def test_rebuild_makes_everything_again(docs: Path, engine: Engine, settings: dict[str, Any]) -> None:
    """With other settings and rebuild every document is chunked and compressed anew, and no old gist stays."""
    build(docs, engine)

    report = build(docs, engine, rebuild=True, **settings)

    fresh = docs.parent / "fresh"
    with GistRAG.from_folder(docs, index=fresh, engine=engine, gists="now", **settings) as rag:
        assert rag.report is not None
        assert (sorted(TEXTS), rag.report.gists_made) == (report.changed, report.gists_made)
        with GistRAG.open(docs.parent / "index", engine=engine) as again:
            assert rag.store.stats() == again.store.stats()
            answers = [one.query("honey", max_new_tokens=4) for one in (rag, again)]
    assert answers[0].text == answers[1].text
    assert [0, 0] == [answer.usage.text_fallbacks for answer in answers]


def test_rebuild_with_another_embedder_keeps_the_gists(docs: Path, engine: Engine) -> None:
    """Another embedder redoes the vectors only."""
    build(docs, engine)
    other = Engine(engine.model, HashEmbedder("other"))  # type: ignore[arg-type]

    report = build(docs, other, rebuild=True)

    assert (sorted(TEXTS), 0, 2) == (report.changed, report.gists_made, report.gists_found)


def test_rebuild_with_another_model(docs: Path, engine: Engine, other_model: GistModel) -> None:
    """After a rebuild the index belongs to the other model; a reader of before answers from text."""
    build(docs, engine)
    other = Engine(other_model, engine.embedder)

    with GistRAG.open(docs.parent / "index", engine=engine) as reader:
        assert 2 == build(docs, other, rebuild=True).gists_made
        answer = reader.query("honey", top_k=2, max_new_tokens=2)

    assert (2, 2) == (len(answer.sources), answer.usage.text_fallbacks)
    with pytest.raises(FingerprintMismatchError, match="'another tiny llama', this one has 'tiny llama'"):
        GistRAG.open(docs.parent / "index", engine=engine)


def test_index_of_another_folder_is_refused(docs: Path, engine: Engine, tmp_path: Path) -> None:
    """A build of another folder into an index does not remove what is in it, not even with rebuild."""
    build(docs, engine)
    (tmp_path / "others").mkdir()

    for rebuild in (False, True):
        with pytest.raises(IndexFolderError, match=r"is the index of .*docs, not of .*others; give --index another"):
            GistRAG.from_folder(
                tmp_path / "others", index=tmp_path / "index", engine=engine, rebuild=rebuild, gists="now"
            )

    assert sorted(TEXTS) == paths(tmp_path / "index")


def test_moved_folder_keeps_its_index(docs: Path, engine: Engine, tmp_path: Path) -> None:
    """A folder that moved is accepted, and the index notes where it is now."""
    build(docs, engine)
    docs.rename(tmp_path / "papers")

    with GistRAG.from_folder(tmp_path / "papers", index=tmp_path / "index", engine=engine, gists="now") as rag:
        assert rag.report is not None
        assert (2, []) == (rag.report.unchanged, rag.report.removed)
        assert 2 == rag.sync().unchanged
        assert "../papers" == rag.store.config.source


def test_folder_and_index_can_move_together(docs: Path, engine: Engine, tmp_path: Path) -> None:
    """Paths are relative: what is moved as a whole can be asked and kept in step."""
    build(docs, engine)
    (tmp_path / "new").mkdir()
    shutil.move(docs, tmp_path / "new" / "docs")
    shutil.move(tmp_path / "index", tmp_path / "new" / "index")

    with GistRAG.open(tmp_path / "new" / "index", engine=engine) as rag:
        assert 0 == rag.query("honey", max_new_tokens=1).usage.text_fallbacks
        assert 2 == rag.sync().unchanged


def test_sync_follows_the_folder(docs: Path, engine: Engine) -> None:
    """After sync the same object answers from what is in the folder now."""
    with GistRAG.from_folder(docs, index=docs.parent / "index", engine=engine, gists="now") as rag:
        (docs / "bees.md").unlink()
        (docs / "tea.md").write_text("Tea came by ship.", "utf-8")

        report = rag.sync()

        assert (["tea.md"], ["bees.md"], 1) == (report.added, report.removed, report.unchanged)
        assert report is rag.report
        answer = rag.query("tea ship", top_k=9, max_new_tokens=1)
        assert ["mills.md", "tea.md"] == sorted(source.path for source in answer.sources)
        assert "tea.md" == answer.sources[0].path


def test_an_index_remembers_its_patterns(docs: Path, engine: Engine) -> None:
    """Patterns hold for every later build that gives none, in this process or another."""
    (docs / "mills.txt").write_text("More about mills.", "utf-8")
    index = docs.parent / "index"

    with GistRAG.from_folder(docs, index=index, engine=engine, include=["*.md"], exclude=["bees*"], gists="now") as rag:
        assert ["mills.md"] == paths(index)
        assert 1 == rag.sync().unchanged
    with GistRAG.open(index, engine=engine) as rag:
        assert 1 == rag.sync().unchanged
    with GistRAG.from_folder(docs, index=index, engine=engine, exclude=[], gists="now") as rag:
        assert ["bees.md", "mills.md"] == paths(index)
    with GistRAG.from_folder(docs, index=index, engine=engine, include=[], gists="now") as rag:
        assert ["bees.md", "mills.md", "mills.txt"] == paths(index)


def test_sync_refuses_an_index_made_again_by_others(docs: Path, engine: Engine, other_model: GistModel) -> None:
    """A sync puts no gist into an index that another model made meanwhile."""
    with GistRAG.from_folder(docs, index=docs.parent / "index", engine=engine, gists="now") as rag:
        build(docs, Engine(other_model, engine.embedder), rebuild=True)
        (docs / "tea.md").write_text("Tea came by ship.", "utf-8")

        with pytest.raises(FingerprintMismatchError, match="'another tiny llama', this one has 'tiny llama'"):
            rag.sync()

    assert sorted(TEXTS) == paths(docs.parent / "index")


def test_one_builder_at_a_time(docs: Path, engine: Engine) -> None:
    """While an index is being built a sync and a build are refused, and questions are answered."""
    build(docs, engine)
    index = docs.parent / "index"

    with GistRAG.open(index, engine=engine) as rag, Store.build(index, command="gistrag build"):
        with pytest.raises(IndexLockedError, match=f"process {os.getpid()} "):
            rag.sync()
        with pytest.raises(IndexLockedError, match="gistrag build"):
            build(docs, engine)
        assert 2 == len(rag.query("honey", max_new_tokens=1).sources)


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        (" ", {}, "the question is empty"),
        ("honey", {"top_k": 0}, "top_k must be at least 1, got 0"),
        ("honey", {"scope": "nowhere.md"}, "no document 'nowhere.md'"),
    ],
)
def test_retrieve_refuses_what_makes_no_sense(
    docs: Path, engine: Engine, question: str, options: dict[str, Any], message: str
) -> None:
    """Retrieving checks what it is asked as querying does."""
    build(docs, engine)

    with GistRAG.open(docs.parent / "index", engine=engine) as rag, pytest.raises(UsageError, match=message):
        rag.retrieve(question, **options)


def test_engine_is_shared(docs: Path, engine: Engine, tmp_path: Path) -> None:
    """Two indexes can use the models of one engine, and keep them apart from each other's documents."""
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "tea.md").write_text("Tea came by ship.", "utf-8")
    build(docs, engine)

    with (
        GistRAG.open(tmp_path / "index", engine=engine) as one,
        GistRAG.from_folder(tmp_path / "others", index=tmp_path / "second", engine=one.engine, gists="now") as two,
    ):
        answers = [rag.query("tea", top_k=9, max_new_tokens=1) for rag in (one, two)]

    assert [2, 1] == [len(answer.sources) for answer in answers]


def test_one_string_is_one_pattern(docs: Path, engine: Engine) -> None:
    """A pattern given as a plain string is not read letter by letter."""
    with GistRAG.from_folder(docs, index=docs.parent / "index", engine=engine, exclude="bees*", gists="now"):
        assert ["mills.md"] == paths(docs.parent / "index")


def test_an_open_index_outlives_a_change_of_folder(docs: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index opened by a relative path is still found after the process went elsewhere."""
    monkeypatch.chdir(docs.parent)
    with GistRAG.from_folder("docs", index="index", engine=engine, gists="now") as rag:
        monkeypatch.chdir("/")

        assert 0 == rag.query("mills", max_new_tokens=1).usage.text_fallbacks


def test_chunks_that_no_window_holds_are_refused(docs: Path, engine: Engine) -> None:
    """A chunk is read twice side by side, so half the window is the most it may take."""
    with pytest.raises(UsageError, match="chunk_tokens must be at most"):
        GistRAG.from_folder(
            docs, index=docs.parent / "index", engine=engine, chunk_tokens=engine.model.window, gists="now"
        )


def test_questions_from_several_threads_get_the_answers_they_get_alone(docs: Path) -> None:
    """Whether the adapter acts is state of the network, so readings take turns."""
    model = tiny_model(dtype=torch.float32)
    model.new_adapter(rank=4, gists=1)
    assert model.adapter is not None
    torch.manual_seed(1)
    for _, weights in model.adapter.parameters():
        weights.data = torch.randn_like(weights) * 0.2
    words = ("mill", "river", "wheat", "bees", "honey", "wax", "salt", "silver")
    for word in words:
        (docs / f"{word}.txt").write_text(f"The {word} is one of eight. " * 6)
    engine = Engine(model, HashEmbedder())
    settings = {"placement": "anchored", "tokens_per_gist": 4, "chunk_tokens": 128}
    with GistRAG.from_folder(docs, index=docs.parent / "index", engine=engine, gists="now", **settings) as rag:

        def ask(word: str) -> str:
            return rag.query(word, max_new_tokens=12, mode="hybrid").text

        alone = [ask(word) for word in words]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(ask, words))

    assert alone == together


def test_llama_index_is_asked_for_by_name(docs: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its package, one line names the command that brings it."""
    with GistRAG.from_folder(docs, index=docs.parent / "index", engine=engine, gists="now") as rag:
        monkeypatch.setitem(sys.modules, "llama_index.retrievers.gistrag", None)

        for opened in (rag.as_retriever, rag.as_query_engine):
            with pytest.raises(UsageError, match="pip install -e integrations/llama-index-retrievers-gistrag"):
                opened()


def test_an_index_inherits_what_its_adapter_was_trained_for(docs: Path) -> None:
    """Placement and rate come from the adapter; a rate may be chosen, gists it does not make are refused."""
    settings = AdapterSettings(base="x", placement="anchored", index_placement="anchored", tokens_per_gist=8)

    fitted = [
        IndexSettings.fitting(given, settings) for given in ({}, {"tokens_per_gist": 2}, {"placement": "selected"})
    ]

    assert [("anchored", 8), ("anchored", 2), ("selected", 8)] == [(s.placement, s.tokens_per_gist) for s in fitted]
    with pytest.raises(UsageError, match="makes anchored gists, but learned was requested"):
        IndexSettings.fitting({"placement": "learned"}, settings)


def test_an_index_remembers_its_adapter(tmp_path: Path, docs: Path, private_cache: Path) -> None:
    """An index made with an adapter is only read with the same one, and says so otherwise."""
    folder = tmp_path / "model"
    tiny_network().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for number in (1, 2):
        model = GistModel.load(folder)
        model.new_adapter(rank=2, gists=1, tokens_per_gist=3, seed=number)
        assert model.adapter is not None
        model.adapter.save(tmp_path / f"adapter {number}")
    one, two = (
        Engine(GistModel.load(folder, adapter=tmp_path / f"adapter {number}"), HashEmbedder()) for number in (1, 2)
    )
    index = docs.parent / "index"

    with GistRAG.from_folder(docs, index=index, engine=one, gists="now") as rag:
        stored = rag.store.settings

    assert ("matched", 3, str(tmp_path / "adapter 1")) == (stored.placement, stored.tokens_per_gist, stored.adapter)
    with pytest.raises(FingerprintMismatchError, match="was made with adapter"):
        GistRAG.open(index, engine=two)


# Texts from outside


def test_texts_are_compressed_once_and_kept(tmp_path: Path, engine: Engine) -> None:
    """`compress` puts the gists of texts into an index without documents, where `stream_from` finds them."""
    texts = ["Bread was baked on Saturdays, in the oven behind the mill.", "x"]
    with GistRAG.for_texts(tmp_path / "index", engine=engine, tokens_per_gist=4) as rag:
        made = [rag.compress(texts), rag.compress(texts)]
    with GistRAG.open(tmp_path / "index", engine=engine) as rag:
        answer = rag.stream_from("bread", texts, max_new_tokens=2).result()

    assert made == [1, 0]  # the second text is too short
    assert answer.usage.gists_made == 0
    assert [source.as_text for source in answer.sources] == [False, True]


def test_an_index_of_texts_keeps_its_settings(tmp_path: Path, engine: Engine) -> None:
    """Opened again with others it refuses, and a document folder is none, so no sync ever empties it."""
    GistRAG.for_texts(tmp_path / "index", engine=engine, tokens_per_gist=2).close()

    with pytest.raises(FingerprintMismatchError, match="tokens_per_gist '2', this one has '3'; name another index"):
        GistRAG.for_texts(tmp_path / "index", engine=engine, tokens_per_gist=3)
    with GistRAG.for_texts(tmp_path / "index", engine=engine) as rag, pytest.raises(UsageError, match="no-documents"):
        rag.sync()


def test_chunks_and_documents_are_listed(docs: Path, tmp_path: Path, engine: Engine) -> None:
    """Chunks come by document, by number, or all in the order of their documents."""
    with GistRAG.from_folder(docs, index=tmp_path / "index", engine=engine, gists="now") as rag:
        paths = [row.path for row in rag.documents()]
        every = rag.chunks()
        first = rag.chunks(document=paths[0])

        assert [chunk.path for chunk in every] == sorted(chunk.path for chunk in every)
        assert every[: len(first)] == first
        assert rag.chunks([every[-1].id]) == [every[-1]]
        assert len(rag.index_id) == 12


def test_an_index_built_with_a_floor_of_quality_opens(docs: Path, tmp_path: Path, engine: Engine) -> None:
    """Version 0.1 put `min_quality` into the fingerprint of an index; its gists still answer."""
    with GistRAG.from_folder(docs, index=tmp_path / "index", engine=engine, gists="now") as rag:
        settings, source = rag.store.settings, rag.store.config.source
        documents = rag.documents()
    with Store.build(tmp_path / "index") as store:
        fingerprint = {**store.config.gist_fingerprint, "min_quality": "0.9"}
        store.configure(
            settings,
            source=source,
            gist_fingerprint=fingerprint,
            embedder_fingerprint=store.config.embedder_fingerprint,
        )

    with GistRAG.open(tmp_path / "index", engine=engine) as rag:
        opened = rag.documents()
        answer = rag.query("honey", max_new_tokens=2)

    assert [row.path for row in opened] == [row.path for row in documents]
    assert answer.sources
    assert IndexSettings.from_json(settings.to_json()[:-1] + ', "min_quality": 0.9}') == settings


def test_an_index_of_an_older_making_goes_on_as_it_was_made(
    docs: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opens, answers, and gets gists of its own version for what is new; a rebuild makes all by the newest."""
    index, versions = docs.parent / "index", []
    with pytest.MonkeyPatch.context() as before:
        before.setitem(making.MAKINGS, "matched", (3,))
        build(docs, engine)
    real = placements.TextPass.__init__

    def noted(self: TextPass, *given: Any, making: int | None = None) -> None:
        versions.append(making)
        real(self, *given, making=making)

    monkeypatch.setattr(placements.TextPass, "__init__", noted)
    with GistRAG.open(index, engine=engine) as rag:
        answer = rag.query("honey", max_new_tokens=2)
    (docs / "new.md").write_text("A new document about the weather in the valley.", "utf-8")
    synced = build(docs, engine)
    with Store.open(index) as store:
        kept = store.config.gist_fingerprint["making"]
    rebuilt = build(docs, engine, rebuild=True)

    assert answer.usage.text_fallbacks == 0
    assert (["new.md"], 2, "3") == (synced.added, synced.unchanged, kept)
    assert 3 == rebuilt.gists_made
    assert [3, 4] == list(dict.fromkeys(versions))
    with Store.open(index) as store:
        assert store.config.gist_fingerprint["making"] == "4"


def test_a_folder_whose_name_is_no_text_is_refused_first(tmp_path: Path, engine: Engine) -> None:
    """A folder that no index can record is refused before any work."""
    folder = tmp_path / "do\udce9cs"
    folder.mkdir()
    (folder / "a.md").write_text("words")

    with pytest.raises(UsageError, match="is not UTF-8"):
        GistRAG.from_folder(folder, index=tmp_path / "index", engine=engine)

    assert not (tmp_path / "index").exists()
