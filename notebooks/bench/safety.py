"""What safety costs: hashing gists on their first read, and building with everything on against everything off.

    python notebooks/bench/safety.py docs/ --output notebooks/bench/safety.json

Reading: eight gist files of 0.4 MB are loaded for the first time and once more, which leaves the hash out; the
difference is what the check costs, by the clock and in CPU time of the thread, which a busy machine does not stretch.
Building: the same folder is built with the default models, with and without all
that keeps an index safe, in turn. Without means: no fsync, SQLite's synchronous and secure_delete off, files written in
place, no hash of gist, row, database or seal, no look for NaN, nothing taken over from an earlier build, every file
parsed in this process. With means a new parser worker for each build. Medians are printed; the samples are in the JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gistrag import Engine, GistRAG, IndexSettings
from gistrag.documents import discovery, parser_worker, readers
from gistrag.evaluation.speed import machine
from gistrag.index import chunk_rows, gist_store, schema, store
from gistrag.index.database import Database
from gistrag.index.gist_store import GistStore
from gistrag.index.store import Store
from gistrag.kv import gist_file
from gistrag.kv.cache import GistCache
from gistrag.storage import files

GISTS, GIST_BYTES = 8, 400_000
SHAPE = (30, 2, 3, -1, 64)  # of the default model


def take(samples: dict[str, list[float]], name: str, work: Callable[[], object]) -> None:
    """Do something and note how long it took, by the clock and in CPU time."""
    cpu_s, started_s = time.thread_time(), time.perf_counter()
    work()
    samples.setdefault(f"{name}_s", []).append(time.perf_counter() - started_s)
    samples.setdefault(f"{name}_cpu_s", []).append(time.thread_time() - cpu_s)


def first_reads(folder: Path, repeats: int) -> dict[str, Any]:
    """Return seconds to load eight gists for the first time and again, and to hash their bytes alone, each time."""
    layers, two, heads, _, width = SHAPE
    slots = round(GIST_BYTES / (layers * two * heads * width * torch.bfloat16.itemsize))
    samples: dict[str, list[float]] = {}
    with Store.build(folder) as built:
        built.configure(IndexSettings(), source=".", gist_fingerprint={}, embedder_fingerprint={})
        keys = [built.gists.key([number]) for number in range(GISTS)]
        for key in keys:
            kv = torch.randn(layers, two, heads, slots, width).to(torch.bfloat16)
            built.gists.put({key: GistCache(kv, torch.arange(slots), slots)})
    time.sleep(2 * gist_store.SETTLED_NS / 1e9)  # until then a file counts as one that may still change
    with Store.open(folder) as opened:
        held = [opened.gists.path(key).read_bytes() for key in keys]
        load = lambda: [opened.gists.load(key) for key in keys]  # noqa: E731
        for _ in range(repeats):
            opened.gists._verified.clear()
            take(samples, "first", load)
            assert len(opened.gists._verified) == GISTS
            take(samples, "again", load)
            take(samples, "hash", lambda: [hashlib.sha256(data).hexdigest() for data in held])
    return {"file_bytes": len(held[0]), **samples}


@contextmanager
def careless() -> Iterator[None]:
    """Build without any of what keeps an index safe, for the length of the block."""

    def write_gist(self: GistStore, key: str, cache: GistCache) -> tuple[str, int]:
        data = gist_file.encode(cache, key=key, fingerprint=self.config.gists_by)
        self.path(key).parent.mkdir(parents=True, exist_ok=True)
        self.path(key).write_bytes(data)
        return "", len(data)

    loose = {"synchronous = FULL": "synchronous = OFF", "secure_delete = ON": "secure_delete = OFF"}
    pragmas = [
        next((line.replace(a, b) for a, b in loose.items() if a in line), line) for line in schema.BUILDER_PRAGMAS
    ]
    changes: list[tuple[Any, str, Any]] = [
        (files, "sync_file", lambda descriptor: None),
        (files, "sync_folder", lambda path: None),
        (schema, "BUILDER_PRAGMAS", pragmas),
        (gist_file, "_seal", lambda tensors, metadata: ""),
        (store, "row_sha256", lambda values: ""),
        (chunk_rows, "row_sha256", lambda values: ""),
        (GistStore, "_write", write_gist),
        (GistStore, "reuse", lambda self, key: False),
        (Database, "sha256", lambda self: ""),
        (GistCache, "is_finite", True),
        (discovery, "guarded_read", readers.read),
    ]
    kept = [
        (owner, name, getattr(owner, name) if owner is not GistCache else vars(owner)[name])
        for owner, name, _ in changes
    ]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def built(docs: Path, engine: Engine, *, is_safe: bool) -> dict[str, float]:
    """Build an index of a folder and return the seconds, the CPU seconds of this process, and the tokens compressed."""
    with tempfile.TemporaryDirectory() as folder:
        parser_worker._worker(os.getpid()).close()  # the next one starts within the time
        started_s, cpu_s = time.perf_counter(), time.process_time()
        with GistRAG.from_folder(docs, index=Path(folder, "index"), engine=engine, gists="now") as rag:
            taken_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
            tokens = rag.store.stats().tokens
    return {"seconds": taken_s, "cpu_s": cpu_s, "tokens": tokens, "is_safe": is_safe}


def builds(docs: Path, engine: Engine, pairs: int) -> list[dict[str, float]]:
    """Return what builds took, in pairs of one with and one without safety, which of them is first in turn."""
    samples = []
    built(docs, engine, is_safe=True)  # loads what is loaded once
    for number in range(2 * pairs):
        if number % 4 in (0, 3):
            samples.append(built(docs, engine, is_safe=True))
        else:
            with careless():
                samples.append(built(docs, engine, is_safe=False))
    return samples


def kept(samples: list[dict[str, float]], name: str) -> list[float]:
    """Return, for each pair of builds, the share of throughput that the safe one keeps."""
    pairs = zip(samples[::2], samples[1::2], strict=True)
    ordered = (sorted(pair, key=lambda one: one["is_safe"]) for pair in pairs)
    return [loose[name] / safe[name] for loose, safe in ordered]


def main() -> None:
    """Measure, print the medians, and write the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("docs", type=Path, help="folder of documents to build")
    parser.add_argument("--pairs", type=int, default=5, help="builds of either kind")
    parser.add_argument("--reads", type=int, default=200, help="first reads of eight gists")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reads = first_reads(Path(folder, "index"), given.reads)
    print(f"eight gists of {reads['file_bytes']:,} bytes, milliseconds:")
    for clock, end in (("by the clock", "_s"), ("CPU time", "_cpu_s")):
        first, again, hashed = (reads[name + end] for name in ("first", "again", "hash"))
        checked = [one - other for one, other in zip(first, again, strict=True)]
        told = (statistics.median(samples) * 1e3 for samples in (first, again, checked, hashed))
        print(f"{clock:12} first {next(told):.2f}  again {next(told):.2f}  the check {next(told):.2f}  ", end="")
        print(f"the hashes alone {next(told):.2f}", flush=True)
    engine = Engine.load(IndexSettings())
    samples = builds(given.docs, engine, given.pairs)
    for is_safe in (True, False):
        rates = [one["tokens"] / one["seconds"] for one in samples if one["is_safe"] == is_safe]
        print(f"build {'with' if is_safe else 'without'} safety: {statistics.median(rates):,.0f} tokens/s")
    wall, cpu = (statistics.median(kept(samples, name)) for name in ("seconds", "cpu_s"))
    print(f"throughput kept: {wall:.1%} by the clock, {cpu:.1%} by CPU time of the builder")
    if given.output:
        told = {"machine": machine(engine.model), "reads": reads, "builds": samples}
        given.output.write_text(json.dumps(told, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
