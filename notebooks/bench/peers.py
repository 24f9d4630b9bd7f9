"""How soon llama.cpp and gistrag answer the same questions from the same chunks, both in one run.

    python notebooks/bench/peers.py --output peers.json                  builds llama.cpp and an index of docs/ first
    python notebooks/bench/peers.py --simd avx2 --output peers-avx2.json both as on a laptop without AVX-512
    python notebooks/bench/peers.py --index index/ --quick               one short round, to see that it works

llama.cpp comes from the source distribution of llama-cpp-python and is compiled (cmake and a C++ compiler) into a
folder of its own. It gets the GGUF file of the index's base model, without gistrag's adapter, the same words and as
many threads; flash attention and the type of its cache are its own defaults. gistrag finds the chunks for both. Each
runs in a process of its own, and they take turns. Every answer is greedy and has `NEW_TOKENS` tokens, even if it would
end before; all seconds include retrieval. Kinds of answers:

    llama.cpp, text           reads the whole prompt
    llama.cpp, prefix kept    its prompt cache holds the shared prefix: passages and question are read
    llama.cpp, passages kept  its prompt cache holds the prefix and exactly these passages: the question is read
    gistrag, gist or text     for each runtime
    cold                      in a fresh process, `gistrag query` from its start; llama.cpp without Python's own start

With `--simd avx2` variables hold PyTorch and oneDNN to AVX2. onnxruntime has no such variable and takes what the
processor has, unless `without_avx512.py` runs this script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Self

from gistrag import GistRAG
from gistrag.evaluation.benchmark import questions_from
from gistrag.evaluation.speed import fixed_length, machine, medians
from gistrag.model.hub import find
from gistrag.model.prompt import passage_text

ROOT = Path(__file__).parents[2]
CACHE = Path("~/.cache/gistrag-peers").expanduser()
LLAMA = "llama-cpp-python==0.3.36"
FLAGS = {
    "native": "-DLLAVA_BUILD=OFF -DGGML_NATIVE=ON",
    "avx2": "-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=OFF",
}
CAPS = {"native": {}, "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}}
THREADS = len(os.sched_getaffinity(0))
RUNTIMES = ("torch", "cpu")
NEW_TOKENS, SHORT = 40, 10
SLOTS = 2048  # of llama.cpp's context
QUESTIONS = 10
QUIET_S = 0.3  # OpenMP's threads spin a while after their work, on the cores of who is asked next
RIVAL = "llama.cpp, text"
KEPT = {RIVAL: 0, "llama.cpp, prefix kept": 1, "llama.cpp, passages kept": -3}  # pieces of the prompt
FIGURES = ("ttft_s", "answer_10_s", "answer_40_s", "decode_tokens_per_s", "context_slots")

Sample = dict[str, Any]


def main() -> None:
    """Build what is missing, measure, print a table, and the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, help="an index with gists; left out, one of docs/ is built")
    parser.add_argument("--questions", type=Path, help="one a line, or JSON lines; left out, ten about the manual")
    parser.add_argument("--llama", type=Path, help="where llama.cpp is built, or is already")
    parser.add_argument("--simd", choices=FLAGS, default="native")
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="rounds over all questions")
    parser.add_argument("--cold", type=int, default=5, metavar="N", help="fresh processes of each kind")
    parser.add_argument("--quick", action="store_true", help="two questions, one round, one fresh process of each kind")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    listed = questions_from(given.questions or ROOT / "tests" / "data" / "questions.jsonl")
    asked = listed if given.questions else listed[:: len(listed) // QUESTIONS][:QUESTIONS]
    if given.quick:
        asked, given.repeats, given.cold = asked[:2], 1, 1
    os.environ.update(CAPS[given.simd])
    llama = build_llama(given.llama or CACHE / f"llama-{given.simd}", FLAGS[given.simd])
    found = measure(given.index or build_index(CACHE / "index"), llama, asked, given)
    print_table(found["median"])
    print(*(f"{name:<27} {text!r}" for name, text in found["answers"].items()), sep="\n")
    print(json.dumps(found))
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


# What is needed


def build_llama(folder: Path, flags: str) -> Path:
    """Return the folder of a llama_cpp compiled with *flags*, made if it is not there."""
    told, wanted = folder / "built-with.txt", f"{LLAMA} {flags}\n"
    if not told.exists() or told.read_text("utf-8") != wanted:
        print(f"compiling {LLAMA} in {folder}, which takes some minutes", file=sys.stderr)
        # no cache: pip would take a wheel that was compiled with other flags
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--upgrade"]
        command = ["nice", "-n", "10", *install, "--no-binary", "llama-cpp-python", "--target", str(folder), LLAMA]
        settings = {"CMAKE_ARGS": flags, "CMAKE_BUILD_PARALLEL_LEVEL": str(THREADS)}
        subprocess.run(command, env={**os.environ, **settings}, check=True)
        told.write_text(wanted, "utf-8")
    return folder


def build_index(folder: Path) -> Path:
    """Return the folder of an index of the manual with all its gists."""
    command = [sys.executable, "-m", "gistrag", "build", str(ROOT / "docs"), "--index", str(folder)]
    subprocess.run(command, stdout=sys.stderr, check=True)
    return folder


class Peer:
    """A process that answers line by line; a context manager that ends it.

    Attributes:
        ready: what it said of itself when its model was loaded.
    """

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        self._running = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ready = self._told()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.communicate()  # ends its input, and with that the process

    def ask(self, **request: Any) -> Sample:
        """Return what the process says to a request, after the processes asked before have become quiet."""
        assert self._running.stdin is not None
        time.sleep(QUIET_S)
        self._running.stdin.write(json.dumps(request) + "\n")
        self._running.stdin.flush()
        return self._told()

    def _told(self) -> Sample:
        assert self._running.stdout is not None
        if not (line := self._running.stdout.readline()):
            raise RuntimeError(f"a worker ended with code {self._running.wait()}; its message stands above")
        told: Sample = json.loads(line)
        return told


def work(index: Path, runtime: Any) -> None:
    """Answer requests as the worker of a runtime."""
    with GistRAG.open(index, runtime=runtime) as rag:
        print(json.dumps({"runtime": rag.runtime.name}), flush=True)  # torch where the other one cannot be had
        for line in sys.stdin:
            request = json.loads(line)
            if request["kind"] == "about":
                told = {"machine": machine(rag.model), "settings": asdict(rag.store.settings)}
            elif request["kind"] == "find":
                told = prompt_of(rag, request["question"], request["top_k"])
            else:
                told = answer_of(rag, request)
            print(json.dumps(told), flush=True)


def prompt_of(rag: GistRAG, question: str, top_k: int) -> Sample:
    """Return the pieces of the prompt as text: prefix, passages, question in three; and the seconds of retrieval."""
    started_s = time.perf_counter()
    hits = rag.retrieve(question, top_k=top_k)
    retrieve_s = time.perf_counter() - started_s
    passages = [passage_text(hit.chunk.text, hit.chunk.heading) for hit in reversed(hits)]  # the best one last
    prompt = rag.runtime.prompt
    asked = [prompt.before_question, f" {question.strip()}", prompt.after_question]
    return {"pieces": [prompt.prefix, *passages, *asked], "retrieve_s": retrieve_s}


def answer_of(rag: GistRAG, request: Sample) -> Sample:
    """Return text, tokens and seconds of an answer; its slots leave out padding slots."""
    with nullcontext() if request["stops"] else fixed_length(rag.runtime):
        answer = rag.query(
            request["question"], mode=request["mode"], top_k=request["top_k"], max_new_tokens=request["new_tokens"]
        )
    usage = answer.usage
    return {
        "ttft_s": answer.timings.ttft_s,
        "total_s": answer.timings.total_s,
        "answer_tokens": usage.answer_tokens,
        "context_slots": rag.runtime.prefix_slots + usage.gist_slots + usage.text_tokens + usage.question_tokens,
        "text": answer.text,
    }


# Measuring


def measure(index: Path, llama: Path, questions: Sequence[str], given: argparse.Namespace) -> dict[str, Any]:
    """Return the samples of every kind of answer, their medians, and what they depend on."""
    load_average = os.getloadavg()[0]
    samples: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        ours = {name: stack.enter_context(Peer([__file__, "--worker", str(index), name])) for name in RUNTIMES}
        about = ours["torch"].ask(kind="about")
        worker = [str(Path(__file__).with_name("llama_cpp_worker.py")), str(find(about["settings"]["model"]).path)]
        start = partial(Peer, [*worker, str(THREADS), str(SLOTS)], PYTHONPATH=str(llama))
        rival = stack.enter_context(start())
        ask = partial(answers, ours, rival, top_k=given.top_k)
        told = {name: sample["text"] for name, sample in ask(questions[0], stops=True)}  # also to warm up
        for question in [*questions] * given.repeats:
            for name, sample in ask(question, stops=False):
                samples.setdefault(name, []).append(timed(sample))
        for question in islice(cycle(questions), given.cold):
            found = ours[RUNTIMES[-1]].ask(kind="find", question=question, top_k=given.top_k)
            for name, sample in cold_answers(index, start, found, question, given.top_k):
                samples.setdefault(name, []).append(timed(sample))
    return {
        **about,
        "llama.cpp": {"package": LLAMA, "cmake": FLAGS[given.simd], **rival.ready},
        "runtimes": {name: peer.ready["runtime"] for name, peer in ours.items()},
        "simd": given.simd,
        "threads": THREADS,
        "load_average": load_average,
        "top_k": given.top_k,
        "questions": list(questions),
        "median": {name: medians(listed) for name, listed in samples.items()},
        "answers": told,
        "samples": samples,
    }


def answers(
    ours: Mapping[str, Peer], rival: Peer, question: str, *, top_k: int, stops: bool
) -> Iterator[tuple[str, Sample]]:
    """Yield one answer of every warm kind, by its name."""
    for name, kept in KEPT.items():
        found = ours[RUNTIMES[-1]].ask(kind="find", question=question, top_k=top_k)
        sample = rival.ask(pieces=found["pieces"], kept=kept, new_tokens=NEW_TOKENS, stops=stops)
        yield name, later(sample, found["retrieve_s"])
    for runtime, peer in ours.items():
        for mode in ("gist", "text"):
            how = {"mode": mode, "top_k": top_k, "new_tokens": NEW_TOKENS, "stops": stops}
            yield f"gistrag {runtime}, {mode}", peer.ask(kind="answer", question=question, **how)


def cold_answers(
    index: Path, start: Callable[[], Peer], found: Sample, question: str, top_k: int
) -> Iterator[tuple[str, Sample]]:
    """Yield one answer of every kind in a fresh process, by its name."""
    with start() as fresh:
        sample = fresh.ask(pieces=found["pieces"], kept=0, new_tokens=NEW_TOKENS, stops=False)
        yield "llama.cpp, cold", later(sample, fresh.ready["load_s"] + found["retrieve_s"])
    query = [sys.executable, "-m", "gistrag", "query", question, "--index", str(index), "--top-k", str(top_k)]
    query += ["--max-new-tokens", str(NEW_TOKENS), "--json"]
    for runtime in RUNTIMES:
        time.sleep(QUIET_S)
        started_s = time.perf_counter()
        done = subprocess.run([*query, "--runtime", runtime], stdout=subprocess.PIPE, check=True)
        process_s = time.perf_counter() - started_s
        answer = json.loads(done.stdout)
        sample = {**answer["timings"], "answer_tokens": answer["usage"]["answer_tokens"]}
        yield f"gistrag {runtime}, cold", later(sample, process_s - sample["total_s"])


def later(sample: Sample, seconds: float) -> Sample:
    """Return a sample whose clock started so many seconds before."""
    return {**sample, "ttft_s": sample["ttft_s"] + seconds, "total_s": sample["total_s"] + seconds}


def timed(sample: Sample) -> dict[str, float]:
    """Return the figures of an answer, with the seconds to `SHORT` and to `NEW_TOKENS` tokens by the mean time of one.

    An answer that ended before took one more step, for the token that ends it.
    """
    steps = sample["answer_tokens"] - (sample["answer_tokens"] == NEW_TOKENS)
    token_s = (sample["total_s"] - sample["ttft_s"]) / max(steps, 1)
    lengths = {f"answer_{length}_s": sample["ttft_s"] + (length - 1) * token_s for length in (SHORT, NEW_TOKENS)}
    known = {name: sample[name] for name in FIGURES if name in sample}
    return {**known, **lengths, "decode_tokens_per_s": 1 / token_s}


def print_table(median: Mapping[str, Mapping[str, float]]) -> None:
    """Print the figures of every kind of answer, and how many times sooner than llama.cpp its longer one is there."""
    columns = ("first token, s", "10 tokens, s", "40 tokens, s", "tokens/s", "slots", "times sooner")
    print(" " * 27, *(f"{column:>14}" for column in columns))
    for name, figures in median.items():
        against = median["llama.cpp, cold" if name.endswith("cold") else RIVAL]
        sooner = against["answer_40_s"] / figures["answer_40_s"]
        cells = [*(figures.get(figure, float("nan")) for figure in FIGURES), sooner]
        print(f"{name:<27}", *(f"{cell:>14.2f}" for cell in cells))


if __name__ == "__main__":
    work(Path(sys.argv[2]), sys.argv[3]) if sys.argv[1:2] == ["--worker"] else main()
