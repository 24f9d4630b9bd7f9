"""Answers from nodes, whoever retrieved them, by their gist caches.

A gist is found by what a node says, not by its id. So nodes of `GistRetriever` and nodes a pipeline compressed are
answered from the gists on disk, also after a postprocessor or another store had them in its hands; for any other node
gists are made when it is first asked about, and kept in memory.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any, Literal

from llama_index.core.callbacks import CallbackManager
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # meant to be had there
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.synthesis import GetResponseEndEvent, GetResponseStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.types import RESPONSE_TEXT_TYPE

from gistrag import GistRAG, Options, Stream
from gistrag.errors import UsageError
from llama_index.retrievers.gistrag.base import require_index

dispatcher = get_dispatcher(__name__)


class GistAnswerEvent(BaseEvent):
    """An answer has ended: ``usage`` and ``timings`` are the fields of `gistrag.Usage` and `gistrag.Timings`."""

    usage: dict[str, Any]
    timings: dict[str, Any]

    @classmethod
    def class_name(cls) -> str:
        """Return the name of the event."""
        return "GistAnswerEvent"


class GistSynthesizer(BaseSynthesizer):
    """Answers a question from the gist caches of nodes; the model of the index answers, no other LLM is asked.

    Args:
        rag: an open index, whose model and gists are used.
        streaming: whether responses come piece by piece.
        empty_response: the answer where there are no nodes.
        mode, max_new_tokens, temperature, seed: how to answer, see `gistrag.Options`.

    Raises:
        UsageError: no open index, or an option out of range.
    """

    def __init__(
        self,
        rag: GistRAG,
        *,
        streaming: bool = False,
        empty_response: str | None = None,
        callback_manager: CallbackManager | None = None,
        mode: Literal["gist", "text", "hybrid"] = "gist",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        require_index(rag)
        super().__init__(
            llm=MockLLM(),  # never asked; without one the base class looks for OpenAI's
            callback_manager=callback_manager or CallbackManager(),
            streaming=streaming,
            empty_response=empty_response,
        )
        self.rag = rag
        self.options = Options(mode=mode, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """Return the answer from texts, best first: a string, or with streaming a generator of pieces.

        Args:
            response_kwargs: options for this answer alone.
        """
        dispatcher.event(GetResponseStartEvent(query_str=query_str, text_chunks=list(text_chunks)))
        stream = self._stream(query_str, text_chunks, response_kwargs)
        response = _pieces(stream) if self._streaming else "".join(_pieces(stream)).strip()
        dispatcher.event(GetResponseEndEvent())
        return response

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Return the same to a coroutine; every piece is computed in a thread."""
        dispatcher.event(GetResponseStartEvent(query_str=query_str, text_chunks=list(text_chunks)))
        pieces = _apieces(self._stream(query_str, text_chunks, response_kwargs))
        response = pieces if self._streaming else "".join([piece async for piece in pieces]).strip()
        dispatcher.event(GetResponseEndEvent())
        return response

    def _stream(self, question: str, texts: Sequence[str], changes: dict[str, Any]) -> Stream:
        options = replace(self.options, **changes)
        if options.scope is not None or options.filters:
            raise UsageError("scope and filters choose among the chunks of the index, but the texts are given")
        return self.rag.stream_from(
            question,
            texts,
            mode=options.mode,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
        )

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        """Do nothing: gists stand behind the prompt of the index, which is part of them."""


def _pieces(stream: Stream) -> Generator[str, None, None]:
    yield from stream
    _tell(stream)


async def _apieces(stream: Stream) -> AsyncGenerator[str, None]:
    async with aclosing(aiter(stream)) as pieces:
        async for piece in pieces:
            yield piece
    _tell(stream)


def _tell(stream: Stream) -> None:
    """Let observers know what the answer took."""
    answer = stream.answer
    dispatcher.event(GistAnswerEvent(usage=asdict(answer.usage), timings=asdict(answer.timings)))
