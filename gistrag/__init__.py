"""Hybrid retrieval-augmented generation with gist caches.

>>> from gistrag import GistRAG
>>> rag = GistRAG.from_folder("docs/")                      # doctest: +SKIP
>>> print(rag.query("How many bytes does a slot take?"))    # doctest: +SKIP
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gistrag.errors import GistRAGError

if TYPE_CHECKING:
    from gistrag.answering.answering import Answer, Options, Source, Stream, Timings, Usage
    from gistrag.rag import Engine, GistRAG
    from gistrag.settings import IndexSettings

__version__ = "0.1.0"

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it would complain of optional kernels

_HOMES = {
    **dict.fromkeys(("Answer", "Options", "Source", "Stream", "Timings", "Usage"), "gistrag.answering.answering"),
    **dict.fromkeys(("Engine", "GistRAG"), "gistrag.rag"),
    "IndexSettings": "gistrag.settings",
}

__all__ = [
    "Answer",
    "Engine",
    "GistRAG",
    "GistRAGError",
    "IndexSettings",
    "Options",
    "Source",
    "Stream",
    "Timings",
    "Usage",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import gistrag` loads no tensor library (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gistrag' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
