"""An answer in the making: passages to memory to tokens, a piece of text at a time.

A `Stream` works when it is iterated over, and records what the answer took: sources, seconds and tokens. Every part
of it that yields pieces of text also yields "" after each step of work that shows nothing, so that whoever takes the
steps may end the work there or do some other.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from gistrag.answering.answer import Answer, Options, Timings, Usage
from gistrag.answering.judge import Judge, Judgement, Reading, is_trained_refusal
from gistrag.answering.passages import Passage, fit, in_prompt_order
from gistrag.documents.text import nfc
from gistrag.errors import ResourceError
from gistrag.kv.packed import Gists
from gistrag.model.generation import decode_stream
from gistrag.model.runtime import AnyRuntime, Trace
from gistrag.qa.phrases import REFUSAL, Phrase, language_of, phrase
from gistrag.settings import require_question

SHORT_TOKENS = 12
"""An answer of at most so many tokens is judged before it is shown, and may be read again; a longer one is streamed."""
AGAIN_PASSAGES, AGAIN_TOKENS, AGAIN_S = 2, 48, 2.0
"""The second reading: passages that are read alone, tokens of an answer that counts at most, and seconds after which
none begins."""


@dataclass(frozen=True)
class Found:
    """What a question is answered from.

    Attributes:
        passages: best first.
        searched: the question as it was searched, empty where nothing was.
        answer: the answer itself, where no model has to write it.
    """

    passages: list[Passage]
    searched: str = ""
    answer: str | None = None


Find = Callable[[str, Options, Usage, Timings], Found]
"""Finds what a question is answered from, and records what that took."""


class Stream(Iterator[str]):
    """An answer in the making: iterate over its pieces of text; the first ``next`` takes the time to first token.

    ``async for`` yields the same pieces, each computed in a thread.

    Args:
        find: finds the passages; nothing: names the answer where it finds none.
        during: what is entered while the answer is in the making.
        judge: returns what judges the answers to a question, given what was searched for it.

    Raises:
        UsageError: no question that `require_question` takes.
    """

    def __init__(
        self,
        runtime: AnyRuntime,
        question: str,
        options: Options,
        *,
        find: Find,
        nothing: Callable[[], Phrase],
        during: Callable[[], AbstractContextManager[None]] = nullcontext,
        judge: Callable[[str], Judge],
    ) -> None:
        self._runtime, self._options, self._find, self._nothing = runtime, options, find, nothing
        self._during, self._judge_of = during, judge
        self._question = nfc(require_question(question))
        self._language = language_of(self._question)
        self._usage, self._timings = Usage(), Timings()
        self._passages: list[Passage] = []
        self._text = self._searched = ""
        self._away_s = 0.0
        self._judgement = Judgement("", 0)
        self._pieces = self._run()
        self._lock = threading.Lock()  # one thread may ask for a piece while another closes

    def __next__(self) -> str:
        return next(piece for piece in self.steps() if piece)

    def steps(self) -> Iterator[str]:
        """Yield the pieces, and "" after each step of work that shows nothing: one token, or a piece of text read."""
        while True:
            with self._lock:
                piece = next(self._pieces, None)
                self._text += piece or ""
            if piece is None:
                return
            yield piece

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
        judgement = self._judgement
        sources = tuple(
            replace(one.source, evidence=judgement.evidence) if one is judgement.passage else one.source
            for one in self._passages
        )
        return Answer(
            self._text.strip(),
            sources,
            replace(self._timings),
            replace(self._usage),
            judgement.confidence,
            judgement.verdict,
            judgement.unsupported,
            self._searched,
            judgement.withheld,
            self._language,
        )

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
                self._clock(started_s, has_begun=bool(piece))
                left_s = time.perf_counter()
                yield piece
                self._away_s += time.perf_counter() - left_s
        self._clock(started_s, has_begun=True)  # an answer may be empty

    def _clock(self, started_s: float, *, has_begun: bool) -> None:
        self._timings.total_s = time.perf_counter() - started_s
        if has_begun:
            self._timings.ttft_s = self._timings.ttft_s or self._timings.total_s

    def _worked_s(self) -> float:
        """Return seconds from some moment on in which this answer was worked on, not another."""
        return time.perf_counter() - self._away_s

    def _answer(self) -> Iterator[str]:
        """Yield the answer piece by piece: find passages, fit them into the context window, read, judge."""
        question = self._runtime.encode_question(self._question)
        found = self._find(self._question, self._options, self._usage, self._timings)
        self._searched = found.searched
        if found.answer is not None:
            self._passages = found.passages
            yield found.answer
            return
        yield ""
        self._usage.question_tokens = len(question)
        self._passages = fit(
            found.passages,
            self._runtime,
            question_tokens=len(question),
            max_new_tokens=self._options.max_new_tokens,
            usage=self._usage,
        )
        if self._passages:
            yield from self._judged(self._judge_of(self._searched or self._question))
        else:
            yield phrase(self._nothing(), self._language)

    def _judged(self, judge: Judge) -> Iterator[str]:
        """Yield what the model generates; a short answer once it is judged, and read again where it is unsure.

        Without a calibration nothing would come of waiting.
        """
        held, is_shown = "", judge.calibration is None
        for piece in self._generated(judge.layers):
            held += piece
            is_shown = is_shown or len(self._reading.tokens) > SHORT_TOKENS
            if is_shown and not self._may_translate(held):
                yield held
                held = ""
            else:
                yield ""
        self._judgement = judge.of(self._reading)
        if is_shown or len(self._reading.tokens) > SHORT_TOKENS:  # the last tokens may have no text
            self._judgement = self._judgement.as_shown
            if held:
                yield phrase("refusal", self._language) if is_trained_refusal(held) else held
            return
        if self._options.second_reading and judge.is_doubtful(self._judgement):
            others = yield from self._read_again(judge)
            self._judgement = judge.best([self._judgement, *others])
            self._usage.answer_tokens = self._judgement.tokens
        yield self._judgement.shown(self._language)

    def _may_translate(self, held: str) -> bool:
        """Return whether the beginning of an answer may become a refusal that is shown in another language."""
        return self._language != "en" and REFUSAL.startswith(held.strip())

    def _read_again(self, judge: Judge) -> Generator[str, None, list[Judgement]]:
        """Return what is thought of the answers from the best passages, each alone, within a time limit."""
        found: list[Judgement] = []
        until_s = self._worked_s() + AGAIN_S
        for passage in self._passages[:AGAIN_PASSAGES] if len(self._passages) > 1 else ():
            if self._worked_s() < until_s:
                reading = self._reading_of([passage], judge.layers)
                for _ in reading.steps(self._options):
                    if reading.refuses or len(reading.tokens) > AGAIN_TOKENS:
                        break
                    yield ""
                if len(reading.tokens) <= AGAIN_TOKENS:
                    found.append(judge.of(reading))
        return found

    def _generated(self, layers: Sequence[int]) -> Iterator[str]:
        """Yield what the model generates; where memory runs out before the first piece, retry with half the chunks.

        Raises:
            ResourceError: memory does not suffice for those either, or ran out later.
        """
        for is_last_try in (len(self._passages) < 2, True):
            is_whole_document = self._options.scope is not None
            ordered = in_prompt_order(self._passages, is_whole_document=is_whole_document)
            self._reading = self._reading_of(ordered, layers)
            try:
                yield from decode_stream(self._runtime, self._tokens(self._reading))
                return
            except self._runtime.out_of_memory as error:
                if is_last_try or self._reading.tokens:
                    raise ResourceError(
                        f"not enough memory on {self._runtime.device_name} to answer from {len(self._passages)} chunks "
                        f"({error}); free some, or ask for fewer chunks"
                    ) from error
            dropped = len(self._passages) // 2
            self._passages = self._passages[: len(self._passages) - dropped]
            self._usage.dropped_chunks += dropped

    def _reading_of(self, passages: Sequence[Passage], layers: Sequence[int]) -> Reading:
        """Return a reading of the question behind passages, in the order of the prompt."""
        self._usage.readings += 1
        return Reading(self._runtime, self._question, passages, self._usage.layout, Trace(layers))

    def _tokens(self, reading: Reading) -> Iterator[int | None]:
        """Yield the tokens of the answer and None for other steps, and count what it is made from."""
        contents = [passage.content for passage in reading.passages]
        caches = [content for content in contents if isinstance(content, Gists)]
        self._usage.gist_slots = sum(cache.gists for cache in caches)
        self._usage.source_tokens = sum(cache.source_tokens for cache in caches)
        self._usage.text_tokens = sum(len(content) for content in contents if not isinstance(content, Gists))
        began_s = time.perf_counter()

        def assembled() -> None:
            self._timings.assemble_s = time.perf_counter() - began_s

        for token in reading.steps(self._options, assembled=assembled):
            self._usage.answer_tokens = len(reading.tokens)
            yield token
