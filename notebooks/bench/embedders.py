r"""What each embedder finds, alone and together with the words: English, and any folder with questions about it.

    python notebooks/bench/embedders.py --folder scratch --squad squad.jsonl.gz --output embedders.json \
        --documents tests/data/believable/documents --questions tests/data/believable/questions.jsonl \
        --clauses tests/data/korean-clauses.jsonl

The paragraphs of SQuAD are of articles that the shipped adapter was not trained on, and all of them are searched. A
question of a question file names its document, and the evidence in it; a clause is a document of its own. A chunk is
right if it holds the evidence, or for SQuAD one of the answers in the paragraph that was asked about. Times are medians
of this process; set OMP_NUM_THREADS, and take none from a machine that does something else.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from gistrag.documents.chunking import Chunker
from gistrag.documents.discovery import Document, find, load
from gistrag.index.embedder import Embedder
from gistrag.index.retriever import Retriever, VectorSearch, keywords
from gistrag.index.store import IndexedChunk, Store
from gistrag.model import hub
from gistrag.model.runtime import AnyRuntime
from gistrag.qa.dataset import read_contexts, split_by_article
from gistrag.settings import DEFAULT_EMBEDDER, MULTILINGUAL_EMBEDDER, IndexSettings

DEPTHS = (1, 3, 10)
BATCH = 64


@dataclass(frozen=True)
class Asked:
    """A question, the document that answers it, and texts of which the right chunk holds one."""

    question: str
    document: str
    evidence: tuple[str, ...]


@dataclass
class Task:
    """Documents to search and questions about them."""

    name: str
    documents: list[Document]
    asked: list[Asked]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)


def document(path: str, text: str) -> Document:
    """Return a text as a document."""
    return Document(path=path, sha256="", size=len(text), mtime_ns=0, kind="text", text=text)


def squad(file: Path, count: int) -> Task:
    """Return the held-out paragraphs of a question file, and some of the questions about them."""
    contexts, _ = read_contexts(file)
    _, held_out = split_by_article(contexts)
    documents = [document(f"{number:05}", context.text) for number, context in enumerate(held_out)]
    asked = [
        Asked(task.question, f"{number:05}", task.answers)
        for number, context in enumerate(held_out)
        for task in context.tasks
        if task.answers
    ]
    return Task("squad", documents, random.Random(0).sample(asked, min(count, len(asked))))


def folder(documents: Path, questions: Path) -> Task:
    """Return the documents of a folder, and the questions that one of them answers."""
    lines = [json.loads(line) for line in questions.read_text("utf-8").splitlines()]
    asked = [Asked(one["question"], one["document"], (one["evidence"],)) for one in lines if one.get("evidence")]
    files, *_ = find(documents)
    return Task(questions.stem, [load(documents, file) for file in files], asked)


def clauses(file: Path) -> Task:
    """Return clauses, each a document, with their questions."""
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    documents = [document(f"{number:05}", line["clause"]) for number, line in enumerate(lines)]
    asked = [Asked(line["question"], f"{number:05}", (line["clause"],)) for number, line in enumerate(lines)]
    return Task(file.stem, documents, asked)


@contextmanager
def indexed(place: Path, task: Task, embedder: Embedder, runtime: AnyRuntime) -> Iterator[tuple[Store, float]]:
    """Hold the documents of a task indexed, and say how many chunks a second became vectors."""
    chunker = Chunker(runtime.text_tokenizer, chunk_tokens=IndexSettings().chunk_tokens)
    chunks = [(one, chunker.split(one)) for one in task.documents]
    texts = [chunk.search_text for _, cut in chunks for chunk in cut]
    began_s = time.perf_counter()
    vectors = [one for at in range(0, len(texts), BATCH) for one in embedder.embed_documents(texts[at : at + BATCH])]
    rate = len(texts) / (time.perf_counter() - began_s)
    with Store.build(place) as store:
        store.configure(IndexSettings(), source=".", gist_fingerprint={}, embedder_fingerprint=embedder.fingerprint)
        rest = iter(vectors)
        for one, cut in chunks:
            entries = [IndexedChunk(chunk=chunk, gist_key=None, vectors=next(rest)) for chunk in cut]
            store.replace_document(one, entries)
        store.commit()
        yield store, rate


def bare(text: str) -> str:
    """Return a text without white space."""
    return "".join(text.split())


def hits(store: Store, asked: Sequence[Asked], rankings: Iterable[Sequence[int]]) -> dict[str, float]:
    """Return the share of questions, in percent, whose right chunk is among the first few."""
    ranks = []
    for one, ids in zip(asked, rankings, strict=True):
        found = [
            chunk.path == one.document and any(bare(text) in bare(chunk.text) for text in one.evidence)
            for chunk in store.chunks(ids)
        ]
        ranks.append(found.index(True) if True in found else DEPTHS[-1])
    return {f"hit@{k}": round(100 * sum(rank < k for rank in ranks) / len(ranks), 1) for k in DEPTHS}


def measured(store: Store, asked: Sequence[Asked], embedder: Embedder) -> dict[str, Any]:
    """Return what the vectors find, the words, and both together; and how long the vector of a question takes."""
    search, retriever = VectorSearch(store), Retriever(store, embedder)
    vectors, seconds = [], []
    for one in asked:
        began_s = time.perf_counter()
        vectors.append(embedder.embed_query(one.question))
        seconds.append(time.perf_counter() - began_s)
    dense = [[chunk for chunk, _ in search.nearest(vector, DEPTHS[-1])] for vector in vectors]
    words = [[chunk for chunk, _ in store.keyword_search(keywords(one.question), DEPTHS[-1])] for one in asked]
    both = [[hit.chunk.id for hit in retriever.search(one.question, top_k=DEPTHS[-1])] for one in asked]
    return {
        "dense": hits(store, asked, dense),
        "words": hits(store, asked, words),
        "hybrid": hits(store, asked, both),
        "query_ms": round(1000 * median(seconds), 2),
    }


def runtime_of(settings: IndexSettings) -> AnyRuntime:
    """Return what cuts the text into tokens: the default reader."""
    from gistrag import Engine

    return Engine.load(settings, device="cpu").runtime


def main() -> None:
    """Index, ask, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder of the indexes; made anew")
    parser.add_argument("--squad", type=Path)
    parser.add_argument("--count", type=int, default=1000, help="questions of SQuAD")
    parser.add_argument("--documents", type=Path, action="append", default=[], help="a folder, with --questions")
    parser.add_argument("--questions", type=Path, action="append", default=[])
    parser.add_argument("--clauses", type=Path, action="append", default=[])
    parser.add_argument("--embedders", nargs="+", default=[DEFAULT_EMBEDDER, MULTILINGUAL_EMBEDDER])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    tasks = [squad(given.squad, given.count)] if given.squad else []
    tasks += [folder(*pair) for pair in zip(given.documents, given.questions, strict=True)]
    tasks += [clauses(file) for file in given.clauses]
    runtime = runtime_of(IndexSettings())
    for name in given.embedders:
        embedder = Embedder(hub.find(name).path)
        embedder.embed_query("warm up")
        for task in tasks:
            with indexed(given.folder / f"{task.name}-{name}", task, embedder, runtime) as (store, rate):
                task.found[name] = {**measured(store, task.asked, embedder), "passages_per_s": round(rate, 1)}
            print(json.dumps({"task": task.name, "embedder": name, **task.found[name]}), flush=True)
    found = {
        task.name: {"documents": len(task.documents), "questions": len(task.asked), **task.found} for task in tasks
    }
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
