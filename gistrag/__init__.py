"""Hybrid retrieval-augmented generation with gist caches.

>>> from gistrag import GistRAG
>>> rag = GistRAG.from_folder("docs/")                      # doctest: +SKIP
>>> print(rag.query("How many bytes does a slot take?"))    # doctest: +SKIP
"""

import importlib as _importlib
import typing as _typing

from gistrag.errors import GistRAGError

if _typing.TYPE_CHECKING:
    from gistrag.answering.answer import Answer, Options, Source, Timings, Usage
    from gistrag.answering.stream import Stream
    from gistrag.engine import Engine
    from gistrag.index.builder import SyncReport
    from gistrag.index.retriever import Hit
    from gistrag.index.schema import StoredChunk
    from gistrag.progress import GistProgress, NoProgress, Progress, TerminalProgress
    from gistrag.rag import GistRAG
    from gistrag.settings import AdapterSettings, GistSettings, IndexSettings

__version__ = "0.2.0"

_HOMES = {
    **dict.fromkeys(("Answer", "Options", "Source", "Timings", "Usage"), "gistrag.answering.answer"),
    **dict.fromkeys(("AdapterSettings", "GistSettings", "IndexSettings"), "gistrag.settings"),
    **dict.fromkeys(("GistProgress", "NoProgress", "Progress", "TerminalProgress"), "gistrag.progress"),
    "Engine": "gistrag.engine",
    "GistRAG": "gistrag.rag",
    "Hit": "gistrag.index.retriever",
    "StoredChunk": "gistrag.index.schema",
    "Stream": "gistrag.answering.stream",
    "SyncReport": "gistrag.index.builder",
}

__all__ = [
    "AdapterSettings",
    "Answer",
    "Engine",
    "GistProgress",
    "GistRAG",
    "GistRAGError",
    "GistSettings",
    "Hit",
    "IndexSettings",
    "NoProgress",
    "Options",
    "Progress",
    "Source",
    "StoredChunk",
    "Stream",
    "SyncReport",
    "TerminalProgress",
    "Timings",
    "Usage",
]


def __getattr__(name: str) -> _typing.Any:
    """Import a public name on first use, so that `import gistrag` loads no tensor library (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gistrag' has no attribute {name!r}")
    return getattr(_importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
