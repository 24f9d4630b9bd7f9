"""A conversation over an index: `GistRAG.stream` with the questions so far, as LlamaIndex's chat engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole
from llama_index.core.chat_engine.types import AgentChatResponse, BaseChatEngine, StreamingAgentChatResponse
from llama_index.core.schema import NodeWithScore

from gistrag import Answer, GistRAG, Options, Stream
from llama_index.retrievers.gistrag.base import GistRetriever, require_index
from llama_index.retrievers.gistrag.synthesizer import _tell, belief, mark_evidence


class GistChatEngine(BaseChatEngine):
    """Answers the questions of a conversation from an index; no other LLM is asked.

    A question that leans on earlier ones, such as "And in Zurich?", is searched together with them. The metadata of a
    response say what was ``searched``, and how sure the answer is: ``confidence``, ``verdict``, ``evidence``.

    Args:
        rag: an open index.
        similarity_top_k: chunks to answer from.
        filters, scope, options: see `gistrag.Options`.
        chat_history: messages of a conversation to go on with; only those of the user count.

    Raises:
        UsageError: no open index, or an option out of range.
    """

    def __init__(
        self,
        rag: GistRAG,
        *,
        similarity_top_k: int = 3,
        filters: Mapping[str, str] | None = None,
        scope: str | None = None,
        chat_history: Sequence[ChatMessage] = (),
        **options: Any,
    ) -> None:
        require_index(rag)
        self.rag = rag
        self.options = Options(top_k=similarity_top_k, filters=filters, scope=scope, **options)
        self._history = list(chat_history)
        self._retriever = GistRetriever(rag)

    @property
    def chat_history(self) -> list[ChatMessage]:
        """The messages so far, oldest first."""
        return list(self._history)

    def reset(self) -> None:
        """Forget the conversation."""
        self._history.clear()

    def chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Return the answer to a message.

        Args:
            chat_history: messages that take the place of those so far.
        """
        stream = self._asked(message, chat_history)
        answer = stream.result()
        self._end(stream)
        return AgentChatResponse(answer.text, source_nodes=self._nodes(answer), metadata=_metadata(answer))

    async def achat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Return the same to a coroutine; the work is done in a thread."""
        return await asyncio.to_thread(self.chat, message, chat_history)

    def stream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> StreamingAgentChatResponse:
        """Return the answer piece by piece, when its first piece and its source nodes are there.

        The answer joins the history when its last piece was taken.
        """
        stream = self._asked(message, chat_history)
        pieces = self._pieces(next(stream, ""), stream)
        return StreamingAgentChatResponse(
            chat_stream=pieces, source_nodes=self._nodes(stream.answer), is_writing_to_memory=False
        )

    async def astream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        """Return the same to a coroutine; every piece is computed in a thread."""
        stream = self._asked(message, chat_history)
        first = await asyncio.to_thread(next, stream, "")
        nodes = await asyncio.to_thread(self._nodes, stream.answer)
        return StreamingAgentChatResponse(
            achat_stream=self._apieces(first, stream), source_nodes=nodes, is_writing_to_memory=False
        )

    def _asked(self, message: str, chat_history: list[ChatMessage] | None) -> Stream:
        """Return the answer to a message in the making; a refused message leaves the history as it was."""
        before = self._history if chat_history is None else list(chat_history)
        asked = [one.content or "" for one in before if one.role == MessageRole.USER]
        stream = self.rag.stream(message, **{**vars(self.options), "history": asked})
        self._history = [*before, ChatMessage(content=message, role=MessageRole.USER)]
        return stream

    def _pieces(self, first: str, stream: Stream) -> Generator[ChatResponse, None, None]:
        yield _response(first)
        for piece in stream:
            yield _response(piece)
        self._end(stream)

    async def _apieces(self, first: str, stream: Stream) -> AsyncGenerator[ChatResponse, None]:
        yield _response(first)
        async with aclosing(aiter(stream)) as pieces:
            async for piece in pieces:
                yield _response(piece)
        self._end(stream)

    def _end(self, stream: Stream) -> None:
        said = ChatMessage(
            content=stream.answer.text, role=MessageRole.ASSISTANT, additional_kwargs=_metadata(stream.answer)
        )
        self._history.append(said)
        _tell(stream)

    def _nodes(self, answer: Answer) -> list[NodeWithScore]:
        scores = {source.chunk_id: source.score for source in answer.sources}
        chunks = self.rag.chunks(list(scores))
        nodes = self._retriever._nodes(chunks)
        found = [NodeWithScore(node=node, score=scores[chunk.id]) for node, chunk in zip(nodes, chunks, strict=True)]
        numbers = {source.chunk_id: number for number, source in enumerate(answer.sources)}
        by_number = {numbers[chunk.id]: node for node, chunk in zip(found, chunks, strict=True)}
        mark_evidence(answer, by_number, belief(answer)["evidence"])
        return found


def _response(piece: str) -> ChatResponse:
    return ChatResponse(message=ChatMessage(content=piece, role=MessageRole.ASSISTANT), delta=piece)


def _metadata(answer: Answer) -> dict[str, Any]:
    """Return what was searched, and how far to believe the answer."""
    return {"searched": answer.searched, **belief(answer)}
