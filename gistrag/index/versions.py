"""The Python and the SQLite that gistrag runs on, and what is known to be wrong with them."""

from __future__ import annotations

import platform
import sqlite3
import sys
from collections.abc import Sequence

HTML_FIXED = {11: 14, 12: 12, 13: 6}
"""Patch of each Python 3 in which html.parser takes linear time (CVE-2025-6069); later ones have it from the start."""
WAL_FIXED = (3, 51, 3)


def versions() -> str:
    """Return Python and SQLite with their versions."""
    return f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"


def known_bugs(
    python: Sequence[int] = sys.version_info[:3], sqlite: Sequence[int] = sqlite3.sqlite_version_info
) -> list[str]:
    """Return a sentence for each known bug of these versions that touches gistrag, with what gistrag does about it.

    >>> known_bugs((3, 14, 0), (3, 51, 3))
    []
    """
    found = []
    if python[1] in HTML_FIXED and python[2] < HTML_FIXED[python[1]]:
        found.append(
            f"html.parser takes quadratic time below Python 3.{python[1]}.{HTML_FIXED[python[1]]} (CVE-2025-6069); "
            "pages that show it are refused"
        )
    if tuple(sqlite) < WAL_FIXED:
        found.append(
            "SQLite below 3.51.3 can damage a database that two programs write at once; only one builder writes an "
            "index, so let no other program write index.db"
        )
    return found
