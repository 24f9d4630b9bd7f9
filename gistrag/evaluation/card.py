"""The card of an adapter that `gistrag adapt` made: what it was made of, how, and how well it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gistrag.evaluation.adapting import Gain
from gistrag.evaluation.report import Figures, in_markdown, long_table
from gistrag.qa.metrics import Estimate


@dataclass(frozen=True, kw_only=True)
class Making:
    """How an adapter was made.

    Attributes:
        base: name of the base model; base_sha256: of its weights.
        data: name and sha256 of each file of questions.
        license: of the data, in the caller's words; "" where the caller did not say.
        base_license: of the base model, notice: that its terms ask for; "" where gistrag does not know the model.
        steps, tokens, seconds: of training, over all stops.
        machine: as from `gistrag.evaluation.speed.machine`.
        calibration: figures of the calibration; empty without one.
    """

    base: str
    base_sha256: str
    data: Mapping[str, str]
    license: str
    base_license: str
    notice: str
    steps: int
    tokens: int
    seconds: float
    machine: Mapping[str, Any]
    calibration: Mapping[str, Any]


GAIN_HEADERS = ("read as", "untrained base, F1", "adapter, F1", "gained")


def gain_rows(gains: Sequence[Gain]) -> list[list[str]]:
    """Return a row of a table for each way of reading, in percent with intervals."""
    return [[one.reading, _percent(one.base), _percent(one.adapter), _points(one.gained)] for one in gains]


def _percent(found: Estimate) -> str:
    return f"{100 * found.value:.1f} ({100 * found.low:.0f}–{100 * found.high:.0f})"


def _points(found: Estimate) -> str:
    return f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def card(making: Making, gains: Sequence[Gain], summary: Figures | None) -> str:
    """Return the card in Markdown.

    Args:
        gains: what it gained over the untrained base; empty where nothing was evaluated.
        summary: of the evaluation, None without one.
    """
    license_of_data = making.license or "not stated by whoever trained it; see the files of questions"
    files = "; ".join(f"{name}, sha256 {sha256[:16]}" for name, sha256 in making.data.items())
    machine = making.machine
    facts = [
        ("base", f"{making.base}, sha256 of its weights {making.base_sha256}"),
        ("data", files),
        ("license", f"of the data: {license_of_data}; of the base: {making.base_license or 'see the base model'}"),
        ("recipe", "in `gist_settings.json`"),
        ("training", f"{making.steps:,} steps, {making.tokens:,} tokens of text, questions and answers, "
                     f"{making.seconds / 60:.1f} minutes"),
        ("machine", f"{machine['device']}, {machine['processor']}, {machine['threads']} threads, {machine['dtype']}"),
        ("made with", ", ".join(f"{name} {machine[name]}" for name in ("gistrag", "torch", "transformers"))),
    ]  # fmt: skip
    parts = [
        "---\nlibrary_name: peft\ntags: [gistrag, kv-cache, gist, rag]\n---",
        f"# Gist adapter for {making.base}",
        "A LoRA adapter for gistrag, made by `gistrag adapt`. It acts where the model answers a question; the base "
        "model alone reads text and makes the gists.",
        in_markdown((["", ""], [[name, value] for name, value in facts])),
        *([f"{making.notice}. These terms hold for this adapter as well."] if making.notice else []),
        "## Measured",
        *_measured(gains, summary),
    ]
    if making.calibration:
        figures = ", ".join(f"{name} {value}" for name, value in making.calibration.items())
        parts += [f"Calibrated on other held-out articles: {figures}."]
    return "\n\n".join(parts) + "\n"


def _measured(gains: Sequence[Gain], summary: Figures | None) -> list[str]:
    if summary is None or not gains:
        return ["Nothing: no article was held out, or no question was asked."]
    refused = summary["parts"].get("refusal", {})
    refusals = ", ".join(f"{arm} {100 * one['refused']['value']:.0f} %" for arm, one in refused.items())
    asked = f"{gains[0].adapter.count:,} questions about articles that it was not trained on"
    return [
        f"{asked}, each from the best {summary['plan']['top_k'][0]} chunks; greedy, gists in 8 bits, in percent with "
        "95 % bootstrap intervals. What was gained is compared question by question.",
        in_markdown((list(GAIN_HEADERS), gain_rows(gains))),
        *(["Long answers, held-out documents:", in_markdown(long)] if (long := long_table(summary))[1] else []),
        *([f"Refused where the passages hold no answer: {refusals}."] if refusals else []),
    ]


def write(folder: Path, text: str, making: Making) -> None:
    """Write the card into the folder of the adapter, and the notice that goes with it."""
    (folder / "README.md").write_text(text, "utf-8")
    if making.notice:
        (folder / "NOTICE").write_text(f"{making.notice}\n", "utf-8")
