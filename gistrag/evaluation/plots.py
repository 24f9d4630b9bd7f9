"""Pictures of an evaluation: quality against bytes, time to first token against length, passkeys by depth.

They are drawn from the summary alone, so an old summary can be drawn again. matplotlib is optional.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gistrag.evaluation.report import Figures

logger = logging.getLogger("gistrag")


def draw(summary: Figures, folder: Path) -> list[Path]:
    """Draw every picture that the summary has figures for, and return the files; none where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning(
            "no figures drawn: matplotlib is missing; pip install matplotlib, and run the same command again"
        )
        return []
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {"quality": _draw_quality, "ttft": _draw_ttft, "passkey": _draw_passkey}
    drawn = []
    for name, drawing in drawings.items():
        figure = Figure(layout="constrained", dpi=150)
        if drawing(figure, summary):
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1])
    return drawn


def _color(arm: str) -> str:
    first, _, rate = arm.partition(" ")
    if first == "gist":
        return {"2": "#08519c", "4": "#2171b5", "8": "#4292c6", "16": "#6baed6"}.get(rate, "#3182bd")
    return {"text": "#222222", "full": "#7a3e9d", "hybrid": "#d95f0e", "uncompressed": "#5f8f3e"}.get(first, "#888888")


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
    read = [found for arm, found in arms.items() if arm.startswith("gist ") and not arm.endswith(" without adapter")]
    gists = sorted(read, key=lambda found: found[0])
    axes.plot([size for size, _ in gists], [100 * f1["value"] for _, f1 in gists], color="#9ecae1", zorder=1)
    for arm, (size, f1) in arms.items():
        value, low, high = (100 * f1[name] for name in ("value", "low", "high"))
        axes.errorbar(size, value, [[value - low], [high - value]], fmt="o", capsize=3, color=_color(arm))
        side = {"xytext": (-7, 4), "ha": "right"} if arm.startswith("gist ") else {"xytext": (7, 4), "ha": "left"}
        axes.annotate(arm, (size, value), textcoords="offset points", fontsize=8, color=_color(arm), **side)
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
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=_color(arm), label=arm)
    axes.set(yscale="log", xlabel="tokens of context", ylabel="time to first token, s")
    axes.set_title(f"Time to first token, {summary['title']}", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
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
