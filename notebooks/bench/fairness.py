"""What one client of a server can do to the others, and how soon the server lets go.

    python notebooks/bench/fairness.py --index index/ --output notebooks/bench/fairness.json

Starts `gistrag serve` as a subprocess with the default models and measures

- first token of a client alone, and while another has 64 passages read as text, and the longest piece of that text;
- seconds from a client that leaves in the middle of such a text until the next has its place;
- seconds from SIGTERM in the middle of such a text until the process has ended;
- failures and seconds of 64 of OpenAI's clients at their default settings, for a minute;
- health checks that are answered beside 300 connections that say nothing;
- the slowest of a client's answers alone, and while the client of another key keeps the server full.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
from serving import CHAT, KEY, process, streamed

from gistrag import GistRAG
from gistrag.evaluation.benchmark import built_in_questions
from gistrag.evaluation.speed import machine

OTHER_KEY = "another-key-of-the-benchmark"
AS_TEXT = {"mode": "text", "top_k": 64}
Figures = dict[str, Any]


def text_request(question: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return body and headers of a request that has as much text read as fits."""
    body = {"model": "bench", "messages": [{"role": "user", "content": question}], "max_tokens": 1, "gistrag": AS_TEXT}
    return body, {"Authorization": f"Bearer {KEY}"}


def beside_a_reader(url: str, questions: list[str]) -> Figures:
    """Return first tokens alone and beside a client whose text is being read."""
    streamed(url, questions[0], 8)
    alone = [streamed(url, question, 8)["ttft_s"] for question in questions]
    body, headers = text_request(questions[0])
    beside: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(httpx.post, url + CHAT, json=body, headers=headers, timeout=600)
        time.sleep(1)
        for question in questions:
            if reading.done():
                break
            beside.append(streamed(url, question, 8)["ttft_s"])
        reading.result().raise_for_status()
    return {"alone_s": alone, "beside_s": beside}


def longest_piece(rag: GistRAG, question: str) -> float:
    """Return seconds of the longest step in which such a text is read."""
    rag.query(question, max_new_tokens=1, mode="text")  # loads what reads text
    stream = rag.stream(question, max_new_tokens=1, mode="text", top_k=64)
    ended_s, longest_s = time.perf_counter(), 0.0
    for _ in stream.steps():
        now_s = time.perf_counter()
        ended_s, longest_s = now_s, max(longest_s, now_s - ended_s)
    return longest_s


@contextmanager
def text_being_read(url: str, question: str) -> Iterator[socket.socket]:
    """Have a text read for the length of the block; closing the connection is leaving."""
    body, headers = text_request(question)
    data = json.dumps(body).encode()
    headers |= {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(data))}
    head = [f"POST {CHAT} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as raw:
        raw.sendall("\r\n".join([*head, "", ""]).encode() + data)
        time.sleep(2)
        yield raw


def leaving(url: str, question: str, repeats: int) -> list[float]:
    """Return seconds from a client that leaves until the only place of the server is the next one's."""
    samples = []
    for _ in range(repeats):
        with text_being_read(url, question):
            pass
        started_s = time.perf_counter()
        headers = {"Authorization": f"Bearer {KEY}"}
        httpx.get(url + "/v1/documents", headers=headers, timeout=600).raise_for_status()
        samples.append(time.perf_counter() - started_s)
    return samples


def ending(index: Path, question: str) -> float:
    """Return seconds from SIGTERM to a server that reads a text until its process has ended."""
    with process(index) as (url, running), text_being_read(url, question):
        started_s = time.perf_counter()
        running.send_signal(signal.SIGTERM)
        running.wait(60)
        return time.perf_counter() - started_s


def crowd(url: str, questions: list[str], *, clients: int, seconds: float) -> Figures:
    """Return how many calls of OpenAI's client failed and how long they took, of so many clients at once."""
    until_s = time.monotonic() + seconds
    took: list[float] = []
    failed: list[str] = []

    def client(number: int) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY) as ai:
            while time.monotonic() < until_s:
                question = {"role": "user", "content": questions[number % len(questions)]}
                started_s = time.perf_counter()
                try:
                    ai.chat.completions.create(model="bench", messages=[question], max_tokens=16)  # type: ignore[list-item]
                    took.append(time.perf_counter() - started_s)
                except openai.OpenAIError as error:
                    failed.append(type(error).__name__)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return {"clients": clients, "answered": len(took), "failed": failed, **spread(took)}


def idle(url: str, count: int) -> Figures:
    """Return the status of health checks beside connections that say nothing."""
    address = (urlsplit(url).hostname, urlsplit(url).port)
    silent = [socket.create_connection(address) for _ in range(count)]
    statuses = [httpx.get(url + "/healthz", timeout=30).status_code for _ in range(96)]
    for one in silent:
        one.close()
    return {"idle": count, "answered": statuses.count(200), "of": len(statuses)}


def two_keys(index: Path, questions: list[str], repeats: int) -> Figures:
    """Return seconds of the answers of one key, alone and while another key keeps the server full."""
    with tempfile.TemporaryDirectory() as place:
        keys = Path(place) / "keys.txt"
        keys.write_text(f"{OTHER_KEY} *\n", "utf-8")
        keys.chmod(0o600)
        with process(index, "--key-file", str(keys)) as (url, _):

            def ask() -> list[float]:
                return [streamed(url, question, 8, key=OTHER_KEY)["total_s"] for question in questions * repeats]

            ask()
            alone = ask()
            ended = threading.Event()

            def greedy(number: int) -> None:
                while not ended.is_set():
                    streamed(url, questions[number % len(questions)], 200)

            with ThreadPoolExecutor(16) as pool:
                crowd = [pool.submit(greedy, number) for number in range(16)]
                time.sleep(5)
                beside = ask()
                ended.set()
                for one in crowd:
                    one.result()
    return {"alone": spread(alone), "beside": spread(beside)}


def spread(seconds: list[float]) -> Figures:
    """Return the median and the 99th percentile, which is the longest of fewer than a hundred."""
    ordered = sorted(seconds)
    at = min(len(ordered) - 1, round(0.99 * len(ordered)))
    return {"p50_s": statistics.median(ordered), "p99_s": ordered[at], "count": len(ordered)}


def main() -> None:
    """Measure, print the figures, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, default=Path("index"))
    parser.add_argument("--seconds", type=float, default=60, help="for which 64 clients ask")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with GistRAG.open(given.index) as rag:
        questions, here = built_in_questions(rag), machine(rag.model)
        found: Figures = {"machine": here, "load": os.getloadavg(), "piece_s": longest_piece(rag, questions[0])}

    def note(name: str, measured: Callable[[], Any]) -> None:
        found[name] = measured()
        print(name, json.dumps(found[name]), flush=True)
        if given.output:
            given.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")

    with process(given.index) as (url, _):
        note("beside a reader", lambda: beside_a_reader(url, questions))
        note("64 clients", lambda: crowd(url, questions, clients=64, seconds=given.seconds))
        note("idle connections", lambda: idle(url, 300))
    with process(given.index, "--together", "1") as (url, _):
        note("leaving", lambda: leaving(url, questions[0], given.repeats))
    note("SIGTERM", lambda: [ending(given.index, questions[0]) for _ in range(given.repeats)])
    note("two keys", lambda: two_keys(given.index, questions, given.repeats))


if __name__ == "__main__":
    main()
