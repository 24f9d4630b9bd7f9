"""gistrag inside LangChain: the same chunks, the same answers, in chains, in pieces and in batches."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from gistrag import Engine, GistRAG, Options
from gistrag.answering.stream import Stream
from gistrag.compression import compress as making_gists
from gistrag.errors import UsageError
from gistrag.qa.phrases import phrase
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from pydantic import ValidationError
from support.believing import UNSURE
from support.tiny_models import HashEmbedder, one_thread, tiny_model

import langchain_gistrag
from langchain_gistrag import GistRAGRetriever, GistRAGRunnable
from langchain_gistrag.retrievers import passage

BOOK = {
    "Mills": "The mill stands by the river and grinds the wheat of the whole valley.",
    "Bees": "Bees gather nectar in spring and keep the honey in combs of wax for winter.",
    "Salt": "Salt was carried over the pass by mules, and paid for in silver coins.",
}
TEA = "Tea came by ship, and honey was stirred into it."
BREAD = "Bread was baked on Saturdays, in the oven behind the mill."
RYE = "Rye was sown late, in a field by the road."
QUESTION = "Where is the honey?"

__all__ = ["one_thread"]  # a fixture that is used by being here


def test_class() -> None:
    """Both classes are what LangChain expects them to be, and the package shows no others."""
    assert BaseRetriever in GistRAGRetriever.__mro__
    assert Runnable in GistRAGRunnable.__mro__
    assert ["GistRAGRetriever", "GistRAGRunnable"] == langchain_gistrag.__all__


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A tiny model and an embedder without one."""
    return Engine(tiny_model(), HashEmbedder())


@pytest.fixture(scope="module")
def rag(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[GistRAG]:
    """An index of a book of three chunks and another document."""
    docs = tmp_path_factory.mktemp("docs")
    chapters = (f"## {title}\n\n{text}" for title, text in BOOK.items())
    (docs / "book.md").write_text("# The book\n\n" + "\n\n".join(chapters), "utf-8")
    (docs / "tea.txt").write_text(TEA, "utf-8")
    with GistRAG.from_folder(
        docs, index=tmp_path_factory.mktemp("index"), engine=engine, chunk_tokens=128, gists="now"
    ) as rag:
        yield rag


@pytest.fixture
def short(rag: GistRAG) -> GistRAGRunnable:
    """Answers of a few tokens."""
    return GistRAGRunnable(rag=rag, options=Options(max_new_tokens=12))


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The passages that are compressed to answer something from here on."""
    made: list[list[int]] = []
    real = making_gists.compress

    def spy(model: Any, chunks: Sequence[Sequence[int]], settings: Any) -> Any:
        made.extend(map(list, chunks))
        return real(model, chunks, settings)

    monkeypatch.setattr(making_gists, "compress", spy)
    return made


# The retriever; the first four are what LangChain's standard tests of retrievers ask for


@pytest.mark.parametrize("k", [1, 3])
def test_k_of_the_constructor(rag: GistRAG, k: int) -> None:
    """The constructor says how many documents are returned."""
    assert k == len(GistRAGRetriever(rag=rag, k=k).invoke(QUESTION))


@pytest.mark.parametrize("k", [1, 3])
def test_k_of_a_call(rag: GistRAG, k: int) -> None:
    """A call may say how many documents are returned, also in a coroutine."""
    retriever = GistRAGRetriever(rag=rag, k=2)

    assert [k, k] == [len(retriever.invoke(QUESTION, k=k)), len(asyncio.run(retriever.ainvoke(QUESTION, k=k)))]


def test_invoke_returns_documents(rag: GistRAG) -> None:
    """Documents are the hits of the index, with their place in the metadata."""
    hits = rag.retrieve(QUESTION, top_k=4)

    found = GistRAGRetriever(rag=rag, k=4).invoke(QUESTION)

    assert [(hit.chunk.text, hit.score) for hit in hits] == [(one.page_content, one.metadata["score"]) for one in found]
    by_source = {one.metadata.get("heading", one.metadata["source"]): one for one in found}
    bees, tea = by_source["The book > Bees"], by_source["tea.txt"]
    start = hits[found.index(bees)].chunk.start
    assert {"source": "book.md", "heading": "The book > Bees", "start_index": start} == without_score(bees)
    assert {"source": "tea.txt", "start_index": 0} == without_score(tea)
    assert 4 == len({one.id for one in found})


def without_score(document: Document) -> dict[str, Any]:
    """Return the metadata of a document but its score."""
    return {name: value for name, value in document.metadata.items() if name != "score"}


def test_ainvoke_returns_documents(rag: GistRAG) -> None:
    """A coroutine gets the same documents."""
    retriever = GistRAGRetriever(rag=rag)

    assert retriever.invoke(QUESTION) == asyncio.run(retriever.ainvoke(QUESTION))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"filters": {"kind": "text"}}, {"tea.txt"}),
        ({"filters": {"path": "b*"}}, {"book.md"}),
        ({"scope": "book.md"}, {"book.md"}),
    ],
)
def test_filters_and_scope(rag: GistRAG, options: dict[str, Any], expected: set[str]) -> None:
    """Filters and scope are those of gistrag."""
    found = GistRAGRetriever(rag=rag, k=9, **options).invoke(QUESTION)

    assert expected == {one.metadata["source"] for one in found}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": {"colour": "me"}}, "filters are path, kind, heading, date, .*, got colour"),
        ({"scope": "nowhere.md"}, r"no document 'nowhere\.md'"),
    ],
)
def test_unknown_filter_or_scope(rag: GistRAG, options: dict[str, Any], message: str) -> None:
    """A filter or scope that does not exist is refused with what there is."""
    with pytest.raises(UsageError, match=message):
        GistRAGRetriever(rag=rag, **options).invoke(QUESTION)


def test_wrong_arguments(rag: GistRAG) -> None:
    """What is no index, or no number of documents, is refused when the object is made."""
    with pytest.raises(ValidationError, match="GistRAG"):
        GistRAGRetriever(rag="index/")
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        GistRAGRetriever(rag=rag, k=0)
    with pytest.raises(UsageError, match="top_k must be at least 1, got 0"):
        GistRAGRetriever(rag=rag).invoke(QUESTION, k=0)
    with pytest.raises(UsageError, match="the question is empty"):
        GistRAGRetriever(rag=rag).invoke("")


def test_retriever_in_a_chain(rag: GistRAG) -> None:
    """The retriever is a link like any other, one question or many."""
    join = RunnableLambda(lambda found: "\n".join(one.page_content for one in found))
    chain = {"context": GistRAGRetriever(rag=rag, k=1) | join, "question": RunnablePassthrough()} | RunnableLambda(str)

    said = chain.batch(["honey in combs of wax", "salt and silver coins"])

    assert all(text in answer for text, answer in zip((BOOK["Bees"], BOOK["Salt"]), said, strict=True))


# The runnable


def test_invoke_answers_as_the_index_does(rag: GistRAG, short: GistRAGRunnable, compressed: list[list[int]]) -> None:
    """The answer is that of `rag.query`, its context the chunks it rests on, best first; nothing is compressed."""
    expected = rag.query(QUESTION, max_new_tokens=12)

    reply = short.invoke(QUESTION)

    assert (QUESTION, expected.text) == (reply["question"], reply["answer"])
    assert GistRAGRetriever(rag=rag).invoke(QUESTION) == [without_evidence(one) for one in reply["context"]]
    assert [] == compressed


class Given(BaseRetriever):
    """A retriever of the same documents, the very same."""

    documents: list[Document]

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return self.documents


def without_evidence(document: Document) -> Document:
    """Return a document as a retriever finds it."""
    metadata = {name: value for name, value in document.metadata.items() if name != "evidence"}
    return document.model_copy(update={"metadata": metadata})


@pytest.mark.parametrize("retriever", [None, "another"])
def test_how_far_to_believe_a_reply(rag: GistRAG, retriever: str | None) -> None:
    """A reply has confidence, verdict and evidence, which lies in its document too; those given stay as they were."""
    given = [Document(page_content="  "), Document(page_content=BREAD), Document(page_content=TEA)]
    with GistRAG.open(rag.folder, engine=replace(rag.engine, calibration=UNSURE)) as judged:
        made = GistRAGRunnable(
            rag=judged, retriever=Given(documents=given) if retriever else None, options=Options(max_new_tokens=6)
        )
        reply = made.invoke(QUESTION)
        chunks = list(made.stream(QUESTION))
        once = made.invoke(QUESTION, second_reading=False)

    (marked,) = [one for one in reply["context"] if "evidence" in one.metadata]
    assert reply["evidence"] == marked.metadata["evidence"]
    assert reply["evidence"]["text"] in marked.page_content
    assert ("unsure", []) == (reply["verdict"], reply["unsupported"]) or reply["unsupported"]
    assert 0.43 == pytest.approx(once["confidence"])
    assert {"answer", "confidence", "verdict", "unsupported", "evidence"} == set(chunks[-1])
    assert [{}, {}, {}] == [one.metadata for one in given]


def test_evidence_is_counted_as_its_document_is(rag: GistRAG) -> None:
    """From the start of the document where that is known, else in the content; the heading above it counts nowhere."""
    (path,) = (row.path for row in rag.documents() if row.path == "book.md")
    text = "".join(("# The book\n\n", "\n\n".join(f"## {title}\n\n{text}" for title, text in BOOK.items())))
    foreign = Document(page_content=f"\n {RYE}", metadata={"heading": "Chapter seven"})
    for found in (GistRAGRetriever(rag=rag, scope=path).invoke(QUESTION), [foreign]):
        answers = GistRAGRunnable(rag=rag, retriever=Given(documents=found), options=Options(max_new_tokens=4))

        evidence = answers.invoke("Was rye or honey sown?")["evidence"]
        whole = text if "source" in found[0].metadata else foreign.page_content
        assert whole[evidence["start"] : evidence["end"]] == evidence["text"]
    above = answers.invoke("Chapter seven?")["evidence"]
    assert (above["text"], above["start"]) == ("Chapter seven", None)


def test_metadata_of_a_user_stay_theirs(rag: GistRAG) -> None:
    """A field that is called evidence is not ours to overwrite; ours from an earlier reply is."""
    given = [Document(page_content=RYE, metadata={"evidence": "exhibit A"})]
    theirs = GistRAGRunnable(rag=rag, retriever=Given(documents=given)).invoke(QUESTION)
    first = GistRAGRunnable(rag=rag).invoke(QUESTION)
    again = GistRAGRunnable(rag=rag, retriever=Given(documents=first["context"])).invoke("Who paid in silver coins?")

    assert [one.metadata["evidence"] for one in theirs["context"]] == ["exhibit A"]
    assert theirs["evidence"]["text"] == RYE
    assert [one.metadata["evidence"] for one in again["context"] if "evidence" in one.metadata] == [again["evidence"]]


def test_without_a_calibration_a_reply_has_evidence_alone(short: GistRAGRunnable) -> None:
    """An older adapter says nothing of how sure an answer is."""
    reply = short.invoke(QUESTION)

    assert (None, None) == (reply["confidence"], reply["verdict"])
    assert reply["evidence"]["text"]


def test_stream_adds_up(short: GistRAGRunnable) -> None:
    """A stream begins with its context, goes on with pieces, and adds up to the whole, sync and async."""

    async def ask() -> list[Any]:
        return [chunk async for chunk in short.astream(QUESTION)]

    whole = short.invoke(QUESTION)
    for chunks in (list(short.stream(QUESTION)), asyncio.run(ask())):
        total = chunks[0]
        assert [["answer"]] * (len(chunks) - 2) == [list(chunk) for chunk in chunks[1:-1]]
        for chunk in chunks[1:]:
            total = total + chunk
        assert len(chunks) > 1
        assert whole == {**total, "answer": total["answer"].strip()}


def test_ainvoke(short: GistRAGRunnable) -> None:
    """A coroutine gets the same answer."""
    assert short.invoke(QUESTION) == asyncio.run(short.ainvoke(QUESTION))


def test_event_loop_goes_on(rag: GistRAG, short: GistRAGRunnable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searching, reading and generating happen in other threads than that of the event loop."""
    threads: set[threading.Thread] = set()

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (threads.add(threading.current_thread()), real(*a, **k))[1])

    watch(rag.engine.embedder, "embed_query")
    watch(rag.model, "read")
    watch(rag.store, "chunks")

    asyncio.run(short.ainvoke(QUESTION))
    asyncio.run(GistRAGRetriever(rag=rag).ainvoke(QUESTION))

    assert threads
    assert threading.main_thread() not in threads


def test_batches_take_turns(short: GistRAGRunnable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many questions are answered in their order, one after the other, and one that is wrong spoils no other."""
    questions = ["honey", "", "silver coins", "the river"]
    at_work: list[int] = [0]
    real = Stream._run

    def watched(stream: Stream) -> Iterator[str]:
        at_work.append(at_work[-1] + 1)
        yield from real(stream)
        at_work.append(at_work[-1] - 1)

    expected = [short.invoke(question)["answer"] for question in questions if question]
    monkeypatch.setattr(Stream, "_run", watched)

    for replies in (
        short.batch(questions, return_exceptions=True),
        asyncio.run(short.abatch(questions, [{}] * 4, return_exceptions=True)),
    ):
        assert expected == [reply["answer"] for reply in replies if isinstance(reply, dict)]
        assert isinstance(replies[1], UsageError)
    assert 1 == max(at_work)


def test_options(rag: GistRAG, short: GistRAGRunnable) -> None:
    """Options hold for all answers, for one, or for those of a bound runnable."""
    expected = rag.query(QUESTION, mode="text", top_k=1, max_new_tokens=12)

    replies = [
        GistRAGRunnable(rag=rag, options=Options(mode="text", top_k=1, max_new_tokens=12)).invoke(QUESTION),
        short.invoke(QUESTION, mode="text", top_k=1),
        short.bind(mode="text", top_k=1).invoke(QUESTION),
        asyncio.run(short.bind(mode="text", top_k=1).ainvoke(QUESTION)),
    ]

    assert {expected.text} == {reply["answer"] for reply in replies}
    assert [1] * 4 == [len(reply["context"]) for reply in replies]
    with pytest.raises(UsageError, match="mode must be one of gist, text, hybrid, got 'fast'"):
        short.invoke(QUESTION, mode="fast")


def test_runnable_in_a_chain(short: GistRAGRunnable) -> None:
    """In a chain it takes a question in words; a dictionary is refused with the remedy."""
    chain = itemgetter("question") | short | itemgetter("answer")

    assert short.invoke(QUESTION)["answer"] == chain.invoke({"question": QUESTION})
    with pytest.raises(
        UsageError, match=r'expected a question in words, got dict; in a chain put itemgetter\("question"\)'
    ):
        short.invoke({"question": QUESTION})


def test_nothing_to_answer_from(rag: GistRAG, tmp_path: Path, engine: Engine) -> None:
    """Where nothing is found the answer says so and rests on nothing."""
    (tmp_path / "docs").mkdir()
    with GistRAG.from_folder(tmp_path / "docs", index=tmp_path / "index", engine=engine, gists="now") as empty:
        reply = GistRAGRunnable(rag=empty).invoke(QUESTION)

    assert (QUESTION, [], phrase("no documents", "en")) == (reply["question"], reply["context"], reply["answer"])
    assert (None, None, []) == (reply["evidence"], reply["verdict"], reply["unsupported"])
    assert phrase("no passages", "en") == GistRAGRunnable(rag=rag).invoke(QUESTION, filters={"kind": "pdf"})["answer"]


def test_abandoned_stream_ends_the_work(short: GistRAGRunnable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that nobody reads on computes nothing more."""
    closed: list[Stream] = []
    real = Stream.close
    monkeypatch.setattr(Stream, "close", lambda stream: (closed.append(stream), real(stream))[1])

    async def first() -> Any:
        chunks = short.astream(QUESTION)
        chunk = await anext(chunks)
        await chunks.aclose()
        return chunk

    chunks = short.stream(QUESTION)
    chunk = next(chunks)
    chunks.close()
    assert chunk == asyncio.run(first())
    assert 2 == len(closed)
    assert [[], []] == [list(stream) for stream in closed]


class Fixed(BaseRetriever):
    """A retriever that knows nothing of gistrag."""

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        return [Document(page_content=BREAD), Document(page_content=TEA)]


def test_any_retriever(rag: GistRAG, compressed: list[list[int]]) -> None:
    """Documents of any retriever are answered from; those of no index are compressed once."""
    answers = GistRAGRunnable(rag=rag, retriever=Fixed(), options=Options(max_new_tokens=4))

    first, second = answers.invoke(QUESTION), asyncio.run(answers.ainvoke(QUESTION))

    assert first == second
    assert Fixed().invoke(QUESTION) == [without_evidence(one) for one in first["context"]]
    assert [rag.model.encode_passage(BREAD)] == compressed


def test_context_is_what_the_answer_rests_on(rag: GistRAG) -> None:
    """A document that did not fit the window, or says nothing, is not in it; a heading of None is none."""
    known = Document(page_content=BREAD, metadata={"heading": None})
    others = [Document(page_content=f"{number} {'bread ' * 40}") for number in range(6)]

    class Many(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
            return [known, Document(page_content=" "), *others]

    reply = GistRAGRunnable(rag=rag, retriever=Many(), options=Options(mode="text", max_new_tokens=4)).invoke(QUESTION)

    assert BREAD == passage(known)
    assert [known, *others][: len(reply["context"])] == [without_evidence(one) for one in reply["context"]]
    assert 1 <= len(reply["context"]) < 7


def test_documents_of_the_index_by_another_way(
    rag: GistRAG, short: GistRAGRunnable, compressed: list[list[int]]
) -> None:
    """What a wrapper around our retriever hands on is answered from the gists on disk."""
    wrapped = GistRAGRunnable(rag=rag, retriever=GistRAGRetriever(rag=rag), options=short.options)

    assert short.invoke(QUESTION) == wrapped.invoke(QUESTION)
    assert [] == compressed


def test_callbacks(rag: GistRAG) -> None:
    """Chain and retriever announce themselves to whoever listens."""
    seen: list[str] = []

    class Recorder(BaseCallbackHandler):
        def on_chain_start(self, *_: Any, name: str = "", **__: Any) -> None:
            seen.append(f"start {name}")

        def on_chain_end(self, outputs: Any, **_: Any) -> None:
            seen.append(f"end {sorted(outputs)}")

        def on_retriever_start(self, *_: Any, name: str = "", **__: Any) -> None:
            seen.append(f"start {name}")

        def on_retriever_end(self, documents: Any, **_: Any) -> None:
            seen.append(f"found {len(documents)}")

    answers = GistRAGRunnable(rag=rag, retriever=GistRAGRetriever(rag=rag, k=2), options=Options(max_new_tokens=2))
    listening: Any = {"callbacks": [Recorder()]}
    answers.invoke(QUESTION, listening)
    whole = seen.copy()
    for _ in answers.stream(QUESTION, listening):
        pass

    keys = ["answer", "confidence", "context", "evidence", "question", "unsupported", "verdict"]
    assert [
        "start GistRAGRunnable", "start GistRAGRetriever", "found 2", f"end {keys}"
    ] == whole  # fmt: skip
    assert 2 * whole == seen


# What README and manual show


def test_manual_runs(rag: GistRAG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of the manual run one after the other, as they stand; here on the tiny model."""
    page = Path(__file__).parents[3] / "docs" / "langchain.md"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GistRAG, "from_folder", partial(GistRAG.from_folder, engine=rag.engine))

    namespace: dict[str, object] = {}
    for example in examples(page):
        exec(compile(example, page, "exec"), namespace)

    assert len(examples(page)) > 4


@pytest.mark.model
def test_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The example of the README runs as it stands on the real models, with the answer and sources that it shows."""
    page = Path(__file__).parents[1] / "README.md"
    (example,) = examples(page)
    monkeypatch.chdir(tmp_path)

    exec(compile(example, page, "exec"), {})

    answer, *sources = capsys.readouterr().out.splitlines()
    assert "wheat" in answer
    assert ["mill.md / The mill", "bees.md / The bees"] == sources


def examples(page: Path) -> list[str]:
    """Return the Python examples of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
