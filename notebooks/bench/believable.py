"""Can a person believe the answers: evidence, confidence, refusals and the second reading, by the product itself.

    python notebooks/bench/believable.py squad.jsonl.gz --folder scratch --output believable.json
    python notebooks/bench/believable.py tests/data/believable --folder scratch --output written.json

A question file of SQuAD's form is asked about articles that the shipped adapter was not trained on; the folder of
written questions brings its own documents. Each question is answered without and with the second reading, in turn, and
once more from passages without the answer (SQuAD). An answer is right if its F1 is at least a half, or if it stands in
a right answer or a right answer in it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from calibrate import shuffled_articles, write_article

from gistrag import Answer, GistRAG
from gistrag.evaluation.calibration import auroc, calibration_error
from gistrag.evaluation.calibration import is_right as matches
from gistrag.qa.dataset import read_contexts
from gistrag.qa.metrics import contains, f1


@dataclass(frozen=True)
class Asked:
    """A question, what counts as right, and the text that holds the evidence; no answers: it has none."""

    question: str
    answers: tuple[str, ...]
    evidence: str
    kind: str = "detail"
    items: tuple[str, ...] = ()


def squad(file: Path, docs: Path, articles: int, count: int) -> list[Asked]:
    """Write held-out articles as documents, and return questions about them."""
    contexts, _ = read_contexts(file)
    asked = []
    for number, paragraphs in enumerate(shuffled_articles(contexts)[:articles]):
        write_article(docs / f"{number:02}.md", paragraphs)
        asked += [Asked(task.question, task.answers, one.text) for one in paragraphs for task in one.tasks]
    return random.Random(1).sample(asked, min(count, len(asked)))


def written(folder: Path) -> list[Asked]:
    """Return the written questions of a folder, without the greetings."""
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text("utf-8").splitlines()]
    return [
        Asked(one["question"], tuple(one["answers"]), one["evidence"] or "", one["kind"], tuple(one.get("items", ())))
        for one in lines
        if one["kind"] != "greeting"
    ]


def is_right(answer: str, asked: Asked) -> bool:
    """Return whether an answer is right; that of a question for a list if it has half of the items."""
    if asked.items:
        return float(np.mean([contains(answer, [item]) for item in asked.items])) >= 0.5
    if asked.kind == "yes-no":
        return contains(" ".join(answer.split()[:1]), asked.answers[:1])
    return matches(answer, asked.answers)


def shows(answer: Answer, asked: Asked) -> bool:
    """Return whether the evidence is the sentence that holds the right answer."""
    if answer.evidence is None:
        return False
    shown, gold = "".join(answer.evidence.text.split()), "".join(asked.evidence.split())
    if asked.kind != "detail":
        return gold in shown or shown in gold
    return shown in gold and contains(answer.evidence.text, asked.answers)


def row(rag: GistRAG, asked: Asked) -> dict[str, Any]:
    """Return what the product says, without and with the second reading."""
    found: dict[str, Any] = {"kind": asked.kind, "question": asked.question, "answers": list(asked.answers)}
    for name, again in (("once", False), ("twice", True)):
        began_s = time.perf_counter()
        answer = rag.query(asked.question, second_reading=again, max_new_tokens=64)
        found[name] = {
            "text": answer.text,
            "withheld": answer.withheld,
            "seconds": time.perf_counter() - began_s,
            "confidence": answer.confidence,
            "verdict": answer.verdict,
            "readings": answer.usage.readings,
            "f1": f1(answer.text, asked.answers) if asked.answers else 0.0,
            "right": bool(asked.answers) and is_right(answer.text, asked),
            "said_right": bool(asked.answers) and is_right(answer.withheld or answer.text, asked),
            "said_f1": f1(answer.withheld or answer.text, asked.answers) if asked.answers else 0.0,
            "evidence": answer.evidence.text if answer.evidence else None,
            "shown": shows(answer, asked),
        }
    return found


def summary(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return the figures of one setting."""
    answerable = [row[name] for row in rows if row["answers"]]
    unanswerable = [row[name] for row in rows if not row["answers"]]
    confidence = np.array([one["confidence"] or 0.0 for one in answerable])
    right = np.array([one["said_right"] for one in answerable])
    sure = [one for one in answerable + unanswerable if one["verdict"] == "answered"]
    return {
        "questions": len(answerable),
        "right": share(right),
        "right_and_shown": share(one["right"] for one in answerable),
        "f1": mean(100 * one["said_f1"] for one in answerable),
        "f1_of_shown": mean(100 * one["f1"] for one in answerable),
        "evidence_of_right": share(one["shown"] for one in answerable if one["said_right"]),
        "auroc": round(auroc(confidence, right), 3),
        "calibration_error": round(calibration_error(confidence, right), 3),
        "sure": share(one["verdict"] == "answered" for one in answerable),
        "wrong_of_sure": share(not one["right"] for one in sure),
        "withheld": share(one["verdict"] == "not found" for one in answerable),
        "refused_without_answer": share(one["verdict"] == "not found" for one in unanswerable),
        "readings": mean(one["readings"] for one in answerable),
        "mean_s": mean((one["seconds"] for one in answerable), digits=3),
    }


def mean(values: Iterable[float], digits: int = 1) -> float:
    """Return a mean, rounded."""
    return round(float(np.mean(list(values))), digits)


def share(flags: Iterable[Any]) -> float | None:
    """Return the share of what is true in percent, None of nothing."""
    listed = list(flags)
    return round(100 * sum(listed) / len(listed), 1) if listed else None


def without_answer(rag: GistRAG, asked: Asked) -> dict[str, Any]:
    """Return what the product says when the passages with the answer are left out."""
    hits = [hit for hit in rag.retrieve(asked.question, top_k=10) if not contains(hit.chunk.text, asked.answers)]
    texts = ["\n".join((" > ".join(hit.chunk.heading), hit.chunk.text)).strip() for hit in hits[:3]]
    found: dict[str, Any] = {"kind": "without", "question": asked.question, "answers": []}
    for name, again in (("once", False), ("twice", True)):
        answer = rag.stream_from(asked.question, texts, second_reading=again, max_new_tokens=64).result()
        found[name] = {
            "text": answer.text, "withheld": answer.withheld, "seconds": answer.timings.total_s,
            "confidence": answer.confidence, "verdict": answer.verdict, "readings": answer.usage.readings,
            "f1": 0.0, "said_f1": 0.0, "right": False, "said_right": False, "evidence": None, "shown": False,
        }  # fmt: skip
    return found


def main() -> None:
    """Build, ask, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a question file of SQuAD's form, or the folder of written questions")
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder of documents, index and answers")
    parser.add_argument("--articles", type=int, default=14)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--unanswerable", type=int, default=200)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    docs = given.folder / "docs"
    if given.source.is_dir():
        asked, docs = written(given.source), given.source / "documents"
    else:
        asked = squad(given.source, docs, given.articles, given.questions)
    rows = []
    with GistRAG.from_folder(docs, index=given.folder / "index", gists="now") as rag:
        rag.query("warm up")
        for number, one in enumerate(asked):
            rows.append(row(rag, one))
            if not given.source.is_dir() and number < given.unanswerable:
                rows.append(without_answer(rag, one))
            (given.folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), "utf-8")
    found = {"source": given.source.name, **{name: summary(rows, name) for name in ("once", "twice")}}
    if given.source.is_dir():
        kinds = sorted({row["kind"] for row in rows} - {"unanswerable"})
        found["right_by_kind"] = {
            kind: {
                name: share(row[name]["said_right"] for row in rows if row["kind"] == kind)
                for name in ("once", "twice")
            }
            for kind in kinds
        }
    print(json.dumps(found, indent=1))
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
