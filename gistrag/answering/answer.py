"""The values of one answer: how it was asked for, its sources, its timings and its counts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

from gistrag.errors import UsageError
from gistrag.index.metadata import require_known
from gistrag.qa.phrases import Language
from gistrag.settings import NEW_TOKENS_MAX, SEED_MAX, TOP_K_MAX, Layout, Mode, require_between


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to answer a question.

    Attributes:
        top_k: chunks to answer from.
        mode: ``gist`` loads gist caches, ``text`` reads text, ``hybrid`` reads the best chunk as text and loads the
            gist caches of the others.
        scope: path of one document; *all* its chunks are taken instead of the best *top_k*.
        filters: see `gistrag.GistRAG.retrieve`.
        history: earlier questions of the same conversation, oldest first. A question that leans on them, such as "And
            in Zurich?", is searched together with them.
        max_new_tokens: the answer is cut after so many tokens.
        temperature: 0 takes the most likely token; above 0, tokens are sampled with *seed*.
        second_reading: read the passages again, one by one, where the first answer is unsure and short.

    Raises:
        UsageError: a value out of range, an unknown filter or an impossible date.
    """

    top_k: int = 3
    mode: Mode = "gist"
    scope: str | None = None
    filters: Mapping[str, str] | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    second_reading: bool = True
    history: Sequence[str] = ()

    def __post_init__(self) -> None:
        require_history(self.history)
        require_known(self.filters or {})
        if self.mode not in get_args(Mode):
            raise UsageError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        require_between("top_k", self.top_k, 1, TOP_K_MAX)
        require_between("max_new_tokens", self.max_new_tokens, 1, NEW_TOKENS_MAX)
        require_between("seed", self.seed, -SEED_MAX, SEED_MAX)
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature must be at least 0 and finite, got {self.temperature}")


def require_history(history: object) -> None:
    """Return if this is a list of texts.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(history, list | tuple) or not all(isinstance(turn, str) for turn in history):
        raise UsageError('history must be a list of earlier questions, such as ["What is a gist?"]')


Verdict = Literal["answered", "unsure", "not found"]
"""What an answer is shown as: as sure, as doubtful, or as a refusal."""


@dataclass(frozen=True)
class Evidence:
    """The sentence, table row or list item that carries an answer.

    Attributes:
        start, end: characters of the document's text; text: what stands there.
        heading: path of headings above it, which may differ from that of its chunk; page: as of its chunk.
        is_supported: whether every word and number of the answer stands in it.
    """

    start: int
    end: int
    text: str
    heading: tuple[str, ...]
    page: int | None
    is_supported: bool


@dataclass(frozen=True)
class Source:
    """A chunk an answer rests on.

    Attributes:
        path: document, relative to its folder; page: counted from 1, where the format has pages.
        heading: path of headings above the chunk; start, end: characters of the document's text.
        score: relevance as retrieval saw it, higher is better; snippet: how the chunk begins.
        chunk_id: of the chunk in the index, 0 for a text from outside; as_text: read as text rather than from gists.
        evidence: of the source that carries the answer, None for the others.
        metadata: what is known of the document, or of this part of it: ``date``, ``from``, ``title`` and others.
    """

    path: str
    page: int | None
    heading: tuple[str, ...]
    start: int
    end: int
    score: float
    snippet: str
    chunk_id: int
    as_text: bool
    evidence: Evidence | None = None
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def place(self) -> str:
        """The citation: path with page or heading; the heading above the evidence, where there is some."""
        heading = self.evidence.heading if self.evidence else self.heading
        where = f"page {self.page}" if self.page else " > ".join(heading)
        return ", ".join(filter(None, (self.path, where)))


@dataclass(kw_only=True)
class Timings:
    """Seconds of each stage; ``ttft_s`` runs from the call to the first token and includes the three before it."""

    retrieve_s: float = 0.0
    load_s: float = 0.0
    assemble_s: float = 0.0
    ttft_s: float = 0.0
    total_s: float = 0.0

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Record the seconds of the block under the name of a stage."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, stage, time.perf_counter() - started_s)

    @property
    def decode_s(self) -> float:
        """Seconds from the first token to the last."""
        return self.total_s - self.ttft_s


@dataclass(kw_only=True)
class Usage:
    """What an answer took.

    Attributes:
        gist_slots: cache slots of the gists; source_tokens: tokens of text they stand for.
        text_tokens: tokens of passages read as text; question_tokens, answer_tokens: of the two in the prompt.
        bytes_read: of gist files; text_fallbacks: chunks read as text because their gist is damaged or missing;
            text_pending: because it is still to be made.
        gists_made: texts from outside the index that were compressed for this answer.
        dropped_chunks: lowest-ranked chunks left out because the context window or the memory is full.
        missing_chunks: how many fewer chunks were found than asked for; layout: of the gists.
        readings: how often the model read passages for this answer: more than once where it was unsure.
    """

    gist_slots: int = 0
    source_tokens: int = 0
    text_tokens: int = 0
    question_tokens: int = 0
    answer_tokens: int = 0
    bytes_read: int = 0
    text_fallbacks: int = 0
    text_pending: int = 0
    gists_made: int = 0
    dropped_chunks: int = 0
    missing_chunks: int = 0
    layout: Layout = "spread"
    readings: int = 0


@dataclass(frozen=True)
class Answer:
    """An answer with what it rests on; ``str(answer)`` is its text.

    Attributes:
        sources: the best first.
        confidence: how likely the answer is right, 0 to 1; None without a calibration of the adapter.
        verdict: what that means; None without a confidence, unless the model refused.
        unsupported: its numbers and names that stand in no passage.
        withheld: what the model said where the verdict is "not found", and the text says so instead.
        searched: what was searched: the question, with those of the earlier ones that it leans on; empty where nothing
            was.
        language: of the question, which a refusal and what is said around the answer have too.
    """

    text: str
    sources: tuple[Source, ...] = ()
    timings: Timings = field(default_factory=Timings)
    usage: Usage = field(default_factory=Usage)
    confidence: float | None = None
    verdict: Verdict | None = None
    unsupported: tuple[str, ...] = ()
    searched: str = ""
    withheld: str = ""
    language: Language = "en"

    @property
    def evidence(self) -> Evidence | None:
        """The sentence that carries the answer, None where none does."""
        return next((source.evidence for source in self.sources if source.evidence), None)

    @property
    def marked(self) -> str:
        """The text, with the number of the source that carries it behind: ``8000 [1]``; a refusal rests on none."""
        numbers = [number for number, source in enumerate(self.sources, 1) if source.evidence]
        is_answer = bool(self.text) and self.verdict != "not found"
        return f"{self.text} [{numbers[0]}]" if numbers and is_answer else self.text

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        places = ", ".join(source.place for source in self.sources)
        return f"Answer({self.text!r}, sources=[{places}], ttft_s={self.timings.ttft_s:.3f})"

    def _repr_markdown_(self) -> str:
        listed = "\n".join(f"{number}. {source.place}" for number, source in enumerate(self.sources, 1))
        return f"{self.text}\n\n{listed}" if listed else self.text
