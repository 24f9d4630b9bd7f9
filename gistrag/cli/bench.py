"""`gistrag bench`: how fast this machine answers from gists and from text, and how fast it makes gists.

Options and output; `gistrag.evaluation.benchmark` does the measuring.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from gistrag.cli.options import INDEX, Debug, Device, Index, Json, Quiet, RuntimeOption, TopK
from gistrag.cli.output import loading, print_json, print_table, say, waiting
from gistrag.errors import UsageError
from gistrag.progress import megabytes

EXAMPLES = (
    "gistrag bench",
    "gistrag bench --tokens 6000 --repeats 3",
    "gistrag bench --questions questions.txt --cold --json > bench.json",
)


def bench(
    index: Index = INDEX,
    questions: Annotated[
        Path | None,
        typer.Option(
            "--questions",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="File of questions: one per line, or JSON lines.",
        ),
    ] = None,
    top_k: TopK = 3,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", min=1, metavar="N", help="As many chunks as hold N tokens, instead of --top-k."),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, metavar="N", help="Measurements of each kind.")] = 5,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, metavar="N", help="Tokens of each answer.")] = 40,
    cold: Annotated[
        bool, typer.Option("--cold", help="Also time fresh processes, from their start to the first token.")
    ] = False,
    device: Device = None,
    runtime: RuntimeOption = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure answers from gists against answers from text.

    Also measures how fast gists are made, compared with only prefilling the text. With --json the table goes to
    standard error, and the JSON holds every single measurement.
    """
    with loading():
        from gistrag.evaluation import benchmark, speed
        from gistrag.rag import GistRAG

        rag = GistRAG.open(index, device=device, runtime=runtime)
    if pending := rag.store.gists.chunks()[1]:
        rag.close()
        raise UsageError(f"the gists of {pending:,} chunks are still to be made; run gistrag build, then measure")
    load_average = os.getloadavg()[0]
    if speed.is_busy():
        say("this machine is busy; measure on a quiet one")
    with rag, waiting("measuring"):
        asked = benchmark.questions_from(questions) if questions else benchmark.built_in_questions(rag)
        answering = benchmark.answering(
            rag, asked, top_k=top_k, tokens=tokens, repeats=repeats, new_tokens=new_tokens
        )  # first, as what follows loads the model that makes gists
        result: dict[str, Any] = {
            "machine": {**speed.machine(rag.model), "load_average": load_average},
            "settings": {
                **asdict(rag.store.settings),
                "runtime": rag.runtime.name,
                "top_k": None if tokens else top_k,
                "tokens": tokens,
                "repeats": repeats,
                "new_tokens": new_tokens,
            },
            "disk": benchmark.disk(rag),
            "answering": answering,
            "compression": benchmark.compression(rag, repeats=repeats),
            "cold": benchmark.cold_starts(index, asked[0], runtime=runtime) if cold else None,
        }
    print(conditions(result["machine"], result["settings"]), file=sys.stderr if as_json else sys.stdout)
    print_table(["", "text", "gist", "text / gist"], list(table(result)), to_stderr=as_json)
    if as_json:
        print_json(result)


def conditions(machine: dict[str, Any], settings: dict[str, Any]) -> str:
    """Return what the figures depend on, in one line.

    >>> machine = {"device": "cpu", "processor": "AMD EPYC", "threads": 2, "simd": "AVX2", "dtype": "float32"}
    >>> conditions(machine, {"runtime": "torch", "chunk_tokens": 256, "placement": "matched", "tokens_per_gist": 4})
    'AMD EPYC, 2 threads, AVX2; torch, float32; chunks of at most 256 tokens, matched, 4 tokens per gist'
    """
    on_cpu = machine["device"] == "cpu"
    where = "{processor}, {threads} threads, {simd}" if on_cpu else "{device}"
    how = "torch, {dtype}" if settings["runtime"] == "torch" else "{runtime} runtime"
    what = "chunks of at most {chunk_tokens} tokens, {placement}, {tokens_per_gist} tokens per gist"
    return f"{where}; {how}; {what}".format_map({**machine, **settings})


def table(result: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the table: what was measured, for text, for gists, and text divided by gist."""
    median, ratio = result["answering"]["median"], result["answering"]["text_to_gist"]
    for name in median["text"]:
        label, shown = ROWS.get(name) or _answer_row(name)
        times = f"{ratio[name]:.2f}" if ratio[name] is not None else ""
        yield [label, shown(median["text"][name]), shown(median["gist"][name]), times]
    yield ["disk, bytes per source token", "", f"{result['disk']['bytes_per_source_token']:,.0f}", ""]
    making = result["compression"]["median"]
    rates = [making[name]["tokens_per_s"] for name in ("read", "compress")]
    yield ["prefilling / making gists, tokens/s", *(f"{rate:,.0f}" for rate in rates), f"{rates[0] / rates[1]:.2f}"]
    for stage in COLD_STAGES if result["cold"] else ():
        text, gist = (result["cold"][mode][stage] for mode in ("text", "gist"))
        yield [f"cold start, {stage.removesuffix('_s').replace('_', ' ')}, s", f"{text:.2f}", f"{gist:.2f}", ""]


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _bytes(value: float) -> str:
    return megabytes(int(value))


def _answer_row(name: str) -> tuple[str, Callable[[float], str]]:
    """Return label and format of the seconds to an answer, such as ``answer_10_s``."""
    return f"answer of {name.split('_')[1]} tokens, s", _seconds


COLD_STAGES = ("import_s", "load_s", "first_token_s", "process_s")
ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "ttft_s": ("time to first token, s", _seconds),
    "retrieve_s": ("  including retrieval, s", _seconds),
    "context_s": ("  including chunks to memory, s", _seconds),
    "decode_tokens_per_s": ("decoding, tokens/s", "{:.1f}".format),
    "context_slots": ("slots of the context", "{:,.0f}".format),
    "context_bytes": ("keys and values in memory", _bytes),
    "peak_process_bytes": ("peak memory, whole process", _bytes),
}
