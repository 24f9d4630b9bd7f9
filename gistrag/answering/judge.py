"""One reading of a question behind passages, and what is thought of the answer it gave.

A `Reading` generates; a `Judgement` says which sentence carries the answer, how sure it is and what is shown of it.
Which of several judgements counts is decided in `gistrag.answering.stream`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from gistrag.answering.answer import Evidence, Options, Verdict
from gistrag.answering.assemble import assemble
from gistrag.answering.confidence import Calibration, signals
from gistrag.answering.evidence import Candidate, candidates
from gistrag.answering.passages import Passage
from gistrag.answering.wording import stands_in, unsupported
from gistrag.documents.headings import heading_at
from gistrag.model.generation import generate
from gistrag.model.prompt import REFUSAL
from gistrag.model.runtime import AnyRuntime, Trace
from gistrag.settings import Layout


@dataclass
class Reading:
    """A question read behind passages, and the tokens of the answer.

    Attributes:
        passages: in the order of the prompt; layout: of their gists.
        trace: of the answer; tokens: of the answer, so far.
    """

    runtime: AnyRuntime
    question: str
    passages: Sequence[Passage]
    layout: Layout
    trace: Trace
    tokens: list[int] = field(default_factory=list)

    def generate(self, options: Options, *, assembled: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Yield the tokens of the answer; *assembled* is called when the memory is."""
        contents = [passage.content for passage in self.passages]
        memory = assemble(self.runtime, contents, layout=self.layout)
        assembled()
        for token in generate(
            self.runtime,
            memory,
            self.runtime.encode_question(self.question),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            trace=self.trace,
        ):
            self.tokens.append(token)
            yield token

    @property
    def text(self) -> str:
        """The answer so far."""
        return self.runtime.decode(self.tokens).strip()


@dataclass(frozen=True)
class Judgement:
    """What is thought of an answer.

    Attributes:
        text: the answer as the model gave it; tokens: how many it has.
        passage, evidence: the sentence that carries it, and the passage with that; None where none does.
        confidence: how likely it is right, 0 to 1, None without a calibration.
        verdict: what it is shown as.
        unsupported: its numbers and names that stand in no passage.
    """

    text: str
    tokens: int
    passage: Passage | None = None
    evidence: Evidence | None = None
    confidence: float | None = None
    verdict: Verdict | None = None
    unsupported: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The answer as it is shown: one that is probably wrong is withheld."""
        return REFUSAL if self.verdict == "not found" else self.text


def judged(reading: Reading, calibration: Calibration | None) -> Judgement:
    """Return what is thought of the answer that a reading gave."""
    text, passages = reading.text, reading.passages
    heads = calibration.heads if calibration else ()
    found = candidates(reading.runtime, reading.question, text, passages, reading.trace, heads)
    best = found[0] if found else None
    missing = unsupported(text, (passage.text for passage in passages))
    is_refusal = stands_in(REFUSAL, text) or not text
    confidence: float | None = None
    verdict: Verdict | None = "not found" if is_refusal else None
    if calibration:
        opening = reading.runtime.encode(f" {REFUSAL}")[0]
        confidence = 0.0 if is_refusal else calibration.confidence(signals(reading.trace, found, opening))
        verdict = verdict or calibration.verdict(confidence)
        if missing and verdict == "answered":
            verdict = "unsure"
    passage = passages[best.passage] if best else None
    return Judgement(
        text, len(reading.tokens), passage, _evidence(passage, best, missing), confidence, verdict, missing
    )


def _evidence(passage: Passage | None, best: Candidate | None, missing: Sequence[str]) -> Evidence | None:
    if passage is None or best is None:
        return None
    start, end = best.span
    return Evidence(
        start=passage.source.start + start,
        end=passage.source.start + end,
        text=best.text,
        heading=heading_at(passage.text, passage.source.heading, start),
        page=passage.source.page,
        is_supported=best.answer == 1.0 and not missing,
    )
