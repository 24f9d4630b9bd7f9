"""How fast an index answers from gists and from text, and how fast gists are made: the measurements of `gistrag bench`.

Both modes answer the same questions through `GistRAG.stream` with the same loaded models, interleaved within one run,
so that whatever else the machine does affects both. The clock starts with the question and includes retrieval, as for
somebody who waits. All answers have the same number of tokens. Quality is not measured here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from gistrag.answering.answer import Answer
from gistrag.answering.assemble import assemble
from gistrag.compression.compress import BATCH_TOKENS, compress
from gistrag.errors import UsageError
from gistrag.evaluation.speed import fixed_length, medians, peak_bytes, reset_peak
from gistrag.index.schema import StoredChunk
from gistrag.model.batching import batches_by_length
from gistrag.rag import GistRAG
from gistrag.settings import Mode, RuntimeName

MODES: tuple[Mode, ...] = ("text", "gist")
SHORT_ANSWER = 10
"""Tokens of a short answer; its seconds are reported beside those of the whole one."""
BUILT_IN_QUESTIONS = 8
CHUNKS_COMPRESSED = 24

Sample = dict[str, float]


# What is asked


def questions_from(file: Path) -> list[str]:
    """Return the questions of a file: one a line, or the field ``question`` of JSON lines.

    Raises:
        UsageError: none in it.
    """
    lines = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    try:
        found = [str(json.loads(line)["question"]) if line.startswith("{") else line for line in lines]
    except (ValueError, KeyError) as error:
        raise UsageError(f"{file}: expected JSON lines with a question each, got {error}") from error
    if not found:
        raise UsageError(f"{file} holds no question; write one a line")
    return found


def built_in_questions(rag: GistRAG) -> list[str]:
    """Return questions made from the headings or first words of chunks, evenly spread over the index.

    Raises:
        UsageError: no chunk of the index has a gist.
    """
    chunks = _chunks_with_gists(rag)
    step = max(1, len(chunks) // BUILT_IN_QUESTIONS)
    return [_question_about(chunk) for chunk in chunks[::step][:BUILT_IN_QUESTIONS]]


def _question_about(chunk: StoredChunk) -> str:
    topic = " ".join(chunk.heading) or " ".join(chunk.text.split()[:8])
    return f"What does the text say about {topic}?"


def _chunks_with_gists(rag: GistRAG) -> list[StoredChunk]:
    usable = [chunk for chunk in rag.chunks() if chunk.gist_key]
    if not usable:
        raise UsageError(f"{rag.folder} holds no gists to measure; build it from more text")
    return usable


# Answering


def answering(
    rag: GistRAG, questions: Sequence[str], *, top_k: int, tokens: int | None, repeats: int, new_tokens: int
) -> dict[str, Any]:
    """Return every measurement of both modes, their medians, and text divided by gist.

    Args:
        top_k: chunks of each answer.
        tokens: as many chunks as hold so many tokens, instead of *top_k*.
        repeats: measurements of each mode.
        new_tokens: tokens of each answer.

    Raises:
        UsageError: chunks without gists, or more chunks than fit into the model's context window.
    """
    asked = [
        (question, _chunks_that_hold(rag, question, tokens) if tokens else top_k) for question in questions[:repeats]
    ]
    samples: dict[str, list[Sample]] = {mode: [] for mode in MODES}
    with fixed_length(rag.runtime):
        for mode in MODES:
            measure_answer(rag, *asked[0], mode=mode, new_tokens=2)  # warm up
        for question, count in islice(cycle(asked), repeats):
            for mode in MODES:
                samples[mode].append(measure_answer(rag, question, count, mode=mode, new_tokens=new_tokens))
    median = {mode: medians(samples[mode]) for mode in MODES}
    ratio = {name: _ratio(median["text"][name], median["gist"][name]) for name in median["text"]}
    return {"questions": [one for one, _ in asked], "samples": samples, "median": median, "text_to_gist": ratio}


def _chunks_that_hold(rag: GistRAG, question: str, tokens: int) -> int:
    """Return how many of the best chunks hold *tokens* tokens.

    Raises:
        UsageError: all of them hold less.
    """
    total = 0
    for count, hit in enumerate(rag.retrieve(question, top_k=rag.store.count()), 1):
        total += hit.chunk.tokens
        if total >= tokens:
            return count
    raise UsageError(f"--tokens asks for {tokens:,}, the retrieved chunks hold {total:,}; build from more text")


def measure_answer(rag: GistRAG, question: str, top_k: int, *, mode: Mode, new_tokens: int) -> Sample:
    """Return what one answer took, in seconds, slots and bytes.

    ``ttft_s`` runs from the question to the first token; it includes ``retrieve_s`` and ``context_s``, from chunks to
    memory. ``answer_10_s`` and the like run from the question to an answer of so many tokens, by the mean time of a
    token: some tokens add no text of their own, so no piece tells when they were generated. ``peak_process_bytes``
    is the peak of the whole process, model included; ``context_bytes`` is the keys and values of passages and question.

    Raises:
        UsageError: chunks without gists, or more chunks than fit into the model's context window.
    """
    reset_peak(rag.runtime)
    stream = rag.stream(question, mode=mode, top_k=top_k, max_new_tokens=new_tokens)
    answer, peak = stream.result(), peak_bytes(rag.runtime)
    timings, usage = answer.timings, answer.usage
    if usage.dropped_chunks:
        raise UsageError(f"{top_k} chunks do not fit into the model's context window as {mode}; measure fewer")
    if mode == "gist" and not usage.gist_slots:
        raise UsageError(f"no chunk with a gist for {question!r}; ask something else or raise --top-k")
    slots = _context_slots(rag, answer)
    lengths = sorted({min(SHORT_ANSWER, new_tokens), new_tokens})
    token_s = timings.decode_s / (usage.answer_tokens - 1)
    answers = {f"answer_{length}_s": timings.ttft_s + (length - 1) * token_s for length in lengths}
    return {
        "ttft_s": timings.ttft_s,
        "retrieve_s": timings.retrieve_s,
        "context_s": timings.load_s + timings.assemble_s,
        **answers,
        "decode_tokens_per_s": 1 / token_s,
        "context_slots": slots,
        "context_bytes": slots * rag.runtime.context_bytes_per_slot,
        "peak_process_bytes": peak,
    }


def _context_slots(rag: GistRAG, answer: Answer) -> float:
    """Return the slots of passages and question that an answer attended to.

    Torch carries padding slots, where heads keep different numbers of tokens; they count.
    """
    usage = answer.usage
    behind = usage.text_tokens + usage.question_tokens
    if rag.runtime.name != "torch":
        return rag.runtime.prefix_slots + usage.gist_slots + behind
    chunks = rag.chunks([source.chunk_id for source in answer.sources if not source.as_text])
    caches = [rag.store.gists.load(chunk.gist_key) for chunk in chunks if chunk.gist_key]
    return assemble(rag.model, caches, layout=usage.layout).carried_slots + behind


# Making gists


def compression(rag: GistRAG, *, repeats: int) -> dict[str, Any]:
    """Return tokens per second of making gists, and of only prefilling the same batches, interleaved."""
    work: dict[str, Callable[[GistRAG, Sequence[Sequence[int]]], None]] = {"read": _prefill, "compress": _compress}
    samples: dict[str, list[Sample]] = {name: [] for name in work}
    batches = _batches(rag)
    for number, batch in enumerate(islice(cycle(batches), repeats + 1)):
        for name, run in work.items():
            started_s = time.perf_counter()
            run(rag, batch)
            seconds = time.perf_counter() - started_s
            if number:  # the first is to warm up
                samples[name].append({"tokens_per_s": sum(map(len, batch)) / seconds})
    median = {name: medians(listed) for name, listed in samples.items()}
    share = _ratio(median["compress"]["tokens_per_s"], median["read"]["tokens_per_s"])
    shapes = [[len(ids) for ids in batch] for batch in batches]
    return {"batches": shapes, "samples": samples, "median": median, "compress_to_read": share}


def _batches(rag: GistRAG) -> list[list[list[int]]]:
    """Return chunks as token ids, in batches that `gistrag.compression.compress.compress` takes at once."""
    chunks = _chunks_with_gists(rag)[:CHUNKS_COMPRESSED]
    ids = [rag.model.encode_passage(chunk.text, chunk.heading) for chunk in chunks]
    return [[ids[row] for row in rows] for rows in batches_by_length(list(map(len, ids)), budget=BATCH_TOKENS)]


def _prefill(rag: GistRAG, batch: Sequence[Sequence[int]]) -> None:
    """Run one forward pass over a batch, up to the logits of its last tokens: the least a model can do with it."""
    rows = [torch.tensor(ids) for ids in batch]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (batch, n)
    hidden = rag.model.read(batch=len(rows)).feed(ids, positions=torch.arange(ids.shape[1]))
    rag.model.logits(hidden[:, -1]).cpu()  # the copy waits for the device


def _compress(rag: GistRAG, batch: Sequence[Sequence[int]]) -> None:
    caches = compress(rag.model, batch, rag.store.settings.gists)
    caches[-1].kv.cpu()


# Disk and fresh processes


def disk(rag: GistRAG) -> dict[str, float]:
    """Return what the gists take on disk."""
    source_tokens = sum(row.source_tokens for row in rag.store.gists.rows())
    size = rag.store.stats().gist_bytes
    return {"gist_bytes": size, "source_tokens": source_tokens, "bytes_per_source_token": size / max(source_tokens, 1)}


def cold_starts(index: Path, question: str, *, runtime: RuntimeName) -> dict[str, Sample]:
    """Return for each mode where the seconds of a fresh process go, from its start to its first token.

    Raises:
        UsageError: the process failed; the message repeats its own.
    """
    return {mode: _cold_start(index, question, mode, runtime) for mode in MODES}


def _cold_start(index: Path, question: str, mode: Mode, runtime: RuntimeName) -> Sample:
    asking = [sys.executable, "-m", "gistrag", "query", question, "--index", str(index), "--runtime", runtime]
    started_s = time.perf_counter()
    done = subprocess.run(
        [*asking, "--mode", mode, "--max-new-tokens", "1", "--json"], capture_output=True, text=True, check=False
    )
    process_s = time.perf_counter() - started_s
    if done.returncode:
        raise UsageError(f"a fresh process ended with code {done.returncode}: {done.stderr.strip()}")
    answer = json.loads(done.stdout)
    return {**answer["startup_s"], "first_token_s": answer["timings"]["ttft_s"], "process_s": process_s}


def _ratio(first: float, second: float) -> float | None:
    return first / second if second else None
