"""Evidence, confidence and the second reading: what makes an answer one that can be checked."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_models import HashEmbedder

from gistrag.answering import judge as judging
from gistrag.answering.answer import Answer, Evidence, Source
from gistrag.answering.confidence import FILE, SIGNALS, Again, Calibration, Similarity, logit, sigmoid, signals
from gistrag.answering.evidence import SentenceMap, candidates
from gistrag.answering.judge import agreeing
from gistrag.answering.passages import Passage, select
from gistrag.answering.stream import SHORT_TOKENS
from gistrag.answering.wording import share_of_words, stands_in, unsupported, words
from gistrag.engine import Engine
from gistrag.model.hashing import folder_sha256
from gistrag.model.prompt import REFUSAL
from gistrag.model.runtime import Trace
from gistrag.qa.phrases import phrase
from gistrag.rag import GistRAG

LEAVE = "# Leave\n\nStaff get 25 days. Trainees get 20 days.\n\n## Sick leave\n\nA note is due after day 3.\n"
PAY = "# Pay\n\nWages come on the 28th. Ask Anna Lee."
CALIBRATION = Calibration(
    adapter="a",
    heads=((1, 0), (1, 2)),
    weights={"total": 1.0},
    bias=2.0,
    again=Again(),
    sure=0.8,
    found=0.2,
    doubtful=0.5,
    measured={},
)  # a total log-probability of -2 is a confidence of a half


@pytest.fixture(scope="module")
def rag(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Iterator[GistRAG]:
    """An index of two documents, and a calibration."""
    docs = tmp_path_factory.mktemp("docs")
    (docs / "leave.md").write_text(LEAVE, "utf-8")
    (docs / "pay.md").write_text(PAY, "utf-8")
    engine = dataclasses.replace(engine, calibration=CALIBRATION)
    index = tmp_path_factory.mktemp("index")
    with GistRAG.from_folder(docs, index=index, engine=engine, chunk_tokens=128, gists="now") as rag:
        yield rag


def found(rag: GistRAG, question: str, mode: Any = "gist") -> list[Passage]:
    """Return the passages of a question."""
    from gistrag.answering.answer import Options, Usage

    return select(rag.retrieve(question), rag.store, rag.runtime, Options(mode=mode), Usage())


# Words


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("1,200 litres", "It holds 1200 litres.", 1.0),
        ("25 days", "Staff get 25 days.", 1.0),
        ("25 days", "Staff get 125 days.", 0.5),
        ("Anna Lee", "ask anna lee", 1.0),
        ("15일", "연차는 15일입니다.", 1.0),
        ("택시비를", "택시비는 준다.", 1.0),
        ("15일입니다", "연차는 15일이다.", 1.0),
        ("윤도현 과장에게", "책임자는 윤도현 과장이다.", 1.0),
        ("윤도영 과장", "책임자는 윤도현 과장이다.", 0.5),
        ("한 달", "한울은 달력을 준다.", 0.0),
        ("3.5", "It takes 35.", 0.0),
        ("", "anything", 0.0),
    ],
)
def test_words_of_an_answer_in_a_text(answer: str, text: str, expected: float) -> None:
    """Numbers count whole, words also in a longer form, in any script."""
    assert share_of_words(words(answer), text) == expected


def test_word_for_word() -> None:
    """Punctuation and case do not matter, the order does."""
    assert stands_in("the 28th", "Wages come on THE 28th.")
    assert not stands_in("25 days staff", "Staff get 25 days.")
    assert not stands_in("", "Staff")
    assert stands_in("윤도현 과장입니다.", "책임자는 윤도현 과장이다.")
    assert not stands_in("윤도현 과장입니다.", "윤도현 씨는 과장이다.")


def test_answers_are_alike_in_other_particles() -> None:
    """Readings agree where only the particle or the level of politeness differs."""
    assert agreeing("15일입니다.", ["15일", "15일이에요", "16일"]) == pytest.approx(2 / 3)
    assert agreeing("the 20 days", ["20 days", "20 weeks"]) == 0.5


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("25 days", ()),
        ("26 days", ("26",)),
        ("Anna Lee", ()),
        ("Anna Low", ("Low",)),
        ("Bern", ("Bern",)),
        ("Because staff ask Anna.", ()),
        ("yes", ()),
    ],
)
def test_numbers_and_names_that_stand_nowhere(answer: str, expected: tuple[str, ...]) -> None:
    """They are named; words that merely begin a sentence are not names."""
    assert unsupported(answer, [LEAVE, PAY]) == expected


# Evidence


@pytest.mark.parametrize("mode", ["gist", "text", "hybrid"])
def test_a_look_at_a_slot_is_a_look_at_a_sentence(rag: GistRAG, mode: str) -> None:
    """Whatever mixture of gists and text the memory holds, attention to one token counts for its sentence."""
    passages = found(rag, "How many days do trainees get?", mode)
    maps, seen = [SentenceMap(rag.runtime, one) for one in passages], 0
    for number, sentence_map in enumerate(maps):
        for sentence in range(len(sentence_map.spans)):
            looks = looking_at(
                rag, passages, lambda at, token, n=number, s=sentence: at == n and maps[n].of_token[token] == s
            )
            if not looks[1][0][rag.runtime.prefix_slots :].any():
                continue  # the head keeps no gist of it
            best = max(
                candidates(rag.runtime, "?", "", passages, trace_of(looks), [(1, 0)]), key=lambda one: one.attention
            )

            assert (best.passage, best.span) == (number, sentence_map.spans[sentence])
            assert best.attention == pytest.approx(1.0)
            seen += 1
    assert seen >= 3


def looking_at(rag: GistRAG, passages: Sequence[Passage], wanted: Callable[[int, int], bool]) -> dict[int, list[Any]]:
    """Return attention of layer 1 that is 1 at wanted tokens of passages, by number and token, and 0 elsewhere."""
    from gistrag.answering.evidence import _kept
    from gistrag.kv.packed import Gists

    heads = len(rag.runtime.attention(memory_of(rag, passages), [5], layers=[1])[1])
    order = [(at, one.content) for at, one in enumerate(passages)]
    order = [
        *(one for one in order if isinstance(one[1], Gists)),
        *(one for one in order if not isinstance(one[1], Gists)),
    ]
    attention = []
    for head in range(heads):
        parts = [np.full(rag.runtime.prefix_slots, 0.5, np.float32)]
        for at, content in order:
            tokens = _kept(content, 1, head, heads) if isinstance(content, Gists) else np.arange(len(content))
            parts.append(np.array([wanted(at, int(token)) for token in tokens], np.float32))
        attention.append(np.concatenate(parts))
    return {1: attention}


def memory_of(rag: GistRAG, passages: Sequence[Passage]) -> Any:
    """Return the memory that the product would answer from."""
    from gistrag.answering.assemble import assemble

    return assemble(rag.runtime, [one.content for one in passages])


def trace_of(*steps: dict[int, list[Any]]) -> Trace:
    """Return a trace of these steps and of one that ends the answer."""
    return Trace((1,), [-0.1] * (len(steps) + 1), np.zeros(300, np.float32), [*steps, steps[-1]])


def test_slots_of_a_memory_are_counted_as_the_runtime_counts_them(rag: GistRAG) -> None:
    """Heads of the default placement keep different numbers of tokens; the looks add up to what is real."""
    passages = found(rag, "When do wages come?")
    expected = looking_at(rag, passages, lambda at, token: True)[1]

    real = rag.runtime.attention(memory_of(rag, passages), [5], layers=[1])[1]

    assert [len(of_head) for of_head in expected] == [of_head.shape[1] for of_head in real]


def test_words_alone_find_the_sentence(rag: GistRAG) -> None:
    """Attention that says nothing, or that nobody traced, leaves the words of answer and question."""
    passages = found(rag, "How many days do trainees get?")
    for trace in (Trace(), trace_of(looking_at(rag, passages, lambda at, token: False))):
        best = candidates(rag.runtime, "How many days do trainees get?", "20 days", passages, trace, [(1, 0)])[0]

        assert best.text == "Trainees get 20 days."
        assert (best.is_verbatim, best.answer, best.attention) == (True, 1.0, 0.0)


def test_evidence_says_where_it_stands(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters of the document, and the heading above the sentence rather than that of the chunk."""
    script(monkeypatch, rag, {2: ("day 3", -0.1)})

    answer = rag.query("When is a note due?")

    evidence = answer.evidence
    assert evidence is not None
    assert LEAVE[evidence.start : evidence.end] == evidence.text == "A note is due after day 3."
    assert evidence.heading == ("Leave", "Sick leave")
    assert evidence.is_supported
    assert [source.path for source in answer.sources if source.evidence] == ["leave.md"]
    assert answer.sources[0].place == "leave.md, Leave > Sick leave"
    assert answer.marked == f"day 3 [{1 + [bool(source.evidence) for source in answer.sources].index(True)}]"


# Confidence and verdict


def script(monkeypatch: pytest.MonkeyPatch, rag: GistRAG, answers: dict[Any, tuple[str, float]]) -> list[list[str]]:
    """Let the model give these answers, each with its total log-probability.

    Args:
        answers: by how many passages are read, or by the path of a single one.

    Returns:
        the paths of the passages of each reading.
    """
    asked: list[list[str]] = []
    paths: list[list[str]] = []

    def assemble(runtime: Any, contents: Sequence[Any], **_: Any) -> Generator[None]:
        asked.append([str(len(contents))])
        yield

    def generate(*_: Any, trace: Trace | None, **options: Any) -> Iterator[int]:
        reading = readings[-1]
        trace = trace or Trace()  # of nobody, where there is no calibration
        paths.append([one.source.path for one in reading.passages])
        key: Any = len(reading.passages)
        text, total = answers[paths[-1][0] if key == 1 and paths[-1][0] in answers else key]
        ids = rag.runtime.encode(text)[: options["max_new_tokens"]]
        for number, token in enumerate(ids):
            trace.logprobs.append(total if number == 0 else 0.0)
            trace.opening = np.full(300, -5.0, np.float32)
            trace.attention.append({})
            yield token

    readings: list[judging.Reading] = []
    real = judging.Reading.__init__

    def remember(self: judging.Reading, *given: Any, **named: Any) -> None:
        real(self, *given, **named)
        readings.append(self)

    monkeypatch.setattr(judging.Reading, "__init__", remember)
    monkeypatch.setattr(judging, "assemble_steps", assemble)
    monkeypatch.setattr(judging, "generate_steps", generate)
    monkeypatch.setattr(judging, "candidates", without_attention)
    return paths


def without_attention(*given: Any) -> Any:
    """Return candidates by words alone: a scripted answer has no attention."""
    return candidates(*given[:-1], [])


@pytest.mark.parametrize(
    ("total", "verdict"), [(-0.1, "answered"), (-1.0, "unsure"), (-3.0, "unsure"), (-8.0, "not found")]
)
def test_a_verdict_is_what_the_confidence_means(
    rag: GistRAG, monkeypatch: pytest.MonkeyPatch, total: float, verdict: str
) -> None:
    """Sure, unsure, or so unlikely that the answer is withheld."""
    script(monkeypatch, rag, {2: ("20 days", total)})

    answer = rag.query("How many days do trainees get?", second_reading=False)

    assert answer.confidence == pytest.approx(sigmoid(2.0 + total))
    assert answer.verdict == verdict
    assert (answer.text, answer.withheld) == ((REFUSAL, "20 days") if verdict == "not found" else ("20 days", ""))


def test_a_number_that_stands_in_no_passage_is_never_sure(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """However likely the model finds it."""
    script(monkeypatch, rag, {2: ("21 days", 0.0)})

    answer = rag.query("How many days do trainees get?")

    assert answer.unsupported == ("21",)
    assert answer.verdict == "unsure"
    assert answer.evidence is not None
    assert not answer.evidence.is_supported


def test_a_refusal_is_no_answer(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no confidence to be right, and its verdict says so."""
    script(monkeypatch, rag, {2: (REFUSAL, 0.0), 1: (REFUSAL, 0.0)})

    answer = rag.query("What is the capital of France?")

    assert (answer.text, answer.confidence, answer.verdict, answer.withheld) == (REFUSAL, 0.0, "not found", "")


ASKED = "수습 직원은 며칠을 쉬나요?"
REFUSED = phrase("refusal", "ko")


def test_a_refusal_is_shown_in_the_language_of_the_question(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model writes the sentence it was trained with; nothing counts as withheld."""
    script(monkeypatch, rag, {2: (REFUSAL, 0.0), 1: (REFUSAL, 0.0)})

    answer = rag.query(ASKED)

    assert (answer.text, answer.verdict, answer.withheld, answer.language) == (REFUSED, "not found", "", "ko")


def test_a_withheld_answer_is_refused_in_the_language_of_the_question(
    rag: GistRAG, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model guessed stays as it wrote it."""
    script(monkeypatch, rag, {2: ("20일", -8.0)})

    answer = rag.query(ASKED, second_reading=False)

    assert (answer.text, answer.withheld) == (REFUSED, "20일")


@pytest.mark.parametrize(("said", "expected"), [(REFUSAL, REFUSED), ("The passages say 20.", "The passages say 20.")])
def test_no_half_refusal_is_streamed(rag: GistRAG, monkeypatch: pytest.MonkeyPatch, said: str, expected: str) -> None:
    """Without a calibration pieces come at once, but the beginning of a refusal waits, since it may be translated."""
    engine = dataclasses.replace(rag.engine, calibration=None)
    with GistRAG.open(rag.folder, engine=engine) as other:
        script(monkeypatch, other, {2: (said, 0.0)})
        stream = other.stream(ASKED)
        pieces = list(stream)

    assert "".join(pieces).strip() == expected == stream.answer.text
    assert (len(pieces) == 1) == (expected == REFUSED)


def test_an_adapter_without_calibration_has_no_confidence(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evidence is found by words, pieces come as they are made, and nothing is read again."""
    engine = dataclasses.replace(rag.engine, calibration=None)
    with GistRAG.open(rag.folder, engine=engine) as other:
        paths = script(monkeypatch, other, {2: ("20 days", -8.0)})
        stream = other.stream("How many days do trainees get?")
        first = next(stream)
        answer = stream.result()

    assert len(first) < len("20 days")
    assert (answer.text, answer.confidence, answer.verdict, len(paths)) == ("20 days", None, None, 1)
    assert answer.evidence is not None


# The second reading


def test_an_unsure_answer_is_read_again(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each passage alone; the most confident answer is shown, with its own passage as the evidence."""
    paths = script(monkeypatch, rag, {2: ("25 days", -4.0), "leave.md": ("20 days", -0.5), "pay.md": (REFUSAL, 0.0)})

    answer = rag.query("How many days do trainees get?")

    assert sorted(paths[1:]) == [["leave.md"], ["pay.md"]]
    assert (answer.text, answer.usage.readings) == ("20 days", 3)
    assert answer.confidence == pytest.approx(sigmoid(1.5))
    assert answer.evidence is not None
    assert answer.evidence.text == "Trainees get 20 days."


def test_agreement_counts(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings that give the same answer make it surer, as the calibration weighs them."""
    calibration = dataclasses.replace(CALIBRATION, again=Again(best=1.0, agreement=3.0, bias=-1.0))
    with GistRAG.open(rag.folder, engine=dataclasses.replace(rag.engine, calibration=calibration)) as other:
        script(monkeypatch, other, {2: ("20 days", -4.0), "leave.md": ("20 days", -1.0), "pay.md": (REFUSAL, 0.0)})
        answer = other.query("How many days do trainees get?")

    assert answer.confidence == pytest.approx(sigmoid(logit(sigmoid(1.0)) + 3.0 * 0.5 - 1.0))


@pytest.mark.parametrize(
    ("total", "text", "options"),
    [
        (-0.1, "20 days", {}),
        (-4.0, "20 days", {"second_reading": False}),
        (-4.0, "20 days, " * SHORT_TOKENS, {}),
        (-4.0, "20 days", {"top_k": 1}),
    ],
)
def test_what_is_not_read_again(
    rag: GistRAG, monkeypatch: pytest.MonkeyPatch, total: float, text: str, options: dict[str, Any]
) -> None:
    """A sure answer, one that was shown already, a single passage, and where nobody wants it."""
    paths = script(monkeypatch, rag, {2: (text, total), 1: (text, total)})

    answer = rag.query("How many days do trainees get?", **options)

    assert len(paths) == answer.usage.readings == 1


def test_a_long_answer_is_streamed(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pieces come while it is generated, and none is taken back, whatever the verdict."""
    text = "twenty days, " * SHORT_TOKENS
    script(monkeypatch, rag, {2: (text, -9.0)})
    stream = rag.stream("How many days do trainees get?")

    pieces = list(stream)

    assert len(pieces) > 1
    assert "".join(pieces).strip() == text.strip()
    assert (stream.answer.verdict, stream.answer.withheld) == ("unsure", "")


def test_the_second_reading_has_a_time_limit(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passages that are still unread when it is over stay unread."""
    from gistrag.answering import stream

    monkeypatch.setattr(stream, "AGAIN_S", 0.0)
    paths = script(monkeypatch, rag, {2: ("20 days", -3.0), 1: ("25 days", 0.0)})

    assert rag.query("How many days do trainees get?").text == "20 days"
    assert len(paths) == 1


def test_an_answer_that_runs_away_does_not_count(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """However confident; and a refusal is not read to its end."""
    from gistrag.answering.stream import AGAIN_TOKENS

    long = "20 days, " * AGAIN_TOKENS
    script(monkeypatch, rag, {2: ("20 days", -3.0), "leave.md": (long, 0.0), "pay.md": (REFUSAL, 0.0)})

    assert rag.query("How many days do trainees get?").text == "20 days"


def test_given_texts_are_judged_too(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evidence has the characters of the text that was given."""
    script(monkeypatch, rag, {1: ("20 days", -0.1)})

    answer = rag.stream_from("How many days do trainees get?", [LEAVE]).result()

    assert answer.evidence is not None
    assert LEAVE[answer.evidence.start : answer.evidence.end] == "Trainees get 20 days."
    assert answer.verdict == "answered"


def test_a_text_that_equals_a_chunk_has_its_heading(rag: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line above the chunk is its heading and no sentence, and characters are still those of the given text."""
    script(monkeypatch, rag, {1: ("Leave", -0.1)})
    (chunk,) = [hit.chunk for hit in rag.retrieve("leave") if hit.chunk.path == "leave.md"]
    text = f"\n{' > '.join(chunk.heading)}\n{chunk.text.strip()}"

    answer = rag.stream_from("Leave", [text]).result()

    assert answer.evidence is not None
    assert (answer.evidence.text, answer.evidence.heading) == ("# Leave", ("Leave",))
    assert text[answer.evidence.start : answer.evidence.end] == "# Leave"
    assert answer.sources[0].place == "Leave"
    assert answer.usage.gists_made == 0


# The file


def adapter_in(folder: Path) -> Path:
    """Return a folder that has a hash, as one of an adapter has."""
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    """With its heads and weights."""
    folder = adapter_in(tmp_path / "adapter")
    written = dataclasses.replace(CALIBRATION, adapter=folder_sha256(folder), again=Again(0.5, 0.2, -1.0))

    written.write(folder)

    assert Calibration.read(folder) == written
    assert written.layers == (1,)


def test_an_adapter_of_before_has_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """That is no fault, and is said once, quietly."""
    caplog.set_level(logging.INFO, "gistrag")

    assert Calibration.read(adapter_in(tmp_path / "adapter")) is None
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: {**values, "adapter": "0" * 64},
        lambda values: {name: value for name, value in values.items() if name != "weights"},
        lambda values: {**values, "weights": {"total": "much"}},
        lambda values: {**values, "weights": {"luck": 1.0}},
        lambda values: {**values, "heads": [[1]]},
        lambda values: [values],
    ],
)
def test_a_damaged_or_foreign_calibration_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Any], Any]
) -> None:
    """One line says so; answers go on without a confidence."""
    folder = adapter_in(tmp_path / "adapter")
    dataclasses.replace(CALIBRATION, adapter=folder_sha256(folder)).write(folder)
    (folder / FILE).write_text(json.dumps(damage(json.loads((folder / FILE).read_text()))), "utf-8")

    assert Calibration.read(folder) is None
    assert len(caplog.records) == 1
    assert "answers have no confidence" in caplog.text


def test_a_calibration_may_weigh_every_signal_there_is() -> None:
    """One that weighs another signal is refused when it is read, rather than at a question."""
    similarity = Similarity(HashEmbedder(), "honey?")

    assert signals(Trace(), [], [], similarity, refusal=0).keys() == SIGNALS


def test_signals_are_on_the_scale_of_the_default_embedder() -> None:
    """The cosine of a passage, known or measured now, is brought to the scale that confidence was fitted with."""

    class Scaled(HashEmbedder):
        def comparable(self, cosine: float) -> float:
            return cosine / 2

    source = Source("a.md", None, (), 0, 4, 0.5, "mill", 1, as_text=True)
    measured, known = (Passage(source, [], "mill", 0, cosine) for cosine in (None, 0.8))
    topics = [
        signals(Trace(), [], [one], Similarity(Scaled(), "mill"), refusal=0)["topic"] for one in (measured, known)
    ]

    assert topics == pytest.approx([0.5, 0.4])


def test_a_text_is_embedded_once() -> None:
    """Readings of the same passages ask for the same sentences; the nearest window of a long text counts."""

    class Embedder:
        def __init__(self) -> None:
            self.embedded: list[str] = []

        def comparable(self, cosine: float) -> float:
            return cosine

        def embed_query(self, question: str) -> Any:
            return np.array([1.0, 0.0], np.float32)

        def embed_documents(self, texts: Sequence[str]) -> list[Any]:
            self.embedded += texts
            return [np.array([[0.0, 1.0], [float("honey" in text), 0.0]], np.float32) for text in texts]

    embedder = Embedder()
    similarity = Similarity(embedder, "honey?")

    assert [similarity("honey"), similarity("tea"), similarity("honey")] == [1.0, 0.0, 1.0]
    assert embedder.embedded == ["honey", "tea"]


def test_an_answer_without_evidence_has_no_mark() -> None:
    """Neither has one without a text."""
    source = Source("a.md", None, (), 0, 9, 0.5, "snippet", 1, False)
    evidence = Evidence(0, 4, "Text", (), None, True)

    assert Answer("8000", (source,)).marked == "8000"
    assert Answer(REFUSAL, (dataclasses.replace(source, evidence=evidence),), verdict="not found").marked == REFUSAL
    assert Answer("", (dataclasses.replace(source, evidence=evidence),)).marked == ""
    assert Answer("8000", (source, dataclasses.replace(source, evidence=evidence))).marked == "8000 [2]"
