"""`notebooks/bench/frontier.py`: at a budget of slots every arm gets the best chunks that fit, and no more."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pages import ROOT
from support.tiny_models import HashEmbedder, byte_tokenizer, tiny_model

from gistrag.compression.making import gist_count
from gistrag.evaluation.arms import Arm, MemoryCache, gist_arm
from gistrag.evaluation.cases import Plan
from gistrag.evaluation.corpus import Corpus, Passage, indexed
from gistrag.evaluation.runner import Journal, Runner, answered, key_of, unanswered
from gistrag.model.gist_model import GistModel
from gistrag.qa.dataset import Context, Task

SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "notebooks" / "bench" / "frontier.py"))
frontier, beginning, frontier_figures = SCRIPT["frontier"], SCRIPT["beginning"], SCRIPT["frontier_figures"]
Shares, MemoriesOnDisk = SCRIPT["Shares"], SCRIPT["MemoriesOnDisk"]

FOOD = {"bear": "honey", "crane": "frogs", "deer": "grass", "eagle": "hares", "finch": "seeds", "goat": "thistles"}
PLAN = Plan(questions=2, max_new_tokens=4)
ARMS = [Arm("text", "text"), gist_arm("selected", 2), gist_arm("selected", 4)]
BUDGETS = (20, 60, 140)


@pytest.fixture(scope="module")
def tiny() -> GistModel:
    """A tiny model of its own."""
    return tiny_model()


@pytest.fixture
def corpus(tmp_path: Path) -> Iterator[Corpus]:
    """Six short contexts, one question each."""
    contexts = [
        Context(f"The {one} of the valley eats {food}. It sleeps.", one, (Task(f"What does the {one} eat?", (food,)),))
        for one, food in FOOD.items()
    ]
    tokenizer = byte_tokenizer().backend_tokenizer
    with indexed(tmp_path / "corpus", contexts, HashEmbedder(), tokenizer=tokenizer, chunk_tokens=150) as corpus:
        yield corpus


def test_as_many_of_the_best_as_fit(corpus: Corpus, tiny: GistModel) -> None:
    """Chunks are taken in the order of retrieval until one does not fit; the best one stands last."""
    for case, arm in frontier(corpus, PLAN, tiny, ARMS, BUDGETS):
        rate, budget = (arm.tokens_per_gist if arm.give == "gists" else 1), case.about["budget"]
        ranked = [corpus.chunks[chunk] for chunk in corpus.search(case.question)]
        slots = [gist_count(len(tiny.encode_passage(one.text, one.heading)), rate) for one in ranked]
        fit = sum(sum(slots[: count + 1]) <= budget for count in range(len(ranked)))
        if fit:
            assert tuple(ranked[:fit][::-1]) == case.passages
        else:
            (passage,) = case.passages
            assert ranked[0].text.startswith(passage.text)
            assert gist_count(len(tiny.encode_passage(passage.text)), rate) <= budget


def test_every_question_is_asked_at_every_budget_of_every_arm(corpus: Corpus, tiny: GistModel) -> None:
    """Gists bring more chunks into the same slots than text does."""
    pairs = frontier(corpus, PLAN, tiny, ARMS, BUDGETS)

    assert 2 * len(ARMS) * len(BUDGETS) == len({(case.part, case.name, arm.name) for case, arm in pairs})
    chunks = {(case.about["budget"], arm.name): len(case.passages) for case, arm in pairs if case.name == "0"}
    assert chunks[140, "text"] < chunks[140, "gist 2"] < chunks[140, "gist 4"]
    assert all(case.about["has_gold"] for case, arm in pairs if arm.name == "gist 4")


def test_a_beginning_without_the_answer_is_not_found(corpus: Corpus, tiny: GistModel) -> None:
    """Of a chunk that is cut, what counts is whether the answer is in what is left."""
    found = {arm.name: case for case, arm in frontier(corpus, PLAN, tiny, ARMS, (20,)) if case.name == "0"}

    assert (False, 1) == (found["text"].about["has_gold"], found["text"].about["chunks"])
    assert found["gist 4"].about["has_gold"]


def test_a_beginning_takes_the_tokens_it_may(tiny: GistModel) -> None:
    """It is a beginning of the text, and never nothing."""
    passage = Passage("The crane eats frogs at noon.", (), 29)
    frame = len(tiny.encode_passage("", ()))

    assert beginning(passage, 1000, tiny) == passage
    cut = beginning(passage, frame + 9, tiny)
    assert ("The crane", 9) == (cut.text, cut.tokens)
    assert "T" == beginning(passage, 1, tiny).text
    assert [passage] == Shares(tiny).of([passage], 1000, 1)


def test_gists_are_made_once_and_answers_are_the_same(
    corpus: Corpus, tiny: GistModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gists that several questions need come from files, and say what fresh ones say; nothing is answered twice."""
    pairs = frontier(corpus, PLAN, tiny, ARMS, BUDGETS)
    fresh = {key_of(row): row for row in Runner(MemoryCache(tiny)).rows(pairs)}
    (tmp_path / "gists").mkdir()

    runner = Runner(MemoriesOnDisk(tiny, tmp_path / "gists"), group_bytes=1)
    with Journal(tmp_path / "rows.jsonl") as journal:
        for row in runner.rows(pairs):
            journal.add(row)
        monkeypatch.setattr("gistrag.evaluation.arms.TextPass", None)  # every cache is in the folder by now
        again = {key_of(row): row for row in Runner(MemoriesOnDisk(tiny, tmp_path / "gists")).rows(pairs)}
        found = {key_of(row): row for row in answered(pairs, journal)}
        left = unanswered(pairs, journal)

    assert left == []
    assert found == fresh
    assert again == fresh
    assert all(row["slots"] <= row["budget"] for row in fresh.values())


def rows_of(arm: str, scores: tuple[float, ...], *, chunks: int) -> list[dict[str, Any]]:
    """Answers to questions a, b, …, of which d has not got its passage."""
    cost = {"slots": 10, "source_tokens": 40, "chunks": chunks}
    return [
        {"part": "budget 64", "name": name, "arm": arm, "budget": 64, "em": float(f1 == 1), "f1": f1,
         "contains": f1 > 0.5, "has_gold": name != "d", **cost}
        for name, f1 in zip("abcd", scores, strict=True)
    ]  # fmt: skip


def test_arms_with_the_same_slots_are_compared() -> None:
    """By budget: means, the gain over text with its interval, and median times; rows left out do not count."""
    rows = [*rows_of("text", (1, 0, 0, 0), chunks=1), *rows_of("gist 4", (1, 1, 0, 0.4), chunks=3)]
    left_out = {"part": "budget 64", "name": "e", "arm": "text", "budget": 64, "left_out": "too long"}
    samples = [{"context": "64", "arm": "gist 4", "ttft_s": seconds, "load_s": 0.0} for seconds in (1.0, 3.0, 2.0)]

    found = frontier_figures([*rows, left_out], samples)["64"]

    assert found["text"]["f1"]["value"] == 0.25
    assert found["gist 4"]["f1_more"]["value"] == pytest.approx(0.35)
    assert found["gist 4"]["has_gold"]["value"] == 0.75
    assert [found["gist 4"][name] for name in ("count", "chunks", "ttft_s")] == [4, 3, 2.0]
    assert found["text"]["ttft_s"] is None
