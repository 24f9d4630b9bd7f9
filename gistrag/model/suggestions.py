"""Readers that no Python package carries, and which to choose where the chosen one does not know a language.

They are named by their hub id. Their shapes are those of the published config.json, and their parameters follow from
these; a table of tokens that serves twice counts once.
"""

from __future__ import annotations

from dataclasses import dataclass

from gistrag.model.hub import OPTIONAL, ReaderShape


@dataclass(frozen=True)
class Suggestion:
    """A reader by hub id: its license, the languages it knows, and what it costs."""

    hub_id: str
    license: str
    languages: str
    reader: ReaderShape


_QWEN2 = "over 29, Korean among them"
_QWEN3 = "over 100, Korean among them"
BY_HUB_ID = (
    Suggestion("Qwen/Qwen2.5-0.5B-Instruct", "Apache-2.0", _QWEN2, ReaderShape(494_032_768, 24, 2, 64)),
    Suggestion("Qwen/Qwen2.5-1.5B-Instruct", "Apache-2.0", _QWEN2, ReaderShape(1_543_714_304, 28, 2, 128)),
    Suggestion("Qwen/Qwen3-0.6B", "Apache-2.0", _QWEN3, ReaderShape(596_049_920, 28, 8, 128)),
    Suggestion("Qwen/Qwen3-1.7B", "Apache-2.0", _QWEN3, ReaderShape(1_720_574_976, 28, 8, 128)),
)


def suggested(current: str) -> str:
    """Return the readers of many languages to choose instead of *current*, with size and license, in words.

    >>> suggested("Qwen/Qwen2.5-0.5B-Instruct")
    'gemma3-270m (268 million parameters, Gemma Terms of Use)'
    """
    known = [(one.name, one.license, one.reader) for one in OPTIONAL] + [
        (one.hub_id, one.license, one.reader) for one in BY_HUB_ID[:1]
    ]
    return " or ".join(
        f"{name} ({shape.parameters / 1e6:,.0f} million parameters, {license_name})"
        for name, license_name, shape in known
        if shape and name != current
    )
