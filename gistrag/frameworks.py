"""The packages of other frameworks, found when they are asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from gistrag.errors import UsageError


def llama_index() -> Any:
    """Return the package that speaks to LlamaIndex.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module("llama_index.retrievers.gistrag")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "llama_index":
            raise
        raise UsageError(
            "LlamaIndex needs its own package; from a clone run pip install -e "
            "integrations/llama-index-retrievers-gistrag"
        ) from error
