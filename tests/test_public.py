"""What `import gistrag` offers is exactly what it says it offers."""

from __future__ import annotations

import gistrag


def test_public_names_are_listed_and_there() -> None:
    """`dir` shows the names of `__all__` and no others, and each of them can be had."""
    assert sorted(gistrag.__all__) == dir(gistrag)
    assert [] == [name for name in gistrag.__all__ if getattr(gistrag, name).__name__ != name]


def test_star_import_gives_the_public_names() -> None:
    """`from gistrag import *` brings the names of `__all__`."""
    names: dict[str, object] = {}

    exec("from gistrag import *", names)

    assert sorted(gistrag.__all__) == sorted(names.keys() - {"__builtins__"})


def test_unknown_name_is_an_attribute_error() -> None:
    """A name that is not there fails as in any module."""
    assert not hasattr(gistrag, "GistRag")
