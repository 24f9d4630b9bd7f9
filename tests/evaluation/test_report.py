"""Rows with known scores add up to figures worked out by hand, and a summary becomes a table and pictures."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gistrag.evaluation.plots import draw
from gistrag.evaluation.report import long_table, main_table, markdown, summarized, timed


def row(arm: str, name: str, f1: float, *, part: str = "questions", **values: Any) -> dict[str, Any]:
    defaults = {
        "generated": f"{arm} {f1}",
        "em": float(f1 == 1),
        "f1": f1,
        "contains": f1 > 0.5,
        "refused": False,
        "hallucinated": f1 == 0,
        "slots": 10,
        "source_tokens": 40,
        "stored_bytes": 800,
    }
    return {"part": part, "name": name, "arm": arm, **defaults, **values}


def rows_of(arm: str, scores: Sequence[float], **values: Any) -> list[dict[str, Any]]:
    """Questions a, b, …, of which d has not got its passage."""
    return [row(arm, name, f1, has_gold=name != "d", **values) for name, f1 in zip("abcd", scores, strict=False)]


ROWS = [
    *rows_of("none", (0, 0, 0, 0.2), slots=0, source_tokens=0, stored_bytes=0),
    *rows_of("text", (1, 1, 0.6, 0), slots=40),
    *rows_of("gist 4", (1, 0.3, 0.6, 1)),
    *rows_of("text", (1, 1, 1), part="oracle"),
    *rows_of("gist 4", (1, 0.5, 0.6), part="oracle"),
    row("text", "a", 1, part="refusal", refused=True),
    row("text", "b", 0, part="refusal"),
    row("text", "0", 1, part="planted name", has_gold=True),
    row("text", "1", 0, part="planted date", has_gold=False),
    *(row("text", f"{depth}", 1, part="passkey", length=500, depth=depth) for depth in (0.0, 1.0)),
    *(row("gist 4", f"{depth}", 1 - depth, part="passkey", length=500, depth=depth) for depth in (0.0, 1.0)),
    row("text", "a", 1, part="order 1", generated="Text 1!"),
    row("text", "a", 0.5, part="order 2"),
    row("text", "b", 1, part="order 1"),
    row("text", "b", 1, part="order 2", generated="the text 1"),
    {"part": "questions", "name": "e", "arm": "text", "left_out": "9 positions more"},
]


def value(estimate: dict[str, float] | None) -> float | None:
    return None if estimate is None else round(estimate["value"], 6)


@pytest.fixture
def summary() -> dict[str, Any]:
    """A summary as `gistrag evaluate` writes it."""
    samples = [
        {"context": context, "arm": arm, "ttft_s": ttft_s, "load_s": 0.01, "decode_tokens_per_s": 20.0,
         "peak_bytes": 5e8, "source_tokens": tokens}
        for context, tokens in (("question", 300), ("500 tokens", 500))
        for arm, ttft_s in (("text", 0.4), ("text", 0.6), ("text", 5.0), ("gist 4", 0.06), ("gist 4", 0.06))
    ]  # fmt: skip
    return {
        **summarized(ROWS),
        "speed": timed(samples),
        "title": "tiny",
        "notes": ["4 questions."],
        "plan": {"top_k": [3, 1]},
    }


def test_scores_are_means(summary: dict[str, Any]) -> None:
    """Every share is over the questions that the arm answered."""
    text = summary["parts"]["questions"]["text"]

    assert 4 == text["count"]
    assert [0.5, 0.65, 0.75, 0.25] == [value(text[name]) for name in ("em", "f1", "contains", "hallucinated")]
    assert {"text": {"questions": 1}} == summary["left_out"]


def test_an_arm_is_compared_with_text(summary: dict[str, Any]) -> None:
    """F1 kept is a ratio of sums, retention counts what text gets right, and text keeps all of itself."""
    arms = summary["parts"]["questions"]

    assert round(2.9 / 2.6, 6) == value(arms["gist 4"]["f1_kept"])
    assert round(2 / 3, 6) == value(arms["gist 4"]["retention"])
    assert (1.0, 1.0) == (value(arms["text"]["f1_kept"]), value(arms["text"]["retention"]))
    assert round(0.2 / 2.6, 6) == value(arms["none"]["f1_kept"])


def test_costs_are_for_a_token_of_text(summary: dict[str, Any]) -> None:
    """Totals are divided, and nothing costs nothing known."""
    arms = summary["parts"]["questions"]

    assert (0.25, 20.0) == (arms["gist 4"]["slots_per_source_token"], arms["gist 4"]["bytes_per_source_token"])
    assert arms["none"]["bytes_per_source_token"] is None


def test_retrieval_is_the_same_for_all_arms(summary: dict[str, Any]) -> None:
    """The share of questions with the right passage among those given."""
    assert {"questions": 0.75, "planted name": 1.0, "planted date": 0.0, "planted": 0.5} == {
        part: value(found) for part, found in summary["retrieval"].items() if found
    }


def test_mixing_is_measured_where_the_right_passage_was_found(summary: dict[str, Any]) -> None:
    """Question d, whose passage was not found, tells nothing about mixing."""
    assert round((0 + 0 + 0.4) / 3, 6) == value(summary["mixing"]["text"]["questions"])
    assert round((0 + 0.2 + 0) / 3, 6) == value(summary["mixing"]["gist 4"]["questions"])


def test_orders_are_compared_with_the_products(summary: dict[str, Any]) -> None:
    """Spread is best less worst order; an answer changes when its words do."""
    found = summary["orders"]["text"]

    assert (2, 0.25, 0.25) == (found["count"], value(found["f1_spread"]), value(found["changed"]))


def test_planted_facts_count_by_kind_and_together(summary: dict[str, Any]) -> None:
    """Each kind is a part, and all of them are one more."""
    parts = summary["parts"]

    shares = [value(parts[name]["text"]["em"]) for name in ("planted name", "planted date", "planted")]
    assert [1.0, 0.0, 0.5] == shares


def test_passkeys_lie_on_a_grid(summary: dict[str, Any]) -> None:
    """By arm, length and depth."""
    assert {"500": {"0": 1.0, "1": 0.0}} == summary["passkey"]["gist 4"]


def test_times_are_medians(summary: dict[str, Any]) -> None:
    """One slow sample moves nothing; text divided by the arm is how many times sooner it is."""
    speed = summary["speed"]["question"]

    assert 0.6 == speed["text"]["ttft_s"]
    assert pytest.approx(10) == speed["gist 4"]["times_sooner"]
    assert pytest.approx(0.05) == speed["gist 4"]["warm_ttft_s"]


def test_no_rows_have_no_figures() -> None:
    """An evaluation of nothing is empty, not wrong."""
    assert {} == summarized([])["parts"]
    assert {} == timed([])
    assert [] == main_table({**summarized([]), "speed": {}})[1]


def test_the_table_has_a_row_for_each_arm(summary: dict[str, Any]) -> None:
    """In percent with intervals; what is unknown stays empty."""
    headers, rows = main_table(summary)

    assert ["none", "text", "gist 4"] == [cells[0] for cells in rows]
    assert all(len(headers) == len(cells) for cells in rows)
    cells = dict(zip(headers, rows[1], strict=True))
    assert cells["F1"].startswith("65.0 (")
    assert cells["refused rightly"].startswith("50.0 (")
    assert ("1.00", "0.600 s") == (cells["slots/token"], cells["TTFT"])
    assert "" == dict(zip(headers, rows[0], strict=True))["TTFT"]


def test_the_report_is_made_of_the_file_alone(summary: dict[str, Any]) -> None:
    """The summary can go through JSON and still be written down, with a section for each thing measured."""
    text = markdown(json.loads(json.dumps(summary)))

    assert text == markdown(summary)
    assert text.startswith("# Evaluation of tiny\n\n4 questions.\n")
    for title in ("Right passage retrieved", "F1 lost", "Planted facts", "Passkey", "other orders", "Speed"):
        assert title in text
    assert "Whole documents" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_pictures_are_drawn(summary: dict[str, Any], tmp_path: Path) -> None:
    """Quality against bytes, first token against length, and the map of passkeys."""
    pytest.importorskip("matplotlib")

    drawn = draw(summary, tmp_path / "figures")

    assert ["quality.png", "ttft.png", "passkey.png"] == [path.name for path in drawn]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    """Without passkeys and times one picture is left."""
    pytest.importorskip("matplotlib")
    rows = [line for line in ROWS if line["part"] == "questions"]

    drawn = draw({**summarized(rows), "speed": {}, "title": "tiny"}, tmp_path / "figures")

    assert ["quality.png"] == [path.name for path in drawn]


def test_without_matplotlib_one_line_says_so(
    summary: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pictures are an extra."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    with caplog.at_level(logging.WARNING, "gistrag"):
        assert [] == draw(summary, tmp_path / "figures")

    assert ["matplotlib is missing" in record.message for record in caplog.records] == [True]


def test_long_answers_have_a_table(summary: dict[str, Any]) -> None:
    """ROUGE-L and covered evidence of each arm, and what is kept of text question by question; nothing without them."""
    rows = [
        row(arm, name, 0.0, part="long", hallucinated=None, rouge_l=rouge_l, evidence=evidence, has_gold=True)
        for arm, name, rouge_l, evidence in (
            ("text", "0", 0.4, 0.5), ("text", "1", 0.6, 1.0), ("gist 4", "0", 0.2, 0.5), ("gist 4", "1", 0.6, 0.25),
        )
    ]  # fmt: skip

    headers, lines = long_table(summarized(rows))

    assert headers[1:] == ["ROUGE-L", "% of text", "evidence covered", "% of text"]
    assert [[cell.split(" ")[0] for cell in line] for line in lines] == [
        ["text", "50.0", "100.0", "75.0", "100.0"],
        ["gist", "40.0", "80.0", "37.5", "50.0"],
    ]
    assert long_table(summary)[1] == []


def test_a_base_beside_its_adapter_is_drawn(summary: dict[str, Any], tmp_path: Path) -> None:
    """The same gists, read without the adapter, take the same bytes and have another F1."""
    rows = [*ROWS, *rows_of("gist 4 without adapter", (0, 0.3, 0.1, 0))]

    drawn = draw({**summary, **summarized(rows)}, tmp_path)

    assert "quality.png" in {path.name for path in drawn}
