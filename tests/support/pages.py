"""The pages of the manual, and what stands in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer.main

from gistrag.cli import main

ROOT = Path(__file__).parents[2]
MANUAL = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*(path for name in ("README.md", "CONTRIBUTING.md") if (path := ROOT / name).exists()), *MANUAL]
PROGRAM: Any = typer.main.get_command(main.app)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def fences(page: Path, *languages: str) -> list[str]:
    """Return the fenced blocks of a page that are in one of these languages."""
    return [body for language, body in FENCE.findall(page.read_text("utf-8")) if language in languages]


def spans(page: Path) -> list[str]:
    """Return the `code` inside the sentences and tables of a page."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text("utf-8")))


def parse(words: list[str]) -> None:
    """Parse a command line as the program does, without running it."""
    name, *rest = words
    if name in program_options() and not rest:
        return
    with PROGRAM.commands[name].make_context(name, rest):
        pass


def program_options() -> set[str]:
    """Return the options of the program itself."""
    return {option for parameter in PROGRAM.params for option in spelt(parameter)}


def spelt(parameter: Any) -> list[str]:
    """Return the long spellings of an option, that of its opposite too."""
    return [option for option in (*parameter.opts, *parameter.secondary_opts) if option[:2] == "--"]
