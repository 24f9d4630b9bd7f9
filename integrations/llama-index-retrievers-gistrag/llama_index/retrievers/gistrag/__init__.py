"""LlamaIndex over gistrag: retrieve chunks, answer from their gist caches, make gists in a pipeline.

Every part works alone: the retriever with any LLM, the synthesizer behind any retriever.
"""

from __future__ import annotations

from llama_index.retrievers.gistrag.base import GistRetriever
from llama_index.retrievers.gistrag.chat_engine import GistChatEngine
from llama_index.retrievers.gistrag.compressor import GistCompressor
from llama_index.retrievers.gistrag.query_engine import GistQueryEngine
from llama_index.retrievers.gistrag.synthesizer import GistAnswerEvent, GistSynthesizer

__all__ = ["GistAnswerEvent", "GistChatEngine", "GistCompressor", "GistQueryEngine", "GistRetriever", "GistSynthesizer"]
