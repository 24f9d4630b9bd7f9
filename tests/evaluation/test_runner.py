"""Arms answer the same cases from what they are named after, and an evaluation that is stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import HashEmbedder, byte_tokenizer, tiny_model

from gistrag.compression.compress import compress
from gistrag.errors import UsageError
from gistrag.evaluation import arms as arms_module
from gistrag.evaluation import runner
from gistrag.evaluation.arms import ARMS, Arm, MemoryCache, Row, arms, gist_arm
from gistrag.evaluation.cases import Case, Plan, cases, planted
from gistrag.evaluation.corpus import Passage, indexed
from gistrag.evaluation.runner import Journal, Runner, answered, key_of, pairs_of, scored, unanswered
from gistrag.kv.cache import Memory, as_stored, concatenate
from gistrag.kv.packed import stored_bytes
from gistrag.model.generation import generate, read_text
from gistrag.model.gist_model import GistModel
from gistrag.qa.dataset import Context, Task
from gistrag.settings import GistSettings

TEXTS = ("The crane eats frogs.", "The mill has two wheels and a roof of straw.", "Nobody lives in the old tower.")
PASSAGES = tuple(Passage(text, ("Valley",), len(text)) for text in TEXTS)
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def tuned() -> GistModel:
    """A tiny model with an adapter of random weights."""
    return adapted(tiny_model())


def adapted(model: GistModel, **settings: Any) -> GistModel:
    model.new_adapter(rank=2, gists=1, **settings)
    generator = torch.Generator().manual_seed(3)
    assert model.adapter is not None
    with torch.no_grad():
        for _, weights in model.adapter.parameters():
            weights.add_(torch.randn(weights.shape, generator=generator).to(weights) / 2)
    return model


def case(name: str = "0", *, passages: Sequence[Passage] = PASSAGES, part: str = "questions", **fields: Any) -> Case:
    document = (*PASSAGES, Passage("It is cold.", (), 11))
    return Case(part, name, f"What about {name}?", ("frogs",), tuple(passages), NEW_TOKENS, document, **fields)


def every(model: GistModel, *, rates: Sequence[int] = (2, 4)) -> list[Arm]:
    return arms(ARMS, rates=rates, placement="anchored", main_rate=2, has_adapter=model.adapter is not None)


def rows(
    model: GistModel, pairs: Sequence[tuple[Case, Arm]], kind: Any = "auto", **options: Any
) -> dict[tuple[str, str, str], Row]:
    return {key_of(row): row for row in Runner(MemoryCache(model, kind), **options).rows(pairs)}


def generated_alone(model: GistModel, memory: Memory, question: str) -> str:
    tokens = generate(model, memory, model.encode_question(question), max_new_tokens=NEW_TOKENS)
    return model.decode(list(tokens)).strip()


def joined(listed: Sequence[list[int]]) -> list[int]:
    return [token for ids in listed for token in ids]


def encoded(model: GistModel, passages: Sequence[Passage]) -> list[list[int]]:
    return [model.encode_passage(passage.text, passage.heading) for passage in passages]


# Arms


def test_arms_come_in_the_order_of_a_table() -> None:
    """Whatever order they are asked for in; without an adapter no arm is without one, nor where one made the gists."""
    names = [
        arm.name for arm in arms(["hybrid", *ARMS], rates=(2, 8), placement="anchored", main_rate=4, has_adapter=True)
    ]
    base = [arm.name for arm in arms(ARMS, rates=(2,), placement="selected", main_rate=2, has_adapter=False)]
    matched = [arm.name for arm in arms(ARMS, rates=(2,), placement="matched", main_rate=2, has_adapter=True)]

    assert base == ["none", "full context", "text", "uncompressed KV", "gist 2", "hybrid 2"]
    assert names[:4] == ["none", "full context", "text without adapter", "text"]
    assert names[4:] == ["uncompressed KV", "gist 2", "gist 8", "hybrid 4"]
    assert matched[4:] == ["uncompressed KV", "gist 2 without adapter", "gist 2", "hybrid 2"]


@pytest.mark.parametrize(("names", "rates", "told"), [(["txt"], (2,), "got txt"), (["gist"], (0,), "got 0")])
def test_arms_that_make_no_sense_are_refused(names: list[str], rates: tuple[int, ...], told: str) -> None:
    """One line says what can be asked for."""
    with pytest.raises(UsageError, match=told):
        arms(names, rates=rates, placement="selected", main_rate=2, has_adapter=False)


def test_side_parts_are_for_arms_that_read_the_passages(tuned: GistModel) -> None:
    """Beside the main questions no arm without passages answers, none without adapter, and no hybrid of one passage."""
    main = [arm.name for arm in every(tuned) if arm.takes(case())]
    side = [arm.name for arm in every(tuned) if arm.takes(case(part="refusal"))]
    one = [arm.name for arm in every(tuned) if arm.takes(case(part="oracle", passages=PASSAGES[:1]))]

    assert [arm.name for arm in every(tuned)] == main
    assert ["text", "uncompressed KV", "gist 2", "gist 4", "hybrid 2"] == side
    assert ["text", "uncompressed KV", "gist 2", "gist 4"] == one


def test_long_questions_are_for_the_base_too(tuned: GistModel) -> None:
    """They tell what the adapter costs in long answers, so the base that reads the passages answers them as well."""
    long = [arm.name for arm in every(tuned) if arm.takes(case(part="long"))]

    assert ["text without adapter", "text", "uncompressed KV", "gist 2", "gist 4", "hybrid 2"] == long


def test_a_long_answer_is_scored_against_its_evidence() -> None:
    """It has ROUGE-L and the share of the marked words; any other row has neither."""
    marked = case(part="long", evidence=("The crane eats frogs.",))

    long, short = (scored(one, Arm("text", "text"), "it eats frogs at noon") for one in (marked, case()))

    assert (long["rouge_l"], long["evidence"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert long["hallucinated"] is None
    assert short.keys() & {"rouge_l", "evidence"} == set()


# Answers


def test_an_arm_generates_what_a_query_would(tuned: GistModel) -> None:
    """In a batch every arm generates what it generates alone, from the memory that it is named after."""
    listed = [case("a"), case("a longer question than that"), case("b", passages=PASSAGES[1:])]
    found = rows(tuned, [(one, arm) for one in listed for arm in every(tuned)])
    model, prefix = tuned, tuned.prefix

    def placed(*caches: Any) -> Memory:
        return concatenate([prefix, *caches], model.rope)

    for one in listed:
        ids = encoded(model, one.passages)
        gists = compress(model, ids, GistSettings(placement="anchored", tokens_per_gist=2))
        memories = {
            "none": placed(),
            "full context": read_text(model, placed(), joined(encoded(model, one.document))),
            "text": read_text(model, placed(), joined(ids)),
            "uncompressed KV": placed(*compress(model, ids, GistSettings(placement="selected", tokens_per_gist=1))),
            "gist 2": placed(*gists),
            "gist 4": placed(*compress(model, ids, GistSettings(placement="anchored", tokens_per_gist=4))),
            "hybrid 2": read_text(model, placed(*gists[:-1]), ids[-1]),
        }
        for arm, memory in memories.items():
            assert generated_alone(model, memory, one.question) == found["questions", one.name, arm]["generated"], arm


def test_all_arms_get_the_same_passages(tuned: GistModel) -> None:
    """Rows of one case name the same passages in the same order, and costs follow from how they are given."""
    found = rows(tuned, [(case(), arm) for arm in every(tuned)])
    tokens = sum(map(len, encoded(tuned, PASSAGES)))

    assert 1 == len({tuple(row["passages"]) for row in found.values()})
    by_arm = {row["arm"]: row for row in found.values()}
    assert (0, 0) == (by_arm["none"]["slots"], by_arm["none"]["stored_bytes"])
    assert (tokens, tokens) == (by_arm["text"]["slots"], by_arm["text"]["source_tokens"])
    assert (tokens, tokens) == (by_arm["uncompressed KV"]["slots"], by_arm["uncompressed KV"]["source_tokens"])
    assert tokens / 2 <= by_arm["gist 2"]["slots"] <= tokens / 2 + 2
    assert sum(len(text) for text in TEXTS) == by_arm["text"]["stored_bytes"]
    per_slot = tuned.kv_bytes_per_slot + 2  # and its position
    assert by_arm["gist 2"]["slots"] * per_slot == by_arm["gist 2"]["stored_bytes"]


@pytest.mark.parametrize(("kind", "share"), [("int8", 2 / 3), ("int4", 2 / 3)])
def test_gists_are_those_of_quantized_files(tuned: GistModel, kind: str, share: float) -> None:
    """Answers come from what a file would give back, and cost the bytes it would take."""
    arm = gist_arm("anchored", 2)
    caches = compress(tuned, encoded(tuned, PASSAGES), GistSettings(placement="anchored", tokens_per_gist=2))
    stored = [as_stored(cache, kind) for cache in caches]

    (found,) = rows(tuned, [(case(), arm)], kind=kind).values()

    memory = concatenate([tuned.prefix, *stored], tuned.rope)
    assert generated_alone(tuned, memory, "What about 0?") == found["generated"]
    planned = sum(stored_bytes(cache.kv.shape, kind, itemsize=8) + 2 * cache.gists for cache in caches)
    assert planned == found["stored_bytes"] < share * sum(cache.kv.nbytes for cache in caches)


def test_an_adapter_changes_the_arms_that_use_it(tuned: GistModel) -> None:
    """The arm without adapter generates what a model that has none generates; the other arm does not."""
    listed = [case(name) for name in "abcdef"]
    found = rows(tuned, [(one, arm) for one in listed for arm in every(tuned)])
    base = rows(tiny_model(), [(one, Arm("text", "text")) for one in listed])

    expected = [base["questions", one.name, "text"]["generated"] for one in listed]
    assert expected == [found["questions", one.name, "text without adapter"]["generated"] for one in listed]
    assert expected != [found["questions", one.name, "text"]["generated"] for one in listed]


def test_the_adapter_is_back_after_an_answer_without_it(tuned: GistModel) -> None:
    """Also when the answer failed."""
    settings = tuned.adapter and tuned.adapter.settings
    before = rows(tuned, [(case(), Arm("text", "text"))])

    with suppress(RuntimeError), tuned.without_adapter() as base:
        assert base.adapter is None
        raise RuntimeError("no answer")

    assert settings is (tuned.adapter and tuned.adapter.settings)
    assert before == rows(tuned, [(case(), Arm("text", "text"))])


def test_small_groups_give_the_same_rows(tuned: GistModel) -> None:
    """How much is kept and computed at a time changes no answer."""
    pairs = [
        (case(name, passages=PASSAGES[: 1 + at % 3]), arm) for at, name in enumerate("abc") for arm in every(tuned)
    ]

    at_once = rows(tuned, [(one, arm) for one, arm in pairs if arm.takes(one)])
    bit_by_bit = rows(tuned, [(one, arm) for one, arm in pairs if arm.takes(one)], group_bytes=1, batch_bytes=1)

    assert at_once == bit_by_bit


def test_groups_of_matched_gists_fit_where_heads_keep_different_numbers(model: GistModel) -> None:
    """What is kept at a time is counted as it lies in memory, as wide as the head that keeps most."""
    texts = [f"{day} {' '.join(TEXTS)}" for day in ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")]
    passages = [Passage(text, (), len(model.encode_passage(text, ()))) for text in texts]
    pairs = [(case(str(at), passages=(passage,)), gist_arm("matched", 8)) for at, passage in enumerate(passages)]
    most = max(one.tokens for one in passages) * model.kv_bytes_per_slot
    limited = Runner(MemoryCache(model), group_bytes=most)

    groups = list(limited.groups(pairs))

    assert pairs == [pair for group in groups for pair in group]
    for group in groups:
        caches = MemoryCache(model).caches(group)
        assert any(cache.is_ragged for cache in caches.values())
        assert sum(cache.kv.nbytes for cache in caches.values()) <= most


def test_a_passage_is_read_once_for_all_rates(tuned: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One text pass makes gists at every rate and the uncompressed cache, however many cases share a passage."""
    read: list[list[int]] = []

    class Counted(arms_module.TextPass):
        def __init__(self, model: GistModel, chunks: Sequence[Sequence[int]]) -> None:
            read.extend(map(list, chunks))
            super().__init__(model, chunks)

    monkeypatch.setattr(arms_module, "TextPass", Counted)

    rows(tuned, [(case(name), arm) for name in "abc" for arm in every(tuned) if arm.give == "gists"])

    assert sorted(encoded(tuned, PASSAGES)) == sorted(read)


def test_the_same_prompt_is_answered_once(tuned: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question whose oracle is its best chunk gets one answer for both parts."""
    prompts: list[Any] = []
    together = runner.generate_batch

    def counted(model: GistModel, memories: Any, listed: Any, **options: Any) -> Any:
        prompts.extend(listed)
        return together(model, memories, listed, **options)

    monkeypatch.setattr(runner, "generate_batch", counted)
    parts = [case(part=part, passages=PASSAGES[:1]) for part in ("top 1", "oracle")]

    found = rows(tuned, [(one, Arm("text", "text")) for one in parts])

    assert 1 == len(prompts)
    assert found["top 1", "0", "text"]["generated"] == found["oracle", "0", "text"]["generated"]


def test_gists_that_do_not_fit_spread_are_packed(tuned: GistModel) -> None:
    """As in the product; text that does not fit is left out with what is missing."""
    many = tuple(Passage(f"{number} {TEXTS[1]}", (), 48) for number in range(18))
    found = rows(tuned, [(case(passages=many), arm) for arm in every(tuned)])
    gists = compress(tuned, encoded(tuned, many), GistSettings(placement="anchored", tokens_per_gist=4))
    packed = concatenate([tuned.prefix, *gists], tuned.rope, layout="packed")

    assert "positions more than the model" in found["questions", "0", "text"]["left_out"]
    assert generated_alone(tuned, packed, case().question) == found["questions", "0", "gist 4"]["generated"]


def test_an_answer_is_cut_where_its_case_says(tuned: GistModel) -> None:
    """A case that may be answered at length does not lengthen the others of its batch."""
    long = Case("whole", "0", "What about 0?", ("frogs",), PASSAGES, 4 * NEW_TOKENS)

    found = rows(tuned, [(one, Arm("text", "text")) for one in (case(), long)])
    short, whole = found["questions", "0", "text"], found["whole", "0", "text"]

    assert whole["generated"].startswith(short["generated"])
    assert len(whole["generated"]) > len(short["generated"])
    assert whole["hallucinated"] is None


def test_an_arm_is_judged_by_what_it_was_given() -> None:
    """What the whole document says is not made up, even where retrieval missed it; with nothing given nothing is."""
    one = Case(
        "questions", "0", "Who?", ("Novak",), (Passage("a mill"),), 8, (Passage("by Novak"),), {"has_gold": False}
    )

    given = {give: scored(one, Arm(give, give), "Novak") for give in ("text", "document", "nothing")}
    below = scored(replace(one, passages=(Passage("a mill", ("Novak",)),)), Arm("text", "text"), "Novak")

    assert [True, False, None] == [row["hallucinated"] for row in given.values()]
    assert [False, True, False] == [row["has_answer"] for row in given.values()]
    assert not below["hallucinated"]  # the model is shown the heading


# Keeping


def test_an_evaluation_goes_on_where_it_was_stopped(tuned: GistModel, tmp_path: Path) -> None:
    """Rows that are there are not computed again, and in the end all rows are those of one go."""
    listed, chosen = [case(name) for name in "abcd"], every(tuned)
    whole = tmp_path / "whole.jsonl"
    with Journal(whole) as journal:
        for row in Runner(MemoryCache(tuned)).rows(unanswered(pairs_of(listed, chosen), journal)):
            journal.add(row)
        expected = answered(pairs_of(listed, chosen), journal)
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:9]) + b'{"part": "questions", "na')

    with Journal(cut) as journal:
        pending = unanswered(pairs_of(listed, chosen), journal)
        for row in Runner(MemoryCache(tuned)).rows(pending):
            journal.add(row)
        found = answered(pairs_of(listed, chosen), journal)

    assert len(expected) - 9 == len(pending)
    assert expected == found
    assert len(expected) == len([json.loads(line) for line in cut.read_text("utf-8").splitlines()])


def test_a_journal_reads_what_it_wrote(tmp_path: Path) -> None:
    """Rows come back by part, name and arm; a line that is none is passed over."""
    path = tmp_path / "rows.jsonl"
    row = {"part": "questions", "name": "0", "arm": "text", "generated": "zwölf\u2028"}
    with Journal(path) as journal:
        journal.add(row)
    with path.open("ab") as file:
        file.write(b"[1]\nnonsense\n")

    with Journal(path) as journal:
        assert {("questions", "0", "text"): row} == journal.rows


def test_rows_that_were_not_asked_for_are_not_answers(tmp_path: Path) -> None:
    """A journal may hold more arms than are looked at."""
    with Journal(tmp_path / "rows.jsonl") as journal:
        for arm in ("text", "none"):
            journal.add({"part": "questions", "name": "0", "arm": arm})

        assert ["text"] == [row["arm"] for row in answered([(case(), Arm("text", "text"))], journal)]


# The whole thing


def test_two_runs_are_equal(tuned: GistModel, tmp_path: Path) -> None:
    """From contexts to rows everything follows from plan and model."""
    contexts = [Context(text, "valley", (Task("What about it?", ("frogs",)),)) for text in TEXTS]
    plan = Plan(questions=2, top_k=(2, 1), planted_facts=2, unanswerable=1, passkey=0, orders=1, max_new_tokens=4)

    def run(folder: Path) -> list[Row]:
        tokenizer = byte_tokenizer().backend_tokenizer
        with indexed(folder, planted(contexts, plan), HashEmbedder(), tokenizer=tokenizer, chunk_tokens=120) as corpus:
            asked = cases(corpus, [], plan, document_tokens=200)
        return list(
            Runner(MemoryCache(tuned)).rows([(one, arm) for one in asked for arm in every(tuned) if arm.takes(one)])
        )

    assert run(tmp_path / "first") == run(tmp_path / "second")


FACTS = {
    "bakery": ("The bakery on Mill Street sells rye bread only.", "What does the bakery sell?", "rye bread"),
    "harbour": ("The harbour was built in 1874 by Dutch engineers.", "When was the harbour built?", "1874"),
    "museum": ("The museum is closed on Tuesday because of cleaning.", "On which day is the museum closed?", "Tuesday"),
    "river": ("The river Lenne is 129 kilometres long.", "How long is the river Lenne?", "129 kilometres"),
    "mayor": ("The mayor of the town is Greta Olsen.", "Who is the mayor of the town?", "Greta Olsen"),
    "bridge": ("The old bridge is made of red granite.", "What is the old bridge made of?", "red granite"),
    "train": ("The first train leaves at 5:40 in the morning.", "When does the first train leave?", "5:40"),
    "hotel": ("The hotel Aurora has 62 rooms.", "How many rooms has the hotel Aurora?", "62"),
    "school": ("The school teaches Latin and Greek.", "Which languages does the school teach?", "Latin and Greek"),
    "church": ("The church has nine bells.", "How many bells has the church?", "nine"),
    "forest": ("The forest is full of beech trees.", "Which trees are in the forest?", "beech"),
    "castle": ("The castle belongs to the Brandt family.", "To which family does the castle belong?", "Brandt"),
}  # fmt: skip


@pytest.mark.model
def test_text_beats_nothing_and_full_caches_come_near(default_model: GistModel) -> None:
    """Made-up facts are known from their passages only: text answers several of twelve, no context hardly any."""
    passages = {name: Passage(text, (name.title(),), 20) for name, (text, _, _) in FACTS.items()}
    listed = [
        Case(
            "questions",
            name,
            question,
            (answer,),
            (passages["hotel" if name != "hotel" else "river"], passages[name]),
            24,
        )
        for name, (_, question, answer) in FACTS.items()
    ]
    chosen = [Arm("none", "nothing"), Arm("text", "text"), Arm("uncompressed KV", "gists"), gist_arm("selected", 2)]

    found = rows(default_model, [(one, arm) for one in listed for arm in chosen])
    right = {arm.name: sum(found["questions", one.name, arm.name]["contains"] for one in listed) for arm in chosen}
    print(right)

    assert right["none"] <= 2
    assert right["text"] >= 7
    assert right["uncompressed KV"] >= right["none"] + 3
