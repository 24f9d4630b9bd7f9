"""`gistrag bench`: how fast this machine answers from gists and from text, and how fast it makes gists.

Both arms get the same chunks and the same loaded model, and take turns within one run, so that whatever else the
machine does hits both. An answer's clock runs from the numbers of the chunks to the first token: the text arm reads
and encodes their text and prefills it, the gist arm reads their gist files, moves and joins them, and prefills the
question only. Finding the chunks costs both the same and is left out. Quality is not measured here.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gistrag import __version__
from gistrag.cli.options import INDEX, Debug, Device, Index, Json, Quiet, TopK
from gistrag.cli.output import loading, print_json, print_table, say, waiting
from gistrag.errors import UsageError
from gistrag.progress import megabytes

if TYPE_CHECKING:
    from gistrag.index.schema import StoredChunk
    from gistrag.model.gist_model import GistModel
    from gistrag.rag import GistRAG

ARMS = ("text", "gist")
BUILT_IN_QUESTIONS = 8
CHUNKS_COMPRESSED = 24
BUSY_SHARE = 0.5


EXAMPLES = (
    "gistrag bench",
    "gistrag bench --tokens 6000 --repeats 3",
    "gistrag bench --questions questions.txt --cold --json > bench.json",
)


def bench(
    index: Index = INDEX,
    questions: Annotated[
        Path | None,
        typer.Option("--questions", metavar="FILE", exists=True, dir_okay=False, help="One a line, or JSON lines."),
    ] = None,
    top_k: TopK = 3,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, metavar="N", help="As many chunks as hold N tokens, not --top-k.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, metavar="N", help="Measurements of each kind.")] = 5,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, metavar="N", help="Tokens of each answer.")] = 32,
    cold: Annotated[bool, typer.Option("--cold", help="Also time fresh processes, from start to first token.")] = False,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure answers from gists against text.

    Also how fast gists are made, compared with only reading the text.

    With --json the table goes to standard error, and every single measurement is in the JSON.
    """
    with loading():
        from gistrag.rag import GistRAG

        rag = GistRAG.open(index, device=device)
    if os.getloadavg()[0] > BUSY_SHARE * (os.cpu_count() or 1):
        say(f"this machine is busy (load {os.getloadavg()[0]:.1f}); figures from a quiet one say more")
    with rag, waiting("measuring"):
        asked = questions_from(questions) if questions else built_in_questions(rag)
        result = {
            "machine": machine(rag.model),
            "settings": {
                **asdict(rag.store.settings),
                "top_k": None if tokens else top_k,
                "tokens": tokens,
                "repeats": repeats,
                "new_tokens": new_tokens,
            },
            "disk": disk(rag),
            "answering": answering(rag, asked, top_k=top_k, tokens=tokens, repeats=repeats, new_tokens=new_tokens),
            "compression": compression(rag, repeats=repeats),
            "cold": cold_starts(index, asked[0]) if cold else None,
        }
    print_table(["", "text", "gist", "text / gist"], list(table(result)), to_stderr=as_json)
    if as_json:
        print_json(result)


# What is asked


def questions_from(file: Path) -> list[str]:
    """Return the questions of a file: one a line, or the field ``question`` of JSON lines.

    Raises:
        UsageError: there is none in it.
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
    """Return questions made of the headings or first words of chunks, evenly spread over the index.

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
    chunks = [chunk for row in rag.store.documents() for chunk in rag.store.chunks_of(row.path)]
    usable = [chunk for chunk in chunks if chunk.gist_key]
    if not usable:
        raise UsageError(f"{rag.folder} holds no gists to measure; build it from more text")
    return usable


# Answering


@dataclass(frozen=True)
class Case:
    """A question's token ids and the chunks to answer it from, in prompt order."""

    question: list[int]
    chunk_ids: list[int]


def answering(
    rag: GistRAG, questions: Sequence[str], *, top_k: int, tokens: int | None, repeats: int, new_tokens: int
) -> dict[str, Any]:
    """Return every measurement of both arms, their medians, and text divided by gist."""
    cases = [_case(rag, question, top_k, tokens) for question in questions[:repeats]]
    for arm in ARMS:
        measure_answer(rag, cases[0], arm, new_tokens=2)  # warm up
    samples: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for case in islice(cycle(cases), repeats):
        for arm in ARMS:
            samples[arm].append(measure_answer(rag, case, arm, new_tokens=new_tokens))
    medians = {arm: _medians(samples[arm]) for arm in ARMS}
    ratio = {name: _ratio(medians["text"][name], medians["gist"][name]) for name in medians["text"]}
    return {"questions": list(questions[:repeats]), "samples": samples, "median": medians, "text_to_gist": ratio}


def _case(rag: GistRAG, question: str, top_k: int, tokens: int | None) -> Case:
    """Return a question with its best chunks that have a gist: *top_k* of them, or as many as hold *tokens*."""
    hits = rag.retrieve(question, top_k=top_k if tokens is None else rag.store.count())
    chunks = [hit.chunk for hit in hits if hit.chunk.gist_key]
    if tokens is not None:
        chunks = list(_filling(chunks, tokens))
    if not chunks:
        raise UsageError(f"no chunk with a gist for {question!r}; ask something else or raise --top-k")
    return Case(rag.model.encode_question(question), [chunk.id for chunk in reversed(chunks)])


def _filling(chunks: Sequence[StoredChunk], tokens: int) -> Iterator[StoredChunk]:
    total = 0
    for chunk in chunks:
        if total < tokens:
            yield chunk
        total += chunk.tokens
    if total < tokens:
        raise UsageError(f"--tokens {tokens:,} was asked for, retrieval gives {total:,}; build from more text")


def measure_answer(rag: GistRAG, case: Case, arm: str, *, new_tokens: int) -> dict[str, float]:
    """Return what one answer of exactly *new_tokens* tokens took.

    ``ttft_s`` holds ``context_s`` (from chunk numbers to a memory and a prompt) and the prefill behind it.
    ``peak_process_bytes`` is of the whole process, model included, during the answer; ``context_bytes`` is exactly
    the keys and values it was answered from.
    """
    import torch

    from gistrag.model.generation import require_room

    model = rag.model
    _reset_peak(model)
    started_s = time.perf_counter()
    memory, prompt = _context(rag, case, arm)
    context_s = time.perf_counter() - started_s
    require_room(model, memory.next_position + len(prompt) + new_tokens)
    position, reading = memory.next_position, model.read(memory)
    ids, ttft_s = torch.tensor([prompt]), 0.0
    for _ in range(new_tokens):
        hidden = reading.feed(ids, positions=position + torch.arange(ids.shape[1]), role="answers")
        position += ids.shape[1]
        ids = model.logits(hidden[:, -1]).argmax(dim=-1, keepdim=True).cpu()  # (1, 1); the copy waits for the device
        ttft_s = ttft_s or time.perf_counter() - started_s
    decode_s = time.perf_counter() - started_s - ttft_s
    return {
        "ttft_s": ttft_s,
        "context_s": context_s,
        "decode_tokens_per_s": (new_tokens - 1) / decode_s,
        "context_slots": memory.carried_slots + len(prompt),
        "context_bytes": (memory.carried_slots + len(prompt)) * model.context_bytes_per_slot,
        "peak_process_bytes": _peak_bytes(model),
    }


def _context(rag: GistRAG, case: Case, arm: str) -> tuple[Any, list[int]]:
    """Return the memory and the prompt of an arm; nothing is kept from one call to the next."""
    from gistrag.kv.cache import concatenate

    model, chunks = rag.model, rag.store.chunks(case.chunk_ids)
    if arm == "text":
        passages = (model.encode_passage(chunk.text, chunk.heading) for chunk in chunks)
        return concatenate([model.prefix], model.rope), [*chain.from_iterable(passages), *case.question]
    caches = [rag.store.gists.load(chunk.gist_key or "").to(rag.model.device) for chunk in chunks]
    return concatenate([model.prefix, *caches], model.rope), case.question


# Making gists


def compression(rag: GistRAG, *, repeats: int) -> dict[str, Any]:
    """Return tokens per second of making gists and of only reading the same batches, taking turns."""
    arms = {"read": _read, "compress": _compress}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    batches = _batches(rag)
    for number, batch in enumerate(islice(cycle(batches), repeats + 1)):
        for name, work in arms.items():
            started_s = time.perf_counter()
            work(rag, batch)
            seconds = time.perf_counter() - started_s
            if number:  # the first is to warm up
                samples[name].append({"tokens_per_s": sum(map(len, batch)) / seconds})
    medians = {name: _medians(listed) for name, listed in samples.items()}
    share = _ratio(medians["compress"]["tokens_per_s"], medians["read"]["tokens_per_s"])
    shapes = [[len(ids) for ids in batch] for batch in batches]
    return {"batches": shapes, "samples": samples, "median": medians, "compress_to_read": share}


def _batches(rag: GistRAG) -> list[list[list[int]]]:
    """Return chunks as token ids, in groups that `gistrag.compression.compress.compress` takes in one go."""
    from gistrag.compression.compress import BATCH_TOKENS

    chunks = _chunks_with_gists(rag)[:CHUNKS_COMPRESSED]
    groups: list[list[list[int]]] = [[]]
    for ids in sorted((rag.model.encode_passage(chunk.text, chunk.heading) for chunk in chunks), key=len):
        if groups[-1] and len(ids) * (len(groups[-1]) + 1) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(ids)
    return groups


def _read(rag: GistRAG, batch: Sequence[Sequence[int]]) -> None:
    """Read a batch once, to the logits of its last tokens: the least a model can do with it."""
    import torch

    rows = [torch.tensor(ids) for ids in batch]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (batch, n)
    hidden = rag.model.read(batch=len(rows)).feed(ids, positions=torch.arange(ids.shape[1]))
    rag.model.logits(hidden[:, -1]).cpu()  # the copy waits for the device


def _compress(rag: GistRAG, batch: Sequence[Sequence[int]]) -> None:
    from gistrag.compression.compress import compress

    caches = compress(rag.model, batch, rag.store.settings.gists)
    caches[-1].kv.cpu()


# What surrounds it


def disk(rag: GistRAG) -> dict[str, float]:
    """Return what the gists take on disk."""
    source_tokens = sum(row.source_tokens for row in rag.store.gists.rows())
    size = rag.store.stats().gist_bytes
    return {"gist_bytes": size, "source_tokens": source_tokens, "bytes_per_source_token": size / max(source_tokens, 1)}


def machine(model: GistModel) -> dict[str, Any]:
    """Return what the figures depend on besides the index."""
    import torch

    return {
        "cpus": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "device": str(model.device),
        "device_name": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None,
        "dtype": str(model.network_dtype).removeprefix("torch."),
        "model": f"{model.network.config.model_type}, {model.layers} layers, {model.kv_heads} kv_heads",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gistrag": __version__,
    }


def _processor() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor()


def _reset_peak(model: GistModel) -> None:
    if model.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(model.device)
        return
    with suppress(OSError):  # Linux only; without it the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def _peak_bytes(model: GistModel) -> int:
    """Return the most memory held since the last reset: on the GPU what torch allocated, else the whole process."""
    if model.device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(model.device))
    with suppress(OSError):
        status = Path("/proc/self/status").read_text("ascii")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cold_starts(index: Path, question: str) -> dict[str, dict[str, float]]:
    """Return for each arm where the seconds of a fresh process go, from its start to its first token.

    Raises:
        UsageError: the process failed, with what it said.
    """
    return {arm: _cold_start(index, question, arm) for arm in ARMS}


def _cold_start(index: Path, question: str, arm: str) -> dict[str, float]:
    asking = [sys.executable, "-m", "gistrag", "query", question, "--index", str(index)]
    started_s = time.perf_counter()
    done = subprocess.run(
        [*asking, "--mode", arm, "--max-new-tokens", "1", "--json"], capture_output=True, text=True, check=False
    )
    process_s = time.perf_counter() - started_s
    if done.returncode:
        raise UsageError(f"a fresh process ended with code {done.returncode}: {done.stderr.strip()}")
    answer = json.loads(done.stdout)
    return {**answer["startup_s"], "first_token_s": answer["timings"]["ttft_s"], "process_s": process_s}


def _medians(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}


def _ratio(first: float, second: float) -> float | None:
    return first / second if second else None


# For people


def table(result: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the table, each with what it is, text, gist, and text divided by gist."""
    median, ratio = result["answering"]["median"], result["answering"]["text_to_gist"]
    for name, (label, shown) in ROWS.items():
        yield [label, shown(median["text"][name]), shown(median["gist"][name]), f"{ratio[name]:.2f}"]
    yield ["disk, bytes per source token", "", f"{result['disk']['bytes_per_source_token']:,.0f}", ""]
    making = result["compression"]["median"]
    rates = [making[name]["tokens_per_s"] for name in ("read", "compress")]
    yield ["reading / making gists, tokens/s", *(f"{rate:,.0f}" for rate in rates), f"{rates[0] / rates[1]:.2f}"]
    for stage in COLD_STAGES if result["cold"] else ():
        text, gist = (result["cold"][arm][stage] for arm in ARMS)
        yield [f"cold start, {stage.removesuffix('_s').replace('_', ' ')}, s", f"{text:.2f}", f"{gist:.2f}", ""]


COLD_STAGES = ("import_s", "load_s", "first_token_s", "process_s")
ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "ttft_s": ("time to first token, s", "{:.3f}".format),
    "context_s": ("  of it chunks to context, s", "{:.3f}".format),
    "decode_tokens_per_s": ("decoding, tokens/s", "{:.1f}".format),
    "context_slots": ("slots of the context", "{:,.0f}".format),
    "context_bytes": ("keys and values in memory", lambda count: megabytes(int(count))),
    "peak_process_bytes": ("peak memory, whole process", lambda count: megabytes(int(count))),
}
