"""gistrag inside LlamaIndex: the same chunks, the same answers, the same gists, and nothing of OpenAI."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gistrag import Engine, GistRAG, GistRAGError
from gistrag.answering.stream import Stream
from gistrag.compression import compress as making_gists
from gistrag.errors import FingerprintMismatchError, IndexFolderError, IndexLockedError, UsageError
from gistrag.index.store import Store
from gistrag.qa.phrases import phrase
from llama_index.core import Document, QueryBundle, Settings
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.response.schema import AsyncStreamingResponse, Response, StreamingResponse
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.base import BaseEvent
from llama_index.core.llms import (
    ChatMessage,
    CompletionResponse,
    CompletionResponseGen,
    CustomLLM,
    LLMMetadata,
    MockLLM,
)
from llama_index.core.postprocessor import LongContextReorder, SimilarityPostprocessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import (
    MetadataMode,
    NodeWithScore,
    TextNode,
    TransformComponent,
)
from llama_index.core.tools import QueryEngineTool
from llama_index.core.vector_stores import FilterOperator, MetadataFilter, MetadataFilters
from support.believing import UNSURE
from support.tiny_models import HashEmbedder, one_thread, tiny_model

from llama_index.retrievers import gistrag as package
from llama_index.retrievers.gistrag import (
    GistAnswerEvent,
    GistChatEngine,
    GistCompressor,
    GistQueryEngine,
    GistRetriever,
    GistSynthesizer,
)
from llama_index.retrievers.gistrag.base import _passes

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
    """Every class is what LlamaIndex expects it to be."""
    bases = {
        GistRetriever: BaseRetriever,
        GistSynthesizer: BaseSynthesizer,
        GistQueryEngine: RetrieverQueryEngine,
        GistCompressor: TransformComponent,
        GistChatEngine: BaseChatEngine,
    }
    for own, base in bases.items():
        assert base.__name__ in [one.__name__ for one in own.__mro__]


def test_public_names() -> None:
    """What the package says is public is what can be seen, and its folders above belong to nobody."""
    seen = {
        name for name, value in vars(package).items() if getattr(value, "__module__", "").startswith(package.__name__)
    }

    assert sorted(package.__all__) == sorted(seen)
    folder = Path(package.__file__).parent
    assert not [path for path in (folder.parent, folder.parents[1]) if (path / "__init__.py").exists()]


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A tiny model and an embedder without one."""
    return Engine(tiny_model(), HashEmbedder())


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A book of three chunks and two short documents."""
    folder = tmp_path_factory.mktemp("docs")
    chapters = (f"## {title}\n\n{text}" for title, text in BOOK.items())
    (folder / "book.md").write_text("# The book\n\n" + "\n\n".join(chapters), "utf-8")
    (folder / "tea.txt").write_text(TEA, "utf-8")
    (folder / "short.txt").write_text("Pepper.", "utf-8")
    return folder


@pytest.fixture(scope="module")
def rag(docs: Path, tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[GistRAG]:
    """An index of the documents."""
    with GistRAG.from_folder(
        docs, index=tmp_path_factory.mktemp("index"), engine=engine, chunk_tokens=128, gists="now"
    ) as rag:
        yield rag


@pytest.fixture
def events() -> Iterator[list[BaseEvent]]:
    """All events that are dispatched meanwhile."""
    seen: list[BaseEvent] = []

    class Recorder(BaseEventHandler):
        def handle(self, event: BaseEvent, **_: Any) -> None:
            seen.append(event)

    root, recorder = get_dispatcher(), Recorder()
    root.add_event_handler(recorder)
    yield seen
    root.event_handlers.remove(recorder)


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


def nodes(*texts: str) -> list[NodeWithScore]:
    """Return nodes of nobody's index, best first."""
    return [NodeWithScore(node=TextNode(text=text), score=1 / rank) for rank, text in enumerate(texts, 1)]


def scored(found: Sequence[NodeWithScore]) -> list[tuple[str, float | None]]:
    """Return which nodes were found, and their scores."""
    return [(one.node_id, one.score) for one in found]


def texts(found: Sequence[NodeWithScore]) -> list[str]:
    """Return what nodes say."""
    return [one.node.get_content(MetadataMode.NONE) for one in found]


# Retrieving


def test_retriever_finds_what_the_index_finds(rag: GistRAG) -> None:
    """Nodes are the hits of the index, in their order, with their scores."""
    hits = rag.retrieve(QUESTION, top_k=4)

    found = GistRetriever(rag, similarity_top_k=4).retrieve(QUESTION)

    assert [(hit.chunk.text, hit.score) for hit in hits] == [(one.node.text, one.score) for one in found]


def test_node_says_where_it_stands(rag: GistRAG, docs: Path) -> None:
    """A node carries its place in the document, its headings, its document and its neighbours."""
    (bees,) = GistRetriever(rag, similarity_top_k=1).retrieve("honey in combs of wax")
    by_id = {node.node_id: node for node in GistRetriever(rag).nodes()}

    node = bees.node
    text = (docs / "book.md").read_text("utf-8")
    assert node.text == text[node.start_char_idx : node.end_char_idx]
    assert {"file_path": "book.md", "file_name": "book.md", "heading": "The book > Bees"} == node.metadata
    assert node == by_id[node.node_id]
    before, after = by_id[node.prev_node.node_id], by_id[node.next_node.node_id]
    assert ("The book > Mills", "The book > Salt") == (before.metadata["heading"], after.metadata["heading"])
    assert (None, None) == (before.prev_node, after.next_node)
    assert node.ref_doc_id == before.ref_doc_id != by_id[f"{node.node_id[:-1]}5"].ref_doc_id
    assert {"file_path": "book.md"} == node.source_node.metadata


def test_nodes_lists_every_chunk(rag: GistRAG) -> None:
    """All chunks come as nodes, by document and in the order of its text; ids differ from those of another index."""
    listed = GistRetriever(rag).nodes()

    assert [*(f"## {title}\n\n{text}" for title, text in BOOK.items()), "Pepper.", TEA] == [
        node.text.removeprefix("# The book\n\n") for node in listed
    ]
    assert len(listed) == len({node.node_id for node in listed})


def test_a_model_is_shown_the_passage_that_was_compressed(rag: GistRAG) -> None:
    """What an LLM or an embedder is shown of a node is the passage of its chunk, to the token."""
    hits = rag.retrieve(QUESTION, top_k=5)

    for one, hit in zip(GistRetriever(rag, similarity_top_k=5).retrieve(QUESTION), hits, strict=True):
        passage = rag.model.encode_passage(hit.chunk.text, hit.chunk.heading)
        for mode in (MetadataMode.LLM, MetadataMode.EMBED):
            assert passage == rag.model.encode_passage(one.node.get_content(mode))


def test_indented_chunk_below_a_heading(tmp_path: Path, engine: Engine) -> None:
    """A chunk that begins with white space is still found by what its node says."""
    (tmp_path / "docs").mkdir()
    lines = "\n".join(f"  * line {number} of the list" for number in range(12))
    (tmp_path / "docs" / "list.md").write_text(f"# List\n\n{lines}\n", "utf-8")
    with GistRAG.from_folder(
        tmp_path / "docs", index=tmp_path / "index", engine=engine, chunk_tokens=64, gists="now"
    ) as rag:
        chunks = rag.store.chunks_of("list.md")
        assert any(chunk.text[:1] == " " for chunk in chunks)

        shown = [node.get_content(MetadataMode.LLM) for node in GistRetriever(rag).nodes()]

        assert [chunk.gist_key for chunk in chunks] == [
            rag.store.gists.key(rag.model.encode_passage(one)) for one in shown
        ]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"kind": "text"}, {"tea.txt", "short.txt"}),
        ({"path": "b*"}, {"book.md"}),
        (MetadataFilters(filters=[MetadataFilter(key="file_path", value="tea.txt")]), {"tea.txt"}),
        (MetadataFilters(filters=[MetadataFilter(key="file_name", value=".txt", operator="text_match")]),
         {"tea.txt", "short.txt"}),
        (MetadataFilters(filters=[MetadataFilter(key="file_path", value=["tea.txt", "book.md"], operator="nin")]),
         {"short.txt"}),
        (MetadataFilters(filters=[
            MetadataFilter(key="heading", value="The book > Salt"),
            MetadataFilters(filters=[MetadataFilter(key="file_path", value="short.txt")]),
        ], condition="or"), {"book.md", "short.txt"}),
        (MetadataFilters(filters=[MetadataFilter(key="heading", value=None, operator="is_empty")], condition="not"),
         {"book.md"}),
        (MetadataFilters(filters=[], condition="or"), {"book.md", "tea.txt", "short.txt"}),
        (MetadataFilters(filters=[MetadataFilter(key="page_label", value="7")]), set()),
    ],
)  # fmt: skip
def test_filters(rag: GistRAG, filters: Any, expected: set[str]) -> None:
    """Only nodes that pass come back, all of them if they are few, by LlamaIndex's filters or gistrag's own."""
    found = GistRetriever(rag, similarity_top_k=9, filters=filters).retrieve(QUESTION)

    assert expected == {one.node.metadata["file_path"] for one in found}


@pytest.mark.parametrize(
    ("operator", "value", "pages"),
    [
        (">=", "9", {9, 10}), (">", 9, {10}), ("==", 9, {9}), ("==", "9", {9}), ("!=", 9, {10}), ("in", [9, 11], {9}),
        ("nin", ["9"], {10}), ("text_match", "1", {10}),
    ],
)  # fmt: skip
def test_pages_are_numbers(operator: Any, value: Any, pages: set[int]) -> None:
    """Written as a number or as text, 9 comes before 10."""
    wanted = MetadataFilters(filters=[MetadataFilter(key="page_label", value=value, operator=operator)])

    assert pages == {page for page in (9, 10) if _passes(wanted, {"page_label": str(page)})}
    assert (operator in ("!=", "nin")) == _passes(wanted, {})


def test_filters_look_as_deep_as_they_must(rag: GistRAG) -> None:
    """The one node that passes is found although others are nearer."""
    question, only = (
        "the mill by the river",
        MetadataFilters(filters=[MetadataFilter(key="file_path", value="short.txt")]),
    )

    (found,) = GistRetriever(rag, similarity_top_k=1, filters=only).retrieve(question)

    assert ["Pepper."] == texts([found]) != texts(GistRetriever(rag, similarity_top_k=1).retrieve(question))


def test_scope_stays_in_a_document(rag: GistRAG) -> None:
    """With a scope only chunks of that document are found."""
    found = GistRetriever(rag, similarity_top_k=9, scope="book.md").retrieve(QUESTION)

    assert {"book.md"} == {one.node.metadata["file_path"] for one in found}
    assert 3 == len(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity_top_k": 0}, "similarity_top_k must be at least 1, got 0"),
        ({"filters": MetadataFilters(filters=[MetadataFilter(key="colour", value="me")])},
         "nodes can be filtered by file_path, .*, heading, got colour"),
        ({"filters": {"colour": "me"}}, "filters are path, kind, heading, date, .*, got colour"),
        ({"scope": "nowhere.md"}, r"no document 'nowhere\.md'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(rag: GistRAG, options: dict[str, Any], message: str) -> None:
    """A filter, scope or number that cannot be meant is refused with what could."""
    with pytest.raises(UsageError, match=message):
        GistRetriever(rag, **options).retrieve(QUESTION)


def test_a_folder_is_no_index() -> None:
    """Where an open index is expected, a path is refused with what opens one."""
    for part in (GistRetriever, GistSynthesizer, GistQueryEngine.from_rag):
        with pytest.raises(UsageError, match=r"expected an open index, found 'index/'; GistRAG\.open or"):
            part("index/")


def test_empty_question_is_refused(rag: GistRAG) -> None:
    """An empty question is an error, as everywhere in gistrag."""
    with pytest.raises(GistRAGError, match="the question is empty"):
        GistRetriever(rag).retrieve(" ")


def test_query_may_bring_its_vector(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that is wanted it decides what is near, whatever its length, and nothing is embedded."""
    vector = [2.0 * value for value in HashEmbedder().embed_query(BOOK["Salt"]).tolist()]
    monkeypatch.setattr(rag.engine.embedder, "embed_query", None)
    retriever = rag.as_retriever(similarity_top_k=1, use_query_embedding=True)

    (salt,) = retriever.retrieve(QueryBundle("zzz", embedding=vector))

    assert "The book > Salt" == salt.node.metadata["heading"]


def test_a_vector_that_another_retriever_left_is_left_alone(rag: GistRAG) -> None:
    """As they do where several get the same query, one after the other."""
    asked = QueryBundle(QUESTION, embedding=[1.0, 0.0])

    assert texts(GistRetriever(rag).retrieve(QUESTION)) == texts(GistRetriever(rag).retrieve(asked))


def test_query_may_bring_other_texts_to_embed(rag: GistRAG) -> None:
    """Texts that stand for the question, as HyDE writes them, are embedded in its place."""
    (salt,) = GistRetriever(rag, similarity_top_k=1).retrieve(
        QueryBundle("zzz", custom_embedding_strs=[BOOK["Salt"], "silver coins"])
    )

    assert "The book > Salt" == salt.node.metadata["heading"]


def test_vector_of_another_model_is_refused(rag: GistRAG) -> None:
    """A vector of another length says whose it must be."""
    with pytest.raises(FingerprintMismatchError, match="open the index with the embedder that made it"):
        GistRetriever(rag, use_query_embedding=True).retrieve(QueryBundle("honey", embedding=[1.0, 0.0]))


def test_retriever_from_folder_and_persist_dir(tmp_path: Path, docs: Path, engine: Engine) -> None:
    """A folder becomes an index, and what was persisted is opened again."""
    index = tmp_path / "index"

    made = GistRetriever.from_folder(
        docs, index=index, similarity_top_k=1, engine=engine, chunk_tokens=128, gists="now"
    )
    opened = GistRetriever.from_persist_dir(index, similarity_top_k=1, engine=engine)

    assert made.retrieve(QUESTION) == opened.retrieve(QUESTION)
    assert 1 == opened.similarity_top_k
    for one in (made, opened):
        one.rag.close()


# Answering


def test_engine_answers_as_the_index_does(rag: GistRAG, compressed: list[list[int]]) -> None:
    """The query engine says what `rag.query` says, from the gists on disk: nothing is compressed again."""
    expected = rag.query(QUESTION, top_k=3, max_new_tokens=12)

    response = GistQueryEngine.from_rag(rag, similarity_top_k=3, max_new_tokens=12).query(QUESTION)

    assert isinstance(response, Response)
    assert expected.text == str(response)
    assert [source.start for source in expected.sources] == [one.node.start_char_idx for one in response.source_nodes]
    assert [*(one.node.node_id for one in response.source_nodes), "gistrag"] == list(response.metadata or ())
    assert [] == compressed


@pytest.mark.parametrize("mode", ["text", "hybrid"])
def test_modes(rag: GistRAG, mode: str) -> None:
    """Nodes are read as text where that is asked for."""
    expected = rag.query(QUESTION, mode=mode, max_new_tokens=12)

    assert expected.text == str(GistQueryEngine.from_rag(rag, mode=mode, max_new_tokens=12).query(QUESTION))


def test_unknown_nodes_are_compressed_once(rag: GistRAG, compressed: list[list[int]], events: list[BaseEvent]) -> None:
    """A node of another index gets gists when it is first asked about; one whose text is indexed needs none."""
    synthesizer = GistSynthesizer(rag, max_new_tokens=4)
    asked = nodes(BREAD, TEA)

    first = synthesizer.synthesize(QUESTION, asked)
    second = synthesizer.synthesize("What was baked?", asked)

    assert [rag.model.encode_passage(BREAD)] == compressed
    assert [1, 0] == [event.usage["gists_made"] for event in events if isinstance(event, GistAnswerEvent)]
    assert [scored(asked)] * 2 == [scored(first.source_nodes), scored(second.source_nodes)]


def test_what_a_postprocessor_changed_is_answered_as_it_is_now(rag: GistRAG, compressed: list[list[int]]) -> None:
    """A node keeps its id when its text is cut, and is not answered from the gists of the text it had."""
    (found,) = GistRetriever(rag, similarity_top_k=1).retrieve("honey in combs of wax")
    found.node.set_content("Bees keep honey.")

    GistSynthesizer(rag, max_new_tokens=2).synthesize(QUESTION, [found])

    assert [rag.model.encode_passage("The book > Bees\nBees keep honey.")] == compressed


def test_options_of_one_answer(rag: GistRAG) -> None:
    """Options may be given for a single answer, and are checked when they are given."""
    synthesizer = GistSynthesizer(rag, max_new_tokens=30)

    short = synthesizer.synthesize(QUESTION, nodes(TEA), max_new_tokens=2)

    assert len(str(short)) < len(str(synthesizer.synthesize(QUESTION, nodes(TEA))))
    with pytest.raises(UsageError, match="mode must be one of gist, text, hybrid, got 'fast'"):
        GistSynthesizer(rag, mode="fast")
    with pytest.raises(TypeError, match="top_k"):
        GistQueryEngine.from_rag(rag, top_k=3)


def test_streaming(rag: GistRAG, events: list[BaseEvent]) -> None:
    """Pieces come one by one, observers take none of them away, and they join to the answer."""
    whole = GistQueryEngine.from_rag(rag, max_new_tokens=16).query(QUESTION)

    response = GistQueryEngine.from_rag(rag, max_new_tokens=16, streaming=True).query(QUESTION)

    assert isinstance(response, StreamingResponse)
    pieces = list(response.response_gen)
    assert 1 < len(pieces)
    assert str(whole) == "".join(pieces).strip()
    assert isinstance(events[-1], GistAnswerEvent)
    assert 0 < events[-1].timings["ttft_s"]


def test_abandoned_stream_ends_the_work(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """A response that nobody reads on computes nothing more, in a thread or not."""
    closed: list[Stream] = []
    real = Stream.close
    monkeypatch.setattr(Stream, "close", lambda stream: (closed.append(stream), real(stream))[1])
    synthesizer = GistSynthesizer(rag, streaming=True, max_new_tokens=16)

    async def first_piece() -> str:
        response = await synthesizer.asynthesize(QUESTION, nodes(TEA))
        pieces = response.response_gen
        piece: str = await anext(pieces)
        await pieces.aclose()
        return piece

    pieces = synthesizer.synthesize(QUESTION, nodes(TEA)).response_gen
    first = next(pieces)
    pieces.close()
    assert first == asyncio.run(first_piece())
    assert 2 == len(closed)


async def pieces_of(response: AsyncStreamingResponse) -> list[str]:
    """Return the pieces of a streaming response."""
    return [piece async for piece in response.async_response_gen()]


def test_async(rag: GistRAG) -> None:
    """A coroutine gets the same nodes and answers, whole or in pieces."""
    whole, streaming = (GistQueryEngine.from_rag(rag, max_new_tokens=16, streaming=flag) for flag in (False, True))

    async def ask() -> tuple[Any, Any, list[str]]:
        found = await whole.retriever.aretrieve(QUESTION)
        return found, await whole.aquery(QUESTION), await pieces_of(await streaming.aquery(QUESTION))

    found, response, pieces = asyncio.run(ask())

    assert whole.retriever.retrieve(QUESTION) == found
    assert str(whole.query(QUESTION)) == str(response) == "".join(pieces).strip()
    assert 1 < len(pieces)


def test_event_loop_goes_on(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding, compressing and generating happen in other threads than that of the event loop."""
    threads: set[threading.Thread] = set()

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (threads.add(threading.current_thread()), real(*a, **k))[1])

    watch(rag.engine.embedder, "embed_query")
    watch(making_gists, "compress")
    watch(rag.model, "read")
    engine = GistQueryEngine.from_rag(rag, max_new_tokens=4)

    async def ask() -> None:
        await engine.aquery(QUESTION)
        await engine.asynthesize(QueryBundle(QUESTION), nodes(BREAD))

    asyncio.run(ask())

    assert threads
    assert threading.main_thread() not in threads


def test_questions_asked_at_once(rag: GistRAG) -> None:
    """Questions gathered in one event loop get the answers they get alone."""
    engine = GistQueryEngine.from_rag(rag, max_new_tokens=6)
    questions = ["honey", "silver coins", "the river", "tea by ship"]

    async def ask() -> list[str]:
        return [str(one) for one in await asyncio.gather(*map(engine.aquery, questions))]

    assert [str(engine.query(question)) for question in questions] == asyncio.run(ask())


@pytest.mark.parametrize("streaming", [False, True])
def test_no_nodes(rag: GistRAG, streaming: bool) -> None:
    """Where nothing was retrieved the response is LlamaIndex's empty one, or the one that was asked for."""
    nowhere = {"kind": "pdf"}
    silent = GistQueryEngine.from_rag(rag, filters=nowhere, streaming=streaming)
    polite = GistSynthesizer(rag, empty_response="Sorry.", streaming=streaming)

    async def ask() -> tuple[str, str]:
        responses = [await silent.aquery(QUESTION), await polite.asynthesize(QUESTION, [])]
        if not streaming:
            return str(responses[0]), str(responses[1])
        first, second = [await pieces_of(response) for response in responses]
        return first[0], second[0]

    assert ("Empty Response", []) == (str(silent.query(QUESTION)), silent.query(QUESTION).source_nodes)
    assert "Sorry." == str(polite.synthesize(QUESTION, []))
    assert ("Empty Response", "Sorry.") == asyncio.run(ask())


def test_nodes_that_say_nothing(rag: GistRAG) -> None:
    """Nodes without text are no passages; if there are no others the answer says so."""
    assert phrase("no texts", "en") == str(GistSynthesizer(rag).synthesize(QUESTION, nodes("", " \n")))


def test_how_far_to_believe_a_response(rag: GistRAG) -> None:
    """A response has confidence, verdict and evidence, which lies in its source node too, unseen by a model."""
    given = nodes(" ", BOOK["Salt"], BOOK["Bees"])
    with GistRAG.open(rag.folder, engine=replace(rag.engine, calibration=UNSURE)) as judged:
        whole = GistSynthesizer(judged, max_new_tokens=4).synthesize(QUESTION, given)
        again = GistSynthesizer(judged, max_new_tokens=4).synthesize(QUESTION, whole.source_nodes)
        once = GistSynthesizer(judged, max_new_tokens=4, second_reading=False).synthesize(QUESTION, given)

    belief = (whole.metadata or {})["gistrag"]
    assert {"confidence", "verdict", "unsupported", "readings", "evidence"} == set(belief)
    (marked,) = [one.node for one in whole.source_nodes if "evidence" in one.node.metadata]
    assert belief["evidence"] == marked.metadata["evidence"]
    assert belief["evidence"]["text"] in marked.get_content()
    assert marked.get_content(MetadataMode.LLM) == marked.get_content(MetadataMode.NONE)
    assert ("unsure", 3) == (belief["verdict"], belief["readings"])
    assert ["evidence" in one.node.metadata for one in given] == [False, False, False]
    assert str(again) == str(whole)
    told = (once.metadata or {})["gistrag"]
    assert (pytest.approx(0.43), 1) == (told["confidence"], told["readings"])


def test_evidence_is_counted_as_its_node_is(rag: GistRAG, docs: Path) -> None:
    """From the start of the document where that is known, else in the text; metadata above it count nowhere."""
    found = GistRetriever(rag, similarity_top_k=3, scope="book.md").retrieve(QUESTION)
    foreign = TextNode(text=f"\n {RYE}", metadata={"title": "Chapter seven"})
    for given in (found, [NodeWithScore(node=foreign, score=1.0)]):
        response = GistSynthesizer(rag, max_new_tokens=4).synthesize("Was rye or honey sown?", given)

        evidence = (response.metadata or {})["gistrag"]["evidence"]
        whole = (docs / "book.md").read_text("utf-8") if given is found else foreign.text
        assert whole[evidence["start"] : evidence["end"]] == evidence["text"]
    response = GistSynthesizer(rag, max_new_tokens=4).synthesize("Chapter seven?", given)
    above = (response.metadata or {})["gistrag"]["evidence"]
    assert (above["text"], above["start"]) == ("title: Chapter seven", None)


def test_metadata_of_a_user_stay_theirs(rag: GistRAG) -> None:
    """A field that is called evidence is read by the model, and not ours to overwrite."""
    node = TextNode(text=RYE, metadata={"evidence": "exhibit A"})
    response = GistSynthesizer(rag, max_new_tokens=4).synthesize(QUESTION, [NodeWithScore(node=node, score=1.0)])

    (source,) = [one.node for one in response.source_nodes]
    assert source.metadata == {"evidence": "exhibit A"}
    assert "exhibit A" in source.get_content(MetadataMode.LLM)
    assert (response.metadata or {})["gistrag"]["evidence"]["text"]


def test_a_stream_says_at_its_end_how_far_to_believe_it(rag: GistRAG) -> None:
    """Sync and async, the metadata are filled in with the last piece; without a calibration there is no verdict."""
    engine = GistQueryEngine.from_rag(rag, similarity_top_k=2, max_new_tokens=2, streaming=True)

    async def ask() -> Any:
        response = await engine.aquery(QUESTION)
        await pieces_of(response)
        return response

    first: Any = engine.query(QUESTION)
    assert {} == first.metadata["gistrag"]
    "".join(first.response_gen)
    for response in (first, asyncio.run(ask())):
        belief = response.metadata["gistrag"]
        assert (None, None) == (belief["confidence"], belief["verdict"])
        assert [belief["evidence"]] == [
            one.metadata["evidence"] for one in response.source_nodes if "evidence" in one.metadata
        ]


def test_events(rag: GistRAG, events: list[BaseEvent]) -> None:
    """Query, retrieval and synthesis announce themselves, in this order, sync and async, with their content."""
    engine = GistQueryEngine.from_rag(rag, similarity_top_k=2, max_new_tokens=2)

    engine.query(QUESTION)
    seen = [type(event).__name__ for event in events]
    asyncio.run(engine.aquery(QUESTION))

    assert [
        "QueryStartEvent", "RetrievalStartEvent", "RetrievalEndEvent", "SynthesizeStartEvent", "GetResponseStartEvent",
        "GistAnswerEvent", "GetResponseEndEvent", "SynthesizeEndEvent", "QueryEndEvent",
    ] == seen  # fmt: skip
    assert 2 * seen == [type(event).__name__ for event in events]
    assert 2 == len(events[2].nodes) == len(events[4].text_chunks)
    assert 0 < events[5].usage["gist_slots"]
    assert str(events[7].response) == str(events[8].response)


class LastFirst(BaseNodePostprocessor):
    """A reranker of a peculiar taste, which keeps two."""

    def _postprocess_nodes(self, nodes: list[NodeWithScore], query_bundle: Any = None) -> list[NodeWithScore]:
        return nodes[::-1][:2]


def test_postprocessors(rag: GistRAG, events: list[BaseEvent]) -> None:
    """Rerankers and other postprocessors decide what is answered from, and in which order."""
    found = GistRetriever(rag, similarity_top_k=4).retrieve(QUESTION)
    engine = GistQueryEngine.from_rag(rag, similarity_top_k=4, max_new_tokens=2, node_postprocessors=[LastFirst()])

    response = engine.query(QUESTION)

    assert scored([found[3], found[2]]) == scored(response.source_nodes)
    shown = [event.text_chunks for event in events if type(event).__name__ == "GetResponseStartEvent"]
    assert [[one.node.get_content(MetadataMode.LLM) for one in response.source_nodes]] == shown
    many = [LongContextReorder(), SimilarityPostprocessor(similarity_cutoff=2.0)]
    assert "Empty Response" == str(GistQueryEngine.from_rag(rag, node_postprocessors=many).query(QUESTION))


def test_query_engine_as_a_tool(rag: GistRAG) -> None:
    """An agent can use the engine as a tool."""
    engine = GistQueryEngine.from_rag(rag, max_new_tokens=8)
    tool = QueryEngineTool.from_defaults(engine, name="book", description="Answers from the book.")

    output = tool(QUESTION)

    assert (str(engine.query(QUESTION)), "book") == (output.content, output.tool_name)
    assert output.content == asyncio.run(tool.acall(QUESTION)).content


# Each part alone


class Echo(CustomLLM):
    """An LLM that answers with its prompt."""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name="echo")

    def complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponse:
        return CompletionResponse(text=prompt)

    def stream_complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponseGen:
        yield CompletionResponse(text=prompt, delta=prompt)


@pytest.mark.parametrize("llm", [Echo(), MockLLM()], ids=["custom", "mock"])
def test_retriever_with_any_llm(rag: GistRAG, llm: Any) -> None:
    """Any LLM can answer from what the retriever finds; it is shown headings and text and nothing else."""
    engine = RetrieverQueryEngine.from_args(GistRetriever(rag, similarity_top_k=2), llm=llm)

    said = str(engine.query("honey in combs of wax"))

    assert f"The book > Bees\n## Bees\n\n{BOOK['Bees']}" in said
    assert "book.md" not in said


class Fixed(BaseRetriever):
    """A retriever that knows nothing of gistrag."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return nodes(TEA, BREAD)


def test_any_retriever_with_the_synthesizer(rag: GistRAG) -> None:
    """The synthesizer answers from what any retriever finds."""
    engine = RetrieverQueryEngine(Fixed(), response_synthesizer=GistSynthesizer(rag, max_new_tokens=8))

    assert str(GistSynthesizer(rag, max_new_tokens=8).synthesize(QUESTION, nodes(TEA, BREAD))) == str(
        engine.query(QUESTION)
    )


def test_global_settings_are_left_alone(rag: GistRAG) -> None:
    """Nothing is put into `Settings`, and no package of OpenAI is needed."""
    before, loaded = vars(Settings).copy(), set(sys.modules)

    engine = GistQueryEngine.from_rag(rag, max_new_tokens=2)
    engine.query(QUESTION)
    engine.update_prompts({})

    assert before == vars(Settings)
    assert (None, None, {}) == (Settings._llm, Settings._embed_model, engine.get_prompts())
    assert not [name for name in set(sys.modules) - loaded if name.split(".")[0] == "openai"]
    assert importlib.util.find_spec("llama_index.llms") is None


def test_index_opens_llama_index(rag: GistRAG) -> None:
    """`rag.as_retriever` and `rag.as_query_engine` return these classes."""
    retriever = rag.as_retriever(similarity_top_k=2, filters={"kind": "text"})
    engine = rag.as_query_engine(similarity_top_k=1, max_new_tokens=2, streaming=True)

    assert isinstance(rag.as_chat_engine(), GistChatEngine)
    assert isinstance(retriever, GistRetriever)
    assert (2, {"kind": "text"}) == (retriever.similarity_top_k, retriever.filters)
    assert isinstance(engine, GistQueryEngine)
    assert isinstance(engine.query(QUESTION), StreamingResponse)


@pytest.mark.parametrize("streaming", [False, True])
def test_greetings_and_whole_documents_need_no_model(rag: GistRAG, streaming: bool) -> None:
    """The query engine and the chat engine answer them as the library does; the summary is the node."""
    engine = rag.as_query_engine(scope="book.md", streaming=streaming)
    whole = "What is this document about?"
    hello, about = engine.query("Hello!"), asyncio.run(engine.aquery(whole))

    assert rag.query("Hello!").text == str(hello) == str(rag.as_chat_engine().chat("Hello!"))
    assert rag.query(whole, scope="book.md").text == str(about) == about.source_nodes[0].node.get_content()
    assert ([], 1) == (hello.source_nodes, len(about.source_nodes))


# A conversation

MILL, FOLLOW_UP = "Where does the mill stand?", "And what does it do?"


def test_chat_joins_what_leans_and_shows_it(rag: GistRAG) -> None:
    """The answer, its nodes and what was searched are those of the library, and the history holds both sides."""
    talk = rag.as_chat_engine(similarity_top_k=1, max_new_tokens=3)
    first, second = talk.chat(MILL), talk.chat(FOLLOW_UP)
    expected = rag.query(FOLLOW_UP, history=[MILL], top_k=1, max_new_tokens=3)

    assert isinstance(talk, GistChatEngine)
    assert (MILL, f"{MILL} {FOLLOW_UP}") == (first.metadata["searched"], second.metadata["searched"])
    assert (expected.text, [source.score for source in expected.sources]) == (
        str(second),
        [node.score for node in second.source_nodes],
    )
    assert second.metadata["evidence"] == second.source_nodes[0].metadata["evidence"]
    assert ["Mills"] == [node.metadata["heading"].split(" > ")[-1] for node in second.source_nodes]
    assert [MILL, str(first), FOLLOW_UP, str(second)] == [message.content for message in talk.chat_history]


def test_chat_streams_the_same_in_pieces(rag: GistRAG) -> None:
    """Nodes come with the first piece, the answer joins the history after the last."""
    talk = rag.as_chat_engine(similarity_top_k=1, max_new_tokens=3)
    whole = rag.as_chat_engine(similarity_top_k=1, max_new_tokens=3).chat(MILL)
    response = talk.stream_chat(MILL)

    assert [node.node_id for node in whole.source_nodes] == [node.node_id for node in response.source_nodes]
    assert ["user"] == [message.role for message in talk.chat_history]
    assert str(whole) == "".join(response.response_gen).strip()
    assert [MILL, str(whole)] == [message.content for message in talk.chat_history]


def test_chat_in_coroutines(rag: GistRAG) -> None:
    """Both ways of asking give the same to a coroutine."""

    async def script() -> tuple[str, str]:
        talk = rag.as_chat_engine(similarity_top_k=1, max_new_tokens=3)
        whole = await talk.achat(MILL)
        talk.reset()
        assert [] == talk.chat_history
        response = await talk.astream_chat(MILL)
        return str(whole), "".join([piece async for piece in response.async_response_gen()]).strip()

    whole, streamed = asyncio.run(script())

    assert whole == streamed


def test_chat_goes_on_from_a_given_history(rag: GistRAG) -> None:
    """Messages of the user count, those of others do not; a refused message leaves the history as it was."""
    said = [ChatMessage(content=MILL, role="user"), ChatMessage(content="By the river.", role="assistant")]
    talk = GistChatEngine(rag, similarity_top_k=1, max_new_tokens=2, chat_history=said)

    with pytest.raises(UsageError, match="empty"):
        talk.chat(" ")
    assert said == talk.chat_history
    assert f"{MILL} {FOLLOW_UP}" == talk.chat(FOLLOW_UP).metadata["searched"]
    assert FOLLOW_UP == talk.chat(FOLLOW_UP, chat_history=[]).metadata["searched"]


# A pipeline


def gist_files(index: Path) -> dict[str, bytes]:
    """Return the gist files of an index by name."""
    return {path.name: path.read_bytes() for path in (index / "gists").glob("??/*")}


def test_pipeline_makes_the_gists_of_a_build(tmp_path: Path, engine: Engine, docs: Path) -> None:
    """From the same nodes a pipeline makes the files a build makes: the same names, the same bytes."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for path in docs.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with GistRAG.from_folder(
        folder, index=tmp_path / "index", engine=engine, tokens_per_gist=2, chunk_tokens=128, gists="now"
    ) as rag:
        built, listed = gist_files(tmp_path / "index"), GistRetriever(rag).nodes()
        for path in folder.iterdir():
            path.unlink()
        rag.sync()
        assert ({}, 5) == (gist_files(tmp_path / "index"), len(built))

        returned = IngestionPipeline(transformations=[GistCompressor(tmp_path / "index", engine=engine)]).run(
            nodes=listed
        )

        assert built == gist_files(tmp_path / "index")
        assert listed == returned


def test_build_finds_the_gists_of_a_pipeline(tmp_path: Path, engine: Engine) -> None:
    """A build into the index of a pipeline finds the gists of equal texts and makes none again."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "tea.txt").write_text(TEA, "utf-8")
    compressor = GistCompressor(tmp_path / "index", settings={"tokens_per_gist": 3}, engine=engine)
    IngestionPipeline(transformations=[compressor]).run(documents=[Document(text=TEA), Document(text=BREAD)])
    made = gist_files(tmp_path / "index")

    with GistRAG.from_folder(tmp_path / "docs", index=tmp_path / "index", engine=engine, gists="now") as rag:
        assert rag.report is not None
        assert (0, 1) == (rag.report.gists_made, rag.report.gists_found)

    assert 2 == len(made)
    assert gist_files(tmp_path / "index").items() <= made.items()


def test_nodes_of_a_pipeline_are_answered_from_disk(
    tmp_path: Path, engine: Engine, compressed: list[list[int]]
) -> None:
    """After a pipeline the synthesizer compresses nothing, in whatever store its nodes were."""
    documents = [Document(text=text, metadata={"author": "me"}) for text in (TEA, BREAD)]
    compressor = GistCompressor(tmp_path / "gists", engine=engine)

    made = asyncio.run(IngestionPipeline(transformations=[compressor]).arun(documents=documents))
    compressed.clear()

    stored = [type(node).from_json(node.to_json()) for node in made]
    with GistRAG.open(tmp_path / "gists", engine=engine) as rag:
        found = [NodeWithScore(node=node, score=1.0) for node in stored]
        assert str(GistSynthesizer(rag, max_new_tokens=4).synthesize(QUESTION, found))
    assert [] == compressed


def test_pipeline_makes_nothing_twice(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gists that are there are found, also by another compressor; texts too short for gists get none."""
    GistCompressor(tmp_path / "gists", engine=engine)([TextNode(text=TEA), TextNode(text="x"), TextNode(text="")])
    made = gist_files(tmp_path / "gists")
    monkeypatch.setattr("gistrag.kv.gist_file.encode", None)

    GistCompressor(tmp_path / "gists", engine=engine)([TextNode(text=TEA), TextNode(text=TEA)])

    assert 1 == len(made)
    assert made == gist_files(tmp_path / "gists")


def test_index_of_a_pipeline(tmp_path: Path, engine: Engine) -> None:
    """It is an index like any other, private, with the settings asked for, and no sync can empty it."""
    GistCompressor(tmp_path / "gists", settings={"tokens_per_gist": 3}, engine=engine)([TextNode(text=TEA)])

    assert 0o700 == (tmp_path / "gists").stat().st_mode & 0o777
    with GistRAG.open(tmp_path / "gists", engine=engine) as rag:
        assert (3, 0, 1) == (rag.store.settings.tokens_per_gist, rag.store.count(), rag.store.stats().gist_files)
        with pytest.raises(UsageError, match=r"expected a folder of documents at .*no-documents"):
            rag.sync()
    assert 1 == len(gist_files(tmp_path / "gists"))


def test_compressor_refuses_what_would_harm_an_index(tmp_path: Path, engine: Engine) -> None:
    """Other settings, another model, a folder that is no index, or another builder at work: nothing is written."""
    GistCompressor(tmp_path / "gists", engine=engine)([TextNode(text=TEA)])
    made = gist_files(tmp_path / "gists")
    other = Engine(tiny_model("qwen3"), engine.embedder)
    (tmp_path / "file").touch()

    with pytest.raises(FingerprintMismatchError, match="made with tokens_per_gist '4', this one has '9'; name another"):
        GistCompressor(tmp_path / "gists", settings={"tokens_per_gist": 9}, engine=engine)([TextNode(text=BREAD)])
    with pytest.raises(FingerprintMismatchError, match="'tiny llama', this one has 'tiny qwen3'"):
        GistCompressor(tmp_path / "gists", engine=other)([TextNode(text=BREAD)])
    with pytest.raises(UsageError, match="tokens_per_gist must be at least 1, got 0"):
        GistCompressor(tmp_path / "new", settings={"tokens_per_gist": 0})
    with pytest.raises(IndexFolderError):
        GistCompressor(tmp_path / "file", engine=engine)([TextNode(text=BREAD)])
    with Store.build(tmp_path / "gists"), pytest.raises(IndexLockedError):
        GistCompressor(tmp_path / "gists", engine=engine)([TextNode(text=BREAD)])
    assert made == gist_files(tmp_path / "gists")


def test_compressor_is_saved_by_what_it_was_told(tmp_path: Path, engine: Engine) -> None:
    """A pipeline knows it by folder and settings, which no loaded model changes."""
    told = GistCompressor(tmp_path / "gists", settings={"tokens_per_gist": 3}, engine=engine)

    data = told.to_dict()

    assert {
        "index": str(tmp_path / "gists"),
        "settings": {"tokens_per_gist": 3},
        "class_name": "GistCompressor",
    } == data
    assert data == GistCompressor.from_dict(data).to_dict()


# What README and manual show


def test_manual_runs(rag: GistRAG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of the manual run one after the other, as they stand; here on the tiny model."""
    page = Path(__file__).parents[3] / "docs" / "llama-index.md"
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


def test_metadata_of_documents_are_on_nodes_and_filter_them(tmp_path: Path) -> None:
    """Dates compare as far as the filter goes; an impossible one is refused."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "2026-01-31 mill.md").write_text("---\nauthor: Kim Min\n---\nThe mill grinds wheat.")
    (docs / "2026-02-01 bees.md").write_text("Bees gather wheat.")
    engine = Engine(tiny_model(), HashEmbedder())

    def found(key: str, operator: FilterOperator, value: str) -> list[str]:
        filters = MetadataFilters(filters=[MetadataFilter(key=key, operator=operator, value=value)])
        return [one.node.metadata["date"] for one in GistRetriever(rag, filters=filters).retrieve("wheat")]

    with GistRAG.from_folder(docs, index=tmp_path / "index", engine=engine, gists="none") as rag:
        assert found("date", FilterOperator.LTE, "2026-01") == ["2026-01-31"]
        assert found("date", FilterOperator.GT, "2026-01") == ["2026-02-01"]
        assert found("date", FilterOperator.EQ, "2026-02-01") == ["2026-02-01"]
        assert found("author", FilterOperator.CONTAINS, "Kim") == ["2026-01-31"]
        own = GistRetriever(rag, filters={"date": ">=2026-02"}).retrieve("wheat")
        assert [one.node.metadata["date"] for one in own] == ["2026-02-01"]
        assert "2026" not in own[0].node.get_content(MetadataMode.LLM)
        with pytest.raises(UsageError, match="real date"):
            found("date", FilterOperator.GTE, "2026-02-30")
