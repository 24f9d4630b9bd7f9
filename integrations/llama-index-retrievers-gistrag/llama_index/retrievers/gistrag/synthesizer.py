"""Answers from nodes, whoever retrieved them, by their gist caches.

A gist is found by what a node says, not by its id. So nodes of `GistRetriever` and nodes a pipeline compressed are
answered from the gists on disk, also after a postprocessor or another store had them in its hands; for any other node
gists are made when it is first asked about, and kept in memory.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks import CallbackManager
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]  # meant to be had there
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.synthesis import GetResponseEndEvent, GetResponseStartEvent
from llama_index.core.llms import MockLLM
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.response_synthesizers.base import QueryTextType
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from llama_index.core.types import RESPONSE_TEXT_TYPE

from gistrag import Answer, GistRAG, Options, Stream
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


@dataclass
class Told:
    """What a response gets when its answer has ended.

    Attributes:
        metadata: how far to believe the answer, see `belief`; nodes: those the texts come from, in their order.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    nodes: list[NodeWithScore] = field(default_factory=list)

    def end(self, answer: Answer) -> None:
        """Fill in what is thought of an answer, and the evidence of the node that has it."""
        self.metadata.update(belief(answer))
        nodes = dict(enumerate(self.nodes))
        for number, source in enumerate(answer.sources):
            if source.evidence and number in nodes:
                self.metadata["evidence"] |= _span(nodes[number].node, source.evidence.start, source.evidence.end)
        mark_evidence(answer, nodes, self.metadata["evidence"])


class GistSynthesizer(BaseSynthesizer):
    """Answers a question from the gist caches of nodes; the model of the index answers, no other LLM is asked.

    ``metadata["gistrag"]`` of a response says how far to believe it: ``confidence``, ``verdict``, ``unsupported``,
    ``readings`` and ``evidence``, which is the sentence that carries the answer, and lies in the metadata of its source
    node too; see `gistrag.Answer`. A response that comes piece by piece has them after its last piece.

    Args:
        rag: an open index, whose model and gists are used.
        streaming: whether responses come piece by piece.
        empty_response: the answer where there are no nodes.
        mode, max_new_tokens, temperature, seed, second_reading: how to answer, see `gistrag.Options`.

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
        second_reading: bool = True,
    ) -> None:
        require_index(rag)
        super().__init__(
            llm=MockLLM(),  # never asked; without one the base class looks for OpenAI's
            callback_manager=callback_manager or CallbackManager(),
            streaming=streaming,
            empty_response=empty_response,
        )
        self.rag = rag
        self.options = Options(
            mode=mode,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            second_reading=second_reading,
        )

    def synthesize(
        self,
        query: QueryTextType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Return the response to a question from nodes, with how far to believe it in its metadata."""
        told, nodes = _told(nodes)
        response = super().synthesize(query, nodes, additional_source_nodes, _told=told, **response_kwargs)
        return _with_belief(response, told)

    async def asynthesize(
        self,
        query: QueryTextType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Return the same to a coroutine."""
        told, nodes = _told(nodes)
        response = await super().asynthesize(query, nodes, additional_source_nodes, _told=told, **response_kwargs)
        return _with_belief(response, told)

    def get_response(self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any) -> RESPONSE_TEXT_TYPE:
        """Return the answer from texts, best first: a string, or with streaming a generator of pieces.

        Args:
            response_kwargs: options for this answer alone.
        """
        dispatcher.event(GetResponseStartEvent(query_str=query_str, text_chunks=list(text_chunks)))
        told = response_kwargs.pop("_told", None)
        pieces = _pieces(self._stream(query_str, text_chunks, response_kwargs), told)
        response = pieces if self._streaming else "".join(pieces).strip()
        dispatcher.event(GetResponseEndEvent())
        return response

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Return the same to a coroutine; every piece is computed in a thread."""
        dispatcher.event(GetResponseStartEvent(query_str=query_str, text_chunks=list(text_chunks)))
        told = response_kwargs.pop("_told", None)
        pieces = _apieces(self._stream(query_str, text_chunks, response_kwargs), told)
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
            second_reading=options.second_reading,
        )

    def _get_prompts(self) -> PromptDictType:
        return {}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        """Do nothing: gists stand behind the prompt of the index, which is part of them."""


def belief(answer: Answer) -> dict[str, Any]:
    """Return how far to believe an answer, for the metadata of a response."""
    return {
        "confidence": answer.confidence,
        "verdict": answer.verdict,
        "unsupported": list(answer.unsupported),
        "readings": answer.usage.readings,
        "evidence": asdict(answer.evidence) if answer.evidence else None,
    }


def mark_evidence(answer: Answer, nodes: Mapping[int, NodeWithScore], evidence: dict[str, Any] | None) -> None:
    """Put the evidence of an answer into the metadata of the node that has it; a model is not shown it.

    Args:
        nodes: by the number of their source; one that has metadata of this name keeps them.
        evidence: as in `belief`.
    """
    for number, source in enumerate(answer.sources):
        if source.evidence and number in nodes and "evidence" not in nodes[number].node.metadata:
            node = nodes[number].node
            node.metadata["evidence"] = evidence
            node.excluded_llm_metadata_keys = [*node.excluded_llm_metadata_keys, "evidence"]
            node.excluded_embed_metadata_keys = [*node.excluded_embed_metadata_keys, "evidence"]


def _span(node: BaseNode, start: int, end: int) -> dict[str, int | None]:
    """Return where a sentence stands, from the start of the document if the node knows its own place in it.

    Args:
        start, end: characters of what a model is shown; those of metadata stand in no text.
    """
    text = node.get_content(MetadataMode.NONE)
    above = node.get_content(MetadataMode.LLM).rfind(text.strip())
    if start < above or above < 0:
        return {"start": None, "end": None}
    shift = (getattr(node, "start_char_idx", None) or 0) + len(text) - len(text.lstrip()) - above
    return {"start": start + shift, "end": end + shift}


def _told(nodes: Sequence[NodeWithScore]) -> tuple[Told, list[NodeWithScore]]:
    """Return copies of nodes, which may get evidence, and what is to fill them in."""
    copies = [NodeWithScore(node=_without_evidence(one.node), score=one.score) for one in nodes]
    return Told(nodes=[one for one in copies if one.node.get_content(MetadataMode.LLM).strip()]), copies


def _without_evidence(node: BaseNode) -> BaseNode:
    """Return a copy of a node without the evidence of an earlier answer; what else is called so stays."""
    metadata = {
        name: value
        for name, value in node.metadata.items()
        if not (name == "evidence" and isinstance(value, dict) and "is_supported" in value)
    }
    return node.model_copy(update={"metadata": metadata})


def _with_belief(response: RESPONSE_TYPE, told: Told) -> RESPONSE_TYPE:
    if response.source_nodes:  # else nothing was asked
        response.metadata = {**(response.metadata or {}), "gistrag": told.metadata}
    return response


def _pieces(stream: Stream, told: Told | None) -> Generator[str, None, None]:
    yield from stream
    _tell(stream)
    if told:
        told.end(stream.answer)


async def _apieces(stream: Stream, told: Told | None) -> AsyncGenerator[str, None]:
    async with aclosing(aiter(stream)) as pieces:
        async for piece in pieces:
            yield piece
    _tell(stream)
    if told:
        told.end(stream.answer)


def _tell(stream: Stream) -> None:
    """Let observers know what the answer took."""
    answer = stream.answer
    dispatcher.event(GistAnswerEvent(usage=asdict(answer.usage), timings=asdict(answer.timings)))
