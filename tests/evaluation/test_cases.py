"""What is asked: sampled, retrieved, planted, hidden and permuted, the same for the same plan."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import HashEmbedder, byte_tokenizer

from gistrag.errors import UsageError
from gistrag.evaluation import cases
from gistrag.evaluation.cases import Case, Plan, other_orders, passkeys, planted, sampled, split_whole
from gistrag.evaluation.corpus import Corpus, indexed
from gistrag.model.prompt import REFUSAL
from gistrag.qa.dataset import Context, Task
from gistrag.qa.metrics import contains
from gistrag.qa.planted_facts import FACTS, PLANTED, is_planted

ANIMALS = {"bear": "honey", "crane": "frogs", "deer": "grass", "eagle": "hares", "finch": "seeds", "goat": "thistles"}
PLACES = {"harbour": "three cranes", "mill": "two wheels", "tower": "nine bells", "bridge": "five arches"}
SMALL = {
    "questions": 8,
    "top_k": (2, 1),
    "planted_facts": 4,
    "unanswerable": 2,
    "passkey": 1,
    "lengths": (150,),
    "orders": 1,
}


def contexts() -> list[Context]:
    """Two articles of short contexts, one question each."""
    about = [
        *((f"The {one} of the valley eats {food}. It sleeps at noon.", f"What does the {one} eat?", food, "animals")
          for one, food in ANIMALS.items()),
        *((f"The {one} of the town has {has}. It is old.", f"How many has the {one}?", has, "places")
          for one, has in PLACES.items()),
    ]  # fmt: skip
    return [
        Context(text, article, (Task(question, (answer,)),), (article.title(),))
        for text, question, answer, article in about
    ]


@pytest.fixture
def plan() -> Plan:
    """A plan with a little of everything."""
    return Plan(**SMALL)


@pytest.fixture
def corpus(tmp_path: Path, plan: Plan) -> Iterator[Corpus]:
    """The contexts with facts planted, indexed."""
    tokenizer = byte_tokenizer().backend_tokenizer
    folder = tmp_path / "corpus"
    with indexed(folder, planted(contexts(), plan), HashEmbedder(), tokenizer=tokenizer, chunk_tokens=150) as corpus:
        yield corpus


def asked(corpus: Corpus, plan: Plan, wholes: list[Context] | None = None) -> list[Case]:
    return cases.cases(corpus, wholes or [], plan, document_tokens=200)


def of(listed: list[Case], part: str) -> list[Case]:
    return [case for case in listed if case.part == part]


# The corpus


def test_a_context_is_one_chunk_where_it_fits(corpus: Corpus) -> None:
    """Contexts keep their text and heading, and an article knows its chunks in order."""
    first = corpus.chunks[corpus.of_context[0][0]]

    assert [1] * 10 == [len(ids) for ids in corpus.of_context]
    assert (corpus.contexts[0].text, ("Animals",)) == (first.text, first.heading)
    assert len(byte_tokenizer().encode(first.text)) == first.tokens
    assert [id_ for ids in corpus.of_context for id_ in ids] == [
        id_ for ids in corpus.of_article.values() for id_ in ids
    ]


def test_a_long_context_is_cut_as_a_build_cuts(tmp_path: Path) -> None:
    """A context above the limit becomes several chunks, and gold is the one with the answer."""
    text = " ".join(f"Sentence number {number} says little." for number in range(20)) + " The key is blue."
    long = Context(text, "long", (Task("Which colour has the key?", ("blue",)),))
    tokenizer = byte_tokenizer().backend_tokenizer

    with indexed(tmp_path / "corpus", [long], HashEmbedder(), tokenizer=tokenizer, chunk_tokens=100) as corpus:
        ids = corpus.of_context[0]
        gold = corpus.gold(0, ["blue"])
        unknown = corpus.gold(0, ["red"])

    assert len(ids) > 5
    assert all(corpus.chunks[chunk].tokens <= 100 for chunk in ids)
    assert ids[-1:] == gold
    assert ids == unknown


def test_an_index_that_is_there_is_used_again(tmp_path: Path) -> None:
    """The second time nothing is embedded, and the chunks are the same."""

    class Counted(HashEmbedder):
        embedded = 0

        def embed_documents(self, texts: Any) -> Any:
            Counted.embedded += len(texts)
            return super().embed_documents(texts)

    def chunks() -> dict[int, Any]:
        tokenizer = byte_tokenizer().backend_tokenizer
        with indexed(tmp_path / "corpus", contexts(), Counted(), tokenizer=tokenizer, chunk_tokens=150) as corpus:
            return corpus.chunks

    assert chunks() == chunks()
    assert 10 == Counted.embedded


def test_a_document_is_cut_into_the_same_parts_for_all_its_chunks(corpus: Corpus) -> None:
    """Parts do not overlap, and each holds the chunk it was asked for."""
    ids = corpus.of_article["animals"]

    parts = [corpus.document(chunk, 120) for chunk in ids]

    assert all(corpus.chunks[chunk] in part for chunk, part in zip(ids, parts, strict=True))
    assert [corpus.chunks[chunk] for chunk in ids] == [passage for part in dict.fromkeys(parts) for passage in part]
    assert 1 < len(set(parts)) < len(ids)


# Questions


def test_a_plan_gives_the_same_cases_again(corpus: Corpus, plan: Plan) -> None:
    """Cases follow from contexts and plan alone."""
    assert asked(corpus, plan) == asked(corpus, plan)


def test_questions_come_from_all_articles_in_turn() -> None:
    """Four of ten questions are two of each article, and more questions begin with the same ones."""
    few = sampled(contexts(), 4, 0, lambda task: True)
    more = sampled(contexts(), 9, 0, lambda task: True)

    assert {"animals": 2, "places": 2} == Counter(contexts()[number].article for number, _ in few)
    assert few == more[:4]
    assert few != sampled(contexts(), 4, 1, lambda task: True)


def test_the_best_chunk_stands_last(corpus: Corpus, plan: Plan) -> None:
    """The main part has the best two chunks, best last, and the smaller part the best one of the same."""
    listed = asked(corpus, plan)

    for two, one in zip(of(listed, "questions"), of(listed, "top 1"), strict=True):
        found = corpus.search(two.question)
        assert tuple(corpus.chunks[chunk] for chunk in found[:2][::-1]) == two.passages
        assert two.passages[-1:] == one.passages
        assert two.name == one.name


def test_the_oracle_is_the_chunk_with_the_answer(corpus: Corpus, plan: Plan) -> None:
    """One passage, which holds the answer."""
    for case in of(asked(corpus, plan), "oracle"):
        assert 1 == len(case.passages)
        assert contains(case.passages[0].text, case.answers)


def test_gold_is_noted(corpus: Corpus, plan: Plan) -> None:
    """Each main case says whether the passage with the answer is among those given."""
    for case in of(asked(corpus, plan), "questions"):
        assert case.about["has_gold"] == any(contains(passage.text, case.answers) for passage in case.passages)


def test_other_orders_are_other_orders(corpus: Corpus, plan: Plan) -> None:
    """Two passages have one other order; three have five, of which three are drawn."""
    main, order = of(asked(corpus, plan), "questions"), of(asked(corpus, plan), "order 1")
    again = next(case for case in main if case.name == order[0].name)

    assert again.passages[::-1] == order[0].passages
    assert [] == other_orders([1], random.Random(0))
    orders = other_orders([1, 2, 3], random.Random(0))
    assert 3 == len(set(orders) - {(1, 2, 3)})


def test_without_its_answer_a_question_is_refused(corpus: Corpus, plan: Plan) -> None:
    """No passage of a refusal case holds the answer, and the refusal is what is right."""
    listed = asked(corpus, plan)
    known = {case.name: case.answers for case in of(listed, "questions")}

    refusals = of(listed, "refusal")

    assert 2 == len(refusals)
    for case in refusals:
        assert (REFUSAL,) == case.answers
        assert 2 == len(case.passages)
        assert not any(contains(passage.text, known[case.name]) for passage in case.passages)


def test_questions_without_an_answer_are_taken_from_the_file(tmp_path: Path, plan: Plan) -> None:
    """A record whose answer is the refusal is asked as one, and is no ordinary question."""
    listed = [*contexts(), Context("The pump is green.", "pumps", (Task("Who built the pump?", (REFUSAL,)),))]
    tokenizer = byte_tokenizer().backend_tokenizer

    with indexed(tmp_path / "c", listed, HashEmbedder(), tokenizer=tokenizer, chunk_tokens=150) as corpus:
        found = asked(corpus, plan)

    assert ["Who built the pump?"] == [case.question for case in of(found, "refusal") if case.name == "given 0"]
    assert "Who built the pump?" not in {case.question for case in of(found, "questions")}


def test_long_form_tasks_are_not_asked(tmp_path: Path, plan: Plan) -> None:
    """What a model wrote itself is no measure."""
    listed = [Context("A pump stands there.", "pumps", (Task("Summarise the passage.", ("A pump.",), "long"),))]
    tokenizer = byte_tokenizer().backend_tokenizer

    with indexed(tmp_path / "c", listed, HashEmbedder(), tokenizer=tokenizer, chunk_tokens=150) as corpus:
        assert [] == [case for case in asked(corpus, plan) if case.part != "passkey"]


# Planted facts


def test_facts_of_all_kinds_are_planted_once(plan: Plan) -> None:
    """Kinds take turns, each fact stands in its context, no answer is torn apart and no question comes twice."""
    found = planted(contexts(), plan)
    tasks = [(context, task) for context in found for task in context.tasks]
    facts = [(context, task) for context, task in tasks if is_planted(task)]

    assert sorted(task.kind for _, task in facts) == sorted(f"{PLANTED} {kind}" for kind in FACTS)
    assert all(task.answers[0] in context.text for context, task in tasks)
    assert len({task.question for _, task in facts}) == len(facts)
    assert [len(context.tasks) for context in contexts()] == [1] * 10
    assert found == planted(contexts(), plan)


def test_more_facts_than_contexts_share_them(plan: Plan) -> None:
    """Of four contexts two get three of six facts each, and two none: passkeys are hidden in those."""
    found = planted(contexts()[:4], Plan(planted_facts=6))

    assert [1, 1, 4, 4] == sorted(len(context.tasks) for context in found)
    assert [] == planted([], plan)


def test_planted_facts_are_asked_by_kind(corpus: Corpus, plan: Plan) -> None:
    """Every planted fact is a case of the part of its kind, with retrieved passages."""
    facts = [case for case in asked(corpus, plan) if case.part.startswith("planted ")]

    assert sorted(case.part for case in facts) == sorted(f"planted {kind}" for kind in FACTS)
    assert {len(case.passages) for case in facts} == {2}


def test_a_passkey_lies_at_its_depth(corpus: Corpus, plan: Plan) -> None:
    """The filler has the length, only one of its chunks holds the key, and that one moves with the depth."""
    listed = list(passkeys(corpus, plan, samples=1))
    places = [
        next(place for place, passage in enumerate(case.passages) if contains(passage.text, case.answers))
        for case in listed
    ]

    assert [0.0, 0.25, 0.5, 0.75, 1.0] == [case.about["depth"] for case in listed]
    assert places == sorted(places)
    assert (0, len(listed[0].passages) - 1) == (places[0], places[-1])
    for case in listed:
        assert sum(passage.tokens for passage in case.passages) >= 150
        assert not any("probe" in passage.text for passage in case.passages)
        others = [passage for passage in case.passages if not contains(passage.text, case.answers)]
        assert len(case.passages) - 1 == len(others)


def test_a_length_beyond_the_corpus_is_left_out(corpus: Corpus) -> None:
    """What the corpus can fill is asked."""
    assert {150} == {case.about["length"] for case in passkeys(corpus, Plan(lengths=(100_000, 150)), samples=3)}


# Whole documents


def test_a_whole_document_is_given_in_order_and_not_retrieved(corpus: Corpus, plan: Plan) -> None:
    """Questions of kind whole get all chunks of their text, and may be answered at length."""
    text = "\n\n".join(context.text for context in contexts())
    whole = Context(text, "all", (Task("What is it about?", ("A valley and a town.",), "whole"),))

    chunked, wholes = split_whole([*contexts(), whole])
    (case,) = of(asked(corpus, plan, wholes), "whole")

    assert (contexts(), [whole]) == (chunked, wholes)
    assert "".join(text.split()) == "".join("".join(passage.text for passage in case.passages).split())
    assert 4 * plan.max_new_tokens == case.max_new_tokens


# The plan


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"questions": 0}, "--questions must be at least 1, got 0"),
        ({"planted_facts": -1}, "planted_facts must be at least 0, got -1"),
        ({"top_k": (0,)}, "--top-k must be at least 1, got 0"),
        ({"top_k": (3, 50)}, "--top-k must be at most 12, got 50"),
        ({"top_k": ()}, "--top-k must be one number or several"),
        ({"lengths": (0,)}, "lengths must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_a_plan_out_of_range_is_refused(values: dict[str, Any], told: str) -> None:
    """The message names the option, what is expected and what was found."""
    with pytest.raises(UsageError, match=told):
        Plan(**values)


def test_a_suite_is_a_plan() -> None:
    """``quick`` derives nothing from the questions and measures no time; what is given replaces what the suite has."""
    quick = Plan.of_suite("quick", questions=7, top_k=None)

    assert quick == Plan(
        questions=7, top_k=(3,), oracle=False, planted_facts=0, passkey=0, lengths=(), orders=0, repeats=0
    )
    assert Plan.of_suite("full") == Plan()
    assert Plan.of_suite("quick", top_k=(5, 1)).top_k == (5, 1)


def test_long_questions_with_evidence_are_asked(corpus: Corpus, plan: Plan, tmp_path: Path) -> None:
    """Those that people marked get a part of their own and more tokens; what a model wrote is not asked."""
    marked = Task("How does the crane live?", ("It eats frogs.",), "long", ("The crane of the valley eats frogs.",))
    made = tuple(Task(f"Tell me {kind}", ("It eats frogs.",), kind) for kind in ("long", "list", "summary"))
    data = [replace(one, tasks=(marked, *made)) if one.text.startswith("The crane of") else one for one in contexts()]
    tokenizer = byte_tokenizer().backend_tokenizer

    with indexed(tmp_path / "long", data, HashEmbedder(), tokenizer=tokenizer, chunk_tokens=150) as corpus:
        listed = asked(corpus, plan)

    (long,) = of(listed, "long")
    assert (long.question, long.answers, long.evidence) == (marked.question, marked.answers, marked.evidence)
    assert long.max_new_tokens == 4 * plan.max_new_tokens
    assert len(long.passages) == plan.top_k[0]
    assert long.about["has_gold"] == ("The crane" in "".join(passage.text for passage in long.passages))
    assert not [case for case in listed if case.question.startswith("Tell me")]
