"""The contexts of a question file as a corpus: cut into chunks, embedded and searched as an index is.

The code that builds and serves an index does all of it, so retrieval in an evaluation is retrieval in the product.
Nothing here runs a language model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from gistrag.documents.chunking import Chunk, Chunker
from gistrag.documents.discovery import Document
from gistrag.index.retriever import QuestionEmbedder, Retriever
from gistrag.index.schema import StoredChunk
from gistrag.index.store import IndexedChunk, Store
from gistrag.qa.dataset import Context
from gistrag.qa.metrics import contains
from gistrag.settings import IndexSettings

logger = logging.getLogger("gistrag")

CANDIDATES = 12
"""Chunks retrieved for every question. Those of every top_k, and those without the answer, are taken from them."""


@dataclass(frozen=True)
class Passage:
    """A chunk as it goes into a prompt, as text or as gists; *tokens* counts those of its text."""

    text: str
    heading: tuple[str, ...] = ()
    tokens: int = 0


class Embedder(QuestionEmbedder, Protocol):
    """What a corpus needs of an embedder; see `gistrag.index.embedder`."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a vector depends on."""

    def embed_documents(self, texts: Sequence[str], /) -> list[npt.NDArray[np.float32]]:
        """Return the vectors of the windows of each text, ``(windows, dim)``."""


class Corpus:
    """Contexts cut into chunks and indexed, one document per article; a store that already holds them is reused.

    Attributes:
        contexts: as given.
        chunks: passages by chunk id.
        of_context: chunk ids of each context, in order.
        of_article: chunk ids of each article, in order.
    """

    def __init__(self, store: Store, embedder: Embedder, contexts: Sequence[Context], chunker: Chunker) -> None:
        self.contexts = contexts
        self.chunks: dict[int, Passage] = {}
        self.of_context: list[list[int]] = [[] for _ in contexts]
        self.of_article: dict[str, list[int]] = {}
        self._store, self._embedder, self._chunker = store, embedder, chunker
        articles: dict[str, list[int]] = {}
        for number, context in enumerate(contexts):
            articles.setdefault(context.article, []).append(number)
        indexed_paths = {row.path for row in store.documents()}
        for place, (article, numbers) in enumerate(articles.items()):
            cut = [(number, chunk) for number in numbers for chunk in self._cut(contexts[number])]
            if f"{place}" not in indexed_paths:
                self._index(f"{place}", [chunk for _, chunk in cut])
                logger.debug("indexed %s, article %d of %d", article or "contexts", place + 1, len(articles))
            self._record(article, [number for number, _ in cut], store.chunks_of(f"{place}"))
        self._retriever = Retriever(store, embedder)

    def _index(self, path: str, chunks: Sequence[Chunk]) -> None:
        """Index the chunks of an article as one document."""
        vectors = self._embedder.embed_documents([chunk.search_text for chunk in chunks])
        entries, start = [], 0
        for (ordinal, chunk), windows in zip(enumerate(chunks), vectors, strict=True):
            placed = replace(chunk, ordinal=ordinal, start=start, end=start + len(chunk.text))
            entries.append(IndexedChunk(chunk=placed, gist_key=None, vectors=windows))
            start = placed.end + 2
        self._store.replace_document(_document(path, "\n\n".join(chunk.text for chunk in chunks)), entries)
        self._store.commit()

    def _record(self, article: str, numbers: Sequence[int], rows: Sequence[StoredChunk]) -> None:
        """Record the chunks of an article, each under the number of its context."""
        self.of_article[article] = [row.id for row in rows]
        for number, row in zip(numbers, rows, strict=True):
            self.chunks[row.id] = Passage(row.text, row.heading, row.tokens)
            self.of_context[number].append(row.id)

    def _cut(self, context: Context) -> list[Chunk]:
        chunks = self._chunker.split(_document("", context.text))
        return [replace(chunk, heading=context.heading) for chunk in chunks]

    @property
    def counts(self) -> dict[str, int]:
        """Articles, chunks and tokens of the corpus."""
        tokens = sum(passage.tokens for passage in self.chunks.values())
        return {"articles": len(self.of_article), "chunks": len(self.chunks), "tokens": tokens}

    def search(self, question: str, *, top_k: int = CANDIDATES) -> list[int]:
        """Return the ids of the *top_k* best chunks, best first."""
        return [hit.chunk.id for hit in self._retriever.search(question, top_k=top_k)]

    def gold(self, number: int, answers: Sequence[str]) -> list[int]:
        """Return the ids of the chunks of a context that contain an answer; all its chunks where none does."""
        ids = self.of_context[number]
        return [chunk for chunk in ids if contains(self.chunks[chunk].text, answers)] or ids

    def document(self, chunk: int, tokens: int) -> tuple[Passage, ...]:
        """Return the article of a chunk; of a longer article, the section of about *tokens* around the chunk.

        All chunks of an article share the same sections, so a section is read once for many questions.
        """
        section: list[int] = []
        for other in next(ids for ids in self.of_article.values() if chunk in ids):
            if sum(self.chunks[one].tokens for one in section) >= tokens:
                if chunk in section:
                    break
                section = []
            section.append(other)
        return tuple(self.chunks[one] for one in section)

    def passages(self, text: str, heading: tuple[str, ...] = ()) -> tuple[Passage, ...]:
        """Return the chunks of a text that is not in the corpus."""
        return tuple(
            Passage(chunk.text, heading, chunk.tokens) for chunk in self._cut(Context(text, "", heading=heading))
        )


def _document(path: str, text: str) -> Document:
    return Document(path=path, sha256="", size=len(text), mtime_ns=0, kind="text", text=text)


@contextmanager
def indexed(
    folder: Path, contexts: Sequence[Context], embedder: Embedder, *, tokenizer: Tokenizer, chunk_tokens: int
) -> Iterator[Corpus]:
    """Hold the contexts indexed in a folder, and reuse the index that is already there.

    Args:
        folder: holds nothing else; the caller makes sure that an index in it was made from the same contexts.
        tokenizer: of the model that answers.
        chunk_tokens: most tokens of a chunk.

    Raises:
        IndexLockedError: another evaluation holds the folder.
    """
    settings = IndexSettings(chunk_tokens=chunk_tokens)
    with Store.build(folder, command="gistrag evaluate") as store:
        store.configure(settings, source=".", gist_fingerprint={}, embedder_fingerprint=embedder.fingerprint)
        yield Corpus(store, embedder, contexts, Chunker(tokenizer, chunk_tokens=chunk_tokens))
