"""Training an adapter: the code that answers questions, with gradients.

One step compresses the chunks of a batch with the frozen base model, relocates and concatenates the gists as an answer
would, and asks all questions of every row::

    text pass (no gradient) ─→ gists ─→ relocate, concatenate ─→ questions and answers ─→ loss
            └────────────────→ uncompressed caches ─→ gold chunk alone ─→ the same, as teacher (no gradient)

Loss = cross-entropy of the answers + KL divergence to the teacher, which reads the gold chunk as text + continuing a
chunk from its gists, whose weight fades. Rows go through the model a few at a time. The gradients they leave at the
gists are summed before they flow back through the gist pass once, so the memory of a step does not grow with its rows.
The optimizer updates float32 weights, of which the model computes with a copy in its own dtype.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from torch.nn import functional

from gistrag.compression.placements import TextPass
from gistrag.errors import UsageError
from gistrag.kv.cache import GistCache, Memory, concatenate, side_by_side
from gistrag.model.batching import batches_by_length
from gistrag.model.gist_model import GistModel
from gistrag.settings import MADE, AdapterSettings, Placement
from gistrag.training.recipe import GRADIENT_NORM, VECTOR_RATE, WARMUP_SHARE, LossWeights, Recipe
from gistrag.training.sampler import IGNORED, Batch, QuestionBatch, Row, Sampler, merged

SLOTS_OF_A_ROW = 1280
"""Most memory slots a row may have on average in one forward pass; rows with more go in smaller batches."""

KEPT_BYTES = 2**32
"""Most bytes of caches that training keeps across epochs; with data twice as large it keeps none."""

LAST_RATE = 0.05
"""Share of the learning rate at the last step."""


@dataclass
class Losses:
    """Sums of losses in nats, and how many tokens they are of."""

    answer: float = 0.0
    answers: int = 0
    distillation: float = 0.0
    taught: int = 0
    continuation: float = 0.0
    continued: int = 0

    def means(self) -> dict[str, float]:
        """Return the three losses per token, 0 where there was no token."""
        return {
            "answer": self.answer / max(1, self.answers),
            "distillation": self.distillation / max(1, self.taught),
            "continuation": self.continuation / max(1, self.continued),
        }


class ChunkCaches:
    """The uncompressed caches and the gists of the chunks of a batch.

    Where the adapter changes neither, both can be kept across epochs. Every chunk then has a forward pass of its own,
    so that its caches are bit by bit the same in every batch. A planted fact makes a chunk another one.

    Args:
        model: compresses.
        kept_bytes: most bytes of caches kept in main memory; 0 compresses every batch anew, as one batch.
    """

    def __init__(self, model: GistModel, *, kept_bytes: int = 0) -> None:
        self._model, self._kept_bytes = model, kept_bytes
        self._kept: OrderedDict[tuple[int, tuple[int, ...]], GistCache] = OrderedDict()  # used longest ago first
        self._bytes = 0

    def of(self, batch: Batch) -> tuple[list[GistCache], list[GistCache]]:
        """Return the uncompressed cache of each chunk of a batch, and its gists."""
        settings = self._model.adapter.settings if self._model.adapter else AdapterSettings(base="")
        placement, rate = settings.placement, batch.tokens_per_gist
        if not self._kept_bytes or placement in MADE:
            text = TextPass(self._model, batch.chunks)
            return text.compress("selected", 1), text.compress(placement, rate)
        pairs = [self._alone(tuple(chunk), placement, rate) for chunk in batch.chunks]
        return [full for full, _ in pairs], [gists for _, gists in pairs]

    def _alone(self, chunk: tuple[int, ...], placement: Placement, rate: int) -> tuple[GistCache, GistCache]:
        found = [self._kept.get((each, chunk)) for each in (1, rate)]
        if None in found:
            text = TextPass(self._model, [chunk])
            found = [text.compress("selected", 1)[0], text.compress(placement, rate)[0]]
        full, gists = (cache.to(self._model.device) for cache in found if cache)
        for each, cache in ((1, full), (rate, gists)):
            self._keep((each, chunk), cache)
        return full, gists

    def _keep(self, key: tuple[int, tuple[int, ...]], cache: GistCache) -> None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        self._kept[key] = cache.to(torch.device("cpu"))
        self._bytes += cache.kv.nbytes
        while self._bytes > self._kept_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].kv.nbytes


class TrainingStep:
    """The forward and backward passes of one batch.

    Args:
        model: with an adapter.
        batch: of the sampler.
        caches: makes or keeps the caches of the chunks; None makes them anew.

    Attributes:
        losses: summed over the rows so far.

    Raises:
        UsageError: a model without an adapter.
    """

    def __init__(self, model: GistModel, batch: Batch, caches: ChunkCaches | None = None) -> None:
        if model.adapter is None:
            raise UsageError("expected a model with an adapter, found none")
        self._model, self._batch = model, batch
        self.losses = Losses()
        self._uncompressed, self._gists = (caches or ChunkCaches(model)).of(batch)

    def measure(self, rows_together: int = 8) -> Losses:
        """Return the losses of all rows, without gradients."""
        for rows in self._groups(rows_together):
            self._read_rows(rows, self._gists, has_teacher=False)
        return self.losses

    def learn(self, weights: LossWeights, rows_together: int = 8) -> Losses:
        """Return the losses of all rows, and accumulate gradients in the adapter and the gist vectors."""
        ends = [_leaf(cache) if cache.kv.requires_grad else cache for cache in self._gists]
        answers, continued = self._label_counts()
        for rows in self._groups(rows_together):
            answer, distance, continuation = self._read_rows(rows, ends, has_teacher=weights.distillation > 0)
            loss = (
                answer + weights.distillation * distance
            ) / answers + weights.continuation * continuation / continued
            with self._model.reading_as("answers"):
                loss.backward()  # type: ignore[no-untyped-call]
        wanted = [
            (cache.kv, end.kv.grad) for cache, end in zip(self._gists, ends, strict=True) if end.kv.grad is not None
        ]
        if wanted:  # selected gists are the base model's own and have no gradient
            with self._model.reading_as("gists"):
                torch.autograd.backward([made for made, _ in wanted], [gradient for _, gradient in wanted])
        return self.losses

    def _groups(self, size: int) -> Iterator[list[Row]]:
        """Yield rows in batches of at most *size*, similar memories together; fewer where memories are long."""
        rows = sorted(self._batch.rows, key=lambda row: len(row.ids))
        slots = [self._slots(row) for row in rows]
        for numbers in batches_by_length(slots, budget=size * SLOTS_OF_A_ROW, rows_max=size):
            yield [rows[number] for number in numbers]

    def _slots(self, row: Row) -> int:
        """Return the slots of a row's memory, without those of the prefix."""
        caches = ((self._uncompressed if number in row.as_text else self._gists)[number] for number in row.chunks)
        return sum(cache.kv.shape[3] for cache in caches)

    def _label_counts(self) -> tuple[int, int]:
        """Return how many answer tokens and continuation tokens there are in all rows, at least 1 each."""
        learned = [(row.labels != IGNORED, row.is_continuation) for row in self._batch.rows]
        answers = sum(int((where & ~continued).sum()) for where, continued in learned)
        return max(1, answers), max(1, sum(int((where & continued).sum()) for where, continued in learned))

    def _read_rows(
        self, rows: Sequence[Row], gists: Sequence[GistCache], *, has_teacher: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return summed losses of some rows, each a scalar: answers, KL divergence to the teacher, continuation."""
        questions = QuestionBatch.of(rows)
        learned = questions.labels != IGNORED
        continued = questions.is_continuation[learned]
        scores = self._scores([self._memory(row, gists) for row in rows], questions, learned)
        labels = questions.labels[learned].to(self._model.device)
        each = functional.nll_loss(scores, labels, reduction="none")
        distance = each.new_zeros(())
        taught = torch.tensor([row.gold >= 0 and row.as_text != {row.gold} for row in rows])
        answers_taught = (learned & ~questions.is_continuation & taught[:, None])[learned]
        if has_teacher and answers_taught.any():
            distance = self._distance(rows, questions, taught, scores[answers_taught.to(scores.device)])
            self.losses.distillation += distance.item()
            self.losses.taught += int(answers_taught.sum())
        answer, continuation = each[~continued].sum(), each[continued].sum()
        self.losses.answer += answer.item()
        self.losses.answers += int((~continued).sum())
        self.losses.continuation += continuation.item()
        self.losses.continued += int(continued.sum())
        return answer, distance, continuation

    def _memory(self, row: Row, gists: Sequence[GistCache]) -> Memory:
        """Return the memory of a row: its chunks in order, each as gists or as text."""
        caches = []
        for number, gap in zip(row.chunks, row.gaps, strict=True):
            cache = self._uncompressed[number] if number in row.as_text else gists[number]
            caches.append(GistCache(cache.kv, cache.positions, cache.source_tokens + gap))
        return concatenate([self._model.prefix, *caches], self._model.rope, layout=row.layout)

    def _scores(self, memories: Sequence[Memory], questions: QuestionBatch, wanted: Tensor) -> Tensor:
        """Return log-probabilities of the next token where *wanted*, ``(labels, vocabulary)`` float32."""
        behind = side_by_side(memories)
        begins = torch.tensor([memory.next_position for memory in memories])[:, None]
        hidden = self._model.read_behind(behind).feed(
            questions.ids, positions=begins + questions.positions, mask=questions.mask(behind.real), role="answers"
        )
        return self._model.logits(hidden[wanted.to(hidden.device)]).float().log_softmax(dim=-1)

    def _distance(self, rows: Sequence[Row], questions: QuestionBatch, taught: Tensor, student: Tensor) -> Tensor:
        """Return the summed KL divergence to the teacher: the same model that reads the gold chunk alone, as text.

        Args:
            taught: ``(batch,)`` bool, rows that have a teacher.
            student: ``(labels, vocabulary)`` log-probabilities of their answers.
        """
        chosen = questions.where(taught)
        memories = [self._memory(_alone(row), self._uncompressed) for row, has in zip(rows, taught, strict=True) if has]
        answers = (chosen.labels != IGNORED) & ~chosen.is_continuation
        self._model.is_training = False
        try:
            teacher = self._scores(memories, chosen, answers)
        finally:
            self._model.is_training = True
        return functional.kl_div(student, teacher, reduction="none", log_target=True).sum()


def _alone(row: Row) -> Row:
    """Return the row with nothing but its gold chunk, as text."""
    return replace(row, chunks=(row.gold,), as_text=frozenset({row.gold}), gaps=(0,), layout="spread")


def _leaf(cache: GistCache) -> GistCache:
    """Return a copy of a cache at which gradients end."""
    return GistCache(cache.kv.detach().requires_grad_(True), cache.positions, cache.source_tokens)


def local_device() -> str | None:
    """Return the GPU of this process where several train together, None where one trains alone."""
    state = PartialState(cpu=not torch.cuda.is_available())
    return str(state.device) if state.num_processes > 1 else None


class Trainer:
    """Weights, optimizer and position in the data of a training run, one step at a time.

    Args:
        model: with an adapter, which is trained in place.
        sampler: gives the batches.
        recipe: settings of the run.

    Attributes:
        step: number of steps done; spent_s: seconds they took.
        slowdown: factor on the learning rate, halved whenever a run diverges.

    Raises:
        UsageError: a model without an adapter.
    """

    def __init__(self, model: GistModel, sampler: Sampler, recipe: Recipe) -> None:
        if model.adapter is None:
            raise UsageError("expected a model with an adapter to train, found none")
        self.model, self.adapter, self.recipe = model, model.adapter, recipe
        self.step, self.spent_s, self.slowdown = 0, 0.0, 1.0
        model.prepare_training()
        self._sampler = sampler
        bytes_of_all = sampler.tokens * model.kv_bytes_per_slot * (1 + sum(1 / rate for rate in recipe.mixture.rates))
        self._caches = ChunkCaches(model, kept_bytes=KEPT_BYTES if bytes_of_all <= KEPT_BYTES / 2 else 0)
        self._accelerator = Accelerator(cpu=model.device.type == "cpu")
        self._trained = dict(self.adapter.parameters())
        self._masters = {name: weights.detach().float().clone() for name, weights in self._trained.items()}
        vectors = [self._masters["gist_vectors"]]
        others = [weights for name, weights in self._masters.items() if name != "gist_vectors"]
        self._optimizer = torch.optim.AdamW(
            [{"params": others, "peak": recipe.rate}, {"params": vectors, "peak": VECTOR_RATE * recipe.rate}],
            betas=(0.9, 0.98),
            weight_decay=0.0,
        )
        for weights in self._trained.values():
            weights.requires_grad_(True)

    @property
    def is_main(self) -> bool:
        """Whether this process, of all that train together, is the one that writes."""
        return bool(self._accelerator.is_main_process)

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps or by time, 0 to 1."""
        of_time = self.spent_s / (60 * self.recipe.minutes) if self.recipe.minutes else 0.0
        return min(1.0, max(self.step / self.recipe.steps, of_time))

    def advance(self) -> dict[str, float]:
        """Learn from the next batch and return its losses, the norm of its gradient and its size.

        The weights stay as they were if the gradient is not finite.
        """
        began_s = time.perf_counter()
        first = self.recipe.batches * (self.step * self._accelerator.num_processes + self._accelerator.process_index)
        batch = merged([self._sampler.batch(first + number) for number in range(self.recipe.batches)])
        weights = self.recipe.loss_weights.at(self.progress)
        self.model.is_training = True
        try:
            losses = TrainingStep(self.model, batch, self._caches).learn(weights, self.recipe.rows_together)
        finally:
            self.model.is_training = False
        norm = self._update(self._factor())
        self.step += 1
        averaged = self._averaged({**losses.means(), "seconds": time.perf_counter() - began_s})
        self.spent_s += averaged.pop("seconds")
        return {
            **averaged,
            "norm": norm,
            "tokens_per_gist": batch.tokens_per_gist,
            "tokens": batch.tokens * self._accelerator.num_processes,
        }

    def gpu_peak_bytes(self) -> int | None:
        """Return the most GPU memory this process has held so far, None where the model is on no GPU."""
        device = self.model.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

    def agrees(self, is_wanted: bool) -> bool:
        """Return whether any of the processes that train together wants what this one may want: all do the same."""
        if self._accelerator.num_processes == 1:
            return is_wanted
        wanted = torch.tensor(float(is_wanted), device=self.model.device)
        return float(self._accelerator.reduce(wanted, "sum")) > 0

    def _averaged(self, losses: dict[str, float]) -> dict[str, float]:
        """Return the means of losses over the processes that train together, the same in each of them."""
        if self._accelerator.num_processes == 1:
            return losses
        means = self._accelerator.reduce(torch.tensor([*losses.values()], device=self.model.device), "mean")
        return dict(zip(losses, means.tolist(), strict=True))

    def measure(self, batches: Sequence[Batch]) -> float:
        """Return the mean loss of the answers in *batches*, in nats per token."""
        measured = [TrainingStep(self.model, batch).measure(self.recipe.rows_together) for batch in batches]
        return sum(losses.answer for losses in measured) / max(1, sum(losses.answers for losses in measured))

    def _factor(self) -> float:
        """Return the share of the learning rate that this step has."""
        progress = self.progress
        warm = min(1.0, max((self.step + 1) / self.recipe.warmup_steps, progress / WARMUP_SHARE))
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.slowdown * warm * (LAST_RATE + (1 - LAST_RATE) * cosine)

    def _update(self, factor: float) -> float:
        """Apply the gradients to the float32 weights, copy these back, and return the norm of the gradient."""
        for name, weights in self._trained.items():
            gradient = torch.zeros_like(weights) if weights.grad is None else weights.grad
            if self._accelerator.num_processes > 1:
                gradient = self._accelerator.reduce(gradient, "mean")
            self._masters[name].grad = gradient.float()
            weights.grad = None
        norm = float(torch.nn.utils.clip_grad_norm_(self._masters.values(), GRADIENT_NORM))
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        if math.isfinite(norm):
            self._optimizer.step()
            self._copy_back()
        return norm

    @torch.no_grad()
    def _copy_back(self) -> None:
        for name, weights in self._trained.items():
            weights.copy_(self._masters[name])

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that are needed to resume exactly here."""
        tensors = {f"weights {name}": weights for name, weights in self._masters.items()}
        for name, weights in self._masters.items():
            for key, value in self._optimizer.state.get(weights, {}).items():
                tensors[f"{key} {name}"] = value
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], *, step: int, slowdown: float, spent_s: float | None = None) -> None:
        """Resume where `state` was taken; the time spent so far stays unless it is given.

        Raises:
            UsageError: these are tensors of another run.
        """
        found = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("weights ")}
        if {f"weights {name}": weights.shape for name, weights in self._masters.items()} != found:
            raise UsageError("expected the weights of this run in the checkpoint, found others; name another --output")
        for name, weights in self._masters.items():
            weights.copy_(tensors[f"weights {name}"])
            held = {key: tensors[f"{key} {name}"].clone() for key in _MOMENTS if f"{key} {name}" in tensors}
            if held:  # the optimizer changes them in place, where the weights are; it counts its steps on the CPU
                self._optimizer.state[weights] = {"step": held.pop("step"), **_moved(held, weights.device)}
        self._copy_back()
        self.step, self.slowdown = step, slowdown
        self.spent_s = self.spent_s if spent_s is None else spent_s


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def _moved(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
