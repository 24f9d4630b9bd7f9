"""Every figure about the adapter that comes with gistrag, from one command.

    python notebooks/bench/results.py squad.jsonl.gz --work evaluation/

Runs three evaluations and one script, each into a folder below ``--work``; a stopped one resumes:

    questions   1,000 held-out questions and planted facts, gists as a build stores them
    16-bit      the same from gists in the numbers of the model; the right passage alone, refusals and other orders too
    breadth     the written questions of ``tests/data/breadth.jsonl`` over other texts
    frontier    100 of the questions, text and gists with the same number of slots: ``frontier.py``

The result goes into ``notebooks/results/`` (``summary.json`` and ``table.md``), into `04_results`, and into the tables
of the page on performance and of the card, behind a comment with their name. The sentences around them do not follow,
nor do the figures in README.md and README.ko.md; ``tests/test_docs.py`` compares those.

This script uses internal modules of gistrag, which change without notice.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from gistrag.evaluation import evaluate
from gistrag.evaluation.arms import Row
from gistrag.evaluation.cases import WHOLE, Plan
from gistrag.evaluation.report import PLANTED, Table, in_markdown, markdown, percent, summarized
from gistrag.qa.metrics import mean
from gistrag.settings import DEFAULT_EMBEDDER, DEFAULT_MODEL
from gistrag.storage import jsonl

ROOT = Path(__file__).parents[2]
SUMMARY = ROOT / "notebooks" / "results" / "summary.json"
BREADTH = ROOT / "tests" / "data" / "breadth.jsonl"
PAGES = ("docs/performance.md", "gistrag/adapters/smollm2-135m-instruct/README.md")
RATES = (2, 4, 8, 16)
BESIDE = ("16-bit", "frontier")
NOTE = "The right passage alone, refusals, other orders and the same slots for both: with gists in 16 bits."

Figures = dict[str, Any]


def main() -> None:
    """Evaluate what is not evaluated yet, and write everything that shows figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--work", type=Path, default=Path("evaluation"))
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    gists = ("text", "gist")
    asked = Plan(questions=1000, top_k=(3,), passkey=0, oracle=False, unanswerable=0, orders=0)
    exact = Plan(questions=1000, top_k=(3,), passkey=0, repeats=0)
    evaluated(given.file, given.work / "questions", asked, ("none", "without-adapter", *gists))
    evaluated(given.file, given.work / "16-bit", exact, gists, kv_cache_dtype="auto")
    evaluated(BREADTH, given.work / "breadth", Plan.of_suite("quick"), ("without-adapter", *gists), is_held_out=False)
    frontier = [sys.executable, str(Path(__file__).with_name("frontier.py")), str(given.file)]
    subprocess.run([*frontier, "--output", str(given.work / "frontier")], check=True)

    summary = gathered(given.work)
    SUMMARY.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", "utf-8")
    SUMMARY.with_name("table.md").write_text(markdown(summary), "utf-8")
    for page in PAGES:
        path = ROOT / page
        path.write_text(with_tables(path.read_text("utf-8"), summary), "utf-8")
    subprocess.run(["jupyter-execute", "--inplace", "04_results.ipynb"], cwd=SUMMARY.parents[1], check=True)


def evaluated(
    file: Path,
    output: Path,
    plan: Plan,
    arm_names: tuple[str, ...],
    *,
    kv_cache_dtype: str = "int8",
    is_held_out: bool = True,
) -> None:
    """Run one evaluation with the default models, or finish it."""
    settings, engine = evaluate.load(
        {"model": DEFAULT_MODEL, "adapter": "auto", "embedder": DEFAULT_EMBEDDER, "kv_cache_dtype": kv_cache_dtype}
    )
    evaluation = evaluate.Evaluation(
        file=file, output=output, plan=plan, arm_names=arm_names, rates=RATES, is_held_out=is_held_out
    )
    evaluation.run(evaluate.read(file), settings, engine)


def gathered(work: Path) -> Figures:
    """Return the summary of the questions, with what the other evaluations add to it."""
    found = {name: json.loads((work / name / "summary.json").read_text("utf-8")) for name in ("questions", *BESIDE)}
    summary, exact, frontier = found.values()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    return {
        **summary,
        "commit": git.stdout.strip(),
        "parts": {**exact["parts"], **summary["parts"]},
        **{name: exact[name] for name in ("mixing", "orders")},
        "frontier": frontier["frontier"],
        "storage": storage(rows_in(work / "questions"), rows_in(work / "16-bit")),
        "breadth": breadth(rows_in(work / "breadth")),
        "notes": [*summary["notes"], NOTE],
    }


def rows_in(folder: Path) -> list[Row]:
    """Return the answers of an evaluation."""
    return [row for row in jsonl.read(folder / "rows.jsonl") if "left_out" not in row]


def storage(stored: list[Row], exact: list[Row]) -> dict[str, Figures]:
    """Return the F1 that each gist arm loses, question by question, when gists are stored as a build stores them."""
    by_arm: dict[str, dict[str, tuple[Row, Row]]] = {}
    known = {(row["arm"], row["name"]): row for row in exact if row["part"] == "questions"}
    for row in stored:
        pair = known.get((row["arm"], row["name"]))
        if pair and row["part"] == "questions":
            by_arm.setdefault(row["arm"], {})[row["name"]] = row, pair
    return {f"gist {rate}": _lost(list(by_arm[f"gist {rate}"].values())) for rate in RATES}


def _lost(pairs: list[tuple[Row, Row]]) -> Figures:
    tokens = sum(row["source_tokens"] for row, _ in pairs)
    return {
        "count": len(pairs),
        "f1_lost": vars(mean([other["f1"] - row["f1"] for row, other in pairs])),
        "same_words": sum(row["generated"] == other["generated"] for row, other in pairs) / len(pairs),
        "bytes": sum(row["stored_bytes"] for row, _ in pairs) / tokens,
        "bytes_in_16_bits": sum(other["stored_bytes"] for _, other in pairs) / tokens,
    }


def breadth(rows: list[Row]) -> dict[str, dict[str, Figures]]:
    """Return the figures of every arm by sort of text, of all sorts, of whole documents, and without an answer."""
    names: dict[str, list[Row]] = {}
    for row in rows:
        sort = row["part"] if row["part"] in (WHOLE, "refusal") else row["article"].partition("/")[0]
        called = {"refusal": ["without an answer"], "unanswerable": ["without an answer"], WHOLE: ["whole documents"]}
        for name in called.get(sort, [sort, "all of these"]):
            names.setdefault(name, []).append({**row, "part": "questions", "name": f"{row['part']} {row['name']}"})
    listed = sorted(names, key=lambda name: (" " in name, name))
    found = {name: summarized(names[name])["parts"]["questions"] for name in listed}
    return {
        name: {arm: one for arm, one in arms.items() if one["count"] == arms["text"]["count"]}
        for name, arms in found.items()
    }


def tables(summary: Figures) -> dict[str, Table]:
    """Return the tables that pages show, by the name in their comment."""
    parts, storage = summary["parts"], summary["storage"]
    arms = ["text without adapter", "text", *(f"gist {rate}" for rate in RATES)]
    main = [(_called(arm), parts["questions"][arm], arm) for arm in arms]
    kept = ["exact match", "F1", "% of text-RAG F1", "bytes per source token"]
    sizes = {arm: f"{found['bytes']:,.0f}" for arm, found in storage.items()}
    return {
        "questions": (
            ["arm", *kept],
            [[name, *(percent(one[figure]) for figure in ("em", "f1", "f1_kept")), sizes.get(arm, "")]
             for name, one, arm in main],
        ),
        "details": (
            ["arm", "% of text's right answers", "F1, right passage alone", "F1 lost beside two others",
             "refused without an answer", "planted facts, exact match", "in no passage"],
            [[name, percent(one["retention"]), percent(parts["oracle"][arm]["f1"]),
              points(summary["mixing"][arm]["questions"]), percent(parts["refusal"][arm]["refused"]),
              percent(parts[PLANTED][arm]["em"]), percent(one["hallucinated"])] for name, one, arm in main[1:]],
        ),
        "frontier": (
            ["slots", *(_called(arm) for arm in arms[1:])],
            [[f"{int(budget):,}", *(percent(found[arm]["f1"]) for arm in arms[1:])]
             for budget, found in summary["frontier"].items()],
        ),
        "frontier more": (
            ["slots", *(_called(arm) for arm in arms[2:])],
            [[f"{int(budget):,}", *(points(found[arm]["f1_more"]) for arm in arms[2:])]
             for budget, found in summary["frontier"].items()],
        ),
        "storage": (
            ["gists of", "F1 lost to 8 bits", "same output, %", "bytes per source token, 8 bits", "16 bits"],
            [[arm.removeprefix("gist ") + " tokens", points(found["f1_lost"]), f"{100 * found['same_words']:.0f}",
              f"{found['bytes']:,.0f}", f"{found['bytes_in_16_bits']:,.0f}"] for arm, found in storage.items()],
        ),
        "breadth": (
            ["F1, questions about", "questions", *(_called(arm) for arm in arms)],
            [[sort, str(found["text"]["count"]), *(percent(found[arm]["f1"]) if arm in found else "" for arm in arms)]
             for sort, found in summary["breadth"].items()],
        ),
    }  # fmt: skip


def points(estimate: Figures) -> str:
    """Return a difference in percentage points with its interval.

    >>> points({"value": 0.011, "low": -0.002, "high": 0.02})
    '+1.1 (-0.2 to +2.0)'
    """
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * estimate[name] for name in ("value", "low", "high")))


def _called(arm: str) -> str:
    """Return the name of an arm in tables."""
    name, _, rate = arm.partition(" ")
    if arm.startswith("text "):
        return arm
    return "**text**" if arm == "text" else f"{name}s of {rate} tokens"


def with_tables(page: str, summary: Figures) -> str:
    """Return a page with the tables whose names stand in comments of it: `<!-- table: questions -->`.

    Raises:
        KeyError: there is no table of that name.
    """
    made = tables(summary)

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{in_markdown(made[found[2]])}\n"

    return re.sub(r"(<!-- table: ([\w ]+) -->)\n\n(?:\|.*\n)*", table, page)


if __name__ == "__main__":
    main()
