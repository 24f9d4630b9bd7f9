"""The passages of an answer: which chunks of an index, and whether each enters as gists or as text."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from gistrag.answering.answer import Options, Source, Usage
from gistrag.answering.assemble import Content, fitting_layout, span
from gistrag.errors import ContextOverflowError
from gistrag.index.retriever import Hit, Retriever
from gistrag.index.schema import StoredChunk
from gistrag.index.store import Store
from gistrag.kv.packed import PackedGists
from gistrag.model.runtime import AnyRuntime

logger = logging.getLogger("gistrag")

SNIPPET_CHARACTERS = 240


@dataclass(frozen=True)
class Passage:
    """A chunk as it enters a memory: its gist cache, or the token ids of its text.

    Attributes:
        text: of the chunk, without its heading path; ordinal: number of the chunk in its document.
        cosine: of the question and the chunk, None where nobody measured it.
    """

    source: Source
    content: Content
    text: str
    ordinal: int = 0
    cosine: float | None = None


def search(store: Store, retriever: Retriever, question: str, options: Options, usage: Usage) -> list[Hit]:
    """Return the best chunks, or all chunks of ``options.scope``, the best of them first."""
    scope, filters = options.scope, options.filters
    if scope is None:
        hits = retriever.search(question, top_k=options.top_k, filters=filters)
        usage.missing_chunks = options.top_k - len(hits)
        return hits
    whole = store.chunks(sorted(store.select(filters, scope) or ()))
    hits = retriever.search(question, top_k=max(1, len(whole)), scope=scope, filters=filters)
    found = {hit.chunk.id for hit in hits}  # a chunk that an unfinished rebuild hides from search counts too
    return [*hits, *(Hit(chunk, 0.0, None, None) for chunk in whole if chunk.id not in found)]


def select(hits: Sequence[Hit], store: Store, runtime: AnyRuntime, options: Options, usage: Usage) -> list[Passage]:
    """Return the hits as passages: gists where the mode wants them and the index has them, text elsewhere."""
    bytes_before = store.gists.bytes_read
    as_gists = hits if options.mode == "gist" else hits[1:] if options.mode == "hybrid" else ()
    loaded = load_gists([hit.chunk for hit in as_gists], store, usage)
    passages = []
    for hit in hits:
        gists = loaded.get(hit.chunk.id)
        content: Content = gists or runtime.encode_passage(hit.chunk.text, hit.chunk.heading)
        source = source_of(hit, as_text=gists is None)
        passages.append(Passage(source, content, hit.chunk.text, hit.chunk.ordinal, hit.dense))
    usage.bytes_read = store.gists.bytes_read - bytes_before
    return passages


def load_gists(chunks: Sequence[StoredChunk], store: Store, usage: Usage) -> dict[int, PackedGists]:
    """Return the gists of chunks by their ids; one without is counted, and logged if its file is damaged or missing."""
    keys = {chunk.id: chunk.gist_key for chunk in chunks if chunk.gist_key is not None}
    found: dict[int, PackedGists] = {}
    for (chunk_id, key), loaded in zip(keys.items(), store.gists.load_all(list(keys.values())), strict=True):
        if isinstance(loaded, PackedGists):
            found[chunk_id] = loaded
        elif store.gists.is_pending(key):
            usage.text_pending += 1
        else:
            usage.text_fallbacks += 1
            logger.warning("answered from text: %s", loaded)
    return found


def source_of(hit: Hit, *, as_text: bool) -> Source:
    """Return a hit as the source of an answer."""
    chunk = hit.chunk
    return Source(
        path=chunk.path,
        page=chunk.page,
        heading=chunk.heading,
        start=chunk.start,
        end=chunk.end,
        score=hit.score,
        snippet=snippet(chunk.text),
        chunk_id=chunk.id,
        as_text=as_text,
        metadata=chunk.metadata,
    )


def snippet(text: str) -> str:
    """Return how a text begins, in one line of at most `SNIPPET_CHARACTERS`."""
    return " ".join(text.split())[:SNIPPET_CHARACTERS]


def fit(
    passages: list[Passage], runtime: AnyRuntime, *, question_tokens: int, max_new_tokens: int, usage: Usage
) -> list[Passage]:
    """Return the passages that fit the context window; the lowest-ranked are left out first.

    Raises:
        ContextOverflowError: not even the question and the best passage fit.
    """
    fixed = runtime.prefix_slots + question_tokens + max_new_tokens
    least = fixed + (span(passages[0].content, "packed") if passages else 0)
    if least > runtime.window:
        raise ContextOverflowError(
            f"the prompt with question, best passage and {max_new_tokens} tokens reserved for the answer takes {least} "
            f"positions, the model's context window has {runtime.window}; ask a shorter question, or for a shorter "
            "answer"
        )
    room = runtime.window - fixed
    usage.layout = fitting_layout([passage.content for passage in passages], runtime.reach - fixed)
    ends = accumulate(span(passage.content, usage.layout) for passage in passages)
    fitting = [passage for passage, end in zip(passages, ends, strict=True) if end <= room]
    usage.dropped_chunks = len(passages) - len(fitting)
    return fitting


def in_prompt_order(passages: Sequence[Passage], *, is_whole_document: bool) -> list[Passage]:
    """Return the passages as they stand in the prompt: a document in its own order, else the best one last."""
    if is_whole_document:
        return sorted(passages, key=lambda passage: passage.ordinal)
    return list(passages[::-1])
