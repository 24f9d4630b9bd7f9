"""Training an adapter: what gradients reach, that learning happens, and that a run goes on exactly where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from support.tiny_models import FAMILIES, tiny_model
from torch import Tensor

from gistrag.compression.compress import compress
from gistrag.compression.placements import TextPass
from gistrag.errors import DivergedError, IndexLockedError, ResourceError, UsageError
from gistrag.kv.cache import GistCache
from gistrag.model import adapter
from gistrag.model.adapter import Adapter, Role
from gistrag.model.gist_model import GistModel
from gistrag.qa.dataset import Context, Task
from gistrag.settings import GistSettings, Placement
from gistrag.training import trainer as training
from gistrag.training.checkpoints import SPIKE_STEPS, Run, checkpoints, draw, read_log
from gistrag.training.recipe import LossWeights, Recipe
from gistrag.training.sampler import IGNORED, Batch, Mixture, Row, Sampler
from gistrag.training.trainer import ChunkCaches, Trainer, TrainingStep

MIXTURE = Mixture(rates={2: 0.5, 4: 0.5}, chunks=(0.4, 0.3, 0.3), contexts=4, chunk_tokens=48, question_tokens=120)
RECIPE = Recipe(steps=30, rank=4, rate=1e-2, mixture=MIXTURE)
PLAIN = LossWeights(distillation=0.0, continuation=0.5)


def contexts(count: int = 8) -> list[Context]:
    """Return short contexts of two articles, each with a question."""
    return [
        Context(
            f"The mill number {n} has {n + 3} wheels.", f"article {n % 2}", (Task("How many wheels?", (str(n + 3),)),)
        )
        for n in range(count)
    ]


def trainee(family: str = "llama", *, placement: str = "anchored", **changes: object) -> GistModel:
    """Return a tiny model with a new adapter."""
    model = tiny_model(family, dtype=torch.float32, **changes)
    model.new_adapter(rank=4, gists=24, placement=placement)
    return model


def sampler(model: GistModel, mixture: Mixture = MIXTURE, *, is_varied: bool = True) -> Sampler:
    """Return batches of the contexts."""
    return Sampler(model, contexts(), mixture, seed=0, is_varied=is_varied)


def trainer(recipe: Recipe = RECIPE) -> Trainer:
    """Return a trainer of a tiny model."""
    model = trainee(placement=recipe.placement)
    return Trainer(model, sampler(model, recipe.mixture), recipe)


def learn(
    model: GistModel, batch: Batch, weights: LossWeights = PLAIN, rows_together: int = 8
) -> dict[str, torch.Tensor]:
    """Return the gradient of everything that a batch reaches."""
    assert model.adapter is not None
    model.prepare_training()
    trained = dict(model.adapter.parameters())
    for tensor in trained.values():
        tensor.requires_grad_(True)
        tensor.grad = None
    model.is_training = True
    TrainingStep(model, batch).learn(weights, rows_together)
    model.is_training = False
    return {name: tensor.grad for name, tensor in trained.items() if tensor.grad is not None}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_reach_gist_vectors_and_adapter_only(family: str) -> None:
    """Nothing of the base model is ever trained, in any family."""
    model = trainee(family)
    base = {name for name, _ in model.network.named_parameters() if "lora_" not in name}

    reached = learn(model, sampler(model).batch(0))

    assert reached["gist_vectors"].abs().sum() > 0
    assert any("lora_B" in name and gradient.abs().sum() > 0 for name, gradient in reached.items())
    assert not {name for name, weights in model.network.named_parameters() if name in base and weights.grad is not None}


def test_learned_gist_vectors_are_trained() -> None:
    """The classic placement is trained by the same code, every gist vector of its own."""
    model = trainee(placement="learned")

    reached = learn(model, sampler(model).batch(0))

    assert 1 < (reached["gist_vectors"].abs().sum(dim=1) > 0).sum()


@pytest.mark.parametrize("placement", ["matched", "adaptive", "selected"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gists_of_the_base_teach_only_their_reader(family: str, placement: str) -> None:
    """What the base model made has no gradient; the adapter that reads it has."""
    model = trainee(family, placement=placement)
    batch = sampler(model).batch(0)

    reached = learn(model, batch, LossWeights(distillation=1.0, continuation=0.5))

    assert "gist_vectors" not in reached
    assert any("lora_B" in name and gradient.abs().sum() > 0 for name, gradient in reached.items())
    assert math.isfinite(TrainingStep(model, batch).measure().answer)


def test_rows_read_apart_leave_the_same_gradients() -> None:
    """How many rows are read together is a matter of memory, not of the result."""
    model = trainee()
    batch = sampler(model).batch(0)
    weights = LossWeights(distillation=1.0, continuation=0.5)

    together, apart = (learn(model, batch, weights, rows) for rows in (8, 1))

    assert together.keys() == apart.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, apart[name], rtol=1e-4, atol=1e-6)


def test_a_new_adapter_changes_nothing() -> None:
    """Before training, gists and answers are those of the base model."""
    model, plain = trainee(), tiny_model(dtype=torch.float32)
    chunks = [list(b"a chunk to compress"), list(b"another")]

    with_adapter, without = (
        compress(each, chunks, GistSettings(placement="anchored", tokens_per_gist=2)) for each in (model, plain)
    )

    assert all(torch.equal(one.kv, other.kv) for one, other in zip(with_adapter, without, strict=True))


def test_the_adapter_leaves_text_alone() -> None:
    """Text is read by the frozen base, whatever the adapter has learned; its gists are not."""
    model = trainee()
    shake(model)
    chunk = [list(b"a chunk to compress")]

    text = TextPass(model, chunk).compress("selected", 1)[0]
    plain = TextPass(tiny_model(dtype=torch.float32), chunk)

    assert torch.equal(plain.compress("selected", 1)[0].kv, text.kv)
    assert not torch.equal(
        plain.compress("anchored", 2)[0].kv, compress(model, chunk, GistSettings(placement="anchored"))[0].kv
    )


def shake(model: GistModel) -> None:
    """Give the adapter weights as if it had been trained."""
    assert model.adapter is not None
    torch.manual_seed(1)
    with torch.no_grad():
        for _, weights in model.adapter.parameters():
            weights.add_(torch.randn_like(weights) * 0.1)


def test_a_chunk_never_sees_another_chunk() -> None:
    """Changing one chunk of a batch leaves the gists of the others as they were."""
    model = trainee()
    shake(model)
    first, changed = (
        TextPass(model, [list(b"a chunk of its own"), list(other)]).compress("anchored", 2)
        for other in (b"some other chunk!!", b"quite another text")
    )

    assert torch.equal(first[0].kv, changed[0].kv)
    assert not torch.equal(first[1].kv, changed[1].kv)


def test_answers_see_text_only_through_gists() -> None:
    """With the gists held fixed, the text of a chunk is without influence on any loss."""
    model = trainee()
    batch = sampler(model, replace(MIXTURE, as_text=0.0), is_varied=False).batch(0)
    other = replace_chunks(batch, [[token ^ 1 for token in chunk] for chunk in batch.chunks])
    one, two = TrainingStep(model, batch), TrainingStep(model, other)
    changed = two.measure().answer
    two = TrainingStep(model, other)
    two._gists = one._gists

    expected = one.measure().answer

    assert two.measure().answer == expected
    assert changed != expected


def replace_chunks(batch: Batch, chunks: list[list[int]]) -> Batch:
    """Return the batch with other chunks of the same lengths."""
    return Batch(chunks, batch.tokens_per_gist, batch.rows)


def test_packed_questions_do_not_see_each_other() -> None:
    """The loss of each question is the one it has when it is asked alone."""
    model = trainee()
    batch = sampler(model, replace(MIXTURE, chunks=(1.0,), as_text=0.0), is_varied=False).batch(0)
    row = batch.rows[0]
    alone = Batch(batch.chunks, batch.tokens_per_gist, [row])
    twice = replace(
        row,
        **{name: torch.cat((getattr(row, name),) * 2) for name in ("ids", "positions", "labels", "is_continuation")},
        segments=torch.cat((row.segments, row.segments + 1 + row.segments.max())),
    )

    expected = TrainingStep(model, alone).measure()
    found = TrainingStep(model, Batch(batch.chunks, batch.tokens_per_gist, [twice])).measure()

    assert 2 * expected.answers == found.answers
    assert expected.answer == pytest.approx(found.answer / 2, rel=1e-5)


def test_training_is_what_serving_computes() -> None:
    """The loss of a row is that of its question behind separately compressed and concatenated caches."""
    from gistrag.kv.cache import concatenate

    model = trainee()
    shake(model)
    mixture = replace(MIXTURE, as_text=0.0, planted=0.0, without_gold=0.0)
    batch = sampler(model, mixture, is_varied=False).batch(0)
    row = batch.rows[0]
    caches = [
        compress(model, [batch.chunks[n]], GistSettings(placement="anchored", tokens_per_gist=batch.tokens_per_gist))[0]
        for n in row.chunks
    ]
    memory = concatenate([model.prefix, *caches], model.rope)
    first = row.segments == 0
    hidden = model.read(memory).feed(
        row.ids[None, first], positions=memory.next_position + row.positions[first], role="answers"
    )
    learned = row.labels[first] != IGNORED
    scores = model.logits(hidden[0][learned]).float()
    expected = torch.nn.functional.cross_entropy(scores, row.labels[first][learned], reduction="sum")

    found = TrainingStep(model, Batch(batch.chunks, batch.tokens_per_gist, [only_first_question(row)])).measure()

    assert expected.item() == pytest.approx(found.answer, rel=1e-4)


def only_first_question(row: Row) -> Row:
    """Return the row with its first question only."""
    first = row.segments == 0
    names = ("ids", "positions", "labels", "segments", "is_continuation")
    return replace(row, **{name: getattr(row, name)[first] for name in names})


def test_distillation_changes_the_gradient() -> None:
    """The teacher reads the gold chunk as text, which the student has as gists."""
    model = trainee()
    shake(model)
    batch = sampler(model, replace(MIXTURE, as_text=0.0)).batch(0)

    plain, taught = (learn(model, batch, replace(PLAIN, distillation=weight)) for weight in (0.0, 1.0))

    assert any(not torch.equal(plain[name], taught[name]) for name in plain)


@pytest.mark.parametrize(("rate", "is_same"), [(1, True), (4, False)])
def test_a_student_with_the_cache_of_the_gold_text_has_no_distance_to_its_teacher(rate: int, is_same: bool) -> None:
    """At one token per gist selected gists are the uncompressed cache that the teacher reads; at four they are not."""
    model = trainee(placement="selected", initializer_range=0.3)
    shake(model)
    mixture = replace(MIXTURE, rates={rate: 1.0}, chunks=(1.0,), as_text=0.0, without_gold=0.0)
    step = taught_step(model, sampler(model, mixture, is_varied=False).batch(0))

    assert step.losses.taught == step.losses.answers > 0
    assert (step.losses.distillation == pytest.approx(0.0, abs=1e-4)) == is_same


def test_a_student_that_reads_the_gold_text_alone_has_no_teacher() -> None:
    """Its forward pass would be the teacher's own, so it is saved."""
    model = trainee()
    mixture = replace(MIXTURE, chunks=(1.0,), as_text=1.0, without_gold=0.0)
    step = taught_step(model, sampler(model, mixture, is_varied=False).batch(0))

    assert step.losses.answers > 0
    assert step.losses.taught == 0


def taught_step(model: GistModel, batch: Batch) -> TrainingStep:
    """Return the step of a batch after it has learned from the teacher."""
    model.prepare_training()
    model.is_training = True
    step = TrainingStep(model, batch)
    step.learn(replace(PLAIN, distillation=1.0))
    model.is_training = False
    return step


def test_the_loss_of_a_seeded_run_falls(tmp_path: Path) -> None:
    """A tiny model learns to answer its few questions: at least a third of the loss goes."""
    model = trainee(initializer_range=0.3)  # the usual tiny weights cannot say anything with certainty

    recipe = replace(RECIPE, steps=40, rate=2e-2)

    records = list(Run(tmp_path / "run", Trainer(model, sampler(model), recipe)).steps())

    first, last = (sum(record["answer"] for record in part) / 5 for part in (records[:5], records[-5:]))
    assert last < first * 2 / 3


def losses(records: Sequence[dict[str, object]]) -> list[object]:
    """Return what a run measured, without its timings."""
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.mark.parametrize("placement", ["anchored", "matched"])
def test_a_run_that_stops_goes_on_bit_by_bit_the_same(tmp_path: Path, placement: Placement) -> None:
    """Stopping after 7 of 12 steps and going on in a new process's place gives the weights of a run in one go."""
    recipe = replace(RECIPE, steps=12, placement=placement)
    whole = trainer(recipe)
    expected = losses(list(Run(tmp_path / "whole", whole).steps()))
    first = trainer(recipe)
    began = losses(list(Run(tmp_path / "parts", first).steps(stop=lambda: first.step == 7)))

    second = trainer(recipe)
    rest = losses(list(Run(tmp_path / "parts", second).steps()))

    assert began + rest == expected
    assert all(torch.equal(tensor, second.state()[name]) for name, tensor in whole.state().items())
    assert len(read_log(tmp_path / "parts")) == 12


def test_chunks_are_read_once_in_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the base alone makes of a chunk is kept and learned from as if it were new; the oldest leave."""
    model, read = trainee(placement="matched"), []
    batch = replace(sampler(model).batch(0), tokens_per_gist=2)
    expected = TrainingStep(model, batch).measure()

    class Seen(TextPass):
        def __init__(self, model: GistModel, chunks: Sequence[Sequence[int]]) -> None:
            read.extend(map(tuple, chunks))
            super().__init__(model, chunks)

    monkeypatch.setattr(training, "TextPass", Seen)
    roomy, narrow = ChunkCaches(model, kept_bytes=2**30), ChunkCaches(model, kept_bytes=1)
    for found in [TrainingStep(model, batch, roomy).measure() for _ in range(3)]:
        assert math.isclose(found.answer, expected.answer, rel_tol=1e-4)
    assert read == [tuple(chunk) for chunk in batch.chunks]
    TrainingStep(model, replace(batch, tokens_per_gist=4), roomy).measure()
    assert len(read) == 2 * len(batch.chunks)
    for _ in range(2):
        TrainingStep(model, batch, narrow).measure()
    assert len(read) == 4 * len(batch.chunks)


def test_two_runs_do_not_train_in_one_folder(tmp_path: Path) -> None:
    """The second is refused while the first is at work."""
    first = Run(tmp_path, trainer()).steps()
    next(first)

    with pytest.raises(IndexLockedError, match="is in use by process"):
        next(Run(tmp_path, trainer()).steps())

    first.close()  # type: ignore[attr-defined]


def test_a_run_that_was_killed_has_no_step_twice(tmp_path: Path) -> None:
    """Steps after the last checkpoint are done again, and their old lines leave the log."""
    recipe = replace(RECIPE, steps=6)
    first = trainer(recipe)
    steps = Run(tmp_path, first).steps(save_every_s=0, stop=lambda: first.step == 3)
    list(steps)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 4}\n{"step": 5}\n{"st')

    list(Run(tmp_path, trainer(recipe)).steps())

    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_run_of_another_recipe_is_refused(tmp_path: Path) -> None:
    """Going on with other settings names what differs; only the number of steps may change."""
    Run(tmp_path, trainer())

    with pytest.raises(UsageError, match=r"another recipe \(rate differ\)"):
        Run(tmp_path, trainer(replace(RECIPE, rate=5e-3)))
    assert Run(tmp_path, trainer(replace(RECIPE, steps=40))).step == 0


def test_a_run_of_another_base_is_left_as_it_is(tmp_path: Path) -> None:
    """A checkpoint that is whole but not of this base is no reason to begin anew over it."""
    one = trainer(replace(RECIPE, steps=2))
    list(Run(tmp_path, one).steps())
    other = trainer(replace(RECIPE, steps=2))
    other._masters["a layer more"] = torch.zeros(1)

    with pytest.raises(UsageError, match="weights of this run"):
        Run(tmp_path, other)

    assert checkpoints(tmp_path)[-1].name == "checkpoint-000002"


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """Without its last file a checkpoint does not count, and a damaged one gives way to the one before."""
    recipe = replace(RECIPE, steps=3)
    for steps in (2, 3):
        one = trainer(recipe)
        list(Run(tmp_path, one).steps(stop=lambda steps=steps, one=one: one.step == steps))
    last = checkpoints(tmp_path)[-1]
    (last / "optimizer.safetensors").write_bytes(b"damaged")
    (tmp_path / "checkpoint-000009").mkdir()

    again = trainer(recipe)
    Run(tmp_path, again)

    assert again.step == 2


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Running out of space while saving ends the run in one line; what was saved before is whole."""
    one = trainer(replace(RECIPE, steps=4))
    run = Run(tmp_path, one)
    list(run.steps(stop=lambda: one.step == 2))

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("gistrag.training.checkpoints.safetensors.torch.save_file", full)
    with pytest.raises(ResourceError, match="no space left"):
        list(run.steps())

    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000002"]


def test_a_batch_without_a_finite_gradient_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes no weight and no learning rate, it is reported, and the run goes on behind it."""
    one = trainer(replace(RECIPE, steps=6))
    update = one._update

    def spoiled(factor: float) -> float:
        if one.step == 3:
            next(weights.grad for weights in one._trained.values() if weights.grad is not None).fill_(float("nan"))
        return update(factor)

    monkeypatch.setattr(one, "_update", spoiled)
    records = list(Run(tmp_path, one).steps())

    assert {record["step"]: record["event"] for record in records if "event" in record} == {
        4: "skipped, its gradient is not finite"
    }
    assert one.step == 6
    assert one.slowdown == 1.0
    assert all(bool(tensor.isfinite().all()) for tensor in one.state().values())


def test_weights_that_are_not_finite_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch after them fails: the last good state comes back, at half the learning rate, and is reported."""
    one = trainer(replace(RECIPE, steps=8))
    run = Run(tmp_path, one)
    healthy, spoiled = one.advance, [float("nan")]

    def advance() -> dict[str, float]:
        told = healthy()
        if one.step == 3 and spoiled:
            one.state()["weights gist_vectors"].fill_(spoiled.pop())
            one._copy_back()
        return told

    monkeypatch.setattr(one, "advance", advance)
    records = list(run.steps())

    events = [record["event"] for record in records if "event" in record]
    assert ["skipped, its gradient is not finite"] * 3 == events[:3]
    assert events[3:] == ["diverged at step 7, back to 0 at 0.5 of the learning rate"]
    assert one.slowdown == 0.5
    assert all(bool(tensor.isfinite().all()) for tensor in one.state().values())


def test_a_loss_that_grows_is_taken_back_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noticed before anything was saved, by the first losses; and each time the state is that of the start."""
    one = trainer(replace(RECIPE, steps=40))
    run = Run(tmp_path, one)
    before = {name: tensor.clone() for name, tensor in one.state().items()}
    healthy, returned = one.advance, []

    def advance() -> dict[str, float]:
        return {**healthy(), "answer": 1.0 if one.step <= SPIKE_STEPS or len(returned) > 1 else 9.0}

    def restore(tensors: dict[str, Tensor], **place: Any) -> None:
        Trainer.restore(one, tensors, **place)
        returned.append({name: tensor.clone() for name, tensor in one.state().items()})

    monkeypatch.setattr(one, "advance", advance)
    monkeypatch.setattr(one, "restore", restore)
    records = list(run.steps(save_every_s=1e9))

    assert [float(record["event"].split(" at ")[2].split()[0]) for record in records if "event" in record] == [
        0.5,
        0.25,
    ]
    assert all(torch.equal(tensor, state[name]) for state in returned for name, tensor in before.items())


def test_moments_survive_two_take_backs(tmp_path: Path) -> None:
    """What the optimizer does after a state was restored does not change the state that was kept."""
    one = trainer()
    for _ in range(2):
        one.advance()
    kept = {name: tensor.clone() for name, tensor in one.state().items()}
    expected = {name: tensor.clone() for name, tensor in kept.items()}

    one.restore(kept, step=2, slowdown=1.0)
    one.advance()

    assert all(torch.equal(tensor, kept[name]) for name, tensor in expected.items())


def test_a_run_goes_on_with_what_it_began_with(tmp_path: Path) -> None:
    """Other data, another base or another adapter is another run."""
    list(Run(tmp_path, trainer(replace(RECIPE, steps=2)), made_with={"data": "a"}).steps())

    assert Run(tmp_path, trainer(replace(RECIPE, steps=2)), made_with={"data": "a"}).step == 2
    with pytest.raises(UsageError, match="made with data 'a', this one has 'b'; name another --output"):
        Run(tmp_path, trainer(replace(RECIPE, steps=2)), made_with={"data": "b"})


def test_checkpoints_that_cannot_be_read_make_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are told of, and those of the run that begins anew stay, although their numbers are lower."""
    recipe = replace(RECIPE, steps=6)
    first = trainer(recipe)
    list(Run(tmp_path, first).steps(save_every_s=0, stop=lambda: first.step == 6))
    for checkpoint in checkpoints(tmp_path):
        (checkpoint / "optimizer.safetensors").write_bytes(b"damaged")

    second = trainer(recipe)
    again = Run(tmp_path, second)
    assert again.step == 0
    list(again.steps(save_every_s=0, stop=lambda: second.step == 2))

    assert caplog.text.count("cannot be read") == 2
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000001", "checkpoint-000002"]
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2]


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    """A base of as many layers may be wider."""
    one = trainer()
    tensors = {name: torch.zeros(3, *tensor.shape) for name, tensor in one.state().items()}

    with pytest.raises(UsageError, match="expected the weights of this run"):
        one.restore(tensors, step=1, slowdown=1.0)


def test_a_run_that_always_diverges_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some halvings it says so instead of going on for ever."""
    one = trainer()
    monkeypatch.setattr(one, "advance", lambda: {"answer": 1.0, "norm": float("inf"), "tokens": 1})

    with pytest.raises(DivergedError, match="smaller one"):
        list(Run(tmp_path, one).steps())


def test_validation_is_logged_and_drawn(tmp_path: Path) -> None:
    """Held-out losses stand in the log, and a curve is drawn of it."""
    one = trainer(replace(RECIPE, steps=4))
    batches = [sampler(one.model).batch(100)]

    records = list(Run(tmp_path, one, {"text": batches}).steps(validate_every=2))

    assert [record["step"] for record in records if "validation text" in record] == [2, 4]
    assert (tmp_path / "curve.png") == draw(tmp_path)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_saved_adapter_makes_the_same_gists(tmp_path: Path) -> None:
    """What a run leaves behind is what a model loads."""
    one = trainer(replace(RECIPE, steps=3))
    list(Run(tmp_path, one).steps())
    chunk = [list(b"a chunk to compress")]
    model = tiny_model(dtype=torch.float32)
    model.adapter = Adapter.load(model.network, tmp_path / "adapter", base=model.weights, prefix=model.prompt.prefix)

    expected, found = (compress(each, chunk, GistSettings(placement="anchored")) for each in (one.model, model))

    assert torch.equal(expected[0].kv, found[0].kv)
    assert json.loads((tmp_path / "adapter" / "gist_settings.json").read_text())["tokens_per_gist"] == 4


def test_answers_from_merged_weights_are_those_of_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for rounding; what text and gists become is the same bit by bit, and training goes on from the adapter."""
    model, text = trainee(), torch.tensor([list(b"How many wheels has the mill?")])
    shake(model)
    assert model.adapter

    def hidden(role: Role) -> torch.Tensor:
        return model.read().feed(text, positions=torch.arange(text.shape[1]), role=role)

    roles: tuple[Role, ...] = ("answers", "text", "answers", "gists", "text")
    apart = [hidden(role) for role in roles]
    model.adapter.merge()
    merged = [hidden(role) for role in roles]

    assert [torch.equal(*pair) for pair in zip(apart, merged, strict=True)] == [False, True, False, True, True]
    for one, other in zip(apart, merged, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    model.prepare_training()
    assert all(torch.equal(*pair) for pair in zip(apart, map(hidden, roles), strict=True))
    monkeypatch.setattr(adapter, "MERGED_BYTES", 1)
    model.adapter.merge()
    assert torch.equal(apart[0], hidden("answers"))


def test_gists_of_one_text_pass_at_several_rates() -> None:
    """A text that was read once can be compressed again and again."""
    model = tiny_model()
    chunk = [list(b"a chunk to compress")]
    text = TextPass(model, chunk)

    def both(tokens_per_gist: int) -> tuple[GistCache, GistCache]:
        fresh = compress(model, chunk, GistSettings(placement="anchored", tokens_per_gist=tokens_per_gist))
        return text.compress("anchored", tokens_per_gist)[0], fresh[0]

    assert all(torch.equal(one.kv, other.kv) for one, other in (both(2), both(8), both(2)))


def test_a_run_ends_when_its_time_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learning rate decays with the time of the steps, which counts on over a stop; validation ends the run."""
    monkeypatch.setattr("gistrag.training.trainer.time.perf_counter", iter(range(0, 1000, 5)).__next__)
    timed = replace(RECIPE, steps=1000, minutes=0.5)
    first = Run(tmp_path / "run", trainer(timed))
    before = [next(steps := first.steps()) for _ in range(2)]
    steps.close()
    first.save()

    run = Run(tmp_path / "run", trainer(timed), {"text": [sampler(trainee()).batch(0)]})
    after = list(run.steps())

    assert [1, 2] == [record["step"] for record in before]
    assert [3, 4, 5, 6] == [record["step"] for record in after]
    assert ["validation text" in record for record in after] == [False, False, False, True]
    assert run.is_over
    assert run.seconds_left() == 0


def test_a_run_may_be_made_longer_and_take_less_memory() -> None:
    """Steps, minutes and the rows of a forward pass change nothing that was learned so far."""
    assert RECIPE.differs(replace(RECIPE, steps=99, minutes=7.0, rows_together=1)) == []
