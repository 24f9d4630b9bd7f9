"""What the rows of an evaluation add up to: figures with intervals, and tables.

The reference of every part is the arm ``text`` in the same part; other arms are compared with it question by question.
Everything here works on rows and on the summary as JSON, so a table can be made again from its file. Pictures are in
`gistrag.evaluation.plots`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from gistrag.qa.metrics import Estimate, mean, normalized, ratio, retention

REFERENCE = "text"
PLANTED = "planted"
"""Part of all planted facts together; the parts of the kinds begin with it, as in ``planted date``."""

Row = Mapping[str, Any]
Figures = dict[str, Any]


def summarized(rows: Iterable[Row]) -> Figures:
    """Return all figures of an evaluation's answers, by part and arm."""
    by_part: dict[str, dict[str, dict[str, Row]]] = {}
    left_out: dict[str, dict[str, int]] = {}
    for row in rows:
        if "left_out" in row:
            counts = left_out.setdefault(row["arm"], {})
            counts[row["part"]] = counts.get(row["part"], 0) + 1
            continue
        for part in (row["part"], *((PLANTED,) if row["part"].startswith(f"{PLANTED} ") else ())):
            by_part.setdefault(part, {}).setdefault(row["arm"], {})[f"{row['part']} {row['name']}"] = row
    orders = {part: arms for part, arms in by_part.items() if part.startswith("order ")}
    parts = {part: arms for part, arms in by_part.items() if part not in orders}
    return {
        "parts": {part: _compared(arms) for part, arms in parts.items()},
        "retrieval": {part: _found(arms) for part, arms in parts.items() if part != "oracle"},
        "mixing": _mixing(parts),
        "orders": _permuted(parts.get("questions", {}), list(orders.values())),
        "passkey": {arm: _grid(answers.values()) for arm, answers in parts.get("passkey", {}).items()},
        "left_out": left_out,
    }


Answers = Mapping[str, Row]


def _compared(arms: Mapping[str, Answers]) -> dict[str, Figures]:
    """Return the figures of each arm in one part."""
    reference = arms.get(REFERENCE, {})
    return {
        arm: _scores(answers) | _kept(answers, reference) | _long(answers, reference) | _cost(answers)
        for arm, answers in arms.items()
    }


def _scores(answers: Answers) -> Figures:
    rows = list(answers.values())
    shares = {name: _mean(row[name] for row in rows) for name in ("em", "f1", "contains")}
    refused = [
        row["refused"] for row in rows if row.get("has_answer", row.get("has_gold", True))
    ]  # else it may well be right
    known = [row["hallucinated"] for row in rows if row["hallucinated"] is not None]
    return {"count": len(rows), **shares, "refused": _mean(refused), "hallucinated": _mean(known)}


def _kept(answers: Answers, reference: Answers) -> Figures:
    """Return the share of the reference that an arm keeps, over the questions that both answered."""
    both = [(answers[name], reference[name]) for name in answers if name in reference]
    f1_kept = ratio([row["f1"] for row, _ in both], [other["f1"] for _, other in both])
    kept = retention([other["contains"] for _, other in both], [row["contains"] for row, _ in both])
    return {"f1_kept": _plain(f1_kept), "retention": _plain(kept)}


def _long(answers: Answers, reference: Answers) -> Figures:
    """Return the figures of long answers, and what an arm keeps of the reference; nothing for other parts."""
    figures: Figures = {}
    for name in ("rouge_l", "evidence"):
        rows = {key: row for key, row in answers.items() if name in row}
        both = [(row[name], reference[key][name]) for key, row in rows.items() if key in reference]
        kept = ratio([one for one, _ in both], [other for _, other in both])
        figures |= {name: _mean(row[name] for row in rows.values()), f"{name}_kept": _plain(kept)} if rows else {}
    return figures


def _cost(answers: Answers) -> Figures:
    """Return slots and bytes on disk for each token of source text."""
    totals = {name: sum(row[name] for row in answers.values()) for name in ("slots", "stored_bytes", "source_tokens")}
    tokens = totals["source_tokens"]
    return {
        "slots_per_source_token": totals["slots"] / tokens if tokens else None,
        "bytes_per_source_token": totals["stored_bytes"] / tokens if tokens else None,
    }


def _found(arms: Mapping[str, Answers]) -> Figures | None:
    """Return the share of questions that have the passage with the answer among those given; the same for all arms."""
    answers = max(arms.values(), key=len)
    return _mean(row["has_gold"] for row in answers.values() if "has_gold" in row)


def _mixing(parts: Mapping[str, Mapping[str, Answers]]) -> dict[str, Figures]:
    """Return the F1 lost from the right passage alone to several passages, where retrieval found the right one."""
    found: dict[str, Figures] = {}
    for arm, alone in parts.get("oracle", {}).items():
        for part in ("questions", *(part for part in parts if part.startswith("top "))):
            mixed = parts.get(part, {}).get(arm, {}).values()
            f1_mixed = {row["name"]: row["f1"] for row in mixed if row["has_gold"]}
            pairs = [(row["f1"], f1_mixed[row["name"]]) for row in alone.values() if row["name"] in f1_mixed]
            found.setdefault(arm, {})[part] = _mean(one - several for one, several in pairs)
    return found


def _permuted(main: Mapping[str, Answers], orders: Sequence[Mapping[str, Answers]]) -> dict[str, Figures]:
    """Return how far answers depend on the order of the passages.

    ``f1_spread`` is the mean distance between the best and the worst order of a question; ``changed`` the share of
    answers in another order that are not the answer in the product's order.
    """
    found = {}
    for arm in dict.fromkeys(arm for order in orders for arm in order):
        again: dict[str, list[Row]] = {}
        for row in (row for order in orders for row in order.get(arm, {}).values()):
            again.setdefault(row["name"], []).append(row)
        first = {row["name"]: row for row in main.get(arm, {}).values()}
        sets = [(first[name], rows) for name, rows in again.items() if name in first]
        scores = [[row["f1"], *(other["f1"] for other in rows)] for row, rows in sets]
        changed = [
            normalized(row["generated"]) != normalized(other["generated"]) for row, rows in sets for other in rows
        ]
        spread = _mean(max(listed) - min(listed) for listed in scores)
        found[arm] = {"count": len(sets), "f1_spread": spread, "changed": _mean(changed)}
    return found


def _grid(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return the share of passkeys found, by length and depth."""
    cells: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        cells.setdefault(f"{row['length']}", {}).setdefault(f"{row['depth']:g}", []).append(row["contains"])
    return {
        length: {depth: statistics.mean(map(float, found)) for depth, found in depths.items()}
        for length, depths in cells.items()
    }


def timed(samples: Sequence[Row]) -> dict[str, dict[str, Figures]]:
    """Return the medians of each context and arm, and how many times sooner than text the first token comes."""
    medians: dict[str, dict[str, Figures]] = {}
    for (context, arm), listed in groupby(sorted(samples, key=_measured), key=_measured):
        rows = list(listed)
        names = [name for name in rows[0] if name not in ("context", "arm")]
        medians.setdefault(context, {})[arm] = {name: statistics.median(row[name] for row in rows) for name in names}
    for arms in medians.values():
        for figures in arms.values():
            figures["warm_ttft_s"] = figures["ttft_s"] - figures["load_s"]
            if text := arms.get(REFERENCE):
                figures["times_sooner"] = text["ttft_s"] / figures["ttft_s"]
    return medians


def _measured(sample: Row) -> tuple[str, str]:
    return sample["context"], sample["arm"]


def _mean(values: Iterable[float]) -> Figures | None:
    return _plain(mean([float(value) for value in values]))


def _plain(estimate: Estimate | None) -> Figures | None:
    return asdict(estimate) if estimate else None


# The table

Table = tuple[list[str], list[list[str]]]


def main_table(summary: Figures) -> Table:
    """Return headers and rows: quality of every arm on the main questions, in percent, and its cost."""
    headers = ["arm", "EM", "F1", "% of text-RAG F1", "retained", "not in passages", "refused wrongly",
               "refused rightly", "planted facts", "slots/token", "bytes/token", "TTFT", "tokens/s"]  # fmt: skip
    parts, speed = summary["parts"], summary["speed"].get("question", {})
    refusal, planted = parts.get("refusal", {}), parts.get(PLANTED, {})
    rows = []
    for arm, figures in parts.get("questions", {}).items():
        times = speed.get(arm, {})
        rows.append(
            [
                arm,
                *(percent(figures[name]) for name in ("em", "f1", "f1_kept", "retention", "hallucinated", "refused")),
                percent(refusal.get(arm, {}).get("refused")),
                percent(planted.get(arm, {}).get("em")),
                _number(figures["slots_per_source_token"], ".2f"),
                _number(figures["bytes_per_source_token"], ",.0f"),
                _number(times.get("ttft_s"), ".3f", " s"),
                _number(times.get("decode_tokens_per_s"), ".1f"),
            ]
        )
    return headers, rows


def long_table(summary: Figures) -> Table:
    """Return headers and rows of the questions with long answers; no rows where none was asked."""
    names = ("rouge_l", "rouge_l_kept", "evidence", "evidence_kept")
    headers = ["arm", "ROUGE-L", "% of text", "evidence covered", "% of text"]
    arms = summary["parts"].get("long", {})
    return headers, [[arm, *(percent(found.get(name)) for name in names)] for arm, found in arms.items()]


def percent(estimate: Figures | None) -> str:
    """Return an estimate in percent with its interval.

    >>> percent({"value": 0.5, "low": 0.41, "high": 0.6})
    '50.0 (41–60)'
    """
    if estimate is None:
        return ""
    return f"{100 * estimate['value']:.1f} ({100 * estimate['low']:.0f}–{100 * estimate['high']:.0f})"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


LEGEND = """\
EM: exact match. % of text-RAG F1: F1 of the arm divided by F1 of text. Retained: of the questions that text answers,
the share that the arm answers too (the output contains an accepted answer). Not in passages: outputs that no given
passage contains word for word. Refused wrongly: with the right passage given; rightly: without it. Planted facts: exact
match. Slots and bytes on disk are per token of source text. TTFT: time to first token, including the loading of gist
files."""


def markdown(summary: Figures) -> str:
    """Return the whole report in Markdown."""
    labels = {"questions": f"top {summary['plan']['top_k'][0]}"}
    parts: Mapping[str, Mapping[str, Figures]] = {
        labels.get(part, part): arms for part, arms in summary["parts"].items()
    }
    kinds = [part for part in parts if part.startswith(f"{PLANTED} ")]
    tops = sorted((part for part in parts if part.startswith("top ")), key=lambda part: int(part.split()[1]))
    sections = [
        ("Right passage retrieved", _shares(summary["retrieval"])),
        ("F1 by number of passages; oracle: the right one alone", _by_part(parts, ["oracle", *tops], "f1")),
        ("F1 lost from the right passage alone to several with it", _mixed(summary["mixing"])),
        ("Planted facts, exact match", _by_part(parts, [*kinds, PLANTED] if kinds else [], "em")),
        ("Passkeys found, by depth", _depths(summary["passkey"])),
        ("Long answers; evidence covered: words of the marked sentences that the answer has", long_table(summary)),
        ("Whole documents, F1", _by_part(parts, ["whole"], "f1")),
        ("The same passages in other orders", _ordered(summary["orders"])),
        ("Speed", _speeds(summary["speed"])),
    ]
    written = [f"# Evaluation of {summary['title']}", *summary["notes"]]
    if summary["parts"].get("questions"):
        written += [in_markdown(main_table(summary)), LEGEND]
    for title, table in sections:
        if table[1]:
            written += [f"## {title}", in_markdown(table, labels)]
    return "\n\n".join(written) + "\n"


def in_markdown(table: Table, labels: Mapping[str, str] | None = None) -> str:
    """Return a table in Markdown, some cells by another name."""
    headers, rows = table
    labels = labels or {}
    lines = (headers, ["---"] * len(headers), *rows)
    return "\n".join(f"| {' | '.join(labels.get(cell, cell) for cell in cells)} |" for cells in lines)


def _shares(found: Mapping[str, Figures | None]) -> Table:
    rows = [[part, percent(share)] for part, share in found.items() if share]
    return ["part", "retrieved"], rows


def _by_part(parts: Mapping[str, Mapping[str, Figures]], names: Sequence[str], figure: str) -> Table:
    """Return one figure of every arm in several parts."""
    known = [name for name in names if name in parts]
    arms = dict.fromkeys(arm for name in known for arm in parts[name])
    rows = [[arm, *(percent(parts[name].get(arm, {}).get(figure)) for name in known)] for arm in arms]
    return ["arm", *known], rows


def _mixed(mixing: Mapping[str, Mapping[str, Figures | None]]) -> Table:
    names = list(dict.fromkeys(name for losses in mixing.values() for name in losses))
    return ["arm", *names], [[arm, *(percent(losses.get(name)) for name in names)] for arm, losses in mixing.items()]


def _depths(passkey: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    depths = sorted({depth for grid in passkey.values() for row in grid.values() for depth in row}, key=float)
    rows = [
        [arm, f"{int(length):,}", *(_number(100 * row[depth] if depth in row else None, ".0f") for depth in depths)]
        for arm, grid in passkey.items()
        for length, row in grid.items()
    ]
    return ["arm", "tokens", *depths], rows


def _ordered(orders: Mapping[str, Figures]) -> Table:
    rows = [[arm, percent(found["f1_spread"]), percent(found["changed"])] for arm, found in orders.items()]
    return ["arm", "F1, best minus worst order", "answers that change"], rows


def _speeds(speed: Mapping[str, Mapping[str, Figures]]) -> Table:
    headers = ["context", "arm", "tokens", "TTFT", "gists in memory", "times sooner", "tokens/s", "peak memory"]
    rows = [
        [
            context,
            arm,
            _number(figures["source_tokens"], ",.0f"),
            _number(figures["ttft_s"], ".3f", " s"),
            _number(figures["warm_ttft_s"], ".3f", " s"),
            _number(figures.get("times_sooner"), ".1f"),
            _number(figures["decode_tokens_per_s"], ".1f"),
            _number(figures["peak_bytes"] / 1e6, ",.0f", " MB"),
        ]
        for context, arms in speed.items()
        for arm, figures in arms.items()
    ]
    return headers, rows
