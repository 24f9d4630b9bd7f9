"""A training run in a folder: it may be killed at any moment, and resumes exactly where it was.

::

    run/
      recipe.json               settings of the run
      made_with.json            base model, data and first adapter; a run resumes with the same ones only
      log.jsonl                 a line per step, validation and event
      checkpoint-000120/        adapter, optimizer and position in the data; state.json is written last, so a
                                checkpoint with a state.json is complete
      adapter/                  the adapter of the last checkpoint, for --adapter
      curve.png                 losses against steps, where matplotlib is installed

A batch whose gradient is not finite is skipped. A run that diverges returns to its last good state, at half the
learning rate.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from gistrag.errors import DivergedError, FingerprintMismatchError, UsageError
from gistrag.storage import files, jsonl
from gistrag.storage.fingerprint import require_same
from gistrag.storage.jsonl import JsonLines
from gistrag.training.recipe import Recipe
from gistrag.training.sampler import Batch
from gistrag.training.trainer import Trainer

logger = logging.getLogger("gistrag")

STATE, OPTIMIZER, RECIPE, LOG, ADAPTER = "state.json", "optimizer.safetensors", "recipe.json", "log.jsonl", "adapter"
MADE_WITH = "made_with.json"
KEPT_CHECKPOINTS = 2
SPIKE_STEPS, SPIKE_NATS = 8, 1.5
MOST_SKIPPED = 3  # batches in a row
MOST_SLOWDOWNS = 6


@dataclass(frozen=True)
class Snapshot:
    """A state of a trainer to return to."""

    tensors: dict[str, Tensor]
    step: int
    slowdown: float
    loss: float


class Run:
    """A trainer with a folder for its checkpoints.

    Args:
        folder: made if it is missing.
        trainer: does the steps.
        validation: batches by the name under which their loss is logged.
        made_with: what decides the result besides the recipe.

    Raises:
        UsageError: the folder holds another run.
    """

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        validation: Mapping[str, Sequence[Batch]] | None = None,
        made_with: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self._trainer, self._validation = folder, trainer, validation or {}
        _require_same_recipe(folder, trainer.recipe)
        _require_same_start(folder, made_with or {})
        folder.mkdir(parents=True, exist_ok=True)
        if trainer.is_main:
            files.write_atomic(folder / RECIPE, trainer.recipe.to_json().encode())
            files.write_atomic(folder / MADE_WITH, (json.dumps(made_with or {}, indent=1) + "\n").encode())
        for checkpoint in reversed(checkpoints(folder)):
            try:
                _load(checkpoint, trainer)
            except UsageError:  # complete, but of another base model
                raise
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                logger.warning("%s cannot be read (%s); resuming from the checkpoint before it", checkpoint, error)
                continue
            break
        self._recent: deque[float] = deque(maxlen=SPIKE_STEPS)
        self._skipped = 0
        self._good = self._snapshot(math.inf)

    @property
    def step(self) -> int:
        """Steps done."""
        return self._trainer.step

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self._trainer.is_main

    @property
    def total_steps(self) -> int:
        """Steps of the recipe."""
        return self._trainer.recipe.steps

    @property
    def is_over(self) -> bool:
        """Whether all steps of the recipe are done, or its time is spent."""
        return self._trainer.progress >= 1

    def seconds_left(self) -> float | None:
        """Return what is left of the recipe's time, None where it sets none."""
        minutes = self._trainer.recipe.minutes
        return None if minutes is None else max(0.0, 60 * minutes - self._trainer.spent_s)

    def gpu_peak_bytes(self) -> int | None:
        """Return the most GPU memory this process has held so far, None without a GPU."""
        return self._trainer.gpu_peak_bytes()

    def steps(
        self, *, save_every_s: float = 120.0, validate_every: int = 200, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[dict[str, Any]]:
        """Yield the figures of each step until the recipe ends or *stop* returns True, then save.

        Args:
            save_every_s: seconds between checkpoints.
            validate_every: steps between validations.
            stop: asked before each step.

        Raises:
            IndexLockedError: another process trains in this folder.
            ResourceError: the disk is full; the last checkpoint stays complete.
            DivergedError: the loss grows at any learning rate.
        """
        saved_s = time.monotonic()
        trainer = self._trainer
        with self._log() as log:
            while not trainer.agrees(self.is_over or stop()):
                record = self._step()
                if trainer.step % validate_every == 0 or self.is_over:
                    record |= self._validate()
                if log:
                    log.append(record)
                yield record
                if trainer.agrees(time.monotonic() - saved_s >= save_every_s):
                    self.save()
                    saved_s = time.monotonic()
            self.save()

    def _step(self) -> dict[str, Any]:
        began_s = time.perf_counter()
        figures = self._trainer.advance()
        took_s = time.perf_counter() - began_s
        record: dict[str, Any] = {"step": self._trainer.step, **figures, "seconds": took_s}
        if event := self._event(figures):
            record["event"] = event
        return {name: round(value, 5) if isinstance(value, float) else value for name, value in record.items()}

    def _event(self, figures: Mapping[str, float]) -> str | None:
        """Recover from a step that went wrong and return what happened, None for a good step."""
        if not math.isfinite(figures["norm"]):  # one such batch may be odd; several in a row mean bad weights
            self._skipped += 1
            return self._take_back() if self._skipped > MOST_SKIPPED else "skipped, its gradient is not finite"
        self._skipped = 0
        self._recent.append(figures["answer"])
        self._good = replace(self._good, loss=min(self._good.loss, self._recent_loss()))
        return self._take_back() if self._has_spiked() else None

    def _recent_loss(self) -> float:
        """Return the mean loss of the last `SPIKE_STEPS` steps, infinite before there are so many."""
        return sum(self._recent) / SPIKE_STEPS if len(self._recent) == SPIKE_STEPS else math.inf

    def _has_spiked(self) -> bool:
        return self._good.loss + SPIKE_NATS < self._recent_loss() < math.inf

    def _take_back(self) -> str:
        """Return to the last good state at half the learning rate, and return what happened."""
        good = self._good
        slowdown = self._trainer.slowdown / 2
        if slowdown < 0.5**MOST_SLOWDOWNS:
            raise DivergedError(
                f"the loss grew again at step {self._trainer.step} although the learning rate was halved "
                f"{MOST_SLOWDOWNS} times; start again with a smaller one (--rate)"
            )
        event = f"diverged at step {self._trainer.step}, back to {good.step} at {slowdown:g} of the learning rate"
        self._trainer.restore(good.tensors, step=good.step, slowdown=slowdown)
        self._recent.clear()
        self._skipped = 0
        logger.warning(event)
        return event

    def _validate(self) -> dict[str, float]:
        return {f"validation {name}": self._trainer.measure(batches) for name, batches in self._validation.items()}

    @contextmanager
    def _log(self) -> Iterator[JsonLines | None]:
        """Hold the log open, without the steps after the checkpoint, which are repeated; only one process writes it."""
        if not self._trainer.is_main:
            yield None
            return
        with JsonLines(self.folder / LOG, command="gistrag train") as log:
            log.replace(record for record in log.records if record["step"] <= self._trainer.step)
            yield log

    def save(self) -> None:
        """Write a checkpoint of this step, and keep the state as one to return to."""
        if self._trainer.is_main:
            self._write()
        if len(self._recent) == SPIKE_STEPS:
            self._good = self._snapshot(self._good.loss)

    def _write(self) -> None:
        target = self.folder / f"checkpoint-{self._trainer.step:06d}"
        with files.explained("write", target), _system_errors():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            self._trainer.adapter.save(target / ADAPTER)
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self._trainer.state().items()}
            safetensors.torch.save_file(tensors, target / OPTIMIZER)
            trainer = self._trainer
            state = {"step": trainer.step, "slowdown": trainer.slowdown, "spent_s": round(trainer.spent_s, 1)}
            files.write_atomic(target / STATE, json.dumps(state).encode())
            _replace(target / ADAPTER, self.folder / ADAPTER)
        here = [path for path in checkpoints(self.folder) if path.name <= target.name]
        for path in {*checkpoints(self.folder)}.difference(here[-KEPT_CHECKPOINTS:]):
            shutil.rmtree(path, ignore_errors=True)  # old, unreadable, or of steps that were undone

    def _snapshot(self, loss: float) -> Snapshot:
        trainer = self._trainer
        tensors = {name: tensor.detach().clone() for name, tensor in trainer.state().items()}
        return Snapshot(tensors, trainer.step, trainer.slowdown, loss)


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(path for path in found if (path / STATE).is_file())


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log without a last line that was cut off."""
    return jsonl.read(folder / LOG)


def _load(checkpoint: Path, trainer: Trainer) -> None:
    state = json.loads((checkpoint / STATE).read_text("utf-8"))
    tensors = safetensors.torch.load_file(checkpoint / OPTIMIZER)
    slowdown, spent_s = float(state["slowdown"]), float(state.get("spent_s", 0.0))
    trainer.restore(tensors, step=int(state["step"]), slowdown=slowdown, spent_s=spent_s)


def _require_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Return if there is no run in *folder* yet, or one of this recipe.

    Raises:
        UsageError: names what differs.
    """
    path = folder / RECIPE
    if path.exists() and (other := recipe.differs(Recipe.from_json(path.read_text("utf-8")))):
        raise UsageError(
            f"{folder} holds a run of another recipe ({', '.join(other)} differ); name another --output, or give the "
            "same settings to resume it"
        )


def _require_same_start(folder: Path, made_with: Mapping[str, str]) -> None:
    """Return if there is no run in *folder* yet, or one that was made with the same.

    Raises:
        UsageError: names what differs.
    """
    try:
        found = json.loads((folder / MADE_WITH).read_text("utf-8"))
        require_same(found, made_with, where=f"the run in {folder}", remedy="name another --output")
    except FileNotFoundError:
        return
    except (ValueError, AttributeError) as error:  # a mismatch is a ValueError too
        is_damaged = not isinstance(error, FingerprintMismatchError)
        message = f"{folder / MADE_WITH} is damaged; name another --output" if is_damaged else str(error)
        raise UsageError(message) from error


@contextmanager
def _system_errors() -> Iterator[None]:
    """Turn the error that safetensors raises for an error of the system back into that error."""
    try:
        yield
    except SafetensorError as error:
        number = errno.ENOSPC if "os error 28" in str(error) or "No space" in str(error) else errno.EIO
        raise OSError(number, str(error)) from error


def _replace(source: Path, target: Path) -> None:
    """Replace folder *target* by a copy of *source*."""
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def draw(folder: Path) -> Path | None:
    """Draw the losses of a run into ``curve.png`` and return its path, None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_log(folder)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    steps = [record["step"] for record in records]
    for name in ("answer", "continuation"):
        axes.plot(steps, _smooth([record[name] for record in records]), label=f"training: {name}", alpha=0.6)
    for name in sorted({name for record in records for name in record if name.startswith("validation ")}):
        points = [(record["step"], record[name]) for record in records if name in record]
        axes.plot(*zip(*points, strict=True), marker="o", label=name.replace("validation ", "held out: "))
    axes.set(xlabel="step", ylabel="nats per token", title=f"training of {folder.name}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=120)
    pyplot.close(figure)
    return folder / "curve.png"


def _smooth(values: Sequence[float], window: int = 25) -> list[float]:
    """Return running means over the last *window* values."""
    return [sum(part) / len(part) for end in range(1, len(values) + 1) if (part := values[max(0, end - window) : end])]
