"""One question, one answer: which chunks, as gists or as text, in which order, and what it took."""

from __future__ import annotations

import asyncio
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import HashEmbedder

from gistrag.answering import judge
from gistrag.answering import texts as given_texts
from gistrag.answering.answer import Answer, Options, Source, Timings, Usage
from gistrag.answering.stream import Stream
from gistrag.answering.texts import GivenTexts
from gistrag.cli.output import cost_line
from gistrag.compression import compress as making_gists
from gistrag.compression.making import gist_count
from gistrag.engine import Engine
from gistrag.errors import ContextOverflowError, ResourceError, UsageError
from gistrag.index.gist_store import GistStore
from gistrag.index.schema import StoredChunk
from gistrag.kv.cache import GistCache, Memory
from gistrag.kv.packed import PackedGists
from gistrag.model import gist_model
from gistrag.qa.phrases import phrase
from gistrag.rag import GistRAG
from gistrag.settings import GistSettings

BOOK = {
    "Mills": "The mill stands by the river and grinds the wheat of the whole valley.",
    "Bees": "Bees gather nectar in spring and keep the honey in combs of wax for winter.",
    "Salt": "Salt was carried over the pass by mules, and paid for in silver coins.",
}
TEA = "Tea came by ship, and honey was stirred into it."
BREAD = "Bread was baked on Saturdays, in the oven behind the mill."
SOURCE = Source("a.md", None, ("One", "Two"), 0, 9, 0.5, "snippet", 1, False)


@pytest.fixture(scope="module")
def rag(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[GistRAG]:
    """An index of a book of three chunks and two other documents."""
    docs = tmp_path_factory.mktemp("docs")
    chapters = (f"## {title}\n\n{text}" for title, text in BOOK.items())
    (docs / "book.md").write_text("# The book\n\n" + "\n\n".join(chapters), "utf-8")
    (docs / "tea.txt").write_text(TEA, "utf-8")
    (docs / "short.txt").write_text("Pepper.", "utf-8")
    with GistRAG.from_folder(
        docs, index=tmp_path_factory.mktemp("index"), engine=engine, chunk_tokens=128, gists="now"
    ) as rag:
        yield rag


@pytest.fixture
def memories(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[GistCache], str]]:
    """The caches, without the prefix, and the layout of every memory that is made from here on."""
    made: list[tuple[list[GistCache], str]] = []
    real = gist_model.concatenate

    def spy(caches: Sequence[GistCache], *given: Any, layout: str, start: int) -> Memory:
        made.append((list(caches[1:]), layout))
        return real(caches, *given, layout=layout, start=start)

    monkeypatch.setattr(gist_model, "concatenate", spy)
    return made


def chapters(rag: GistRAG) -> list[StoredChunk]:
    """Return the chunks of the book, in its order."""
    return rag.store.chunks_of("book.md")


def fixed(rag: GistRAG, question: str, max_new_tokens: int = 1) -> int:
    """Return the positions that a prompt takes without passages."""
    return rag.model.prefix.gists + len(rag.model.encode_question(question)) + max_new_tokens


def test_answer_rests_on_the_best_chunks(rag: GistRAG) -> None:
    """Sources are what retrieve returns, best first, with where they stand in the document."""
    hits = rag.retrieve("honey in combs of wax", top_k=2)

    answer = rag.query("honey in combs of wax", top_k=2, max_new_tokens=2)

    assert [hit.chunk.id for hit in hits] == [source.chunk_id for source in answer.sources]
    best, bees = answer.sources[0], chapters(rag)[1]
    assert ("book.md", "book.md, The book > Bees", None) == (best.path, best.place, best.page)
    assert (bees.start, bees.end, hits[0].score, False) == (best.start, best.end, best.score, best.as_text)
    assert best.snippet == " ".join(bees.text.split())


def test_usage_counts_what_was_read(rag: GistRAG) -> None:
    """Slots, tokens and bytes are those of the gists of the sources."""
    answer = rag.query("honey", top_k=2, max_new_tokens=3)

    used = [chunk.gist_key for chunk in rag.store.chunks(source.chunk_id for source in answer.sources)]
    caches = [GistCache.unpacked(rag.store.gists.load(key)) for key in used if key]
    assert 2 == len(caches)
    assert answer.usage == Usage(
        gist_slots=sum(cache.gists for cache in caches),
        source_tokens=sum(cache.source_tokens for cache in caches),
        question_tokens=len(rag.model.encode_question("honey")),
        answer_tokens=answer.usage.answer_tokens,
        bytes_read=sum(rag.store.gists.path(key).stat().st_size for key in used if key),
        readings=1,
    )
    assert answer.usage.answer_tokens <= 3


def test_timings_add_up(rag: GistRAG) -> None:
    """Time to first token holds retrieving, loading and assembling, the total holds it."""
    timings = rag.query("honey", max_new_tokens=3).timings

    assert min(timings.retrieve_s, timings.load_s, timings.assemble_s) > 0
    assert timings.retrieve_s + timings.load_s + timings.assemble_s <= timings.ttft_s <= timings.total_s
    assert timings.decode_s == timings.total_s - timings.ttft_s


def test_best_chunk_stands_next_to_the_question(rag: GistRAG, memories: list[tuple[list[GistCache], str]]) -> None:
    """Gists stand in the memory worst first, so that the best one is read last."""
    answer = rag.query("honey", top_k=3, max_new_tokens=1)

    keys = [rag.store.chunks([source.chunk_id])[0].gist_key for source in reversed(answer.sources)]
    assert_caches(rag, keys, memories[-1][0])


def assert_caches(rag: GistRAG, keys: Sequence[str | None], caches: Sequence[GistCache]) -> None:
    """See that the caches are the gists *keys*, in that order."""
    assert len(keys) == len(caches)
    for key, cache in zip(keys, caches, strict=True):
        assert key is not None
        assert torch.equal(GistCache.unpacked(rag.store.gists.load(key)).kv, cache.kv)


def test_text_mode_loads_no_gist(
    rag: GistRAG, memories: list[tuple[list[GistCache], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In text mode every chunk is read as text and no gist file is opened."""
    monkeypatch.setattr(GistStore, "load", None)

    answer = rag.query("honey", top_k=3, mode="text", max_new_tokens=1)

    chunks = rag.store.chunks(source.chunk_id for source in answer.sources)
    tokens = sum(len(rag.model.encode_passage(chunk.text, chunk.heading)) for chunk in chunks)
    assert [] == memories[-1][0]
    assert (tokens, 0, 0, 0) == (
        answer.usage.text_tokens,
        answer.usage.gist_slots,
        answer.usage.bytes_read,
        answer.usage.text_fallbacks,
    )
    assert all(source.as_text for source in answer.sources)


def test_hybrid_reads_the_best_chunk_as_text(rag: GistRAG, memories: list[tuple[list[GistCache], str]]) -> None:
    """In hybrid mode the best chunk is text, the others are gists before it."""
    answer = rag.query("honey", top_k=3, mode="hybrid", max_new_tokens=1)

    chunks = rag.store.chunks(source.chunk_id for source in answer.sources)
    assert [True, False, False] == [source.as_text for source in answer.sources]
    assert len(rag.model.encode_passage(chunks[0].text, chunks[0].heading)) == answer.usage.text_tokens
    assert_caches(rag, [chunks[2].gist_key, chunks[1].gist_key], memories[-1][0])


def test_one_token_per_gist_answers_like_text(tmp_path: Path, engine: Engine) -> None:
    """A gist for every token is the text itself: one chunk gives the same answer in both modes."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "tea.txt").write_text(TEA, "utf-8")

    with GistRAG.from_folder(
        tmp_path / "docs", index=tmp_path / "index", engine=engine, tokens_per_gist=1, gists="now"
    ) as rag:
        gist, text = (rag.query("honey", mode=mode, max_new_tokens=12) for mode in ("gist", "text"))

    assert gist.text == text.text
    assert (gist.usage.gist_slots, 0) == (text.usage.text_tokens, text.usage.gist_slots)


def test_scope_takes_the_whole_document_as_it_reads(rag: GistRAG, memories: list[tuple[list[GistCache], str]]) -> None:
    """With a scope all chunks of the document are used whatever top_k says, in the order of its text."""
    answer = rag.query("grinds wheat", scope="book.md", top_k=1, max_new_tokens=1)

    assert_caches(rag, [chunk.gist_key for chunk in chapters(rag)], memories[-1][0])
    assert "Mills" == answer.sources[0].heading[-1]
    assert 3 == len(answer.sources)


def test_scope_is_whole_while_a_rebuild_is_under_way(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that search cannot find yet, their vectors being of another embedder, still belong to the document."""
    monkeypatch.setattr(rag._retriever, "search", lambda *given, **options: [])

    answer = rag.query("silver", scope="book.md", max_new_tokens=1)

    assert [chunk.id for chunk in chapters(rag)] == [source.chunk_id for source in answer.sources]


def test_scope_and_filters_both_hold(rag: GistRAG) -> None:
    """A filter inside a scope leaves out what does not pass."""
    answer = rag.query("silver", scope="book.md", filters={"heading": "bees"}, max_new_tokens=1)

    assert [chapters(rag)[1].id] == [source.chunk_id for source in answer.sources]


@pytest.mark.parametrize(
    ("options", "paths"),
    [
        ({"filters": {"kind": "text"}, "top_k": 1}, {"tea.txt"}),
        ({"filters": {"path": "t*"}, "top_k": 9}, {"tea.txt"}),
        ({"top_k": 99}, {"book.md", "tea.txt", "short.txt"}),
    ],
)
def test_filters_and_top_k_choose(rag: GistRAG, options: dict[str, Any], paths: set[str]) -> None:
    """Only what passes is used, and all of it where fewer chunks are there than asked for."""
    assert paths == {source.path for source in rag.query("honey", max_new_tokens=1, **options).sources}


def test_more_chunks_than_there_are(rag: GistRAG) -> None:
    """All there are, and it is noted."""
    count = rag.store.count()

    usage, sources = (answer := rag.query("honey", top_k=count + 5, max_new_tokens=1)).usage, answer.sources

    assert (count, 5) == (len(sources), usage.missing_chunks)
    assert f"the index has only {count} such chunks" in cost_line(answer)
    assert "all there is" not in cost_line(rag.query("honey", top_k=count, max_new_tokens=1))


def test_nothing_passes_the_filters(rag: GistRAG) -> None:
    """Where no chunk passes the answer says so and rests on nothing."""
    answer = rag.query("honey", filters={"kind": "pdf"})

    assert (phrase("no passages", "en"), ()) == (answer.text, answer.sources)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": 10**19}, "top_k must be at most 10,000, got 10"),
        ({"top_k": True}, "top_k must be a number, got bool"),
        ({"seed": 10**30}, "seed must be at most 9,223,372,036,854,775,807"),
        ({"max_new_tokens": 10**20}, "max_new_tokens must be at most 2,147,483,647"),
        ({"mode": "fast"}, "mode must be one of gist, text, hybrid, got 'fast'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
    ],
)
def test_options_out_of_range(rag: GistRAG, options: dict[str, Any], message: str) -> None:
    """An option that makes no sense is refused when the stream is made, before any work."""
    with pytest.raises(UsageError, match=message):
        rag.stream("honey", **options)


def test_half_a_character_is_no_document(rag: GistRAG) -> None:
    """A scope with half a character, as a Latin-1 terminal gives it, is refused in one line."""
    with pytest.raises(UsageError, match="half a character"):
        rag.query("honey", scope="caf\udce9")


@pytest.mark.parametrize("question", ["", " \n\t"])
def test_empty_question(rag: GistRAG, question: str) -> None:
    """An empty question is refused."""
    with pytest.raises(UsageError, match="the question is empty"):
        rag.stream(question)


def test_letters_in_parts_are_composed(rag: GistRAG) -> None:
    """A question whose accents are characters of their own is searched, read and answered as the composed one."""
    question = "Où est le café où le miel fut payé?"
    parts = unicodedata.normalize("NFD", question)
    assert parts != question

    composed, decomposed = rag.stream(question, max_new_tokens=4), rag.stream(parts, max_new_tokens=4)

    assert decomposed._question == question
    assert (composed.result().text, question) == (decomposed.result().text, decomposed.answer.searched)
    assert rag.retrieve(question) == rag.retrieve(parts)
    assert rag.searched(question, [parts]) == rag.searched(parts, [question])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "nowhere.md"}, "no document 'nowhere.md' in .*; gistrag inspect lists them"),
        ({"filters": {"colour": "me"}}, "filters are path, kind, heading, date, .*, got colour"),
    ],
)
def test_unknown_scope_or_filter(rag: GistRAG, options: dict[str, Any], message: str) -> None:
    """A scope or filter that does not exist is refused with what there is."""
    with pytest.raises(UsageError, match=message):
        rag.query("honey", **options)


def test_question_longer_than_the_window(rag: GistRAG) -> None:
    """A question that does not fit is refused with both numbers, never cut."""
    question = "honey " * 300

    with pytest.raises(
        ContextOverflowError, match=rf" takes \d+ positions, the model's context window has {rag.model.window};"
    ):
        rag.query(question, max_new_tokens=8)


def test_best_passage_that_does_not_fit(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even the best chunk fits the answer is refused, rather than given from nothing."""
    best = rag.query("honey", top_k=1, mode="text", max_new_tokens=1)
    least = fixed(rag, "honey") + best.usage.text_tokens
    monkeypatch.setattr(rag.model, "window", least - 1)

    with pytest.raises(
        ContextOverflowError, match=f" takes {least} positions, the model's context window has {least - 1};"
    ):
        rag.query("honey", top_k=1, mode="text", max_new_tokens=1)


def test_full_window_packs_the_gists(
    rag: GistRAG, memories: list[tuple[list[GistCache], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gists are spread as their text was where that fits exactly, and packed with one position less."""
    usage = rag.query("honey", top_k=3, max_new_tokens=1).usage
    room = fixed(rag, "honey") + usage.source_tokens

    for window in (room, room - 1):
        monkeypatch.setattr(rag.model, "window", window)
        assert 0 == rag.query("honey", top_k=3, max_new_tokens=1).usage.dropped_chunks

    assert ["spread", "spread", "packed"] == [layout for _, layout in memories]


def test_gists_are_packed_where_a_layer_would_not_reach_them(
    rag: GistRAG, memories: list[tuple[list[GistCache], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with windows gets its gists spread where they fit into a window, and packed with one position less."""
    usage = rag.query("honey", top_k=3, max_new_tokens=1).usage
    room = fixed(rag, "honey") + usage.source_tokens

    for window in (room, room - 1):
        monkeypatch.setattr(rag.model, "local_window", window)
        assert 0 == rag.query("honey", top_k=3, max_new_tokens=1).usage.dropped_chunks

    assert ["spread", "spread", "packed"] == [layout for _, layout in memories]


def test_lowest_ranked_chunks_leave_first(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit even when packed is left out from the end of the ranking, and counted."""
    whole = rag.query("honey", top_k=4, max_new_tokens=1)
    monkeypatch.setattr(rag.model, "window", fixed(rag, "honey") + whole.usage.gist_slots + whole.usage.text_tokens - 1)

    cut = rag.query("honey", top_k=4, max_new_tokens=1)

    assert (whole.sources[:3], 1) == (cut.sources, cut.usage.dropped_chunks)
    assert "packed" == cut.usage.layout


def test_scope_that_does_not_fit_loses_its_least_relevant_chunks(
    rag: GistRAG, memories: list[tuple[list[GistCache], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole document that is too long keeps the chunks that fit the question best, still in its order."""
    ranked = rag.query("mill river silver coins", scope="book.md", max_new_tokens=1)
    room = fixed(rag, "mill river silver coins") + ranked.usage.gist_slots - 1
    monkeypatch.setattr(rag.model, "window", room)

    cut = rag.query("mill river silver coins", scope="book.md", max_new_tokens=1)

    assert (ranked.sources[:2], 1) == (cut.sources, cut.usage.dropped_chunks)
    kept = {source.chunk_id for source in cut.sources}
    assert_caches(rag, [chunk.gist_key for chunk in chapters(rag) if chunk.id in kept], memories[-1][0])


def test_stream_works_at_the_first_next(rag: GistRAG, memories: list[tuple[list[GistCache], str]]) -> None:
    """Making a stream does nothing; its pieces join to the answer, whose sources are there from the first one on."""
    stream = rag.stream("honey", max_new_tokens=20)
    assert ([], ()) == (memories, stream.answer.sources)

    pieces = [next(stream)]
    assert (1, 3) == (len(memories), len(stream.answer.sources))
    assert 0 < stream.answer.timings.ttft_s
    pieces += stream

    assert len(pieces) > 1
    assert "".join(pieces).strip() == stream.answer.text == rag.query("honey", max_new_tokens=20).text


def test_closed_stream_computes_nothing(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """After close no token is computed, and the answer is what there was."""
    stream = rag.stream("honey", max_new_tokens=20)
    piece = next(stream)
    stream.close()
    monkeypatch.setattr(rag.model, "read", None)

    assert [] == list(stream)
    assert piece.strip() == stream.answer.text
    assert stream.answer.usage.answer_tokens < 20


def test_threads_do_not_disturb_each_other(rag: GistRAG) -> None:
    """Questions asked at once get the answers they get alone."""
    questions = ["honey", "silver coins", "the river", "tea by ship", "pepper", "winter"] * 2

    def ask(question: str) -> tuple[str, tuple[Source, ...], Usage]:
        answer = rag.query(question, max_new_tokens=6)
        return answer.text, answer.sources, answer.usage

    alone = [ask(question) for question in questions]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(ask, questions))

    assert alone == together


def test_same_seed_same_answer(rag: GistRAG) -> None:
    """A draw repeats with its seed and differs with another; without temperature the seed means nothing."""

    def ask(temperature: float, seed: int) -> str:
        return rag.query("honey", max_new_tokens=24, temperature=temperature, seed=seed).text

    assert ask(2.0, 1) == ask(2.0, 1) != ask(2.0, 2)
    assert ask(0.0, 1) == ask(0.0, 2)


def test_memory_that_runs_out_is_tried_with_fewer_chunks(
    rag: GistRAG, memories: list[tuple[list[GistCache], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When memory does not suffice the lower-ranked half of the chunks is left out, and counted."""
    whole = rag.query("honey", top_k=3, max_new_tokens=4)
    run_out(monkeypatch, times=1)

    answer = rag.query("honey", top_k=3, max_new_tokens=4)

    assert (whole.sources[:2], 1) == (answer.sources, answer.usage.dropped_chunks)
    assert [3, 3, 2] == [len(caches) for caches, _ in memories]
    assert rag.query("honey", top_k=2, max_new_tokens=4).text == answer.text


def run_out(monkeypatch: pytest.MonkeyPatch, *, times: int, after: int = 0) -> None:
    """Let the next generations run out of memory after so many tokens."""
    real, left = judge.generate_steps, iter(range(times))

    def hungry(*given: Any, **options: Any) -> Iterator[int]:
        tokens = real(*given, **options)
        if next(left, None) is not None:
            yield from islice(tokens, after)
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        yield from tokens

    monkeypatch.setattr(judge, "generate_steps", hungry)


@pytest.mark.parametrize("top_k", [1, 3])
def test_memory_that_does_not_suffice(rag: GistRAG, monkeypatch: pytest.MonkeyPatch, top_k: int) -> None:
    """When fewer chunks do not help either, the error says on what and how many."""
    run_out(monkeypatch, times=2)

    with pytest.raises(
        ResourceError, match=r"not enough memory on cpu to answer from [12] chunks .*9 GiB.*fewer chunks"
    ):
        rag.query("honey", top_k=top_k)


def test_memory_that_runs_out_later(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that has begun is not begun again: what was said stands."""
    run_out(monkeypatch, times=1, after=12)
    stream = rag.stream("honey", max_new_tokens=20)
    said = next(stream)

    with pytest.raises(ResourceError, match="answer from 3 chunks"):
        said += "".join(stream)

    assert stream.answer.text.startswith(said.strip())
    assert 0 == stream.answer.usage.dropped_chunks


def test_reranker_decides_the_order(rag: GistRAG) -> None:
    """With a reranker the chunks come in its order, with its scores."""

    class Longest:
        def rank(self, question: str, texts: Sequence[str]) -> list[float]:
            return [float(len(text)) for text in texts]

    engine = Engine(rag.engine.model, HashEmbedder(), Longest())  # type: ignore[arg-type]

    with GistRAG.open(rag.folder, engine=engine) as other:
        scores = [source.score for source in other.query("honey", top_k=9, max_new_tokens=1).sources]

    assert 5 == len(scores)
    assert sorted(scores, reverse=True) == scores


def test_answer_shows_itself() -> None:
    """An answer prints as its text, and shows its sources in a console and in a notebook."""
    answer = Answer("Honey.", (SOURCE, replace(SOURCE, page=7)), Timings(ttft_s=0.25))

    assert "Honey." == str(answer)
    assert "Answer('Honey.', sources=[a.md, One > Two, a.md, page 7], ttft_s=0.250)" == repr(answer)
    assert "Honey.\n\n1. a.md, One > Two\n2. a.md, page 7" == answer._repr_markdown_()
    assert "Honey." == Answer("Honey.")._repr_markdown_()


@pytest.mark.parametrize(
    ("changes", "place"),
    [({}, "a.md, One > Two"), ({"page": 3}, "a.md, page 3"), ({"heading": ()}, "a.md")],
)
def test_source_says_where_to_look(changes: dict[str, Any], place: str) -> None:
    """A source is named by its path with its page, or else its headings."""
    assert place == replace(SOURCE, **changes).place


def test_options_are_checked_alone() -> None:
    """Options are a value of their own, with defaults that hold."""
    assert (3, "gist", 0.0) == (Options().top_k, Options().mode, Options().temperature)


# In an event loop


def test_an_answer_in_the_making_is_a_snapshot(rag: GistRAG) -> None:
    """An answer that was kept from the middle stays as it was while the stream goes on."""
    stream = rag.stream("honey", max_new_tokens=8)
    next(stream)
    early = stream.answer
    text, tokens, total_s = early.text, early.usage.answer_tokens, early.timings.total_s

    whole = stream.result()

    assert (early.text, early.usage.answer_tokens, early.timings.total_s) == (text, tokens, total_s)
    assert whole.usage.answer_tokens > tokens
    assert whole.text.startswith(text)


@pytest.mark.parametrize("question", [5, None, ["honey"]])
def test_a_question_must_be_a_text(rag: GistRAG, question: Any) -> None:
    """What is no text is refused by an error of this library."""
    with pytest.raises(UsageError, match="expected a question in words, got"):
        rag.query(question)


def test_pieces_for_a_coroutine(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coroutine gets the same pieces, and not one is computed in the thread of its event loop."""
    threads: set[threading.Thread] = set()
    real = rag.model.read_behind

    def spy(*given: Any) -> Any:
        threads.add(threading.current_thread())
        return real(*given)

    monkeypatch.setattr(rag.model, "read_behind", spy)

    async def ask() -> list[str]:
        return [piece async for piece in rag.stream("honey", max_new_tokens=12)]

    pieces = asyncio.run(ask())

    assert threads
    assert threading.main_thread() not in threads
    assert list(rag.stream("honey", max_new_tokens=12)) == pieces


def test_coroutine_that_leaves_ends_the_work(rag: GistRAG) -> None:
    """When a coroutine is cancelled or reads no further, the stream is closed after the piece that is being made."""
    stream, other = (rag.stream("honey", max_new_tokens=40) for _ in range(2))

    async def ask() -> None:
        pieces = aiter(stream)
        await anext(pieces)
        await pieces.aclose()
        task = asyncio.create_task(anext(aiter(other)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())

    assert [[], []] == [list(stream), list(other)]
    assert stream.answer.usage.answer_tokens < 40


# From texts that somebody else found


@pytest.fixture
def given(rag: GistRAG) -> GivenTexts:
    """Answers from given texts, with nothing kept yet."""
    return GivenTexts(rag.store, rag.runtime, lambda: rag.model, judge=rag.engine.judge)


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The passages that are compressed from here on."""
    made: list[list[int]] = []
    real = making_gists.compress

    def spy(model: Any, chunks: Sequence[list[int]], settings: GistSettings) -> list[GistCache]:
        made.extend(chunks)
        return real(model, chunks, settings)

    monkeypatch.setattr(making_gists, "compress", spy)
    return made


def finish(stream: Stream) -> Answer:
    """Return the answer of a stream, read to its end."""
    for _ in stream:
        pass
    return stream.answer


def test_texts_of_the_index_are_answered_from_its_gists(
    rag: GistRAG, given: GivenTexts, memories: list[tuple[list[GistCache], str]], compressed: list[list[int]]
) -> None:
    """A text that equals a chunk with its headings is that chunk: same gists, same order, same answer."""
    hits = rag.retrieve("honey", top_k=3)
    texts = ["\n".join((" > ".join(hit.chunk.heading), hit.chunk.text)).strip() for hit in hits]

    answer = finish(given.stream("honey", texts, Options(max_new_tokens=12)))

    assert_caches(rag, [hit.chunk.gist_key for hit in reversed(hits)], memories[-1][0])
    expected = rag.query("honey", top_k=3, max_new_tokens=12)
    assert (expected.text, expected.usage) == (answer.text, answer.usage)
    assert [] == compressed


def test_other_texts_are_compressed_once(rag: GistRAG, given: GivenTexts, compressed: list[list[int]]) -> None:
    """Gists of a text from elsewhere are made at the first question, with the settings of the index, and kept."""
    first, second = (
        finish(given.stream(question, [BREAD, TEA], Options(max_new_tokens=2))) for question in ("bread", "tea")
    )

    assert [rag.model.encode_passage(BREAD)] == compressed
    assert [1, 0] == [answer.usage.gists_made for answer in (first, second)]
    usage = Usage()
    gists = given._gists(rag.model.encode_passage(BREAD), usage)
    assert gists
    assert (gist_count(len(compressed[0]), rag.store.settings.tokens_per_gist), 0) == (gists.gists, usage.gists_made)
    assert ["", ""] == [source.path for source in first.sources]
    assert [BREAD, TEA] == [source.snippet for source in first.sources]


def test_texts_used_last_are_kept(
    given: GivenTexts, compressed: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is full, the gists that were not used for longest are made again."""
    texts = [f"{BREAD} {number}" for number in range(3)]
    encoded = [given._runtime.encode_passage(text) for text in texts]
    gists = given._gists(encoded[0], Usage())
    assert isinstance(gists, PackedGists)
    monkeypatch.setattr(given_texts, "KEPT_BYTES", int(2.5 * gists.nbytes))

    for number in (1, 0, 2, 0, 1):
        given._gists(encoded[number], Usage())

    assert [encoded[number] for number in (0, 1, 2, 1)] == compressed


@pytest.mark.parametrize(("text", "as_text"), [("x" * 700, [True, False]), (" ", [False])])
def test_texts_that_cannot_be_compressed(
    given: GivenTexts, compressed: list[list[int]], text: str, as_text: list[bool]
) -> None:
    """A text that would not fit the window twice is read as text; one that says nothing is left out."""
    answer = finish(given.stream("honey", [text, TEA], Options(max_new_tokens=2)))

    assert as_text == [source.as_text for source in answer.sources]
    assert [] == compressed


def test_gists_that_are_not_finite(given: GivenTexts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gists that would poison an answer are not used."""
    nan = GistCache(torch.full((3, 2, 2, 4, 8), torch.nan, dtype=torch.float64), torch.arange(4), 9)
    monkeypatch.setattr(making_gists, "compress", lambda *_, **__: [nan])

    assert finish(given.stream("honey", [BREAD], Options(max_new_tokens=2))).sources[0].as_text


def test_given_texts_in_text_mode(given: GivenTexts, compressed: list[list[int]]) -> None:
    """Modes hold for given texts too: the best one, or all, are read as text."""
    modes = {
        mode: finish(given.stream("honey", [BREAD, TEA], Options(mode=mode, max_new_tokens=2)))
        for mode in ("text", "hybrid")
    }

    assert [[True, True], [True, False]] == [[one.as_text for one in answer.sources] for answer in modes.values()]
    assert [] == compressed


def test_no_texts(given: GivenTexts) -> None:
    """Where no text is given the answer says so."""
    assert (phrase("no texts", "en"), ()) == (
        finish(given.stream("honey", [" "], Options())).text,
        given.stream("honey", [], Options()).answer.sources,
    )


def test_given_texts_cannot_be_chosen_from(given: GivenTexts) -> None:
    """What chooses among the chunks of the index is refused, as is what is refused elsewhere."""
    with pytest.raises(UsageError, match="scope and filters choose among the chunks of the index, but the texts"):
        given.stream("honey", [TEA], Options(scope="book.md"))
    with pytest.raises(UsageError, match="the question is empty"):
        given.stream(" ", [TEA], Options())
