"""A question in, an answer with its sources out; whole, in pieces, or many.

The answer comes from the gist caches of the documents. Those of the index are on disk. Where another retriever finds
the documents, a gist is known by what its document says; for one that is in no index gists are made when it is first
asked about, and kept in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from dataclasses import asdict, replace
from typing import Any

from gistrag import Answer, GistRAG, Options, Stream
from gistrag.errors import UsageError
from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import AddableDict, RunnableConfig, RunnableSerializable
from pydantic import ConfigDict, Field

from langchain_gistrag.retrievers import document, passage

Reply = dict[str, Any]
Config = RunnableConfig | list[RunnableConfig] | None


class GistRAGRunnable(RunnableSerializable[str, Reply]):
    """Answers questions over an index: ``{"question": …, "context": [documents], "answer": …}``.

    A reply also says how far to believe it: ``confidence``, ``verdict``, ``unsupported`` and ``evidence``, which is the
    sentence that carries the answer, and lies in the metadata of its document too; see `gistrag.Answer`.

    A stream begins with question, context and the first piece of the answer, and ends with how far to believe it; its
    chunks add up to the whole. One model answers, so the questions of a batch take turns unless ``max_concurrency``
    says otherwise.

    >>> answers = GistRAGRunnable(rag=GistRAG.open("index/"))               # doctest: +SKIP
    >>> answers.invoke("How many bytes does a slot take?")["answer"]        # doctest: +SKIP

    Attributes:
        rag: an open index.
        options: how to answer. Single ones may be given to ``invoke`` and to ``bind``: ``max_new_tokens=20``.
        retriever: finds the documents to answer from; by default the index itself.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    rag: GistRAG
    options: Options = Field(default_factory=Options)
    retriever: BaseRetriever | None = None

    def invoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> Reply:
        """Return the answer to a question with its sources.

        Raises:
            UsageError: not a question in words, or an option out of range.
        """
        return self._call_with_config(self._answer, input, config, **kwargs)

    async def ainvoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> Reply:
        """Return the same to a coroutine; every piece is computed in a thread."""
        return await self._acall_with_config(self._aanswer, input, config, **kwargs)

    def stream(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Reply]:
        """Yield the answer in chunks that add up to it."""
        yield from self._transform_stream_with_config(iter([input]), self._chunks, config, **kwargs)

    async def astream(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Reply]:
        """Yield the same to a coroutine; every piece is computed in a thread."""
        async for chunk in self._atransform_stream_with_config(_only(input), self._achunks, config, **kwargs):
            yield chunk

    def batch(
        self, inputs: list[str], config: Config = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Reply]:
        """Return the answers to many questions, in their order."""
        return super().batch(inputs, _in_turn(config), return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self, inputs: list[str], config: Config = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Reply]:
        """Return the same to a coroutine."""
        return await super().abatch(inputs, _in_turn(config), return_exceptions=return_exceptions, **kwargs)

    def _answer(
        self, question: str, run_manager: CallbackManagerForChainRun, config: RunnableConfig, **changes: Any
    ) -> Reply:
        return _joined(list(self._chunks(iter([question]), run_manager, config, **changes)))

    async def _aanswer(
        self, question: str, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig, **changes: Any
    ) -> Reply:
        return _joined([chunk async for chunk in self._achunks(_only(question), run_manager, config, **changes)])

    def _chunks(
        self, questions: Iterator[str], run_manager: CallbackManagerForChainRun, config: RunnableConfig, **changes: Any
    ) -> Generator[AddableDict]:
        question = next(questions)
        found = self.retriever.invoke(question, config) if self.retriever else None
        with closing(self._stream(question, found, changes)) as stream:
            first = next(stream, "")
            context = self._context(stream.answer, found)
            yield AddableDict(question=question, context=list(context.values()), answer=first)
            for piece in stream:
                yield AddableDict(answer=piece)
            yield _belief(stream.answer, context, were_found=found is not None)

    async def _achunks(
        self,
        questions: AsyncIterator[str],
        run_manager: AsyncCallbackManagerForChainRun,
        config: RunnableConfig,
        **changes: Any,
    ) -> AsyncGenerator[AddableDict]:
        question = await anext(questions)
        found = await self.retriever.ainvoke(question, config) if self.retriever else None
        stream = self._stream(question, found, changes)
        async with aclosing(aiter(stream)) as pieces:
            first = await anext(pieces, "")
            context = await asyncio.to_thread(self._context, stream.answer, found)
            yield AddableDict(question=question, context=list(context.values()), answer=first)
            async for piece in pieces:
                yield AddableDict(answer=piece)
            yield _belief(stream.answer, context, were_found=found is not None)

    def _stream(self, question: str, found: Sequence[Document] | None, changes: dict[str, Any]) -> Stream:
        if not isinstance(question, str):
            raise UsageError(
                f"expected a question in words, got {type(question).__name__}; in a chain put "
                'itemgetter("question") before'
            )
        options = replace(self.options, **changes)
        if found is None:
            return self.rag.stream(question, **vars(options))
        if options.scope is not None or options.filters:
            raise UsageError("scope and filters choose among the chunks of the index, but the texts are given")
        return self.rag.stream_from(
            question,
            [passage(one) for one in found],
            mode=options.mode,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            second_reading=options.second_reading,
        )

    def _context(self, answer: Answer, found: Sequence[Document] | None) -> dict[int, Document]:
        """Return documents by the number of their source: of those that were found as many as fit, or its chunks."""
        if found is not None:
            fitting = [one for one in found if passage(one)][: len(answer.sources)]
            return {at: _without_evidence(one) for at, one in enumerate(fitting)}
        numbers = {source.chunk_id: at for at, source in enumerate(answer.sources)}
        chunks = self.rag.chunks(list(numbers))
        return {numbers[one.id]: document(self.rag, one, answer.sources[numbers[one.id]].score) for one in chunks}


async def _only(question: str) -> AsyncIterator[str]:
    yield question


def _belief(answer: Answer, context: dict[int, Document], *, were_found: bool) -> AddableDict:
    """Return how far to believe an answer, and put its evidence into the metadata of the document that has it.

    Args:
        were_found: whether the documents were given to the index, which then counts characters of what it was given.
    """
    evidence = asdict(answer.evidence) if answer.evidence else None
    for number, source in enumerate(answer.sources):
        if evidence and source.evidence and number in context:
            one = context[number]
            if were_found:
                evidence |= _span(one, evidence["start"], evidence["end"])
            one.metadata.setdefault("evidence", evidence)
    return AddableDict(
        answer="",
        confidence=answer.confidence,
        verdict=answer.verdict,
        unsupported=list(answer.unsupported),
        evidence=evidence,
    )


def _span(document: Document, start: int, end: int) -> dict[str, int | None]:
    """Return where a sentence stands, from the start of the file if the document knows its own place in it.

    Args:
        start, end: characters of what a model is shown; those of the heading stand in no content.
    """
    content, begin = document.page_content, document.metadata.get("start_index", 0)
    above = len(passage(document)) - len(content.strip())
    if start < above:
        return {"start": None, "end": None}
    shift = (begin if isinstance(begin, int) else 0) + len(content) - len(content.lstrip()) - above
    return {"start": start + shift, "end": end + shift}


def _without_evidence(document: Document) -> Document:
    """Return a copy of a document without the evidence of an earlier reply; what else is called so stays."""
    metadata = {
        name: value
        for name, value in document.metadata.items()
        if not (name == "evidence" and isinstance(value, dict) and "is_supported" in value)
    }
    return document.model_copy(update={"metadata": metadata})


def _joined(chunks: Sequence[AddableDict]) -> Reply:
    """Return the chunks of an answer as one."""
    return {**chunks[0], **chunks[-1], "answer": "".join(chunk["answer"] for chunk in chunks).strip()}


def _in_turn(config: Config) -> Config:
    """Return a configuration by which questions are answered one after the other, unless it says otherwise."""
    if isinstance(config, list):
        return [{"max_concurrency": 1, **one} for one in config]
    return {"max_concurrency": 1, **(config or {})}
