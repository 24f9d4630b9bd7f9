"""LangChain over gistrag: a retriever for any chain, and a runnable that answers from gist caches."""

from __future__ import annotations

from langchain_gistrag.retrievers import GistRAGRetriever
from langchain_gistrag.runnables import GistRAGRunnable

__all__ = ["GistRAGRetriever", "GistRAGRunnable"]
