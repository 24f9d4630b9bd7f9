"""Training examples: what stands in a batch, and that the seed decides it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gistrag.model.gist_model import GistModel
from gistrag.model.prompt import REFUSAL
from gistrag.qa.dataset import Context, Task
from gistrag.training.sampler import GAP, IGNORED, Mixture, QuestionBatch, Row, Sampler, merged

MIXTURE = Mixture(contexts=6, chunk_tokens=64, question_tokens=200, planted=0.0)


def contexts(articles: int = 3, each: int = 7) -> list[Context]:
    """Return contexts whose text names article and number, with a question each."""
    return [
        Context(f"In {a} the mill {n} has {a}{n} wheels" + "." * n, f"article {a}", (Task(f"Mill {n}?", (f"{a}{n}",)),))
        for a in "xyz"[:articles]
        for n in range(each)
    ]


def sampler(model: GistModel, seed: int = 0, *, is_varied: bool = False, **changes: Any) -> Sampler:
    """Return a sampler of the contexts."""
    return Sampler(model, contexts(), replace(MIXTURE, **changes), seed=seed, is_varied=is_varied)


def all_rows(samples: Sampler) -> list[Row]:
    """Return the rows of an epoch."""
    return [row for step in range(samples.steps_per_epoch) for row in samples.batch(step).rows]


def answers(model: GistModel, row: Row) -> list[str]:
    """Return what a row learns to answer, a text for each question; continuations are left out."""
    learned = (row.labels != IGNORED) & ~row.is_continuation
    return [
        model.decode(row.labels[where]) for n in row.segments.unique() if (where := (row.segments == n) & learned).any()
    ]


def test_an_epoch_asks_every_context_once(model: GistModel) -> None:
    """Every context is compressed and asked once an epoch, in another order the next time."""
    samples = sampler(model)

    first = [samples._epoch(0), samples._epoch(1)]

    assert all(sorted(range(21)) == sorted(n for batch in epoch for n in batch) for epoch in first)
    assert first[0] != first[1]


def test_batches_are_merged_into_one(model: GistModel) -> None:
    """Every row stands beside the same chunks as before, only numbered on, and asks the same."""
    samples = sampler(model, as_text=0.5, without_gold=0.3)
    batches = [samples.batch(0), samples.batch(1)]

    one = merged(batches)

    assert one.chunks == batches[0].chunks + batches[1].chunks
    assert one.tokens_per_gist == batches[0].tokens_per_gist
    before = [(batch.chunks, row) for batch in batches for row in batch.rows]
    for (chunks, row), moved in zip(before, one.rows, strict=True):
        assert [chunks[number] for number in row.chunks] == [one.chunks[number] for number in moved.chunks]
        assert [chunks[number] for number in row.as_text] == [one.chunks[number] for number in moved.as_text]
        assert (row.gold < 0) == (moved.gold < 0)
        assert row.gold < 0 or chunks[row.gold] == one.chunks[moved.gold]
        assert row.ids is moved.ids


def test_seed_and_step_decide_a_batch(model: GistModel) -> None:
    """A run that goes on sees what it would have seen; another seed sees something else."""
    one, again, other = sampler(model).batch(2), sampler(model).batch(2), sampler(model, seed=1).batch(2)

    assert one.chunks == again.chunks
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(one.rows, again.rows, strict=True))
    assert one.chunks != other.chunks


def test_the_gold_chunk_is_among_the_chunks_of_its_row(model: GistModel) -> None:
    """A row with gold shows it, at a place of its own choosing; its distractors come from the batch."""
    rows = all_rows(sampler(model, without_gold=0.0, chunks=(0.0, 0.0, 1.0)))

    assert all(3 == len(set(row.chunks)) and row.gold in row.chunks for row in rows)
    assert {row.chunks.index(row.gold) for row in rows} == {0, 1, 2}


def test_distractors_are_mostly_of_the_same_article(model: GistModel) -> None:
    """Hard negatives are what retrieval would have brought."""
    samples = sampler(model, without_gold=0.0, chunks=(0.0, 1.0))

    same = [
        model.decode(batch.chunks[row.chunks[0]])[3] == model.decode(batch.chunks[row.chunks[1]])[3]
        for batch in map(samples.batch, range(samples.steps_per_epoch))
        for row in batch.rows
    ]

    assert sum(same) > 0.6 * len(same)


def test_without_gold_the_answer_is_the_refusal(model: GistModel) -> None:
    """What the chunks do not say is refused, in the one sentence the product has for it."""
    rows = all_rows(sampler(model, without_gold=1.0))

    assert rows
    assert {answer for row in rows for answer in answers(model, row)} == {REFUSAL}
    assert {row.gold for row in rows} == {-1}


def test_labels_are_answer_and_end(model: GistModel) -> None:
    """Only the answer is learned, and that it ends."""
    row = all_rows(sampler(model, without_gold=0.0))[0]

    learned = row.labels[row.labels != IGNORED].tolist()

    assert model.end_id == learned[-1]
    assert learned[:-1] == row.ids.tolist()[1 - len(learned) :]


def test_questions_of_a_row_start_at_the_same_position(model: GistModel) -> None:
    """Each question is asked right behind the memory, as it will be."""
    row = next(
        row for row in all_rows(sampler(model, is_varied=True, without_gold=0.0)) if len(row.segments.unique()) > 1
    )

    for number in row.segments.unique():
        where = row.segments == number
        assert list(range(int(where.sum()))) == row.positions[where].tolist()


def test_continuations_are_tokens_of_a_shown_chunk(model: GistModel) -> None:
    """What has to be continued is what stands in the chunk."""
    samples = sampler(model, is_varied=True)
    batch = samples.batch(0)

    for row in batch.rows:
        wanted = row.labels[row.is_continuation & (row.labels != IGNORED)].tolist()
        assert any(
            wanted == chunk[i : i + len(wanted)]
            for n in row.chunks
            for chunk in [batch.chunks[n]]
            for i in range(len(chunk))
        )


def test_a_share_of_rows_has_all_chunks_as_text(model: GistModel) -> None:
    """A share of 1 gives every chunk of every row as text."""
    rows = all_rows(sampler(model, as_text=1.0))

    assert all(row.as_text == frozenset(row.chunks) for row in rows)


def test_varied_rows_are_hybrid_packed_and_have_gaps_now_and_then(model: GistModel) -> None:
    """A hybrid row has exactly one of several chunks as text; gaps stay within their limit."""
    samples = sampler(model, is_varied=True, as_text=0.0)

    rows = [row for step in range(30) for row in samples.batch(step).rows]

    assert {len(row.as_text) for row in rows} == {0, 1}
    assert all(len(row.chunks) > 1 for row in rows if row.as_text)
    assert {row.layout for row in rows} == {"packed", "spread"}
    assert {gap for row in rows for gap in row.gaps} == set(range(GAP + 1))


def test_rows_without_variety_are_gists_side_by_side(model: GistModel) -> None:
    """Validation measures the same plain rows every time."""
    samples = sampler(model, as_text=0.0)

    rows = [row for step in range(30) for row in samples.batch(step).rows]

    assert {row.as_text for row in rows} == {frozenset()}
    assert {row.layout for row in rows} == {"spread"}
    assert {gap for row in rows for gap in row.gaps} == {0}
    assert not any(row.is_continuation.any() for row in rows)


def test_long_answers_are_mixed_in(model: GistModel) -> None:
    """Contexts with a long answer now and then take the place of others."""
    long = [Context(f"long {n}", "elsewhere", (Task("Summarise.", (f"L{n}",), "long"),)) for n in range(3)]
    samples = Sampler(model, contexts() + long, replace(MIXTURE, without_gold=0.0), seed=0)

    said = [answers(model, row)[0] for step in range(30) for row in samples.batch(step).rows]

    assert 0.06 < sum(answer.startswith("L") for answer in said) / len(said) < 0.24
    assert sum(len(batch) for batch in samples._epoch(0)) == 21


def test_questions_beside_a_long_answer_are_asked_too(model: GistModel) -> None:
    """A context with both is drawn like any other, and its long answer comes now and then."""
    both = [replace(one, tasks=(*one.tasks, Task("Summarise.", ("L",), "long"))) for one in contexts()]
    samples = Sampler(model, both, replace(MIXTURE, without_gold=0.0), seed=0)

    said = [answer for row in all_rows(samples) for answer in answers(model, row)]

    assert sum(len(batch) for batch in samples._epoch(0)) == 21
    assert 0 < said.count("L") < 10
    assert said.count("L") + len({*said} - {"L"}) <= len(said)
    assert len({*said} - {"L"}) > 10


def test_what_was_cut_off_is_not_asked(model: GistModel) -> None:
    """A chunk ends where the mixture says, and a question whose answer stood behind is left out."""
    long = [
        Context(
            f"first {n} " + "." * 80 + f" last {n}",
            "a",
            (Task("first?", (f"first {n}",)), Task("last?", (f"last {n}",))),
        )
        for n in range(6)
    ]
    samples = Sampler(model, long, replace(MIXTURE, without_gold=0.0), seed=0)

    said = {answer for row in all_rows(samples) for answer in answers(model, row)}

    assert {f"first {n}" for n in range(6)} == said


def test_planted_facts_are_asked_for(model: GistModel) -> None:
    """A planted fact is asked for first, so that its question always has room."""
    samples = sampler(model, planted=1.0, without_gold=0.0, chunk_tokens=400)
    batch = samples.batch(0)

    for row in batch.rows:
        assert answers(model, row)[0] in model.decode(batch.chunks[row.gold])


@pytest.mark.parametrize("room", [30, 90, 300])
def test_a_row_keeps_to_its_room(model: GistModel, room: int) -> None:
    """However many questions there are, only those that fit are asked, and always one."""
    many = tuple(Task(f"Question {n}?", ("yes",)) for n in range(20))
    samples = Sampler(
        model,
        [replace(context, tasks=many) for context in contexts()],
        replace(MIXTURE, question_tokens=room, without_gold=0.0),
        seed=0,
        is_varied=False,
    )

    rows = all_rows(samples)

    one = min(len(row.ids) for row in rows)
    assert all(one <= len(row.ids) <= max(room, one + 2) for row in rows)


def test_the_mask_shows_memory_and_what_stands_before(model: GistModel) -> None:
    """A question sees the real slots of its memory and itself, never another question, never padding."""
    rows = sampler(model, is_varied=True).batch(0).rows[:2]
    questions = QuestionBatch.of(rows)
    visible = torch.tensor([[False, True, True], [True, True, True]])

    mask = questions.mask(visible)

    segments = questions.segments
    for b, n in ((0, 0), (0, 5), (1, 3)):
        assert visible[b].tolist() == mask[b, n, :3].tolist()
        own = [segments[b, n] == segments[b, m] and m <= n for m in range(segments.shape[1])]
        assert own == mask[b, n, 3:].tolist()


def test_long_contexts_are_cut(model: GistModel) -> None:
    """A context longer than the limit is cut there."""
    long = [replace(context, text=context.text * 40) for context in contexts()]

    batch = Sampler(model, long, MIXTURE, seed=0).batch(0)

    assert set(map(len, batch.chunks)) == {MIXTURE.chunk_tokens}


def special(kind: str, answer: str) -> Context:
    """Return a context with one question of a kind that has a share of its own."""
    return Context("In w the mill 0 has w0 wheels", "article w", (Task("Which mills?", (answer,), kind),))


@pytest.mark.parametrize(
    ("kind", "answer", "share"),
    [
        ("long", "One of wheels.", "long"),
        ("list", "- mill 0", "long"),
        ("summary", "A mill.", "long"),
        ("refusal", REFUSAL, "unanswerable"),
    ],
)
def test_special_questions_have_a_share(model: GistModel, kind: str, answer: str, share: str) -> None:
    """None of them is asked at a share of 0, nothing else at 1; validation asks none."""
    data = [*contexts(), special(kind, answer)]
    asked = []
    for size, is_varied in ((0.0, True), (1.0, True), (1.0, False)):
        mixture = replace(MIXTURE, without_gold=0.0, **{"long": 0.0, share: size})
        rows = all_rows(Sampler(model, data, mixture, seed=0, is_varied=is_varied))
        asked.append({answer for row in rows for answer in answers(model, row)})

    assert answer not in asked[0] | asked[2]
    assert asked[1] == {answer}
