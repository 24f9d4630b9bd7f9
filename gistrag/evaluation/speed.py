"""How long the arms of an evaluation take: one answer at a time, gists read from files as a query reads them.

The arms take turns, so that whatever else the machine does hits all of them; only their ratios travel to another one.
Peak memory is what torch allocated on a GPU, and what the whole process held elsewhere.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import TracebackType

import torch

from gistrag.evaluation.cases import Case, Passage
from gistrag.evaluation.runner import Arm, Dial, Memories, Pair, Row
from gistrag.kv import gist_file
from gistrag.kv.cache import GistCache, concatenate
from gistrag.model.generation import read_text
from gistrag.model.gist_model import GistModel
from gistrag.settings import KvCacheDtype

TIMED_TOKENS = 16


class Stopwatch:
    """Times answers; a context manager, whose folder of gist files goes when it ends."""

    def __init__(self, model: GistModel, kv_cache_dtype: KvCacheDtype = "auto") -> None:
        self._model, self._kv_cache_dtype = model, kv_cache_dtype
        self._memories = Memories(model)
        self._folder = tempfile.TemporaryDirectory(prefix="gistrag-evaluate-")
        self._files: dict[tuple[Passage, Dial], Path] = {}

    def __enter__(self) -> Stopwatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def samples(self, cases: Mapping[str, Sequence[Case]], arms: Sequence[Arm], *, repeats: int) -> Iterator[Row]:
        """Yield one measurement after the other.

        Args:
            cases: by what their contexts are called.
            arms: those that do not take a case, or for which it is too long, are left out.
            repeats: measurements of each case and arm; one more before them is to warm up.
        """
        for label, listed in cases.items():
            for case in listed:
                yield from self.turns(label, [(case, arm) for arm in arms if arm.takes(case)], repeats=repeats)

    def turns(self, label: str, pairs: Sequence[Pair], *, repeats: int) -> Iterator[Row]:
        """Yield measurements of pairs that take turns; arguments as for `samples`."""
        fitting = [(case, arm) for case, arm in pairs if not self._memories.overflow(case, arm)]
        self._write(fitting)
        for repeat in range(repeats + 1):
            for case, arm in fitting:
                measured = self._measure(case, arm)
                if repeat:
                    yield {"context": label, "arm": arm.name, **measured}

    def _write(self, pairs: Sequence[Pair]) -> None:
        """Write the gists that the pairs need to files."""
        for (passage, dial), cache in self._memories.caches(pairs).items():
            path = Path(self._folder.name) / f"{len(self._files)}.safetensors"
            path.write_bytes(gist_file.encode(cache, key="", fingerprint="", kv_cache_dtype=self._kv_cache_dtype))
            self._files[passage, dial] = path

    def _measure(self, case: Case, arm: Arm) -> Row:
        """Return what one answer of `TIMED_TOKENS` tokens took, whether it would have ended before or not.

        ``ttft_s`` runs to the first token and holds ``load_s``, the reading of gist files.
        """
        model = self._model
        reset_peak(model)
        started_s = time.perf_counter()
        gists, texts = arm.shares(case)
        held = [self._load(passage, arm.dial) for passage in gists]
        load_s = time.perf_counter() - started_s
        ids = list(chain.from_iterable(model.encode_passage(passage.text, passage.heading) for passage in texts))
        begin = concatenate([model.prefix, *held], model.rope, layout=self._memories.layout(case, arm))
        memory = read_text(model, begin, ids)
        fed, position = torch.tensor([model.encode_question(case.question)]), memory.next_position
        reading, ttft_s = model.read(memory), 0.0
        for _ in range(TIMED_TOKENS):
            hidden = reading.feed(fed, positions=position + torch.arange(fed.shape[1]), role="answers")
            position += fed.shape[1]
            fed = model.logits(hidden[:, -1]).argmax(dim=-1, keepdim=True).cpu()  # the copy waits for the device
            ttft_s = ttft_s or time.perf_counter() - started_s
        decode_s = time.perf_counter() - started_s - ttft_s
        return {
            "ttft_s": ttft_s,
            "load_s": load_s,
            "decode_tokens_per_s": (TIMED_TOKENS - 1) / decode_s,
            "peak_bytes": peak_bytes(model),
            "source_tokens": len(ids) + sum(cache.source_tokens for cache in held),
        }

    def _load(self, passage: Passage, dial: Dial) -> GistCache:
        path = self._files[passage, dial]
        return gist_file.decode(path.read_bytes(), path, key="", fingerprint="").to(self._model.device)


def reset_peak(model: GistModel) -> None:
    """Let the peak of memory be counted from now."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        return
    with suppress(OSError):  # Linux only; without it the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def peak_bytes(model: GistModel) -> int:
    """Return the most memory held since `reset_peak`, in bytes."""
    if model.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(model.device))
    with suppress(OSError):
        status = Path("/proc/self/status").read_text("ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
