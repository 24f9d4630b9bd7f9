"""How fast a server answers: one client against the library, several clients together against one by one, its page.

    python notebooks/bench/serving.py --index index/ --output notebooks/bench/serving.json

Two servers run as subprocesses over the same index, one that makes up to eight answers together and one that makes them
one after the other. Time to first token alternates between the library in this process and a stream of the server;
throughput alternates between the two servers. A headless Chromium, where there is one, opens the page anew several
times and says when it painted first. Medians are printed; the samples are in the JSON. The questions are those
of `gistrag bench`, made from the index.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx

from gistrag import GistRAG
from gistrag.evaluation.benchmark import built_in_questions
from gistrag.evaluation.speed import machine

CHAT = "/v1/chat/completions"
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
KEY = "the-key-of-the-benchmark"
QUIET_S = 0.5  # OpenMP's threads spin a while after their work, on the cores of who is asked next


@contextmanager
def server(index: Path, together: int) -> Iterator[str]:
    """Run a server for the length of the block and give its address."""
    with process(index, "--together", str(together)) as (url, _):
        yield url


@contextmanager
def process(index: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a server for the length of the block and give its address and its process."""
    command = [sys.executable, "-m", "gistrag", "serve", "--index", f"bench={index}", "--port", "0", *options]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "GISTRAG_API_KEY": KEY}
    ) as running:
        assert running.stderr is not None
        told = next(line for line in running.stderr if line.startswith("serving"))
        threading.Thread(target=running.stderr.read, daemon=True).start()  # so that it never waits for a reader
        try:
            yield re.findall(r"http://\S+:\d+", told)[0], running
        finally:
            running.terminate()


def streamed(url: str, question: str, tokens: int, *, key: str = KEY, **chosen: Any) -> dict[str, float]:
    """Return seconds to the first and the last piece of a streamed answer, and its tokens.

    Args:
        chosen: what the request chooses under ``gistrag``.
    """
    body = {"model": "bench", "messages": [{"role": "user", "content": question}], "max_tokens": tokens, "stream": True}
    body, headers = {**body, "gistrag": chosen}, {"Authorization": f"Bearer {key}"}
    started_s, first_s, said = time.perf_counter(), 0.0, 0
    with httpx.stream("POST", url + CHAT, json=body, headers=headers, timeout=600) as response:
        for line in response.iter_lines():
            event = json.loads(line[6:]) if line.startswith("data: {") else {}
            if event.get("choices", [{}])[0].get("delta", {}).get("content") and not first_s:
                first_s = time.perf_counter() - started_s
            said = event.get("gistrag", {}).get("usage", {}).get("answer_tokens", said)
    return {"ttft_s": first_s, "total_s": time.perf_counter() - started_s, "tokens": said}


def first_tokens(rag: GistRAG, url: str, questions: list[str], tokens: int) -> dict[str, list[float]]:
    """Return seconds to the first piece of each question, asked of the library and of a server in turn."""
    samples: dict[str, list[float]] = {"library": [], "server": []}
    rag.query(questions[0], max_new_tokens=2)
    streamed(url, questions[0], tokens)
    for question in questions:
        time.sleep(QUIET_S)
        started_s = time.perf_counter()
        stream = rag.stream(question, max_new_tokens=tokens)
        next(stream)
        samples["library"].append(time.perf_counter() - started_s)
        stream.close()
        time.sleep(QUIET_S)
        samples["server"].append(streamed(url, question, tokens)["ttft_s"])
    return samples


def crowd(url: str, questions: list[str], clients: int, tokens: int) -> dict[str, float]:
    """Return what *clients* get who ask at the same time, each two questions in a row."""
    asked = (questions * (2 * clients))[: 2 * clients]
    started_s = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        told = list(pool.map(lambda question: streamed(url, question, tokens), asked))
    seconds = time.perf_counter() - started_s
    return {
        "tokens_per_s": sum(one["tokens"] for one in told) / seconds,
        "ttft_s": statistics.median(one["ttft_s"] for one in told),
        "total_s": statistics.median(one["total_s"] for one in told),
    }


def first_paints(url: str, repeats: int) -> list[float]:
    """Return seconds from opening the page, nothing cached, to its first contentful paint; [] without a browser."""
    path = os.environ.get("GISTRAG_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        return []
    from playwright.sync_api import sync_playwright

    samples = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(repeats):
            context = browser.new_context()
            page = context.new_page()
            page.goto(f"{url}/#key={KEY}")
            page.locator("#facts:not(:empty)").wait_for()
            samples.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000)
            context.close()
        browser.close()
    return samples


def measure(index: Path, *, tokens: int, repeats: int) -> dict[str, Any]:
    """Return all samples, and the machine they are from."""
    crowds: dict[str, list[dict[str, float]]] = {}
    with GistRAG.open(index) as rag:
        questions, here = built_in_questions(rag), machine(rag.model)
        with server(index, 8) as together, server(index, 1) as apart:
            ttft = first_tokens(rag, together, questions * repeats, tokens)
            paints = first_paints(together, 5 * repeats)
            for clients, _ in itertools.product((1, 2, 4, 8), range(repeats)):
                for name, url in (("together", together), ("one by one", apart)):
                    crowds.setdefault(f"{clients} clients, {name}", []).append(crowd(url, questions, clients, tokens))
    return {"machine": here, "tokens": tokens, "ttft_s": ttft, "first_paint_s": paints, "crowds": crowds}


def median_of(samples: list[dict[str, float]], name: str) -> float:
    """Return the median of one figure."""
    return statistics.median(sample[name] for sample in samples)


def main() -> None:
    """Measure, print a table, and write the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, default=Path("index"))
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    measured = measure(given.index, tokens=given.tokens, repeats=given.repeats)
    library, served = (statistics.median(measured["ttft_s"][name]) for name in ("library", "server"))
    print(f"first token: library {library:.3f} s, server {served:.3f} s, ratio {served / library:.2f}")
    if paints := measured["first_paint_s"]:
        print(f"first paint of the page: {statistics.median(paints):.3f} s, at most {max(paints):.3f} s")
    for name, samples in measured["crowds"].items():
        figures = {figure: median_of(samples, figure) for figure in ("tokens_per_s", "ttft_s", "total_s")}
        print(f"{name:22} " + "  ".join(f"{figure} {value:8.2f}" for figure, value in figures.items()))
    if given.output:
        given.output.write_text(json.dumps(measured, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
