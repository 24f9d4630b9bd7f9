"""The whole job on the real default models: the manual is indexed and asked the questions written for it.

Prints recall of retrieval and the share of questions answered in each mode. Answers are computed side by side, which
`test_generation` shows to be what `generate` says one at a time. Floors are what was measured, less the noise that a
hundred questions have.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gistrag import GistRAG
from gistrag.cache import GistCache, concatenate
from gistrag.compression import compress
from gistrag.generation import generate, generate_together
from gistrag.retrieval import Hit
from gistrag.settings import Placement

pytestmark = pytest.mark.model

ROOT = Path(__file__).parents[1]
NEW_TOKENS = 24
SIDE_BY_SIDE = 10


@dataclass(frozen=True)
class Question:
    """A question about the manual, the answers that are accepted, and the page that holds them."""

    question: str
    answers: list[str]
    document: str

    def is_answered_by(self, text: str) -> bool:
        """Whether an accepted answer stands in *text*, apart from case, articles and punctuation."""
        return any(f" {plain(answer)} " in f" {plain(text)} " for answer in self.answers)


def plain(text: str) -> str:
    """Return *text* in lower case without articles and punctuation."""
    spaced = "".join(" " if letter in string.punctuation else letter for letter in text.lower().replace(",", ""))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", spaced).split())


@dataclass
class Trial:
    """The questions, what retrieval finds for each, and every arm's answers, computed when first asked for."""

    rag: GistRAG
    questions: list[Question]
    hits: list[list[Hit]]
    answers: dict[str, list[bool]] = field(default_factory=dict)

    def recall(self, k: int) -> float:
        """Share of questions whose page is among the best *k* chunks."""
        pairs = zip(self.questions, self.hits, strict=True)
        return sum(any(hit.chunk.path == q.document for hit in hits[:k]) for q, hits in pairs) / len(self.questions)

    def share(self, arm: str) -> float:
        """Share of questions that an arm answers."""
        return sum(self.answers[arm]) / len(self.questions)

    def kept(self, arm: str, *, of: str = "text") -> float:
        """Share of the questions the text arm answers that this arm answers too."""
        pairs = list(zip(self.answers[of], self.answers[arm], strict=True))
        return sum(both for right, both in pairs if right) / sum(right for right, _ in pairs)

    def run(self, arm: str, *, texts: int, k: int = 3, placement: Placement = "selected", rate: int = 2) -> None:
        """Answer all questions with the best *texts* chunks as text and the rest of *k* as gists."""
        gists = self._gists({hit.chunk.id: hit for hits in self.hits for hit in hits[texts:k]}, placement, rate)
        model, jobs = self.rag.model, []
        for question, hits in zip(self.questions, self.hits, strict=True):
            caches = [gists[hit.chunk.id] for hit in hits[texts:k][::-1]]
            passages = [token for hit in hits[: min(texts, k)][::-1] for token in self._ids(hit)]
            prompt = passages + model.encode_question(question.question)
            jobs.append((concatenate([model.prefix, *caches], model.rope), prompt))
        said: dict[int, str] = {}
        for rows in alike([len(ids) for _, ids in jobs]):
            memories, prompts = zip(*(jobs[row] for row in rows), strict=True)
            tokens = generate_together(model, memories, prompts, max_new_tokens=NEW_TOKENS)
            said.update(zip(rows, map(model.decode, tokens), strict=True))
        self.answers[arm] = [question.is_answered_by(said[row]) for row, question in enumerate(self.questions)]

    def _gists(self, hits: dict[int, Hit], placement: Placement, rate: int) -> dict[int, GistCache]:
        passages = [self._ids(hit) for hit in hits.values()]
        caches = compress(self.rag.model, passages, placement=placement, tokens_per_gist=rate)
        return dict(zip(hits, caches, strict=True))

    def _ids(self, hit: Hit) -> list[int]:
        return self.rag.model.encode_passage(hit.chunk.text, hit.chunk.heading)


def alike(lengths: list[int]) -> Iterator[list[int]]:
    """Yield row numbers in groups of similar length."""
    rows = sorted(range(len(lengths)), key=lambda row: lengths[row])
    for start in range(0, len(rows), SIDE_BY_SIDE):
        yield rows[start : start + SIDE_BY_SIDE]


@pytest.fixture(scope="module")
def rag(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GistRAG]:
    """The manual, indexed with the default settings."""
    with GistRAG.from_folder(ROOT / "docs", index=tmp_path_factory.mktemp("trial") / "index") as rag:
        yield rag


@pytest.fixture(scope="module")
def trial(rag: GistRAG) -> Trial:
    """All arms on all questions; prints the table."""
    lines = (ROOT / "tests/data/questions.jsonl").read_text("utf-8").splitlines()
    questions = [Question(**json.loads(line)) for line in lines]
    return Trial(rag, questions, [rag.retrieve(question.question, top_k=5) for question in questions])


def test_the_written_questions(trial: Trial, capsys: pytest.CaptureFixture[str]) -> None:
    """Retrieval finds the page, and the gists keep their share of what text answers."""
    trial.run("text", texts=3)
    trial.run("gist, 1 token", texts=0, rate=1)
    trial.run("gist, 2 tokens", texts=0, rate=2)
    trial.run("gist, 4 tokens", texts=0, rate=4)
    trial.run("hybrid, 2 tokens", texts=1, rate=2)
    trial.run("anchored untrained, 4 tokens", texts=0, placement="anchored", rate=4)
    trial.run("anchored untrained, 4 tokens, k = 1", texts=0, k=1, placement="anchored", rate=4)
    with capsys.disabled():
        print(f"\n{len(trial.questions)} questions; page among the best 1, 3, 5 chunks:", *map(trial.recall, (1, 3, 5)))
        for arm in trial.answers:
            print(f"{arm:38} answered {trial.share(arm):.2f}   of those text answers {trial.kept(arm):.2f}")

    assert len(trial.questions) >= 60
    assert trial.recall(3) >= 0.9
    assert trial.share("text") >= 0.2
    assert trial.kept("gist, 1 token") >= 0.4
    assert trial.kept("gist, 2 tokens") >= 0.2
    assert trial.kept("hybrid, 2 tokens") >= 0.45
    assert trial.share("gist, 2 tokens") > trial.share("anchored untrained, 4 tokens")


def test_a_query_answers_from_gists_alone(rag: GistRAG) -> None:
    """By default a query reads gist files and no text, and says what they stand for."""
    answer = rag.query("What is the default placement of gists?", max_new_tokens=32)

    usage = answer.usage
    assert (0, 0, 0) == (usage.text_tokens, usage.text_fallbacks, usage.dropped_chunks)
    assert usage.source_tokens / 2 <= usage.gist_slots <= usage.source_tokens / 2 + 3
    assert usage.bytes_read > usage.gist_slots * rag.model.kv_bytes_per_slot
    assert "how-gists-work.md" in {source.path for source in answer.sources}
    assert answer.text


def test_text_and_gists_of_everything_begin_alike(rag: GistRAG) -> None:
    """Behind one chunk, all of its cache and its text are the same to the model: the answers begin alike."""
    question = "What is the default placement of gists?"
    hit = rag.retrieve(question, top_k=1)[0]
    model, passage = rag.model, rag.model.encode_passage(hit.chunk.text, hit.chunk.heading)
    cache = compress(model, [passage], tokens_per_gist=1)[0]
    asked = model.encode_question(question)
    memories = [concatenate([model.prefix], model.rope), concatenate([model.prefix, cache], model.rope)]

    read, remembered = (
        next(generate(model, memory, ids, max_new_tokens=1))
        for memory, ids in zip(memories, [passage + asked, asked], strict=True)
    )

    assert read == remembered
