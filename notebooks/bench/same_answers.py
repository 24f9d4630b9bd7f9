"""The answers to the questions of the manual in every mode, to compare two versions of the library.

    python notebooks/bench/same_answers.py tests/data/questions.jsonl --index index/ --output before.json
    python notebooks/bench/same_answers.py tests/data/questions.jsonl --index index/ --compare before.json

Uses nothing but public names, so it runs on both. Every answer is recorded with its sources and its counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gistrag import GistRAG

MODES = ("gist", "text", "hybrid")


def answered(rag: GistRAG, question: str, mode: str) -> dict[str, Any]:
    """Return an answer and what it rests on."""
    answer = rag.query(question, mode=mode, max_new_tokens=24)
    usage = answer.usage
    return {
        "text": answer.text,
        "sources": [(source.path, source.start, source.as_text) for source in answer.sources],
        "tokens": [usage.answer_tokens, usage.question_tokens, usage.text_tokens, usage.gist_slots],
    }


def main() -> int:
    """Answer all questions, and write or compare the answers; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--index", type=Path, default=Path("index"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--compare", type=Path)
    given = parser.parse_args()
    questions = [json.loads(line)["question"] for line in given.questions.read_text("utf-8").splitlines()]
    with GistRAG.open(given.index) as rag:
        found = {mode: [answered(rag, question, mode) for question in questions] for mode in MODES}
        found["scope"] = [answered_of_one(rag, question) for question in questions[:10]]
    found = json.loads(json.dumps(found))
    if given.output:
        given.output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if not given.compare:
        return 0
    before = json.loads(given.compare.read_text("utf-8"))
    differ = {mode: sum(a != b for a, b in zip(before[mode], found[mode], strict=True)) for mode in found}
    print(json.dumps({"questions": len(questions), "differ": differ}))
    return int(any(differ.values()))


def answered_of_one(rag: GistRAG, question: str) -> dict[str, Any]:
    """Return an answer from all gists of one document."""
    answer = rag.query(question, scope="limits.md", max_new_tokens=24)
    return {"text": answer.text, "sources": [source.start for source in answer.sources]}


if __name__ == "__main__":
    sys.exit(main())
