"""One reading of a question behind passages, and what is thought of the answer it gave.

A `Reading` generates. A `Judgement` says which sentence carries the answer, how sure it is and what is shown of it; a
`Judge` makes it, and says which of several counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from gistrag.answering.answer import Evidence, Options, Verdict
from gistrag.answering.assemble import assemble_steps
from gistrag.answering.confidence import Calibration, Similarity, signals
from gistrag.answering.evidence import Candidate, Head, candidates
from gistrag.answering.passages import Passage
from gistrag.answering.wording import alike, stands_in, unsupported
from gistrag.documents.headings import heading_at
from gistrag.model.generation import HALF_LETTER, generate_steps
from gistrag.model.runtime import AnyRuntime, Trace
from gistrag.qa.phrases import PHRASES, REFUSAL, Language, phrase
from gistrag.settings import Layout

TELLING_CHARACTERS = 8
"""So much of an answer tells whether it is a refusal."""


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

    def steps(self, options: Options, *, assembled: Callable[[], None] = lambda: None) -> Iterator[int | None]:
        """Yield the tokens of the answer, and None between pieces of what is read before it.

        Args:
            assembled: called when the memory is.
        """
        contents = [passage.content for passage in self.passages]
        memory = yield from assemble_steps(self.runtime, contents, layout=self.layout)
        assembled()
        for token in generate_steps(
            self.runtime,
            memory,
            self.runtime.encode_question(self.question),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            trace=self.trace if self.trace.layers else None,  # only a calibration reads it, and that has heads
        ):
            if token is not None:
                self.tokens.append(token)
            yield token

    @property
    def text(self) -> str:
        """The answer so far, without a last letter whose bytes are incomplete."""
        return self.runtime.decode(self.tokens).replace(HALF_LETTER, "").strip()

    @property
    def refuses(self) -> bool:
        """Whether the answer has begun as a refusal does."""
        text = self.text
        return len(text) >= TELLING_CHARACTERS and REFUSAL.startswith(text)

    def candidates(self, heads: Sequence[Head], *, about: str = "") -> list[Candidate]:
        """Return the sentences of the passages, the likeliest evidence first.

        Args:
            about: the question in full, where it is a follow-up.
        """
        return candidates(self.runtime, about or self.question, self.text, self.passages, self.trace, heads)

    def signals(self, found: Sequence[Candidate], similarity: Similarity) -> dict[str, float]:
        """Return what tells a right answer from a wrong one, see `gistrag.answering.confidence.signals`."""
        opening = self.runtime.encode(REFUSAL)[0]
        return signals(self.trace, found, self.passages, similarity, refusal=opening)


@dataclass(frozen=True)
class Judgement:
    """What is thought of an answer.

    Attributes:
        text: the answer as the model gave it; tokens: how many it has.
        evidence: the sentence that carries it; passage: the one with that sentence; None where none does.
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
    def withheld(self) -> str:
        """The answer where it is probably wrong and a refusal is shown instead, else ""."""
        return self.text if self.verdict == "not found" and not is_refusal(self.text) else ""

    def shown(self, language: Language) -> str:
        """Return the answer as it is shown: withheld if it is probably wrong, a refusal in the language of people."""
        return phrase("refusal", language) if self.withheld or is_trained_refusal(self.text) else self.text

    @property
    def as_shown(self) -> Judgement:
        """The judgement of an answer that was shown while it was generated, and cannot be withheld any more."""
        return replace(self, verdict="unsure") if self.withheld else self


@dataclass(frozen=True)
class Judge:
    """Says what is thought of the answers to one question.

    Attributes:
        calibration: of the adapter; None finds evidence by words alone, and is never sure.
        question: as it was searched, with what it leans on; similarity: of texts to it.
    """

    calibration: Calibration | None
    question: str
    similarity: Similarity

    @property
    def layers(self) -> Sequence[int]:
        """Layers whose attention a trace has to record."""
        return self.calibration.layers if self.calibration else ()

    def of(self, reading: Reading) -> Judgement:
        """Return what is thought of the answer that a reading gave."""
        text, passages = reading.text, reading.passages
        found = reading.candidates(self.calibration.heads if self.calibration else (), about=self.question)
        missing = unsupported(text, (passage.text for passage in passages))
        passage = passages[found[0].passage] if found else None
        evidence = _evidence(passage, found[0], missing) if passage else None
        judgement = Judgement(text, len(reading.tokens), passage, evidence, unsupported=missing)
        if reading.refuses or is_refusal(text):
            return replace(judgement, confidence=0.0 if self.calibration else None, verdict="not found")
        if self.calibration is None:
            return judgement
        confidence = self.calibration.confidence(reading.signals(found, self.similarity))
        return with_confidence(judgement, confidence, self.calibration)

    def is_doubtful(self, judgement: Judgement) -> bool:
        """Return whether the passages should be read again."""
        return self.calibration is not None and (judgement.confidence or 0.0) < self.calibration.doubtful

    def best(self, judgements: Sequence[Judgement]) -> Judgement:
        """Return the most confident judgement, its confidence from all of them; the first one of equals."""
        best = max(judgements, key=lambda one: one.confidence or 0.0)
        if not best.confidence or len(judgements) < 2 or self.calibration is None:
            return best
        agreement = agreeing(best.text, [one.text for one in judgements if one is not best])
        return with_confidence(best, self.calibration.combined(best.confidence, agreement), self.calibration)


def agreeing(answer: str, others: Sequence[str]) -> float:
    """Return the share of other answers that have the same words.

    >>> agreeing("20 days", ["the 20 days", "25 days"])
    0.5
    """
    return sum(alike(one, answer) for one in others) / len(others)


def is_refusal(text: str) -> bool:
    """Return whether an answer says, in English or Korean, that the passages do not say."""
    return not text or any(stands_in(one, text) for one in PHRASES["refusal"])


def is_trained_refusal(text: str) -> bool:
    """Return whether an answer is what adapters are trained to refuse with, and nothing else."""
    return text.strip() == REFUSAL


def with_confidence(judgement: Judgement, confidence: float, calibration: Calibration) -> Judgement:
    """Return a judgement of an answer that is no refusal; what stands in no passage is never shown as sure."""
    verdict = calibration.verdict(confidence)
    if judgement.unsupported and verdict == "answered":
        verdict = "unsure"
    return replace(judgement, confidence=confidence, verdict=verdict)


def _evidence(passage: Passage, best: Candidate, missing: Sequence[str]) -> Evidence:
    start, end = best.span
    return Evidence(
        start=passage.source.start + start,
        end=passage.source.start + end,
        text=best.text,
        heading=heading_at(passage.text, passage.source.heading, start),
        page=passage.source.page,
        is_supported=best.answer == 1.0 and not missing,
    )
