"""Promise 10: indexes that share an engine share nothing else."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from support import fake_compressor
from support.fake_compressor import is_right, retrieved, write_documents

from gistrag.engine import Engine
from gistrag.errors import CorruptGistError, GistNotFoundError
from gistrag.kv.packed import PackedGists
from gistrag.rag import GistRAG

TENANTS = 8
SETTINGS = {"chunk_tokens": 160, "tokens_per_gist": fake_compressor.TOKENS_PER_GIST}


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[GistRAG]]:
    """Indexes of the same documents and one of their own each, made and opened with one engine."""
    folder, engine = tmp_path_factory.mktemp("tenants"), fake_compressor.engine()
    with fake_compressor.fake_compression(), ExitStack() as stack:
        opened = []
        for number in range(TENANTS):
            docs = folder / f"docs{number}"
            write_documents(docs, {"a": 1, "b": 1})
            (docs / "canary.txt").write_text(f"The secret word of the harbour is canary{number}.")
            opened.append(
                GistRAG.from_folder(docs, index=folder / f"index{number}", engine=engine, gists="now", **SETTINGS)
            )
            stack.callback(opened[-1].close)
        yield opened


def foreign(tenants: list[GistRAG], number: int, question: str) -> int:
    """Return how many chunks an answer rests on that are not the tenant's own."""
    rag = tenants[number]
    passages = retrieved(rag, question, top_k=4)[0]
    assert passages
    assert all(is_right(passage, rag.engine) for passage in passages)
    own = {chunk.text for row in rag.store.documents() for chunk in rag.store.chunks_of(row.path)}
    told = [passage.text for passage in passages]
    return sum(text not in own or ("canary" in text and f"canary{number}." not in text) for text in told)


def ask(tenants: list[GistRAG], count: int, randomness: random.Random) -> int:
    """Ask so many questions of all tenants at the same time and return how many foreign chunks came back."""
    questions = [
        (randomness.randrange(TENANTS), f"What is canary{randomness.randrange(TENANTS)} of the harbour?")
        for _ in range(count)
    ]
    with ThreadPoolExecutor(4) as threads:
        return sum(threads.map(lambda asked: foreign(tenants, *asked), questions))


def test_tenants_do_not_mix(tenants: list[GistRAG], randomness: random.Random) -> None:
    """Whoever asks about the canary of whom, the answer rests on the tenant's own documents."""
    assert 0 == ask(tenants, 100, randomness)


@pytest.mark.soak
def test_tenants_do_not_mix_10000_times(tenants: list[GistRAG], randomness: random.Random) -> None:
    """10,000 questions."""
    assert 0 == ask(tenants, 10_000, randomness)


def test_a_canary_is_in_one_folder_only(tenants: list[GistRAG]) -> None:
    """No byte of an index holds the canary of another."""
    for rag in tenants:
        held = b"".join(path.read_bytes() for path in rag.folder.rglob("*") if path.is_file())
        assert [f"canary{number}." in str(held) for number in range(TENANTS)].count(True) == 1


def test_equal_documents_have_gists_of_their_own(tenants: list[GistRAG]) -> None:
    """The same text has another name in every index, so no file of one is a file of another."""
    keys = [{row.key for row in rag.store.gists.rows()} for rag in tenants]

    assert sum(map(len, keys)) == len(set.union(*keys))


def test_gist_of_another_tenant_is_refused(tenants: list[GistRAG], tmp_path: Path) -> None:
    """A gist of equal text, made by the same engine, is refused under the names of another index."""
    one, two = tenants[:2]
    mine, its = (next(row for row in rag.store.gists.rows()) for rag in (one, two))
    path, aside = one.store.gists.path(mine.key), tmp_path / "aside"
    shutil.copy(path, aside)
    shutil.copy(two.store.gists.path(its.key), path)
    try:
        with pytest.raises(CorruptGistError):
            one.store.gists.load(mine.key)
        with pytest.raises(GistNotFoundError):
            one.store.gists.load(its.key)
    finally:
        shutil.copy(aside, path)
    assert isinstance(one.store.gists.load(mine.key), PackedGists)


def test_engine_keeps_nothing_of_a_tenant(tenants: list[GistRAG]) -> None:
    """What an engine answered for one tenant changes nothing for the next: the same bits each time."""
    first = [str(rag.query("What is the secret word?", top_k=2, max_new_tokens=4)) for rag in tenants]
    again = [str(rag.query("What is the secret word?", top_k=2, max_new_tokens=4)) for rag in tenants[::-1]][::-1]

    assert first == again
    assert isinstance(tenants[0].engine, Engine)
