"""Cutting documents into chunks in the parser worker, where a text that takes too long costs its document only."""

from __future__ import annotations

from functools import cached_property

import tokenizers

from gistrag.documents.chunking import Chunk
from gistrag.documents.discovery import Document
from gistrag.documents.parser_worker import worker


class GuardedChunker:
    """Splits documents as `gistrag.documents.chunking.Chunker` does, whose arguments it takes."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, chunk_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._chunk_tokens = chunk_tokens

    @cached_property
    def _json(self) -> bytes:
        return self._tokenizer.to_str().encode()

    def split(self, document: Document) -> list[Chunk]:
        """Return the chunks of *document*, in order.

        Raises:
            DocumentError: cutting takes too much time or memory.
            ResourceError: the parser worker cannot start.
        """
        rows = worker().cut(
            document.text,
            self._json,
            chunk_tokens=self._chunk_tokens,
            kind=document.kind,
            pages=document.pages,
            parts=[part.start for part in document.parts],
        )
        texts = (document.text[row["start"] : row["end"]] for row in rows)
        return [
            Chunk(**{**row, "text": text, "heading": tuple(row["heading"])})
            for row, text in zip(rows, texts, strict=True)
        ]
