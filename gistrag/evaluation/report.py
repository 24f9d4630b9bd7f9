"""What the rows of an evaluation add up to: figures with intervals, a table, and pictures.

The reference of every part is the arm ``text`` in the same part; whatever is compared with it is compared question by
question. Everything here works on rows and on the summary as JSON, so a table can be made again from its file.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from gistrag.qa.metrics import Estimate, mean, normalized, ratio, retention
from gistrag.qa.planted_facts import PLANTED

logger = logging.getLogger("gistrag")

REFERENCE = "text"

Row = Mapping[str, Any]
Figures = dict[str, Any]


def summarised(rows: Iterable[Row]) -> Figures:
    """Return all figures of an evaluation's answers, by part and arm."""
    by_part: dict[str, dict[str, dict[str, Row]]] = {}
    left_out: dict[str, dict[str, int]] = {}
    for row in rows:
        if "left_out" in row:
            counts = left_out.setdefault(row["arm"], {})
            counts[row["part"]] = counts.get(row["part"], 0) + 1
            continue
        for part in (row["part"], *(("probes",) if row["part"].startswith(f"{PLANTED} ") else ())):
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
    return {arm: _scores(answers) | _kept(answers, reference) | _cost(answers) for arm, answers in arms.items()}


def _scores(answers: Answers) -> Figures:
    rows = list(answers.values())
    shares = {name: _mean(row[name] for row in rows) for name in ("em", "f1", "contains")}
    refused = [
        row["refused"] for row in rows if row.get("has_answer", row.get("has_gold", True))
    ]  # else it may well be right
    known = [row["hallucinated"] for row in rows if row["hallucinated"] is not None]
    return {"count": len(rows), **shares, "refused": _mean(refused), "hallucinated": _mean(known)}


def _kept(answers: Answers, reference: Answers) -> Figures:
    """Return what an arm keeps of the reference, over the questions that both answered."""
    both = [(answers[name], reference[name]) for name in answers if name in reference]
    f1_kept = ratio([row["f1"] for row, _ in both], [other["f1"] for _, other in both])
    kept = retention([other["contains"] for _, other in both], [row["contains"] for row, _ in both])
    return {"f1_kept": _plain(f1_kept), "retention": _plain(kept)}


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
    """Return what F1 loses from the one right passage to several, where retrieval found the right one."""
    found: dict[str, Figures] = {}
    for arm, alone in parts.get("oracle", {}).items():
        for part in ("questions", *(part for part in parts if part.startswith("top "))):
            mixed = parts.get(part, {}).get(arm, {}).values()
            f1_mixed = {row["name"]: row["f1"] for row in mixed if row["has_gold"]}
            pairs = [(row["f1"], f1_mixed[row["name"]]) for row in alone.values() if row["name"] in f1_mixed]
            found.setdefault(arm, {})[part] = _mean(one - several for one, several in pairs)
    return found


def _permuted(main: Mapping[str, Answers], orders: Sequence[Mapping[str, Answers]]) -> dict[str, Figures]:
    """Return how far answers hang on the order of the passages.

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
        changed = [normalized(row["said"]) != normalized(other["said"]) for row, rows in sets for other in rows]
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


def frontier_figures(rows: Iterable[Row], samples: Sequence[Row]) -> dict[str, dict[str, Figures]]:
    """Return for every budget of slots what each arm does with it; ``f1_more`` is beyond text, question by question."""
    by_budget: dict[str, dict[str, dict[str, Row]]] = {}
    for row in rows:
        if "left_out" not in row:
            by_budget.setdefault(f"{row['budget']}", {}).setdefault(row["arm"], {})[row["name"]] = row
    speed = timed(samples)
    return {
        budget: {
            arm: _filled(answers, arms.get(REFERENCE, {}))
            | {"ttft_s": speed.get(budget, {}).get(arm, {}).get("ttft_s")}
            for arm, answers in arms.items()
        }
        for budget, arms in by_budget.items()
    }


def _filled(answers: Answers, reference: Answers) -> Figures:
    """Return what an arm answers with the slots it has, and what stands in them."""
    rows = list(answers.values())
    shares = {name: _mean(row[name] for row in rows) for name in ("em", "f1", "contains", "has_gold")}
    more = _mean(row["f1"] - reference[name]["f1"] for name, row in answers.items() if name in reference)
    held = {name: statistics.mean(row[name] for row in rows) for name in ("chunks", "slots", "source_tokens")}
    return {"count": len(rows), **shares, "f1_more": more, **held}


def timed(samples: Sequence[Row]) -> dict[str, dict[str, Figures]]:
    """Return the medians of each context and arm, and how many times sooner than text its first token comes."""
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
    """Return headers and rows: what every arm does on the main questions, in percent, and what it takes."""
    headers = ["arm", "EM", "F1", "F1 kept", "retained", "not in passages", "refused wrongly", "refused rightly",
               "probes", "slots/token", "bytes/token", "TTFT", "tokens/s"]  # fmt: skip
    parts, speed = summary["parts"], summary["speed"].get("question", {})
    refusal, probes = parts.get("refusal", {}), parts.get("probes", {})
    rows = []
    for arm, figures in parts.get("questions", {}).items():
        times = speed.get(arm, {})
        rows.append(
            [
                arm,
                *(percent(figures[name]) for name in ("em", "f1", "f1_kept", "retention", "hallucinated", "refused")),
                percent(refusal.get(arm, {}).get("refused")),
                percent(probes.get(arm, {}).get("em")),
                _number(figures["slots_per_source_token"], ".2f"),
                _number(figures["bytes_per_source_token"], ",.0f"),
                _number(times.get("ttft_s"), ".3f", " s"),
                _number(times.get("decode_tokens_per_s"), ".1f"),
            ]
        )
    return headers, rows


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


def frontier_table(summary: Figures) -> Table:
    """Return headers and rows: what text and gists answer with the same slots."""
    headers = ["slots", "arm", "chunks", "found", "EM", "F1", "F1 more than text", "TTFT"]
    rows = [
        [
            f"{int(budget):,}",
            arm,
            _number(figures["chunks"], ".1f"),
            *(percent(figures[name]) for name in ("has_gold", "em", "f1", "f1_more")),
            _number(figures["ttft_s"], ".3f", " s"),
        ]
        for budget, arms in (summary.get("frontier") or {}).items()
        for arm, figures in arms.items()
    ]
    return headers, rows


LEGEND = """\
F1 kept: of the F1 of text. Retained: of the questions that text answers, those the arm answers too (an accepted answer
stands in what is said). Not in passages: answers that no given passage has in these words. Refused wrongly: with the
right passage given; rightly: without it. Probes: planted facts, exact match. Slots and bytes on disk are for each token
of source text. TTFT: time to the first token, reading gist files included."""


def markdown(summary: Figures) -> str:
    """Return the whole report in Markdown."""
    labels = {"questions": f"top {summary['plan']['top_k'][0]}"}
    parts: Mapping[str, Mapping[str, Figures]] = {
        labels.get(part, part): arms for part, arms in summary["parts"].items()
    }
    probes = [part for part in parts if part.startswith(f"{PLANTED} ")]
    tops = sorted((part for part in parts if part.startswith("top ")), key=lambda part: int(part.split()[1]))
    sections = [
        ("Found by retrieval", _shares(summary["retrieval"])),
        ("F1 by passages given; oracle is the right one alone", _by_part(parts, ["oracle", *tops], "f1")),
        ("F1 lost from the right passage alone to several with it", _mixed(summary["mixing"])),
        ("Planted facts, exact match", _by_part(parts, [*probes, "probes"] if probes else [], "em")),
        ("Passkeys found, by depth", _depths(summary["passkey"])),
        ("Whole documents, F1", _by_part(parts, ["whole"], "f1")),
        ("The same passages in other orders", _ordered(summary["orders"])),
        ("The same slots for text and gists", frontier_table(summary)),
        ("Speed", _speeds(summary["speed"])),
        ("Sweep over tokens per gist", _swept(summary["sweep"])),
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
    return ["part", "found"], rows


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
    return ["arm", "F1, best less worst order", "answers that change"], rows


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


def _swept(sweep: Figures | None) -> Table:
    points = sorted(sweep["points"], key=lambda point: float(point["tokens_per_gist"])) if sweep else []
    rows = [
        [f"{point['tokens_per_gist']}", percent(point["f1_kept"]), _number(point["bytes_per_source_token"], ",.0f")]
        for point in points
    ]
    return ["tokens per gist", "F1 kept", "bytes/token"], rows


# Pictures


def draw(summary: Figures, folder: Path) -> list[Path]:
    """Draw what the summary has figures for and return the files; none where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning(
            "no figures drawn: matplotlib is missing; pip install matplotlib, and run the same command again"
        )
        return []
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {
        "quality": _draw_quality, "ttft": _draw_ttft, "passkey": _draw_passkey, "frontier": _draw_frontier,
    }  # fmt: skip
    drawn = []
    for name, drawing in drawings.items():
        figure = Figure(layout="constrained", dpi=150)
        if drawing(figure, summary):
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1])
    return drawn


def _colour(arm: str) -> str:
    first, _, rate = arm.partition(" ")
    if first == "gist":
        return {"2": "#08519c", "4": "#2171b5", "8": "#4292c6", "16": "#6baed6"}.get(rate, "#3182bd")
    return {"text": "#222222", "full": "#7a3e9d", "hybrid": "#d95f0e"}.get(first, "#888888")


def _draw_quality(figure: Any, summary: Figures) -> bool:
    """Draw F1 against the bytes that are stored for a token of source text."""
    arms = {
        arm: (figures["bytes_per_source_token"], figures["f1"])
        for arm, figures in summary["parts"].get("questions", {}).items()
        if figures["bytes_per_source_token"] and arm != "full context"
    }
    if not arms:
        return False
    figure.set_size_inches(6.4, 4.2)
    axes = figure.subplots()
    gists = sorted(arms[arm] for arm in arms if arm.startswith("gist "))
    axes.plot([size for size, _ in gists], [100 * f1["value"] for _, f1 in gists], color="#9ecae1", zorder=1)
    for arm, (size, f1) in arms.items():
        value, low, high = (100 * f1[name] for name in ("value", "low", "high"))
        axes.errorbar(size, value, [[value - low], [high - value]], fmt="o", capsize=3, color=_colour(arm))
        side = {"xytext": (-7, 4), "ha": "right"} if arm.startswith("gist ") else {"xytext": (7, 4), "ha": "left"}
        axes.annotate(arm, (size, value), textcoords="offset points", fontsize=8, color=_colour(arm), **side)
    if nothing := summary["parts"].get("questions", {}).get("none"):
        axes.axhline(100 * nothing["f1"]["value"], color="#888888", linestyle=":", linewidth=1)
        axes.annotate("no context", (1, 100 * nothing["f1"]["value"]), xycoords=("axes fraction", "data"),
                      ha="right", va="bottom", fontsize=8, color="#888888")  # fmt: skip
    axes.set(xscale="log", xlabel="stored bytes per token of source text", ylabel="F1, %")
    axes.set_title(f"Quality against bytes, {summary['title']}", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.15)
    return True


def _draw_ttft(figure: Any, summary: Figures) -> bool:
    """Draw the time to the first token against the tokens of the context."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for arms in summary["speed"].values():
        for arm, figures in arms.items():
            lines.setdefault(arm, []).append((figures["source_tokens"], figures["ttft_s"]))
    if max(map(len, lines.values()), default=0) < 2:
        return False
    figure.set_size_inches(6.4, 4.2)
    axes = figure.subplots()
    for arm, points in lines.items():
        points.sort()
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=_colour(arm), label=arm)
    axes.set(yscale="log", xlabel="tokens of context", ylabel="time to first token, s")
    axes.set_title(f"Time to first token, {summary['title']}", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    return True


def _draw_frontier(figure: Any, summary: Figures) -> bool:
    """Draw F1 against the slots an answer may fill, and against the time to its first token where that was measured."""
    lines: dict[str, list[Figures]] = {}
    for budget, arms in (summary.get("frontier") or {}).items():
        for arm, figures in arms.items():
            lines.setdefault(arm, []).append({**figures, "budget": int(budget)})
    if not lines:
        return False
    is_timed = all(point["ttft_s"] for points in lines.values() for point in points)
    figure.set_size_inches(10.0 if is_timed else 5.6, 4.2)
    panels = figure.subplots(1, 1 + is_timed, sharey=True, squeeze=False)[0]
    for axes, across in zip(panels, ("budget", "ttft_s"), strict=False):
        for arm, points in lines.items():
            f1 = [100 * point["f1"]["value"] for point in points]
            off = [[abs(100 * point["f1"][end] - value) for point, value in zip(points, f1, strict=True)]
                   for end in ("low", "high")]  # fmt: skip
            size = [point[across] for point in points]
            axes.errorbar(size, f1, off, fmt="o-", markersize=4, capsize=3, color=_colour(arm), label=arm)
        axes.set(xscale="log", xlabel={"budget": "slots for passages", "ttft_s": "time to first token, s"}[across])
    budgets = [point["budget"] for point in max(lines.values(), key=len)]
    panels[0].set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    panels[0].minorticks_off()
    panels[0].set(ylabel="F1, %")
    panels[0].set_ylim(bottom=0)
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"The same slots for text and gists, {summary['title']}", fontsize=9)
    return True


def _draw_passkey(figure: Any, summary: Figures) -> bool:
    """Draw the share of passkeys found by depth and length, a map for each arm."""
    grids = {arm: grid for arm, grid in summary["passkey"].items() if grid}
    if not grids:
        return False
    lengths = list(dict.fromkeys(length for grid in grids.values() for length in grid))
    depths = sorted({depth for grid in grids.values() for row in grid.values() for depth in row}, key=float)
    columns = min(4, len(grids))
    lines = -(-len(grids) // columns)
    figure.set_size_inches(1.2 + 1.9 * columns, 0.8 + 1.9 * lines)
    maps = figure.subplots(lines, columns, squeeze=False)
    for axes in maps.flat:
        axes.set_axis_off()
    for axes, (arm, grid) in zip(maps.flat, grids.items(), strict=False):
        cells = [[grid.get(length, {}).get(depth, float("nan")) for length in lengths] for depth in depths]
        image = axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_axis_on()
        axes.set_title(arm, fontsize=9)
        axes.set_xticks(range(len(lengths)), [f"{int(length):,}" for length in lengths], fontsize=7)
        axes.set_yticks(range(len(depths)), depths, fontsize=7)
    figure.supxlabel("tokens of context", fontsize=9)
    figure.supylabel("depth of the passkey", fontsize=9)
    figure.colorbar(image, ax=maps, shrink=0.8, label="found")
    return True
