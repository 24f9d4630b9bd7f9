"""What is asked of a teacher, and what a run writes, also when it is killed."""

from __future__ import annotations

import errno
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import byte_tokenizer

from gistrag.errors import IndexLockedError, ResourceError, UsageError
from gistrag.model.gist_model import GistModel
from gistrag.qa.dataset import read_contexts, split_by_article
from gistrag.storage import files
from gistrag.training import generate
from gistrag.training.filters import parse
from gistrag.training.generate import (
    LONG,
    Ledger,
    Passage,
    Report,
    Synthesis,
    choose,
    passages_of_file,
    passages_of_folder,
    request,
)
from gistrag.training.teacher import LocalTeacher, Request
from gistrag.training.wordings import ENGLISH

TOWER = "The tower was built by Adela Novak in 1931. It is 80 metres high and stands on a hill above the harbour."
GOOD = "The tower was built by Adela Novak in 1931, and it stands on a hill above the harbour."


class Script:
    """A teacher that says what a function makes of each request, and remembers what it was asked."""

    def __init__(self, say: Callable[[Request], str | None]) -> None:
        self.say = say
        self.asked: list[Request] = []

    def fits(self, request: Request, *, max_new_tokens: int) -> bool:
        """Return whether a passage is short."""
        return len(request.passage) < 5000

    def write(self, requests: Sequence[Request], *, max_new_tokens: int) -> list[str | None]:
        """Return what the script says."""
        self.asked += requests
        return [self.say(request) for request in requests]


def passages(count: int, text: str = TOWER) -> list[Passage]:
    """Return passages that are all different."""
    return [Passage(f"Note {n}. {text}", "towers.md", n * 1000, n * 1000 + 200, ("Towers",)) for n in range(count)]


def question(asked: Request) -> str:
    """Return a good pair about the passage of a request, a different one for each."""
    note = asked.passage.split(".")[0]
    return f"Q: Which builder does {note} name for {note}?\nA: Adela Novak"


def unknowing() -> Script:
    """Return a judge that knows nothing."""
    return Script(lambda asked: "I cannot say")


def synthesize(
    output: Path, about: Sequence[Passage], kinds: Sequence[str], say: Callable[[Request], str | None], **settings: Any
) -> Report:
    """Run a synthesis with a scripted teacher."""
    with Ledger.opened(output) as ledger:
        judge = settings.pop("judge", unknowing())
        return Synthesis(ledger, teacher=Script(say), judge=judge, **settings).run(about, kinds)


def records(path: Path) -> list[dict[str, Any]]:
    """Return what is in a file of records."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# Passages


def test_passages_are_pieces_of_their_documents(tmp_path: Path) -> None:
    """Their offsets give their text, and what cannot be read is told."""
    (tmp_path / "a.md").write_text("# Towers\n\n" + " ".join(f"Sentence {n} of it." for n in range(40)))
    (tmp_path / "b.txt").write_text("a short one")
    (tmp_path / "c.pdf").write_text("no pdf at all")

    found, skipped = passages_of_folder(tmp_path, byte_tokenizer().backend_tokenizer, window=200)

    assert [row.path for row in skipped] == ["c.pdf"]
    assert {passage.source for passage in found} == {"a.md", "b.txt"}
    assert len(found) > 3
    for passage in found:
        text = (tmp_path / passage.source).read_text()
        assert passage.text == text[passage.start : passage.end]
        assert ("Towers",) == passage.heading or passage.source == "b.txt"


def test_a_wider_window_makes_fewer_passages(tmp_path: Path) -> None:
    """The window is the most tokens of a passage."""
    (tmp_path / "a.md").write_text("\n\n".join(f"Paragraph {n} of the document." for n in range(60)))
    tokenizer = byte_tokenizer().backend_tokenizer

    counts = [len(passages_of_folder(tmp_path, tokenizer, window=window)[0]) for window in (200, 2000)]

    assert counts[0] > counts[1] == 1


@pytest.mark.parametrize("name", [None, "broken.pdf"])
def test_a_folder_without_documents_is_refused(tmp_path: Path, name: str | None) -> None:
    """Nothing to read is an error, which names a reason where there is one."""
    if name:
        (tmp_path / name).write_text("no pdf")

    with pytest.raises(UsageError, match=name or "found none"):
        passages_of_folder(tmp_path, byte_tokenizer().backend_tokenizer, window=200)


def squad(path: Path, articles: int) -> Path:
    """Write a SQuAD file with two contexts an article."""
    lines = [
        json.dumps(
            {
                "title": f"Article_{n}",
                "context": f"{TOWER} {n} {half}",
                "qas": [{"question": "Who?", "answers": ["Adela"]}],
            }
        )
        for n in range(articles)
        for half in "ab"
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_contexts_of_a_file_are_passages(tmp_path: Path) -> None:
    """A context is a passage of its own, under its title."""
    path = squad(tmp_path / "squad.jsonl", 2)
    path.write_text(path.read_text() + "no JSON\n")
    (first, *_), dropped = passages_of_file(path)

    assert dropped == 1
    assert Passage(f"{TOWER} 0 a", "Article_0", 0, len(TOWER) + 4, ("Article 0",)) == first


def test_held_out_articles_can_be_left_out(tmp_path: Path) -> None:
    """Those that training leaves for evaluation."""
    path = squad(tmp_path / "squad.jsonl", 40)
    train, held = split_by_article(read_contexts(path)[0])

    found, _ = passages_of_file(path, training_only=True)

    assert held
    assert [context.text for context in train] == [passage.text for passage in found]


def test_a_higher_limit_adds() -> None:
    """The same seed draws the same passages; a higher limit keeps those of a lower one, another seed draws others."""
    all_of_them = passages(50)
    few, more = choose(all_of_them, 5, seed=1), choose(all_of_them, 20, seed=1)

    assert few == choose(all_of_them, 5, seed=1)
    assert set(few) < set(more)
    assert few != choose(all_of_them, 5, seed=2)
    assert all_of_them == choose(all_of_them, None, seed=1) == choose(all_of_them, 50, seed=1)


def test_requests_vary_and_repeat_with_the_seed() -> None:
    """The same draw asks the same; over many passages every phrasing occurs."""
    (passage,) = passages(1)

    tasks = [request("long", passage, random.Random(seed)).task for seed in range(200)]

    assert set(LONG) == set(tasks)
    for kind in ("detail", "theme", "inference", "long"):
        assert request(kind, passage, random.Random(3)) == request(kind, passage, random.Random(3))


# Runs


def test_records_hold_all_that_training_needs(tmp_path: Path) -> None:
    """A line a record, which `gistrag.qa.dataset` reads."""
    (passage,) = passages(1)

    report = synthesize(tmp_path / "qa.jsonl", [passage], ["detail"], question)

    (record,) = records(tmp_path / "qa.jsonl")
    (context,), dropped = read_contexts(tmp_path / "qa.jsonl")
    assert report.written == {"detail": 1}
    assert report.dropped.total() == 0
    assert list(record) == ["instruction", "context", "gist_span", "question", "answer", "kind", "source", "heading"]
    assert record["gist_span"] == [passage.start, passage.end]
    assert passage.text == context.text
    assert context.article == "towers.md"
    assert context.heading == ("Towers",)
    assert dropped == 0
    assert context.tasks[0].answers == ("Adela Novak",)


def test_each_filter_counts_what_it_drops(tmp_path: Path) -> None:
    """What was written and dropped adds up to what was asked for."""
    texts = {
        "Note 0": "Q: Who built the tower in note zero?\nA: Adela Novak",
        "Note 1": "Q: Who built the tower in note zero?\nA: Adela Novak",
        "Note 2": "Q: Who painted it, and why?\nA: Tomas Brandt",
        "Note 3": "I would rather not.",
        "Note 4": None,
        "Note 5": "Q: When was the thing on that hill made?\nA: 1931",
    }
    judge = Script(lambda asked: "in 1931" if "hill" in asked.task else "no idea")

    report = synthesize(
        tmp_path / "qa.jsonl",
        passages(6),
        ["detail"],
        lambda request: texts[request.passage.split(".")[0]],
        judge=judge,
    )

    assert report.written == {"detail": 1}
    assert +report.dropped == {"duplicate": 1, "unsupported": 1, "unreadable": 1, "unanswered": 1, "known": 1}
    assert {"", None} > {request.passage for request in judge.asked}


def test_what_is_too_long_is_not_asked_again(tmp_path: Path) -> None:
    """A passage that no window holds is counted once, and done with."""
    about = [*passages(1), Passage("long " * 2000, "towers.md", 0, 10_000)]

    first = synthesize(tmp_path / "qa.jsonl", about, ["detail"], question)
    second = synthesize(tmp_path / "qa.jsonl", about, ["detail"], question)

    assert first.written == {"detail": 1}
    assert +first.dropped == {"too long": 1}
    assert second.done_before == 2
    assert +second.dropped == Counter()


def test_long_answers_carry_their_task(tmp_path: Path) -> None:
    """The question of a long answer is the task as it was put; nobody asks it closed-book."""
    judge = unknowing()

    report = synthesize(tmp_path / "long.jsonl", passages(3), ["long"], lambda request: GOOD, judge=judge)

    assert report.written == {"long": 3}
    assert judge.asked == []
    assert {record["question"] for record in records(tmp_path / "long.jsonl")} <= set(LONG)


def test_facts_are_planted_without_a_teacher(tmp_path: Path) -> None:
    """The context holds the fact, the span is that of the passage it was planted in."""
    about = passages(30)
    with Ledger.opened(tmp_path / "probes.jsonl") as ledger:
        report = Synthesis(ledger, teacher=None, judge=None).run(about, ["probe"])

    written = records(tmp_path / "probes.jsonl")
    assert 30 == report.written.total() == len(written)
    assert set(report.written) == {"probe name", "probe date", "probe number", "probe identifier"}
    for passage, record in zip(about, written, strict=True):
        assert record["answer"] in record["context"]
        assert record["answer"] not in passage.text
        assert record["gist_span"] == [passage.start, passage.end]


def test_the_same_seed_writes_the_same_file(tmp_path: Path) -> None:
    """Byte for byte; another seed asks otherwise."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        with Ledger.opened(tmp_path / name) as ledger:
            script = Script(lambda asked: GOOD)
            Synthesis(ledger, teacher=script, judge=None, seed=seed).run(passages(20), ["long", "probe"])

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_a_second_run_does_what_is_left(tmp_path: Path) -> None:
    """What was answered is not asked again, what was not is."""
    output, about = tmp_path / "qa.jsonl", passages(20)
    first = synthesize(output, about, ["detail"], lambda asked: None if "Note 1" in asked.passage else question(asked))
    script = Script(question)
    with Ledger.opened(output) as ledger:
        second = Synthesis(ledger, teacher=script, judge=unknowing()).run(about, ["detail"])

    assert first.written["detail"] == 9
    assert first.dropped["unanswered"] == 11
    assert second.written["detail"] == 11
    assert second.done_before == 9
    assert all("Note 1" in request.passage for request in script.asked)
    assert len(records(output)) == 20


def test_kinds_and_passages_can_be_added(tmp_path: Path) -> None:
    """A file grows by what it does not have."""
    output = tmp_path / "qa.jsonl"

    synthesize(output, passages(2), ["detail"], question)
    report = synthesize(output, passages(3), ["probe", "detail"], question)

    assert report.done_before == 2
    assert len(records(output)) == 6


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    """Wherever a kill cuts the files, the next run makes them what one run would have made."""
    about, whole, torn = passages(40), tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    synthesize(whole, about, ["detail", "probe"], question)
    data, state = whole.read_bytes(), whole.with_name("whole.jsonl.state").read_bytes()
    notes = state.splitlines(keepends=True)
    upto = [sum(len(line) for line in data.splitlines(keepends=True)[: 16 * batch]) for batch in range(6)]
    cuts = [
        (data[: upto[2]], b"".join(notes[:2])),
        (data[: upto[2] + 7], b"".join(notes[:2])),  # in the middle of a record
        (data[: upto[3] - 3], b"".join(notes[:2])),
        (data[: upto[3]], b"".join(notes[:2])),  # between a batch and its note
        (data[: upto[3]], b"".join(notes[:3])[:-5]),  # in the middle of a note
        (data[:9], b""),
        (b"", b""),
    ]

    for records_left, notes_left in cuts:
        torn.write_bytes(records_left)
        torn.with_name("torn.jsonl.state").write_bytes(notes_left)
        synthesize(torn, about, ["detail", "probe"], question)

        assert data == torn.read_bytes()


def test_a_file_that_was_taken_away_begins_anew(tmp_path: Path) -> None:
    """What is noted about it no longer counts."""
    output = tmp_path / "qa.jsonl"
    synthesize(output, passages(2), ["detail"], question)
    output.unlink()

    report = synthesize(output, passages(2), ["detail"], question)

    assert report.done_before == 0
    assert len(records(output)) == 2


def test_lines_may_be_taken_out_by_hand(tmp_path: Path) -> None:
    """A record that somebody removed does not come back, and lines of another kind do not disturb."""
    output = tmp_path / "qa.jsonl"
    synthesize(output, passages(3), ["detail"], question)
    kept = output.read_text().splitlines(keepends=True)[1]
    output.write_text(f"{kept}# a remark\n[]\n")

    synthesize(output, passages(3), ["detail"], question)

    assert output.read_text() == f"{kept}# a remark\n[]\n"


def test_a_foreign_file_is_not_touched(tmp_path: Path) -> None:
    """A file that was not begun here is refused."""
    output = tmp_path / "qa.jsonl"
    output.write_text("precious")

    with pytest.raises(UsageError, match="another --output"), Ledger.opened(output):
        pass

    assert output.read_text() == "precious"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A missing folder, or a folder in the way."""
    for output in (tmp_path / "missing" / "qa.jsonl", tmp_path):
        with pytest.raises(UsageError, match="cannot write"), Ledger.opened(output):
            pass


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    """The second is told that somebody is at it."""
    with (
        Ledger.opened(tmp_path / "qa.jsonl"),
        pytest.raises(IndexLockedError, match="is in use by process"),
        Ledger.opened(tmp_path / "qa.jsonl"),
    ):
        pass


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before stays, and the next run goes on from there."""
    output, about = tmp_path / "qa.jsonl", passages(40)
    write_all, calls = files.write_all, iter(range(100))

    def full(descriptor: int, data: bytes) -> None:
        if b"question" in data and next(calls) == 1:  # the second batch of records
            write_all(descriptor, data[:20])
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(descriptor, data)

    monkeypatch.setattr(files, "write_all", full)
    with pytest.raises(ResourceError, match="no space left"):
        synthesize(output, about, ["detail"], question)
    report = synthesize(output, about, ["detail"], question)

    assert report.done_before == 16
    assert 40 == len(records(output)) == len({record["context"] for record in records(output)})


class Steps:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.planned, self.done = 0, [0]

    def plan(self, *, chunks: int, tokens: int, gist_bytes: int) -> None:
        self.planned = chunks

    def advance(self, *, chunks: int, tokens: int) -> None:
        self.done.append(self.done[-1] + chunks)


def test_progress_is_told(tmp_path: Path) -> None:
    """What is ahead, and each batch."""
    steps = Steps()

    synthesize(tmp_path / "qa.jsonl", passages(20), ["detail"], question, progress=steps)

    assert steps.planned == 20
    assert steps.done == [0, 16, 20]


@pytest.mark.model
def test_the_default_model_writes(default_model: GistModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes long answers that its passages hold, and a question about a detail that can be read."""
    apollo = (
        "Apollo 11 was the spaceflight that first landed humans on the Moon. Commander Neil Armstrong and lunar module "
        "pilot Buzz Aldrin landed the lunar module Eagle on July 20, 1969. Armstrong became the first person to step "
        "onto the lunar surface six hours later; Aldrin joined him about 20 minutes after that."
    )
    bees = (
        "Honey bees are known for their construction of colonial nests from wax. A colony has one queen, tens of "
        "thousands of workers and a few hundred drones. Workers tell each other where flowers are by a dance, which "
        "Karl von Frisch described in 1927."
    )
    about = [Passage(apollo, "apollo", 0, len(apollo)), Passage(bees, "bees", 0, len(bees))]
    best = replace(ENGLISH, long=("List the main points of the passage.",))  # what it does best
    monkeypatch.setattr(generate, "WORDINGS", {"en": best})
    monkeypatch.setattr(generate, "NEW_TOKENS", 72)
    local = LocalTeacher(default_model)
    with Ledger.opened(tmp_path / "long.jsonl") as ledger:
        report = Synthesis(ledger, teacher=local, judge=local, seed=0).run(about, ["long"])

    text = local.write([request("detail", about[0], random.Random(0))], max_new_tokens=40)[0] or ""

    assert report.written["long"] == 2
    for record in records(tmp_path / "long.jsonl"):
        assert 12 <= len(record["answer"].split()) <= 96
        assert record["answer"][-1] == "."
    assert parse(text) is not None


@pytest.mark.parametrize(("kind", "begin"), [("list", "1."), ("summary", "")])
def test_lists_and_summaries_are_about_the_heading(kind: str, begin: str) -> None:
    """The task names the topic of the passage, so it is understood beside other passages; a list begins as one."""
    passage = Passage("The mill has nine wheels.", "a.md", 0, 25, ("Harbour", "Mills"))

    asked = request(kind, passage, random.Random(0))

    assert "Mills" in asked.task
    assert asked.begin == begin
    assert "the passage" in request(kind, replace(passage, heading=()), random.Random(0)).task


@pytest.mark.parametrize("kind", ["detail", "theme", "inference", "long", "list", "summary"])
def test_a_korean_passage_is_asked_about_in_korean(kind: str) -> None:
    """Task, rules and the beginning of a pair are in its language."""
    passage = Passage("물방아에는 바퀴가 아홉 개 있다.", "a.md", 0, 18, ("항구", "물방아"))

    asked = request(kind, passage, random.Random(0))

    assert not re.search("[A-Za-z]", f"{asked.task}{asked.rules}{asked.begin}")
    assert asked.begin == {"long": "", "summary": "", "list": "1."}.get(kind, "질문:")
    assert ("물방아" in asked.task) == (kind in ("list", "summary"))
