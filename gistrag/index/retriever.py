"""Hybrid search: the chunks that answer a question, by vectors and by keywords.

Reciprocal rank fusion (Cormack et al. 2009) merges the two lists: a chunk scores ``1 / (60 + rank)`` in each list it is
in. Ranks need no common scale, which cosine and BM25 do not have. Where pairs of letters are looked for, many chunks
hold some by chance; then first ranks count for more, and vectors of an embedder that knows the letters count twice.

`VectorSearch` keeps the vectors of a store in memory: the faiss file as far as it goes, newer rows beside it.
Nothing here loads a gist or answers anything.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gistrag.documents.text import nfc
from gistrag.index.doubt import differences
from gistrag.index.schema import StoredChunk
from gistrag.index.store import Store
from gistrag.index.vector_index import VectorIndex
from gistrag.index.vector_store import VectorFile
from gistrag.qa.stop_words import STOP_WORDS
from gistrag.settings import TOP_K_MAX, require_between, require_question

logger = logging.getLogger("gistrag")

RANK_OFFSET = 60
PAIRS_OFFSET = 5
"""In its place where pairs of letters were looked for, see `gistrag.index.pairs`."""
PAIRS_WEIGHT = 0.5
"""How much the list of keywords counts then, beside vectors of an embedder that knows these letters."""
HASHED_BYTES_MAX = 2**28
"""A larger index.db is not hashed before its first search, which would take more than about 0.3 s."""
DEPTH_MIN = 50
"""Length of each list at least: a chunk that is 20th in both beats one that is first in one and absent in the other."""


class QuestionEmbedder(Protocol):
    """What a retriever needs of an embedder."""

    @property
    def is_multilingual(self) -> bool:
        """Whether it is known to read Chinese, Japanese and Korean."""

    def embed_query(self, question: str, /) -> npt.NDArray[np.float32]:
        """Return the vector of a question, ``(dim,)``, normalized."""

    def comparable(self, cosine: float, /) -> float:
        """Return a cosine on the scale of the default embedder."""


class TextScorer(Protocol):
    """What a retriever needs of a reranker: slower than vectors, and a better judge of few chunks."""

    def rank(self, question: str, texts: Sequence[str], /) -> Sequence[float]:
        """Return how well each text answers *question*, higher is better."""


@dataclass(frozen=True)
class Hit:
    """A chunk that may answer.

    Attributes:
        score: fused, or the reranker's; higher is better.
        dense: cosine of the question and the chunk's best part, None where the list by meaning did not reach it.
        keyword: BM25, None where no word of the question is in it.
    """

    chunk: StoredChunk
    score: float
    dense: float | None
    keyword: float | None

    @property
    def metadata(self) -> Mapping[str, str]:
        """What is known of the document, or of the part of it that the chunk is in."""
        return self.chunk.metadata


@dataclass(frozen=True)
class Fit:
    """How well the best chunks fit a question: the highest cosine, and the highest BM25; 0 where there are none.

    The cosine is on the scale of the default embedder.
    """

    dense: float
    keyword: float


class Retriever:
    """Finds the chunks of a store that may answer a question."""

    def __init__(self, store: Store, embedder: QuestionEmbedder, *, reranker: TextScorer | None = None) -> None:
        self._store = store
        self._embedder = embedder
        self._reranker = reranker
        self._vectors = VectorSearch(store)

    def search(
        self,
        question: str,
        *,
        top_k: int,
        filters: Mapping[str, str] | None = None,
        scope: str | None = None,
        vector: npt.NDArray[np.float32] | None = None,
    ) -> list[Hit]:
        """Return the *top_k* best chunks, best first, equal scores by id; fewer where there are fewer.

        Args:
            question: in words.
            top_k: how many chunks.
            filters: see `Store.select`.
            scope: path of the one document to look in.
            vector: ``(dim,)`` embedding to search by in place of the question's own.

        Raises:
            UsageError: no question that `require_question` takes, *top_k* below 1, an unknown filter or document.
        """
        question = require_question(question)
        require_between("top_k", top_k, 1, TOP_K_MAX)
        if vector is None:
            vector = self._embedder.embed_query(question)
        depth = max(4 * top_k, DEPTH_MIN)
        with self._store.snapshot():
            allowed = self._store.select(filters, scope)
            dense = dict(self._vectors.nearest(vector, depth, allowed=allowed))
            keyword = dict(self._store.keyword_search(keywords(question), depth, allowed=allowed))
            scores = self._fused(question, list(dense), list(keyword))
            chunks = self._store.chunks(scores)
        hits = [Hit(chunk, scores[chunk.id], dense.get(chunk.id), keyword.get(chunk.id)) for chunk in chunks]
        return self._rerank(question, hits[:depth])[:top_k]

    def _fused(self, question: str, dense: Sequence[int], keyword: Sequence[int]) -> dict[int, float]:
        if not self._store.pairs.serve(keywords(question)):
            return fuse(dense, keyword)
        weight = PAIRS_WEIGHT if self._embedder.is_multilingual else 1.0
        return fuse(dense, keyword, weights=(1.0, weight), offset=PAIRS_OFFSET)

    def fit(self, question: str, *, filters: Mapping[str, str] | None = None, scope: str | None = None) -> Fit:
        """Return how well the best chunks fit *question*; no chunk is read and nothing is sorted again."""
        vector = self._embedder.embed_query(question)
        with self._store.snapshot():
            allowed = self._store.select(filters, scope)
            dense = self._vectors.nearest(vector, 1, allowed=allowed)
            keyword = self._store.keyword_search(keywords(question), 1, allowed=allowed)
        return Fit(self._embedder.comparable(dense[0][1]) if dense else 0.0, keyword[0][1] if keyword else 0.0)

    def nearest_summary(self, question: str) -> tuple[int, float] | None:
        """Return the id of the summary that is nearest to *question*, and its cosine on the scale of `Fit`.

        None where none is stored.
        """
        found = self._store.summaries.nearest(self._embedder.embed_query(question), 1)
        return (found[0][0], self._embedder.comparable(found[0][1])) if found else None

    def _rerank(self, question: str, hits: list[Hit]) -> list[Hit]:
        if self._reranker is None or not hits:
            return hits
        scores = self._reranker.rank(question, [hit.chunk.text for hit in hits])
        ranked = [Hit(hit.chunk, float(score), hit.dense, hit.keyword) for hit, score in zip(hits, scores, strict=True)]
        return sorted(ranked, key=lambda hit: (-hit.score, hit.chunk.id))


class VectorSearch:
    """The vectors of a store, searchable, and as new as its last commit."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._record: VectorFile | None = None
        self._main: VectorIndex | None = None
        self._main_last = self._last = self._opening = 0
        self._tail: VectorIndex | None = None

    def nearest(
        self, vector: npt.NDArray[np.float32], k: int, *, allowed: Collection[int] | None = None
    ) -> list[tuple[int, float]]:
        """Return up to *k* chunk ids that are in the store now, with their cosine, best first, equal ones by id."""
        with self._store.snapshot():
            self._refresh()
            reach = k
            while True:
                found = self._search(vector, reach, allowed)
                present = self._store.present(chunk_id for chunk_id, _ in found)
                alive = [pair for pair in found if pair[0] in present]
                if len(alive) >= k or len(found) < reach:
                    return alive[:k]
                reach *= 2  # removed chunks took the places

    def _search(
        self, vector: npt.NDArray[np.float32], k: int, allowed: Collection[int] | None
    ) -> list[tuple[int, float]]:
        best: dict[int, float] = {}
        for index in (self._main, self._tail):
            for chunk_id, score in index.search(vector, k, allowed=allowed) if index else ():
                best[chunk_id] = max(score, best.get(chunk_id, score))
        return sorted(best.items(), key=lambda pair: (-pair[1], pair[0]))[:k]

    def _refresh(self) -> None:
        record, last = self._store.vectors.file(), self._store.vectors.last_id()
        if self._opening != self._store.database.openings:
            self._warn_of_damage()
        if self._opening != self._store.database.openings or record != self._record:
            self._load(record)
            self._opening = self._store.database.openings
        if last > self._last:
            rows = self._store.vectors.rows(after=self._main_last)
            self._tail, self._last = VectorIndex.build(rows.chunk_ids, rows.vectors), rows.last_id

    def _warn_of_damage(self) -> None:
        database = self._store.database
        if database.size_bytes <= HASHED_BYTES_MAX and (found := differences(database)):
            logger.warning("%s; other passages than the best may be found until gistrag build has run", found[0])

    def _load(self, record: VectorFile | None) -> None:
        data = self._store.vectors.read_file(record) if record else None
        if record and data is not None:
            self._main, self._main_last = VectorIndex.from_bytes(data), record.last_id
        else:
            rows = self._store.vectors.rows()
            self._main, self._main_last = VectorIndex.build(rows.chunk_ids, rows.vectors), rows.last_id
        self._record, self._tail, self._last = record, None, self._main_last


def write_vector_file(store: Store) -> None:
    """Commit, and write the vectors of a builder's store as one faiss file, unless it is there, sound and current."""
    store.commit()
    record, rows = store.vectors.file(), store.vectors.rows()
    is_current = record and (record.last_id, record.count) == (rows.last_id, len(rows.chunk_ids))
    if record and is_current and store.vectors.read_file(record) is not None:
        return
    store.vectors.put_file(VectorIndex.build(rows.chunk_ids, rows.vectors).to_bytes(), rows)
    store.commit()


def fuse(
    *rankings: Sequence[int], weights: Sequence[float] | None = None, offset: int = RANK_OFFSET
) -> dict[int, float]:
    """Return the fused score of every id, best first, equal scores by id; *weights* are of the rankings.

    >>> fuse([5, 3], [3])
    {3: 0.03252247488101534, 5: 0.01639344262295082}
    """
    scores: dict[int, float] = {}
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        for rank, chunk_id in enumerate(ranking, 1):
            scores[chunk_id] = scores.get(chunk_id, 0.0) + weight / (offset + rank)
    return dict(sorted(scores.items(), key=lambda pair: (-pair[1], pair[0])))


def keywords(question: str) -> list[str]:
    """Return the words of *question* that are worth looking for, each once; all of them if none is.

    Any of them may match: with AND one word the document says differently loses the chunk, and BM25 puts those that
    hold more and rarer words first.

    >>> keywords("How long is the gist of a gist?")
    ['long', 'gist']
    """
    words = list(dict.fromkeys(re.findall(r"\w+", nfc(question).lower())))
    return [word for word in words if word not in STOP_WORDS] or words
