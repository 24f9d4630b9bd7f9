"""On a GPU: nothing mixes its tensors with those of the CPU, and the outcome is the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.fake_gpu import Elsewhere, a_gpu
from support.tiny_models import byte_tokenizer, tiny_model

from gistrag.compression.compress import compress
from gistrag.evaluation.arms import Arm, MemoryCache, gist_arm
from gistrag.evaluation.cases import Case
from gistrag.evaluation.corpus import Passage
from gistrag.evaluation.runner import Runner
from gistrag.model.gist_model import GistModel
from gistrag.qa.dataset import Context, Task
from gistrag.settings import GistSettings, KvCacheDtype
from gistrag.training.recipe import LossWeights, Recipe
from gistrag.training.sampler import Mixture, Sampler
from gistrag.training.trainer import Trainer

TEXTS = ["the river turns the mill", "rye and oats in the ledger of the harbour", "a crane, copper and a sluice"]
RECIPE = Recipe(
    steps=2, rank=2, loss_weights=LossWeights(teacher_from=0.0), placement="matched", batches=2, rows_together=8,
    mixture=Mixture(
        rates={2: 1.0}, contexts=4, chunk_tokens=64, question_tokens=160, chunks=(0.2, 0.4, 0.4),
        as_text=0.3, planted=0.5,
    ),
)  # fmt: skip


@pytest.fixture
def model() -> Iterator[GistModel]:
    """A tiny model on a GPU."""
    plain = tiny_model(dtype=torch.float32)
    with a_gpu() as device:
        plain.network.to(device)
        yield GistModel(plain.network, byte_tokenizer(), identity="tiny llama")


def test_devices_are_not_mixed_unnoticed(model: GistModel) -> None:
    """The pretence holds: numbers of both are refused, and come back when they are asked for."""
    there = torch.ones(2, 3, device=model.device)

    with pytest.raises(RuntimeError, match="expected tensors of one device for add"):
        there + torch.ones(2, 3)
    assert isinstance(there * 2, Elsewhere)
    assert (there * 2).cpu().tolist() == [[2.0] * 3] * 2


@pytest.mark.parametrize("placement", ["matched", "adaptive", "selected", "anchored", "learned"])
def test_gists_made_on_a_gpu(model: GistModel, placement: str) -> None:
    """They are made there, all chunks of a batch at once, and are those of a CPU."""
    ids = [model.encode_passage(text) for text in TEXTS]

    made = compress(model, ids, GistSettings(placement=placement, tokens_per_gist=3))

    expected = compress(tiny_model(dtype=torch.float32), ids, GistSettings(placement=placement, tokens_per_gist=3))
    for one, other in zip(made, expected, strict=True):
        assert isinstance(one.kv, Elsewhere)
        assert torch.equal(one.positions.cpu(), other.positions)
        torch.testing.assert_close(one.kv.cpu(), other.kv, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["auto", "int8", "int4"])
def test_answers_on_a_gpu(model: GistModel, kind: KvCacheDtype) -> None:
    """Text, gists and both are read and answered there, with an adapter and without one."""
    model.new_adapter(rank=2, gists=1, placement="matched")
    passages = tuple(Passage(text, (), 40) for text in TEXTS)
    cases = [Case("questions", name, f"What of {name}?", ("rye",), passages, 4) for name in ("oats", "the mill")]
    arms = [
        Arm("text without adapter", "text", has_adapter=False), Arm("text", "text"), Arm("uncompressed KV", "gists"),
        gist_arm("matched", 4), Arm("hybrid 4", "hybrid", "matched", 4),
    ]  # fmt: skip

    rows = list(Runner(MemoryCache(model, kind)).rows([(case, arm) for case in cases for arm in arms]))

    assert len(rows) == len(cases) * len(arms)


def test_training_on_a_gpu(model: GistModel) -> None:
    """A step learns there, and goes on from what was saved."""
    model.new_adapter(rank=2, gists=1, placement="matched")
    contexts = [Context(text, f"article {number % 2}", (Task("What of it?", (text[-5:],)),))
                for number, text in enumerate(TEXTS * 4)]  # fmt: skip
    trainer = Trainer(model, Sampler(model, contexts, RECIPE.mixture, seed=0), RECIPE)

    told = trainer.advance()
    trainer.restore({name: one.cpu() for name, one in trainer.state().items()}, step=1, slowdown=1.0)

    assert 0 < told["norm"] < torch.inf
    assert trainer.advance()["answer"] > 0
