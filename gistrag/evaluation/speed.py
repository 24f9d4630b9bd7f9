"""What every measurement of time and memory shares, and how long the arms of an evaluation take.

Arms are measured interleaved, so that whatever else the machine does affects all of them; only their ratios transfer to
another machine. Peak memory is what torch allocated on a GPU, and what the whole process held elsewhere. How long the
product itself takes, from the question on, is measured by `gistrag.evaluation.benchmark`.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from gistrag.answering.assemble import Content, assemble
from gistrag.evaluation.arms import Arm, MemoryCache, Pair, Row, Setting
from gistrag.evaluation.cases import Case
from gistrag.evaluation.corpus import Passage
from gistrag.kv import gist_file
from gistrag.kv.packed import PackedGists
from gistrag.model.generation import generate
from gistrag.model.gist_model import GistModel
from gistrag.model.runtime import AnyRuntime
from gistrag.settings import KvCacheDtype

TIMED_TOKENS = 16
BUSY_SHARE = 0.5


# The machine


def machine(model: GistModel) -> dict[str, Any]:
    """Return what figures depend on besides data and settings: hardware, device, versions and load."""
    is_gpu = model.device.type == "cuda"
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(model.device) if is_gpu else str(model.device),
        "dtype": str(model.network_dtype).removeprefix("torch."),
        "model": f"{model.network.config.model_type}, {model.layers} layers, {model.kv_heads} kv_heads",
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{
            name: version(name)
            for name in ("gistrag", "torch", "onnxruntime", "transformers", "peft", "sentence-transformers")
        },
    }


def _processor() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor()


def is_busy() -> bool:
    """Return whether other work disturbs a measurement: more than half of the processors were busy of late."""
    return os.getloadavg()[0] > BUSY_SHARE * (os.cpu_count() or 1)


# Measuring


def reset_peak(runtime: AnyRuntime) -> None:
    """Start counting peak memory anew."""
    if runtime.device_name.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(runtime.device_name)
        return
    with suppress(OSError):  # Linux only; elsewhere the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def peak_bytes(runtime: AnyRuntime) -> int:
    """Return the most memory held since `reset_peak`, in bytes."""
    if runtime.device_name.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(runtime.device_name))
    with suppress(OSError):
        status = Path("/proc/self/status").read_text("ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def fixed_length(runtime: AnyRuntime) -> Iterator[None]:
    """Let every answer run to its limit of tokens inside the block, so that all arms generate equally many."""
    stop_ids = runtime.stop_ids
    runtime.stop_ids = frozenset()
    try:
        yield
    finally:
        runtime.stop_ids = stop_ids


def medians(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of every figure of samples that have the same figures.

    >>> medians([{"ttft_s": 0.1}, {"ttft_s": 5.0}, {"ttft_s": 0.2}])
    {'ttft_s': 0.2}
    """
    return {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}


# The arms of an evaluation


class Stopwatch:
    """Times answers from gist files; a context manager that removes its folder of gist files in the end."""

    def __init__(self, model: GistModel, kv_cache_dtype: KvCacheDtype = "auto") -> None:
        self._model, self._kv_cache_dtype = model, kv_cache_dtype
        self._memories = MemoryCache(model)
        self._folder = tempfile.TemporaryDirectory(prefix="gistrag-evaluate-")
        self._files: dict[tuple[Passage, Setting], Path] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def samples(self, cases: Mapping[str, Sequence[Case]], arms: Sequence[Arm], *, repeats: int) -> Iterator[Row]:
        """Yield one measurement after the other.

        Args:
            cases: by the name of their context.
            arms: an arm that does not take a case, or for which the case is too long, is left out.
            repeats: measurements of each case and arm, after one that warms up.
        """
        for label, listed in cases.items():
            for case in listed:
                yield from self.interleaved(label, [(case, arm) for arm in arms if arm.takes(case)], repeats=repeats)

    def interleaved(self, label: str, pairs: Sequence[Pair], *, repeats: int) -> Iterator[Row]:
        """Yield interleaved measurements of pairs; arguments as for `samples`."""
        fitting = [(case, arm) for case, arm in pairs if not self._memories.overflow(case, arm)]
        self._write(fitting)
        for repeat in range(repeats + 1):
            for case, arm in fitting:
                measured = self._measure(case, arm)
                if repeat:
                    yield {"context": label, "arm": arm.name, **measured}

    def _write(self, pairs: Sequence[Pair]) -> None:
        """Write the gists that the pairs need to files."""
        for (passage, setting), cache in self._memories.caches(pairs).items():
            path = Path(self._folder.name) / f"{len(self._files)}.safetensors"
            path.write_bytes(gist_file.encode(cache, key="", fingerprint="", kv_cache_dtype=self._kv_cache_dtype))
            self._files[passage, setting] = path

    def _measure(self, case: Case, arm: Arm) -> Row:
        """Return what one answer of `TIMED_TOKENS` tokens took, even if it would have ended before.

        ``ttft_s`` runs to the first token and includes ``load_s``, the reading of gist files.
        """
        model = self._model
        reset_peak(model)
        started_s = time.perf_counter()
        gists, texts = arm.shares(case)
        held = gist_file.in_parallel(lambda passage: self._load(passage, arm.setting), gists)
        load_s = time.perf_counter() - started_s
        ids = [model.encode_passage(passage.text, passage.heading) for passage in texts]
        contents: list[Content] = [*held, *ids]
        memory = assemble(model, contents, layout=self._memories.layout(case, arm))
        prompt = model.encode_question(case.question)
        with fixed_length(model):
            tokens = generate(model, memory, prompt, max_new_tokens=TIMED_TOKENS)
            next(tokens)
            ttft_s = time.perf_counter() - started_s
            further = sum(1 for _ in tokens)
        decode_s = time.perf_counter() - started_s - ttft_s
        return {
            "ttft_s": ttft_s,
            "load_s": load_s,
            "decode_tokens_per_s": further / decode_s,
            "peak_bytes": peak_bytes(model),
            "source_tokens": sum(map(len, ids)) + sum(cache.source_tokens for cache in held),
        }

    def _load(self, passage: Passage, setting: Setting) -> PackedGists:
        path = self._files[passage, setting]
        return gist_file.decode(path.read_bytes(), path, key="", fingerprint="")
