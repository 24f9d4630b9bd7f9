"""`gistrag build --dry-run`: what a build would do, and what it would cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gistrag.cli.output import counted, loading, print_json, say
from gistrag.progress import duration, megabytes

if TYPE_CHECKING:
    from gistrag.index.plan import Plan

NAMED = 20
"""Documents that are named in each list."""


def dry_run_of(
    documents: Path,
    index: Path,
    settings: Mapping[str, Any],
    files: Mapping[str, Any],
    *,
    rebuild: bool,
    as_json: bool,
) -> int:
    """Print what a build would do, and return the exit code; nothing is made or changed.

    Args:
        settings: fields of `gistrag.settings.IndexSettings`, None where not given.
        files: ``include``, ``exclude``, ``delete`` and ``prune``.
    """
    with loading():
        from gistrag.index.plan import making_rate
        from gistrag.planning import plan_build

        plan, runtime = plan_build(documents, index, settings, rebuild=rebuild, **files)
        seconds = plan.tokens / making_rate(runtime)
    if not as_json:
        say(*_lines(plan, seconds))
    print_json({**asdict(plan), "seconds": round(seconds, 1)})
    return 0


def _lines(plan: Plan, seconds: float) -> list[str]:
    lines = []
    for what in ("added", "changed", "renamed", "removed", "kept"):
        paths = getattr(plan, what)
        lines += [f"{what:<8} {path}" for path in paths[:NAMED]]
        lines += [f"{what:<8} … and {len(paths) - NAMED:,} more"] if len(paths) > NAMED else []
    lines += [f"skipped  {row.path}: {row.reason}" for row in plan.skipped[:NAMED]]
    if plan.left_out:
        lines.append(f"left out: {counted(plan.left_out)}; no reader knows them")
    lines.append(f"{plan.unchanged:,} documents unchanged, {plan.chunks:,} chunks to index")
    cost = f"about {duration(seconds)} for {plan.tokens:,} tokens, up to {megabytes(plan.gist_bytes)} of disk"
    return [*lines, f"gists: {cost}" if plan.tokens else "no gists to make", "dry run: nothing was done"]
