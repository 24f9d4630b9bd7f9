"""Examples in docstrings, on the site: what stands behind ``>>>`` becomes a block of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*\n?(?:^\1\S.*\n?)*", re.MULTILINE)
FLAGS = re.compile(r" *# doctest: .*$", re.MULTILINE)


def fenced(text: str) -> str:
    r"""Return a docstring with its examples as blocks of code, without the flags of doctest.

    >>> fenced("Half.\n\n>>> half(4)  # doctest: +SKIP\n2").splitlines()
    ['Half.', '', '```pycon', '>>> half(4)', '2', '```']
    """
    return EXAMPLE.sub(
        lambda found: f"{found[1]}```pycon\n{FLAGS.sub('', found[0]).rstrip()}\n{found[1]}```\n", text
    ).rstrip()


class Doctests(griffe.Extension):
    """Fences the examples of every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Fence those of one module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
