"""An answer in the making: passages to memory to tokens, a piece of text at a time.

A `Stream` works when it is iterated over, and records what the answer took: sources, seconds and tokens.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from gistrag.answering.answer import Answer, Options, Timings, Usage
from gistrag.answering.assemble import assemble
from gistrag.answering.passages import Passage, fit, in_prompt_order
from gistrag.errors import ResourceError, UsageError
from gistrag.kv.packed import Gists
from gistrag.model.generation import decode_stream, generate
from gistrag.model.runtime import AnyRuntime

Find = Callable[[str, Options, Usage, Timings], list[Passage]]
"""Finds the passages of a question, best first, and records what that took."""


class Stream(Iterator[str]):
    """An answer in the making: iterate over its pieces of text; the first ``next`` takes the time to first token.

    ``async for`` yields the same pieces, each computed in a thread.

    Args:
        find: finds the passages; nothing: the answer where it finds none.
        during: what is entered while the answer is in the making.

    Raises:
        UsageError: an empty question, or one that is not a text.
    """

    def __init__(
        self,
        runtime: AnyRuntime,
        question: str,
        options: Options,
        *,
        find: Find,
        nothing: Callable[[], str],
        during: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        if not isinstance(question, str):
            raise UsageError(f"expected a question in words, got {type(question).__name__}")
        if not question.strip():
            raise UsageError("the question is empty; ask something")
        self._runtime, self._options, self._find, self._nothing = runtime, options, find, nothing
        self._during = during
        self._question = question.encode("utf-8", "replace").decode()  # a terminal may pass half a character
        self._usage, self._timings = Usage(), Timings()
        self._passages: list[Passage] = []
        self._text = ""
        self._pieces = self._run()
        self._lock = threading.Lock()  # one thread may ask for a piece while another closes

    def __next__(self) -> str:
        with self._lock:
            piece = next(self._pieces)
            self._text += piece
        return piece

    async def __aiter__(self) -> AsyncGenerator[str]:
        """Yield the pieces to a coroutine; the event loop runs on meanwhile, and leaving the loop ends the work."""
        try:
            while (piece := await asyncio.to_thread(next, self, None)) is not None:
                yield piece
        finally:
            await asyncio.to_thread(self.close)

    @property
    def answer(self) -> Answer:
        """A snapshot of the answer so far: sources from the first piece on, everything after the last."""
        sources = tuple(passage.source for passage in self._passages)
        return Answer(self._text.strip(), sources, replace(self._timings), replace(self._usage))

    def result(self) -> Answer:
        """Generate what is left and return the whole answer."""
        for _ in self:
            pass
        return self.answer

    def close(self) -> None:
        """End the work; nothing is computed afterwards."""
        with self._lock:
            self._pieces.close()

    def _run(self) -> Generator[str]:
        started_s = time.perf_counter()
        with self._during():
            for piece in self._answer():
                self._clock(started_s)
                yield piece
        self._clock(started_s)  # an answer may be empty

    def _clock(self, started_s: float) -> None:
        self._timings.total_s = time.perf_counter() - started_s
        self._timings.ttft_s = self._timings.ttft_s or self._timings.total_s

    def _answer(self) -> Iterator[str]:
        """Yield the answer piece by piece: find passages, fit them into the context window, assemble, generate."""
        question = self._runtime.encode_question(self._question)
        self._usage.question_tokens = len(question)
        found = self._find(self._question, self._options, self._usage, self._timings)
        self._passages = fit(
            found,
            self._runtime,
            question_tokens=len(question),
            max_new_tokens=self._options.max_new_tokens,
            usage=self._usage,
        )
        if self._passages:
            yield from self._generated(question)
        else:
            yield self._nothing()

    def _generated(self, question: list[int]) -> Iterator[str]:
        """Yield what the model generates; where memory runs out before the first piece, retry with half the chunks.

        Raises:
            ResourceError: memory does not suffice for those either, or ran out later.
        """
        for is_last_try in (len(self._passages) < 2, True):
            try:
                yield from decode_stream(self._runtime, self._tokens(question))
                return
            except self._runtime.out_of_memory as error:
                if is_last_try or self._text:
                    raise ResourceError(
                        f"not enough memory on {self._runtime.device_name} to answer from {len(self._passages)} chunks "
                        f"({error}); free some, or ask for fewer chunks"
                    ) from error
            dropped = len(self._passages) // 2
            self._passages = self._passages[: len(self._passages) - dropped]
            self._usage.dropped_chunks += dropped

    def _tokens(self, question: list[int]) -> Iterator[int]:
        """Yield the tokens of the answer from a memory of all passages."""
        ordered = in_prompt_order(self._passages, is_whole_document=self._options.scope is not None)
        contents = [passage.content for passage in ordered]
        caches = [content for content in contents if isinstance(content, Gists)]
        self._usage.gist_slots = sum(cache.gists for cache in caches)
        self._usage.source_tokens = sum(cache.source_tokens for cache in caches)
        self._usage.text_tokens = sum(len(content) for content in contents if not isinstance(content, Gists))
        with self._timings.measure("assemble_s"):
            memory = assemble(self._runtime, contents, layout=self._usage.layout)
        options = self._options
        tokens = generate(
            self._runtime,
            memory,
            question,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
        )
        for count, token in enumerate(tokens, 1):
            self._usage.answer_tokens = count
            yield token
