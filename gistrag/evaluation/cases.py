"""What an evaluation asks: contexts as a corpus, questions, and the passages each is to be answered from.

A `Case` is settled before any model answers, so all arms get the same passages in the same order. Cases come in parts::

    questions      sampled over articles, with the best chunks of the main top k, best one last as in the product
    top 1, top 5   the same questions with fewer or more chunks;   oracle   with the one chunk that holds the answer
    order 1 …      the same chunks in other orders
    refusal        the same questions, every passage with an answer taken away
    probe …        facts planted in contexts of the corpus, found by retrieval
    passkey        an identifier planted at a depth of a long filler, all of which is given
    whole          questions about a whole document (kind ``whole``), all of which is given

Chunks are cut, embedded and searched by the code that serves an index. Long-form tasks (kind ``long``) are not asked:
their answers are a model's own words. Nothing here runs a language model.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from gistrag.documents.chunking import Chunk, Chunker
from gistrag.documents.discovery import Document
from gistrag.errors import UsageError
from gistrag.index.retriever import Retriever
from gistrag.index.schema import StoredChunk
from gistrag.index.store import IndexedChunk, Store
from gistrag.model.prompt import REFUSAL
from gistrag.qa.dataset import Context, Task
from gistrag.qa.metrics import contains, is_refusal
from gistrag.qa.planted_facts import FACTS, is_planted, plant
from gistrag.settings import IndexSettings

logger = logging.getLogger("gistrag")

LONG, WHOLE = "long", "whole"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ORDERS = 3
REACH = 12
"""Chunks retrieved for every question, from which those of each top k and those without the answer are taken."""
LONGER = 4
"""An answer about a whole document may be this many times longer."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of what is asked; the same plan and file give the same cases.

    Attributes:
        questions: sampled over articles; seed: of everything drawn.
        top_k: chunks to answer from; the first is the main one, the others are asked beside it.
        oracle: ask with the one right chunk too.
        probes: planted facts, of all kinds in turn; unanswerable: questions asked without their passage.
        passkey: fillers of each length, each asked at all of `DEPTHS`; lengths: of fillers, in tokens.
        orders: questions asked again in `ORDERS` other orders; whole: questions about whole documents.
        max_new_tokens: where an answer is cut.

    Raises:
        UsageError: a value out of range.
    """

    questions: int = 500
    seed: int = 0
    top_k: tuple[int, ...] = (3, 1, 5)
    oracle: bool = True
    probes: int = 100
    unanswerable: int = 100
    passkey: int = 2
    lengths: tuple[int, ...] = (1000, 2000, 4000)
    orders: int = 50
    whole: int = 50
    max_new_tokens: int = 24

    def __post_init__(self) -> None:
        for name in ("questions", "max_new_tokens"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("probes", "unanswerable", "passkey", "orders", "whole"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        _require(bool(self.top_k), "top-k", "one number or several", self.top_k)
        _require(min(self.top_k) >= 1, "top-k", "at least 1", min(self.top_k))
        _require(max(self.top_k) <= REACH, "top-k", f"at most {REACH}", max(self.top_k))
        _require(min(self.lengths, default=1) >= 1, "lengths", "at least 1", self.lengths)


def _require(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise UsageError(f"--{name.replace('_', '-')} must be {expected}, got {found}")


@dataclass(frozen=True)
class Passage:
    """A chunk as it goes into a prompt, whichever way; tokens are those of its text."""

    text: str
    heading: tuple[str, ...] = ()
    tokens: int = 0


@dataclass(frozen=True)
class Case:
    """A question and what it is answered from.

    Attributes:
        part, name: which case it is; a name is that of one question in every part.
        question, answers: as in the file; answers that are the refusal mean that there is none.
        passages: in prompt order.
        document: the consecutive part of the article that holds the answer, for the arm that reads all of it.
        about: what its row says besides.
    """

    part: str
    name: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    max_new_tokens: int
    document: tuple[Passage, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)


class Embedder(Protocol):
    """What a corpus needs of an embedder; see `gistrag.index.embedder`."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a vector depends on."""

    def embed_query(self, question: str, /) -> npt.NDArray[np.float32]:
        """Return the vector of a question, ``(dim,)``, normalized."""

    def embed_documents(self, texts: Sequence[str], /) -> list[npt.NDArray[np.float32]]:
        """Return for each text the vectors of its windows, ``(windows, dim)``."""


class Corpus:
    """Contexts cut into chunks and indexed, an article as one document; a store that has them is read.

    Attributes:
        contexts: as given; chunks: passages by chunk id.
        of_context: chunk ids of each context, in order; of_article: those of each article.
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
        known = {row.path for row in store.documents()}
        for place, (article, numbers) in enumerate(articles.items()):
            cut = [(number, chunk) for number in numbers for chunk in self._cut(contexts[number])]
            if f"{place}" not in known:
                self._put(f"{place}", [chunk for _, chunk in cut])
                logger.info("indexed %s, article %d of %d", article or "contexts", place + 1, len(articles))
            self._take(article, [number for number, _ in cut], store.chunks_of(f"{place}"))
        self._retriever = Retriever(store, embedder)

    def _put(self, path: str, chunks: Sequence[Chunk]) -> None:
        """Index the chunks of an article as one document."""
        vectors = self._embedder.embed_documents([chunk.search_text for chunk in chunks])
        entries, start = [], 0
        for (ordinal, chunk), parts in zip(enumerate(chunks), vectors, strict=True):
            placed = replace(chunk, ordinal=ordinal, start=start, end=start + len(chunk.text))
            entries.append(IndexedChunk(chunk=placed, gist_key=None, vectors=parts))
            start = placed.end + 2
        self._store.replace_document(_document(path, "\n\n".join(chunk.text for chunk in chunks)), entries)
        self._store.commit()

    def _take(self, article: str, numbers: Sequence[int], rows: Sequence[StoredChunk]) -> None:
        """Keep the chunks of an article, each with the number of its context."""
        self.of_article[article] = [row.id for row in rows]
        for number, row in zip(numbers, rows, strict=True):
            self.chunks[row.id] = Passage(row.text, row.heading, row.tokens)
            self.of_context[number].append(row.id)

    def _cut(self, context: Context) -> list[Chunk]:
        chunks = self._chunker.split(_document("", context.text))
        return [replace(chunk, heading=context.heading) for chunk in chunks]

    @property
    def facts(self) -> dict[str, int]:
        """How large it is."""
        tokens = sum(passage.tokens for passage in self.chunks.values())
        return {"articles": len(self.of_article), "chunks": len(self.chunks), "tokens": tokens}

    def search(self, question: str, *, top_k: int = REACH) -> list[int]:
        """Return the ids of the *top_k* best chunks, best first."""
        return [hit.chunk.id for hit in self._retriever.search(question, top_k=top_k)]

    def gold(self, number: int, answers: Sequence[str]) -> list[int]:
        """Return the ids of the chunks of a context that hold an answer, all of its chunks where none does."""
        ids = self.of_context[number]
        return [chunk for chunk in ids if contains(self.chunks[chunk].text, answers)] or ids

    def document(self, chunk: int, tokens: int) -> tuple[Passage, ...]:
        """Return the article of a chunk as it reads; of a longer one the part of about *tokens* with the chunk in it.

        Parts are the same for all chunks of an article, so that a part is read once for many questions.
        """
        part: list[int] = []
        for other in next(ids for ids in self.of_article.values() if chunk in ids):
            if sum(self.chunks[one].tokens for one in part) >= tokens:
                if chunk in part:
                    break
                part = []
            part.append(other)
        return tuple(self.chunks[one] for one in part)

    def passages(self, text: str, heading: tuple[str, ...] = ()) -> tuple[Passage, ...]:
        """Return a text that is not in the corpus, cut as one that is."""
        return tuple(
            Passage(chunk.text, heading, chunk.tokens) for chunk in self._cut(Context(text, "", heading=heading))
        )


def _document(path: str, text: str) -> Document:
    return Document(path=path, sha256="", size=len(text), mtime_ns=0, kind="text", text=text)


@contextmanager
def indexed(
    folder: Path, contexts: Sequence[Context], embedder: Embedder, *, tokenizer: Tokenizer, chunk_tokens: int
) -> Iterator[Corpus]:
    """Hold the contexts indexed in a folder, whose index is used again if it is there.

    Args:
        folder: of nothing else; the caller knows that an index in it is of the same contexts.
        tokenizer: of the model that answers.
        chunk_tokens: most tokens of a chunk.

    Raises:
        IndexLockedError: another evaluation holds it.
    """
    settings = IndexSettings(chunk_tokens=chunk_tokens)
    with Store.build(folder, command="gistrag evaluate") as store:
        store.configure(settings, source=".", gist_fingerprint={}, embedder_fingerprint=embedder.fingerprint)
        yield Corpus(store, embedder, contexts, Chunker(tokenizer, chunk_tokens=chunk_tokens))


_Asked = tuple[int, Task]


def split_whole(contexts: Sequence[Context]) -> tuple[list[Context], list[Context]]:
    """Return the contexts of the corpus, and those that are whole documents, which are never retrieved."""
    chunked = [context for context in contexts if any(task.kind != WHOLE for task in context.tasks)]
    return chunked, [context for context in contexts if any(task.kind == WHOLE for task in context.tasks)]


def planted(contexts: Sequence[Context], plan: Plan) -> list[Context]:
    """Return the contexts with the facts of the plan planted in some of them, no question twice."""
    randomness = random.Random(f"{plan.seed} probes")
    contexts, asked = list(contexts), {task.question for context in contexts for task in context.tasks}
    places = randomness.sample(range(len(contexts)), len(contexts))
    places = places[: max(1, len(places) // 2)]  # what is left makes the fillers of passkeys
    for number in range(plan.probes if places else 0):
        kind = sorted(FACTS)[number % len(FACTS)]
        place = places[number % len(places)]
        contexts[place] = _with_probe(contexts[place], randomness, kind, asked)
        asked.add(contexts[place].tasks[-1].question)
    return contexts


def _with_probe(context: Context, randomness: random.Random, kind: str, asked: set[str]) -> Context:
    """Return a context with a fact that nobody asked for yet, planted where it parts no answer if there is a place.

    Raises:
        UsageError: everything that can be planted is asked for.
    """
    for attempt in range(10_000):
        found = plant(context, randomness, kind)
        if found.tasks[-1].question not in asked and (attempt > 100 or _keeps_answers(context, found)):
            return found
    raise UsageError("the file asks for everything that could be planted; lower --probes")


def _keeps_answers(before: Context, after: Context) -> bool:
    answers = (answer for task in before.tasks for answer in task.answers)
    return all(answer in after.text for answer in answers if answer in before.text)


def sampled(contexts: Sequence[Context], count: int, seed: int, wanted: Callable[[Task], bool]) -> list[_Asked]:
    """Return up to *count* questions with the number of their context, from all articles in turn."""
    randomness = random.Random(f"{seed} sample")
    articles: dict[str, list[_Asked]] = {}
    for number, context in enumerate(contexts):
        articles.setdefault(context.article, []).extend((number, task) for task in context.tasks if wanted(task))
    queues = [randomness.sample(asked, len(asked)) for asked in articles.values()]
    randomness.shuffle(queues)
    return [asked for turn in zip_longest(*queues) for asked in turn if asked is not None][:count]


def _is_plain(task: Task) -> bool:
    return task.kind not in (LONG, WHOLE) and not is_planted(task) and not _is_unanswerable(task)


def _is_unanswerable(task: Task) -> bool:
    return all(map(is_refusal, task.answers))


def asked_plainly(corpus: Corpus, plan: Plan) -> list[_Asked]:
    """Return the main questions, with the number of the context that each is about."""
    return sampled(corpus.contexts, plan.questions, plan.seed, _is_plain)


def cases(corpus: Corpus, wholes: Sequence[Context], plan: Plan, *, document_tokens: int) -> list[Case]:
    """Return everything that is asked, the cases that share passages near each other.

    Args:
        corpus: of the contexts that are retrieved; wholes: whole documents.
        document_tokens: about the most of an article that is given as a whole.
    """
    asked = [(f"{number}", *pair) for number, pair in enumerate(asked_plainly(corpus, plan))]
    probes = sampled(corpus.contexts, plan.probes, plan.seed, is_planted)
    grouped = sorted(asked, key=lambda one: (corpus.contexts[one[1]].article, one[1]))
    return [
        *(
            case
            for name, number, task in grouped
            for case in _asking(corpus, plan, name, number, task, document_tokens)
        ),
        *_unanswered(corpus, plan),
        *(_probing(corpus, plan, place, number, task) for place, (number, task) in enumerate(probes)),
        *passkeys(corpus, plan, samples=plan.passkey),
        *_wholes(corpus, wholes, plan),
    ]


def _asking(corpus: Corpus, plan: Plan, name: str, number: int, task: Task, document_tokens: int) -> Iterator[Case]:
    """Yield all cases of one question."""
    found, gold = corpus.search(task.question), corpus.gold(number, task.answers)

    def case(part: str, ids: Sequence[int], **about: Any) -> Case:
        about = {"kind": task.kind, "article": corpus.contexts[number].article, **about}
        passages = tuple(corpus.chunks[chunk] for chunk in ids)
        return Case(part, name, task.question, task.answers, passages, plan.max_new_tokens, about=about)

    for top_k in plan.top_k:
        best = found[:top_k][::-1]
        part = "questions" if top_k == plan.top_k[0] else f"top {top_k}"
        made = case(part, best, top_k=top_k, has_gold=not set(gold).isdisjoint(best))
        yield replace(made, document=corpus.document(gold[0], document_tokens)) if part == "questions" else made
    if plan.oracle:
        yield case("oracle", gold[:1])
    if int(name) < plan.orders:
        main = found[: plan.top_k[0]][::-1]
        for order, ids in enumerate(other_orders(main, random.Random(f"{plan.seed} order {name}")), 1):
            yield case(f"order {order}", ids)
    if int(name) < plan.unanswerable:
        without = [
            chunk for chunk in found if chunk not in gold and not contains(corpus.chunks[chunk].text, task.answers)
        ]
        if without:
            yield replace(case("refusal", without[: plan.top_k[0]][::-1]), answers=(REFUSAL,))


def other_orders(ids: Sequence[int], randomness: random.Random) -> list[tuple[int, ...]]:
    """Return up to `ORDERS` different orders that are not the given one."""
    orders: dict[tuple[int, ...], None] = {}
    while len(orders) < min(ORDERS, math.factorial(len(ids)) - 1):
        order = tuple(randomness.sample(ids, len(ids)))
        if order != tuple(ids):
            orders[order] = None
    return list(orders)


def _unanswered(corpus: Corpus, plan: Plan) -> Iterator[Case]:
    """Yield the questions of the file that have no answer in it."""
    for place, (_, task) in enumerate(sampled(corpus.contexts, plan.unanswerable, plan.seed, _is_unanswerable)):
        best = corpus.search(task.question)[: plan.top_k[0]][::-1]
        passages = tuple(corpus.chunks[chunk] for chunk in best)
        about = {"kind": task.kind}
        yield Case("refusal", f"given {place}", task.question, (REFUSAL,), passages, plan.max_new_tokens, about=about)


def _probing(corpus: Corpus, plan: Plan, place: int, number: int, task: Task) -> Case:
    best = corpus.search(task.question)[: plan.top_k[0]][::-1]
    has_gold = not set(corpus.gold(number, task.answers)).isdisjoint(best)
    passages = tuple(corpus.chunks[chunk] for chunk in best)
    about = {"kind": task.kind, "has_gold": has_gold}
    return Case(task.kind, f"{place}", task.question, task.answers, passages, plan.max_new_tokens, about=about)


def passkeys(corpus: Corpus, plan: Plan, *, samples: int, depths: Sequence[float] = DEPTHS) -> Iterator[Case]:
    """Yield fillers of every length with an identifier planted at every depth; lengths beyond the corpus are left out.

    Args:
        samples: fillers of each length; a filler is the same at all depths but for the planted chunk.
        depths: 0 is the first chunk, 1 the last.
    """
    clean = [
        chunk
        for number, context in enumerate(corpus.contexts)
        if not any(is_planted(task) for task in context.tasks)
        for chunk in corpus.of_context[number]
    ]
    for length in plan.lengths if samples else ():
        if sum(corpus.chunks[chunk].tokens for chunk in clean) < length:
            continue
        for sample in range(samples):
            randomness = random.Random(f"{plan.seed} passkey {length} {sample}")
            filler = _filler(corpus, clean, length, randomness)
            for depth in depths:
                yield _hidden(corpus, plan, filler, randomness, length=length, depth=depth, sample=sample)


def _filler(corpus: Corpus, clean: Sequence[int], length: int, randomness: random.Random) -> list[Passage]:
    """Return random chunks of at least *length* tokens."""
    filler: list[Passage] = []
    for chunk in randomness.sample(clean, len(clean)):
        filler.append(corpus.chunks[chunk])
        if sum(passage.tokens for passage in filler) >= length:
            break
    return filler


def _hidden(
    corpus: Corpus,
    plan: Plan,
    filler: Sequence[Passage],
    randomness: random.Random,
    *,
    length: int,
    depth: float,
    sample: int,
) -> Case:
    """Return the case of one identifier planted in a copy of the filler."""
    place = round(depth * (len(filler) - 1))
    before = filler[place]
    context = plant(Context(before.text, ""), randomness, "identifier")
    (task,) = context.tasks
    passages = [*filler[:place], replace(before, text=context.text), *filler[place + 1 :]]
    about = {"kind": "passkey", "length": length, "depth": depth}
    name = f"{length} {sample} {depth:g}"
    return Case("passkey", name, task.question, task.answers, tuple(passages), plan.max_new_tokens, about=about)


def _wholes(corpus: Corpus, wholes: Sequence[Context], plan: Plan) -> Iterator[Case]:
    """Yield questions about whole documents, with all of their chunks in reading order."""
    asked = sampled(wholes, plan.whole, plan.seed, lambda task: task.kind == WHOLE)
    for place, (number, task) in enumerate(asked):
        passages = corpus.passages(wholes[number].text, wholes[number].heading)
        about = {"kind": WHOLE, "article": wholes[number].article}
        new_tokens = LONGER * plan.max_new_tokens
        yield Case(WHOLE, f"{place}", task.question, task.answers, passages, new_tokens, about=about)
