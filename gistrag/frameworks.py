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


class LlamaIndex:
    """What an index is to LlamaIndex: a retriever, a query engine, a chat engine."""

    def as_retriever(self, **options: Any) -> Any:
        """Return a LlamaIndex retriever over this index; options are those of its `GistRetriever`.

        Raises:
            UsageError: its package is not installed; names the command that installs it.
        """
        return llama_index().GistRetriever(self, **options)

    def as_query_engine(self, **options: Any) -> Any:
        """Return a LlamaIndex query engine over this index; options are those of `GistQueryEngine.from_rag`.

        Raises:
            UsageError: its package is not installed; names the command that installs it.
        """
        return llama_index().GistQueryEngine.from_rag(self, **options)

    def as_chat_engine(self, **options: Any) -> Any:
        """Return a LlamaIndex chat engine over this index; options are those of its `GistChatEngine`.

        Raises:
            UsageError: its package is not installed; names the command that installs it.
        """
        return llama_index().GistChatEngine(self, **options)
