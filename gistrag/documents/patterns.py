"""Gitignore-style patterns: those of ``--include`` and ``--exclude``, and the .gitignore files of a folder.

pathspec turns a pattern into a regular expression, whose time can grow with the length of a path to the power of the
wildcards. So a pattern may hold only a few wildcards: the slowest pattern within the limits takes about 50 ms on the
longest path, and one more wildcard would take seconds.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from pathspec import GitIgnoreSpec

from gistrag.errors import DocumentError, UsageError

WILDCARDS_MAX = 3
FOLDER_WILDCARDS_MAX = 2
IGNORE_LINES_MAX = 10_000
IGNORE_SLOW_LINES_MAX = 100
IGNORE_BYTES_MAX = 2**20
_SHOWN_CHARS = 60

Ignores = tuple[tuple[str, GitIgnoreSpec], ...]
"""Folders with a .gitignore, outermost first: the folder's name as it begins a path, and the rules."""


def require_patterns(include: Sequence[str] | None, exclude: Sequence[str] | None) -> None:
    """Return if `gistrag.documents.discovery.find` accepts these patterns; a string counts as one pattern.

    Raises:
        UsageError: names the option and the mistake.
    """
    for option, patterns in (("include", include), ("exclude", exclude)):
        compiled(option, [patterns] if isinstance(patterns, str) else patterns or ())


def only(name: str) -> str:
    r"""Return the pattern that the file *name* at the top of a folder matches, and no other file.

    >>> only("notes [1].md")
    '/notes \\[1\\].md'
    """
    return "/" + re.sub(r"([\\*?\[\]]| $)", r"\\\1", name)


def names_one_file(pattern: str) -> bool:
    """Return whether a pattern is one that `only` makes.

    >>> names_one_file("/notes.md"), names_one_file("/*.md"), names_one_file("notes.md")
    (True, False, False)
    """
    return re.fullmatch(r"/([^*?\[\]\\/]|\\.)+", pattern) is not None


def compiled(option: str, patterns: Sequence[str]) -> GitIgnoreSpec:
    """Return the patterns of *option* ready to match.

    Raises:
        UsageError: a pattern is malformed, or holds too many wildcards.
    """
    try:
        spec = GitIgnoreSpec.from_lines(patterns)
    except (ValueError, re.error) as error:
        raise UsageError(f"{option} expects gitignore-style patterns, got {list(patterns)}: {error}") from None
    for pattern in patterns:
        if mistake := _too_many_wildcards(pattern):
            raise UsageError(f"{option} has a {mistake}; use several simpler patterns")
    return spec


def parse_gitignore(data: bytes) -> GitIgnoreSpec:
    """Return the rules of a .gitignore file; like git, ignore a line that is not a pattern.

    Raises:
        DocumentError: matching the rules could take too long. Without them the index could get files that they
            exclude, so the caller must not go on.
    """
    if len(data) > IGNORE_BYTES_MAX or data.count(b"\n") > IGNORE_LINES_MAX:
        limit = f"{IGNORE_LINES_MAX:,} lines or {IGNORE_BYTES_MAX:,} bytes"
        raise DocumentError(f"its .gitignore is too long: {len(data):,} bytes; the limit is {limit}")
    lines = [line for line in data.decode("utf-8", "surrogateescape").splitlines() if not line.startswith("#")]
    for line in lines:
        if mistake := _too_many_wildcards(line):
            raise DocumentError(f"its .gitignore has a {mistake}")
    slow = sum(map(_is_slow, lines))
    if slow > IGNORE_SLOW_LINES_MAX:
        raise DocumentError(
            f"its .gitignore has {slow:,} patterns of {WILDCARDS_MAX} wildcards or {FOLDER_WILDCARDS_MAX} **; "
            f"the limit is {IGNORE_SLOW_LINES_MAX}"
        )
    return GitIgnoreSpec([pattern for line in lines for pattern in _rules(line)])


def is_ignored(path: str, ignores: Ignores) -> bool:
    """Return whether the innermost .gitignore with a matching rule excludes *path*."""
    for folder, spec in reversed(ignores):
        verdict = spec.check_file(path.removeprefix(folder)).include
        if verdict is not None:
            return verdict
    return False


def _rules(line: str) -> Iterable[Any]:
    with suppress(ValueError, re.error), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the module re, about a bracket inside of brackets
        return GitIgnoreSpec.from_lines([line]).patterns
    return ()


def _too_many_wildcards(pattern: str) -> str | None:
    """Return what is wrong with a pattern that holds too many wildcards, or None."""
    wildcards, folders = _count_wildcards(pattern)
    if wildcards <= WILDCARDS_MAX and folders <= FOLDER_WILDCARDS_MAX:
        return None
    shown = pattern if len(pattern) <= _SHOWN_CHARS else pattern[:_SHOWN_CHARS] + "…"
    limit = f"{WILDCARDS_MAX}, {FOLDER_WILDCARDS_MAX} of them **"
    return f"pattern of {wildcards} wildcards, {folders} of them **; the limit is {limit}: {shown!r}"


def _is_slow(pattern: str) -> bool:
    wildcards, folders = _count_wildcards(pattern)
    return wildcards >= WILDCARDS_MAX or folders >= FOLDER_WILDCARDS_MAX


def _count_wildcards(pattern: str) -> tuple[int, int]:
    r"""Return the number of wildcards that cost time, and how many of them are ``**``.

    A name that is only ``*`` and a ``/**`` at the end match in one way, so they cost nothing.

    >>> _count_wildcards("**/*.test.*"), _count_wildcards("*/*/build/**"), _count_wildcards(r"\*")
    ((3, 1), (0, 0), (0, 0))
    """
    names = re.sub(r"\\.", "", pattern).strip().removeprefix("!").removesuffix("/**").split("/")
    folders = names.count("**")
    return folders + sum(name.count("*") for name in names if name not in ("*", "**")), folders
