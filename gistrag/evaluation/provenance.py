"""What the figures of an evaluation were made with, and the folder that holds one evaluation.

An output folder is one evaluation::

    settings.json   everything the answers depend on; a later run with the same resumes
    corpus/         the contexts, indexed
    rows.jsonl      grows answer by answer
    summary.json, table.md, figures/   made from the rows at the end
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gistrag import __version__
from gistrag.compression.making import making
from gistrag.engine import Engine
from gistrag.errors import FingerprintMismatchError, UsageError
from gistrag.evaluation.cases import Plan
from gistrag.evaluation.plots import draw
from gistrag.evaluation.report import Figures, markdown
from gistrag.model.hashing import file_sha256
from gistrag.settings import IndexSettings
from gistrag.storage import files
from gistrag.storage.fingerprint import require_same

ROWS_VERSION = "2"
"""Raised when the names of parts, arms or fields change, so that old and new rows never mix."""


def made_with(file: Path, plan: Plan, settings: IndexSettings, engine: Engine, *, is_held_out: bool) -> dict[str, str]:
    """Return everything an answer depends on besides its case and arm; how much is asked may grow later."""
    embedder = {f"embedder_{name}": value for name, value in engine.embedder.fingerprint.items()}
    stored = {} if settings.kv_cache_dtype == "auto" else {"kv_cache_dtype": settings.kv_cache_dtype}
    found = {
        "gistrag": __version__,
        "rows": ROWS_VERSION,
        "file": file_sha256(file),
        "held_out": is_held_out,
        "seed": plan.seed,
        "planted_facts": plan.planted_facts,
        "top_k": plan.top_k[0],
        "max_new_tokens": plan.max_new_tokens,
        "placement": settings.placement,
        "chunk_tokens": settings.chunk_tokens,
        **stored,
        **making(settings.placement),
        **engine.model.fingerprint,
        **embedder,
    }
    return {name: str(value) for name, value in found.items()}


def prepare(output: Path, expected: Mapping[str, str]) -> None:
    """Make the output folder, or return if it already holds this evaluation.

    Args:
        expected: as from `made_with`.

    Raises:
        UsageError: it holds another evaluation.
    """
    path = output / "settings.json"
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        _write_json(path, expected)
        return
    try:
        found = json.loads(path.read_text("utf-8"))
        require_same(found, expected, where=f"the evaluation in {output}", remedy="name another --output, or remove it")
    except FingerprintMismatchError as error:
        raise UsageError(str(error)) from error
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{path} is damaged; name another --output") from error


def write(summary: Figures, output: Path) -> None:
    """Write the summary, its tables and its pictures."""
    _write_json(output / "summary.json", summary)
    files.write_atomic(output / "table.md", markdown(summary).encode())
    draw(summary, output / "figures")


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    files.write_atomic(path, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())


def title(settings: IndexSettings) -> str:
    """Return the heading of a report: model, adapter and the numbers of the gists.

    >>> title(IndexSettings(model="models/tiny", adapter="none", kv_cache_dtype="int8"))
    'tiny, no adapter, gists in int8'
    """
    adapter = f"adapter {Path(settings.adapter).name}" if settings.adapter != "none" else "no adapter"
    stored = "" if settings.kv_cache_dtype == "auto" else f", gists in {settings.kv_cache_dtype}"
    return f"{Path(settings.model).name}, {adapter}{stored}"


def notes(summary: Figures, file: Path) -> list[str]:
    """Return what a reader has to know besides the figures."""
    corpus, plan, machine = summary["corpus"], summary["plan"], summary["machine"]
    long = f" and {corpus['long_questions']:,} for long answers" if corpus.get("long_questions") else ""
    lines = [
        f"{corpus['questions']:,} questions{long} of {file.name}, seed {plan['seed']}, {plan['top_k'][0]} chunks each; "
        f"corpus of {corpus['articles']:,} articles, {corpus['chunks']:,} chunks, {corpus['tokens']:,} tokens.",
        f"gistrag {machine['gistrag']}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"{machine['device']}, {machine['threads']} threads.",
        "In brackets: 95 % bootstrap intervals over questions, resampled in pairs where arms are compared with text.",
    ]
    if left_out := {arm: sum(parts.values()) for arm, parts in summary["left_out"].items()}:
        listed = ", ".join(f"{count:,} of {arm}" for arm, count in left_out.items())
        lines.append(f"Left out, because the model's context window is too short: {listed}.")
    return lines
