"""Fidelity tells how far gists stand in for their text, and a floor of it decides how many a chunk gets."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support.tiny_models import HashEmbedder, tiny_model

from gistrag.cli import inspect
from gistrag.compression.compress import REPEAT, compress
from gistrag.compression.fidelity import SHARE, Repeated, compress_to, is_faithful
from gistrag.kv.cache import GistCache, as_stored, concatenate
from gistrag.model.generation import read_text
from gistrag.model.gist_model import GistModel
from gistrag.rag import Engine, GistRAG

CHUNK = list(b"The mill by the river Ulm grinds 8420 sacks of rye a year, and Ida Brandt keeps the books of it.")
OTHER = list(b"Bees gather nectar in spring and keep the honey in combs of wax.")


@pytest.fixture(scope="module")
def sharp() -> GistModel:
    """A tiny random model whose guesses are less even than chance, so that they can differ."""
    model = tiny_model()
    with torch.no_grad():
        model.network.lm_head.weight.mul_(30)
    return model


def gists(model: GistModel, rate: int, *, chunk: list[int] = CHUNK, placement: str = "selected") -> GistCache:
    return compress(model, [chunk], placement=placement, tokens_per_gist=rate)[0]  # type: ignore[arg-type]


def fidelities(model: GistModel, rates: tuple[int, ...]) -> dict[int, float]:
    repeated = Repeated(model, CHUNK)
    return {rate: repeated.fidelity(gists(model, rate)) for rate in rates}


def test_the_full_cache_is_the_text(sharp: GistModel) -> None:
    """Behind every key and value of a chunk the model guesses as behind its text."""
    assert pytest.approx(1, abs=1e-6) == Repeated(sharp, CHUNK).fidelity(gists(sharp, 1))


def test_it_is_the_overlap_of_guesses_at_surprising_tokens(sharp: GistModel) -> None:
    """A naive twin: each token guessed by a reading of its own, the quarter that surprised most averaged."""
    prefix, asked = concatenate([sharp.prefix], sharp.rope), sharp.encode_question(REPEAT)
    fed = torch.tensor([[*asked, *CHUNK]])
    guesses = []
    for memory in (read_text(sharp, prefix, CHUNK), concatenate([sharp.prefix, gists(sharp, 4)], sharp.rope)):
        hidden = sharp.read(memory).feed(fed, positions=memory.next_position + torch.arange(fed.shape[1]))
        guesses.append(sharp.logits(hidden[0, len(asked) - 1 : -1]).float().softmax(dim=-1))
    hidden = sharp.read(prefix).feed(torch.tensor([CHUNK]), positions=prefix.next_position + torch.arange(len(CHUNK)))
    before = torch.cat((sharp.prefix_hidden[-1:], hidden[0, :-1]))
    surprise = -sharp.logits(before).float().log_softmax(dim=-1)[range(len(CHUNK)), CHUNK]
    places = surprise.topk(math.ceil(SHARE * len(CHUNK))).indices
    expected = torch.minimum(*guesses).sum(dim=-1)[places].mean().item()

    assert pytest.approx(expected, abs=1e-5) == fidelities(sharp, (4,))[4]
    assert 0 < expected < 0.999


def test_gists_of_another_chunk_keep_less(sharp: GistModel) -> None:
    """What stands for another text does not stand for this one."""
    repeated = Repeated(sharp, CHUNK)

    assert repeated.fidelity(gists(sharp, 1, chunk=OTHER)) < repeated.fidelity(gists(sharp, 1))


def test_a_chunk_too_long_to_be_repeated_is_repeated_as_far_as_it_fits() -> None:
    """The window ends the comparison, not the build."""
    model, chunk = tiny_model(), list(b"x" * 90)
    fixed = model.prefix.gists + len(model.encode_question(REPEAT)) + len(chunk)
    model.window = fixed + 40

    assert len(model.encode_question(REPEAT)) + 40 == Repeated(model, chunk)._fed.shape[1]
    assert pytest.approx(1, abs=1e-6) == Repeated(model, chunk).fidelity(gists(model, 1, chunk=chunk))


def test_a_chunk_gets_the_fewest_gists_that_reach_the_floor(sharp: GistModel) -> None:
    """Rates are halved until they do; what is measured comes with the cache."""
    measured = fidelities(sharp, (8, 4, 2, 1))
    for floor in (0.0, *(value - 1e-6 for value in measured.values())):
        (cache,) = compress_to(sharp, [CHUNK], placement="selected", tokens_per_gist=8, min_quality=floor)

        rate = next(rate for rate, value in measured.items() if value >= floor)
        assert (math.ceil(len(CHUNK) / rate), pytest.approx(measured[rate])) == (cache.gists, cache.fidelity)
        assert is_faithful(cache, floor)


def test_chunks_are_refined_one_by_one(sharp: GistModel) -> None:
    """A chunk that is good enough stays as it is, whatever the others need; the order is that given."""
    floor = (fidelities(sharp, (8,))[8] + Repeated(sharp, OTHER).fidelity(gists(sharp, 8, chunk=OTHER))) / 2

    caches = compress_to(sharp, [CHUNK, OTHER], placement="selected", tokens_per_gist=8, min_quality=floor)

    counts = [math.ceil(len(chunk) / 8) for chunk in (CHUNK, OTHER)]
    assert [len(CHUNK), len(OTHER)] == [cache.source_tokens for cache in caches]
    assert 1 == sum(cache.gists == count for cache, count in zip(caches, counts, strict=True))


def test_the_best_is_kept_where_none_reaches_the_floor(sharp: GistModel) -> None:
    """Gists that were never trained do not repeat a chunk, however many they are."""
    (cache,) = compress_to(sharp, [CHUNK], placement="anchored", tokens_per_gist=4, min_quality=1.0)
    repeated = Repeated(sharp, CHUNK)
    tried = [repeated.fidelity(gists(sharp, rate, placement="anchored")) for rate in (4, 2, 1)]

    assert pytest.approx(max(tried)) == cache.fidelity
    assert not is_faithful(cache, 1.0)
    assert is_faithful(gists(sharp, 4), 1.0)  # never measured


def test_what_is_measured_is_what_the_file_gives_back(sharp: GistModel) -> None:
    """In few bits the same gists keep less."""
    dials = {"placement": "selected", "tokens_per_gist": 2, "min_quality": 1e-9}
    (cache,) = compress_to(sharp, [CHUNK], **dials, kv_cache_dtype="int4")  # type: ignore[arg-type]

    assert pytest.approx(Repeated(sharp, CHUNK).fidelity(as_stored(gists(sharp, 2), "int4"))) == cache.fidelity


# In an index

TEXTS = {"mill.md": bytes(CHUNK).decode(), "bees.md": bytes(OTHER).decode()}


def built(tmp_path: Path, model: GistModel, **settings: object) -> GistRAG:
    (tmp_path / "docs").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "docs" / name).write_text(text)
    engine = Engine(model, HashEmbedder())  # type: ignore[arg-type]
    return GistRAG.from_folder(tmp_path / "docs", index=tmp_path / "index", engine=engine, **settings)  # type: ignore[arg-type]


def test_a_build_refines_and_remembers(tmp_path: Path, sharp: GistModel, capsys: pytest.CaptureFixture[str]) -> None:
    """More gists where they are needed, the fidelity in every file, and inspect shows it."""
    with built(
        tmp_path, sharp, placement="selected", tokens_per_gist=8, min_quality=1.0 - 1e-6, kv_cache_dtype="auto"
    ) as rag:
        assert rag.report is not None
        assert (2, 2, 0) == (rag.report.gists_made, rag.report.refined, rag.report.below)
        loaded = [rag.store.load(row.key) for row in rag.store.gist_rows()]
        assert all(cache.fidelity and cache.fidelity > 1 - 1e-4 for cache in loaded)
        assert sorted(len(text) + 2 for text in TEXTS.values()) >= sorted(cache.gists for cache in loaded)
        chunk = rag.store.chunks_of("mill.md")[0].id

    assert 0 == inspect.main(["--index", str(tmp_path / "index"), "--document", "mill.md"])
    assert "1.00" in capsys.readouterr().out.splitlines()[1].split()
    assert 0 == inspect.main(["--index", str(tmp_path / "index"), "--chunk", str(chunk), "--json"])
    assert json.loads(capsys.readouterr().out)["gist"]["fidelity"] > 1 - 1e-4


def test_auto_reads_as_text_what_gists_keep_badly(tmp_path: Path, sharp: GistModel) -> None:
    """And loads the gists of everything else; it is no fallback, nothing is broken."""
    dials = {"placement": "anchored", "tokens_per_gist": 2, "min_quality": 1.0}
    chunks = [sharp.encode_passage(text) for text in TEXTS.values()]
    caches = compress_to(sharp, chunks, **dials)  # type: ignore[arg-type]
    fidelity = {name: cache.fidelity for name, cache in zip(TEXTS, caches, strict=True)}
    worst, best = sorted(TEXTS, key=lambda name: fidelity[name] or 0)
    floor = (fidelity[worst] + fidelity[best]) / 2  # type: ignore[operator]
    with built(tmp_path, sharp, placement="anchored", tokens_per_gist=2, min_quality=floor) as rag:
        assert rag.report is not None
        assert 1 == rag.report.below
        auto, gist = (rag.query("mill honey", mode=mode, top_k=2, max_new_tokens=2) for mode in ("auto", "gist"))

    assert {worst: True, best: False} == {source.path: source.as_text for source in auto.sources}
    assert [False, False] == [source.as_text for source in gist.sources]
    assert 0 == auto.usage.text_fallbacks


def test_auto_without_a_floor_is_gist(tmp_path: Path, sharp: GistModel) -> None:
    """An index that measured nothing answers from gists, and has the fingerprint it always had."""
    with built(tmp_path, sharp, kv_cache_dtype="auto") as rag:
        answer = rag.query("mill", mode="auto", top_k=2, max_new_tokens=2)
        fingerprint = rag.store.gist_fingerprint

    assert [False, False] == [source.as_text for source in answer.sources]
    assert not {"min_quality", "kv_cache_dtype"} & fingerprint.keys()
