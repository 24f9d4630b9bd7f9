"""How soon an index answers: the first answer over an empty folder, all gists, and a question beside the work on them.

    python notebooks/bench/first_answer.py --tokens 40000 > notebooks/bench/DATE-first-answer.json

A process of its own imports gistrag, builds the index of a folder with so many tokens of the manual and answers the
first question; models are at hand, the index is not. Then questions are asked while gists are made in the background,
and again when all are made and nothing else runs. Both times they are answered from text, so that the work is the
same. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
QUESTIONS = (
    "What port does the server use by default?",
    "How many bytes does a slot take?",
    "Which placement needs no training?",
    "How is a damaged gist noticed?",
)
FIRST = """
import json, sys, time
started_s = time.perf_counter()
from gistrag import GistRAG
rag = GistRAG.from_folder(sys.argv[1], index=sys.argv[2])
searchable_s = time.perf_counter() - started_s
answer = rag.query(sys.argv[3], max_new_tokens=40)
print(json.dumps({"searchable_s": searchable_s, "first_answer_s": time.perf_counter() - started_s,
                  "answer_tokens": answer.usage.answer_tokens, "text_pending": answer.usage.text_pending}))
"""


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description="Measure how soon an index answers.")
    parser.add_argument("--tokens", type=int, default=40_000, help="least tokens of the folder")
    parser.add_argument("--questions", type=int, default=12, help="questions asked alone, and beside the work")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), tokens=arguments.tokens, questions=arguments.questions)
    print(json.dumps({"cores": os.cpu_count(), **found}))


def measure(folder: Path, *, tokens: int, questions: int) -> dict[str, object]:
    """Return the seconds of each step in *folder*, which is empty."""
    docs, index = folder / "docs", folder / "index"
    fill(docs, tokens)
    first = [sys.executable, "-c", FIRST, str(docs), str(index), QUESTIONS[0]]
    found = json.loads(subprocess.run(first, check=True, stdout=subprocess.PIPE, text=True).stdout)

    from gistrag import GistRAG

    with GistRAG.open(index, gists="background") as rag:
        started_s = time.perf_counter()
        stats = rag.store.stats()
        while rag.progress.is_working and not rag.progress.done:
            time.sleep(0.1)
        beside_s = asked(rag, questions) if rag.progress.is_working else []
        was_working = rag.progress.is_working
        while rag.progress.is_working:
            time.sleep(0.2)
        progress, gists_s = rag.progress, time.perf_counter() - started_s
        alone_s = asked(rag, questions)
    alone, beside = statistics.median(alone_s), statistics.median(beside_s) if beside_s else None
    return {
        "tokens": stats.tokens,
        "chunks": stats.chunks,
        **found,
        "all_gists_s": gists_s,
        "gists_done": progress.done,
        "error": progress.error,
        "question_alone_s": alone,
        "question_beside_s": beside,
        "was_working_all_the_time": was_working,
        "ratio": beside / alone if beside else None,
    }


def fill(docs: Path, tokens: int) -> None:
    """Copy pages of the manual, with a number in each copy, until they have about so many tokens."""
    docs.mkdir()
    left = tokens * 4  # characters of English a token, at most
    for copy in count():
        for page in sorted(DOCS.glob("*.md")):
            text = page.read_text("utf-8")
            (docs / f"{copy}-{page.name}").write_text(f"Copy {copy}.\n\n{text}" if copy else text, "utf-8")
            left -= len(text)
            if left <= 0:
                return


def asked(rag: object, questions: int) -> list[float]:
    """Return the seconds of each question, answered from text in 20 tokens."""
    seconds = []
    for number in range(questions):
        started_s = time.perf_counter()
        rag.query(QUESTIONS[number % len(QUESTIONS)], mode="text", max_new_tokens=20)  # type: ignore[attr-defined]
        seconds.append(time.perf_counter() - started_s)
    return seconds


if __name__ == "__main__":
    main()
