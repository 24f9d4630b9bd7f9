"""How well fidelity, which a build can measure, foretells the answers that gists keep.

    python notebooks/bench/calibration.py squad.jsonl.gz --questions 100 --rates 2,4,8,16 --output calibration/

Held-out questions are asked of the one chunk that holds the answer, as text and as gists at every rate. The questions
that text answers are sorted by the fidelity of their gists into groups of equal size, and of each group the share is
printed that gists answer too, with its interval; and what a floor would have kept. A run that was stopped goes on. The
last line is the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gistrag.compression.fidelity import Repeated
from gistrag.evaluation.cases import Plan, cases, indexed
from gistrag.evaluation.runner import Arm, Examiner, Journal, Memories, gist_arm, rows_of, unanswered
from gistrag.index.embedder import Embedder
from gistrag.model.gist_model import GistModel
from gistrag.model.hub import find, find_adapter
from gistrag.qa.dataset import read_contexts, split_by_article
from gistrag.qa.metrics import mean
from gistrag.settings import DEFAULT_EMBEDDER, DEFAULT_MODEL, AdapterSettings

GROUPS = 5
FLOORS = (0.5, 0.7, 0.8, 0.9, 0.95)


def main() -> None:
    """Ask, measure, and print what one says about the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--rates", default="2,4,8,16")
    parser.add_argument("--adapter", default="auto")
    parser.add_argument("--output", type=Path, default=Path("calibration"))
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    base = find(DEFAULT_MODEL).path
    adapter = find_adapter(given.adapter, base)
    placement = AdapterSettings.read(adapter).index_placement if adapter else "selected"
    model, embedder = GistModel.load(base, adapter=adapter), Embedder(find(DEFAULT_EMBEDDER).path)
    nothing = {"probes": 0, "unanswerable": 0, "passkey": 0, "orders": 0, "whole": 0}
    plan = Plan(questions=given.questions, top_k=(1,), oracle=True, **nothing)
    contexts = split_by_article(read_contexts(given.file)[0])[1]
    (given.output / "gists").mkdir(parents=True, exist_ok=True)
    tokenizer = model.text_tokenizer
    with (
        indexed(given.output / "corpus", contexts, embedder, tokenizer=tokenizer, chunk_tokens=256) as corpus,
        Journal(given.output / "rows.jsonl") as journal,
    ):
        asked = [case for case in cases(corpus, [], plan, document_tokens=1) if case.part == "oracle"]
        arms = [Arm("text", "text"), *(gist_arm(placement, int(rate)) for rate in given.rates.split(","))]
        pairs = [(case, arm) for case in asked for arm in arms]
        for row in Examiner(model, folder=given.output / "gists", group_bytes=1 << 26).rows(unanswered(pairs, journal)):
            journal.add(row)
        rows = {(row["name"], row["arm"]): row for row in rows_of(pairs, journal)}
        memories = Memories(model, folder=given.output / "gists")
        points: list[dict[str, Any]] = []
        for count, case in enumerate(asked, 1):
            repeated = Repeated(model, memories.encoded(case.passages[0]))
            caches = memories.caches([(case, arm) for arm in arms])
            for arm in arms[1:]:
                row, text = rows[case.name, arm.name], rows[case.name, "text"]
                fidelity = repeated.fidelity(caches[case.passages[0], arm.dial])
                point = {"rate": arm.tokens_per_gist, "fidelity": fidelity, "f1": row["f1"], "text_f1": text["f1"]}
                points.append({**point, "right": row["contains"], "text_right": text["contains"]})
            memories.forget()
            if count % 20 == 0:
                logging.info("%d of %d chunks measured", count, len(asked))
    found = {"placement": placement, "questions": len(asked), "groups": groups(points), "floors": floors(points)}
    for group in found["groups"]:
        print(f"fidelity {group['from']:.2f} to {group['to']:.2f}: kept {group['kept']} of {group['count']}")
    for floor in found["floors"]:
        print(f"floor {floor['floor']:.2f}: {floor['share']:.0%} of gists reach it, of those kept {floor['kept']}")
    print(json.dumps({**found, "points": points}, default=vars))


def groups(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what gists keep of the answers of text, by fidelity in groups of equal size."""
    answered = sorted((point for point in points if point["text_right"]), key=lambda point: float(point["fidelity"]))
    size = -(-len(answered) // GROUPS) or 1
    cut = [answered[start : start + size] for start in range(0, len(answered), size)]
    return [
        {"from": part[0]["fidelity"], "to": part[-1]["fidelity"], "count": len(part), "kept": _kept(part)}
        for part in cut
    ]


def floors(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for every floor how many gists reach it, and what those keep of the answers of text."""
    found = []
    for floor in FLOORS:
        above = [point for point in points if point["fidelity"] >= floor]
        kept = _kept([point for point in above if point["text_right"]])
        found.append({"floor": floor, "share": len(above) / len(points), "kept": kept})
    return found


def _kept(points: Sequence[dict[str, Any]]) -> Any:
    return mean([float(point["right"]) for point in points])


if __name__ == "__main__":
    main()
