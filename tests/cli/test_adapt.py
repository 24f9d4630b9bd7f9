"""`gistrag adapt`: from a base model and questions to an adapter with its figures, in parts that resume."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import HashEmbedder, byte_tokenizer, tiny_network

from gistrag.answering.confidence import Again, Calibration
from gistrag.cli.main import main as run_command
from gistrag.engine import Engine
from gistrag.evaluation import adapting
from gistrag.evaluation.adapting import apart, gains
from gistrag.model import hub
from gistrag.model.gist_model import GistModel
from gistrag.model.hashing import weights_sha256
from gistrag.qa.dataset import Context
from gistrag.settings import AdapterSettings, IndexSettings
from gistrag.training.checkpoints import read_log
from gistrag.training.recipe import Recipe
from gistrag.training.sampler import Mixture
from gistrag.training.trainer import Trainer

TINY = Recipe(
    rank=2, placement="matched",
    mixture=Mixture(rates={2: 1.0}, contexts=2, chunk_tokens=48, question_tokens=64, chunks=(0.5, 0.5)),
)  # fmt: skip


@pytest.fixture
def base(tmp_path: Path, private_cache: Path) -> Path:
    """A tiny random model as a folder."""
    folder = tmp_path / "base"
    tiny_network().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Question records about twenty articles."""
    records = [
        {"context": f"Mill {n} has {n} wheels.", "question": f"Mill {n}?", "answer": str(n), "source": f"{n % 20}.md"}
        for n in range(60)
    ]
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def given(tmp_path: Path, base: Path, questions: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a run of a few tiny steps; the embedder is none."""
    monkeypatch.setattr(Engine, "load", lambda settings, **_: _engine(settings))
    (tmp_path / "recipe.json").write_text(TINY.to_json())
    return [
        "adapt", str(base), "--questions", str(questions), "-o", str(tmp_path / "run"), "--tokens", "600",
        "--recipe", str(tmp_path / "recipe.json"), "--evaluate", "4", "--calibrate", "0",
    ]  # fmt: skip


def _engine(settings: IndexSettings) -> Engine:
    adapter = None if settings.adapter == "none" else settings.adapter
    return Engine(GistModel.load(settings.model, adapter=adapter), HashEmbedder())


def test_one_command_makes_an_adapter_with_its_card(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It trains, evaluates on articles held out, shows a table of what was gained, and writes the card."""
    code = run_command([*given, "--license", "CC0"])

    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert [line.split("  ")[0] for line in shown.out.splitlines()] == ["read as", "text", "gists of 4 tokens"]
    adapter = tmp_path / "run" / "adapter"
    assert AdapterSettings.read(adapter).held_out == 0.1
    card = (adapter / "README.md").read_text("utf-8")
    facts = ("# Gist adapter for base", "qa.jsonl, sha256 ", "of the data: CC0", "| gists of 4 tokens |", " minutes")
    assert [fact for fact in facts if fact not in card] == []
    assert str(tmp_path) not in card


def test_the_terms_of_the_base_go_with_its_adapter(
    given: list[str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter of a model that is passed on under terms carries the notice that they ask for."""
    known = next(entry for entry in hub.CATALOG if entry.terms)
    monkeypatch.setattr(hub, "CATALOG", (*hub.CATALOG, replace(known, name="other", sha256=weights_sha256(base))))

    code = run_command([*given, "--evaluate", "0"])

    assert code == 0
    assert known.terms is not None
    assert (tmp_path / "run" / "adapter" / "NOTICE").read_text("utf-8") == f"{known.terms.notice}\n"
    card = (tmp_path / "run" / "adapter" / "README.md").read_text("utf-8")
    assert known.terms.notice in card
    assert f"of the base: {known.license}" in card


def test_the_same_command_does_nothing_twice(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is done is not trained or asked again, and prints the same figures."""
    assert run_command([*given, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(Trainer, "advance", lambda _: pytest.fail("trained again"))
    monkeypatch.setattr("gistrag.evaluation.runner.Runner._batch", lambda *_: pytest.fail("answered again"))

    assert run_command([*given, "--json"]) == 0

    again = json.loads(capsys.readouterr().out)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert first["steps"] == len(read_log(tmp_path / "run"))


def test_a_killed_run_goes_on(base: Path, questions: Path, tmp_path: Path) -> None:
    """Killed in the middle of training, the same command goes on at the last checkpoint, not at the beginning."""
    recipe, run = tmp_path / "recipe.json", tmp_path / "run"
    recipe.write_text(TINY.to_json())
    command = [
        sys.executable, "-m", "gistrag", "adapt", str(base), "--questions", str(questions), "-o", str(run),
        "--recipe", str(recipe), "--minutes", "0.1", "--evaluate", "0", "--calibrate", "0", "--json",
    ]  # fmt: skip
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + 120
    while not (kept := sorted(run.glob("checkpoint-*/state.json"))) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()

    ran = subprocess.run(command, capture_output=True, text=True)

    assert kept, "no checkpoint in two minutes"
    assert ran.returncode == 0, ran.stderr
    steps = [record["step"] for record in read_log(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert json.loads(ran.stdout)["steps"] == len(steps) > int(kept[0].parent.name.partition("-")[2])
    assert (run / "adapter" / "README.md").is_file()


def test_a_longer_budget_goes_on(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With more tokens a run that is done learns on, and is evaluated again beside the figures before."""
    assert run_command([*given, "--json"]) == 0
    assert run_command([*given, "--json", "--tokens", "1200"]) == 0

    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert second["steps"] > first["steps"]
    assert len(list((tmp_path / "run").glob("evaluation-*"))) == 2


def test_questions_about_a_folder_are_written_first(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Documents instead of a file: the base writes, and of two documents one is held out."""
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in "ab":
        (docs / f"{name}.md").write_text(f"The mill {name} has nine wheels and grinds the wheat of the valley.")
    monkeypatch.setattr(
        "gistrag.training.teacher.LocalTeacher.write",
        lambda _, requests, **__: [
            f"Q: What does {one.passage[:10]} grind? A: the wheat" if one.passage else "" for one in requests
        ],
    )
    at = given.index("--questions")
    arguments = [*given[:at], "--folder", str(docs), *given[at + 2 :]]

    code = run_command([*arguments, "--json"])

    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert json.loads(shown.out)["gains"][0]["adapter"]["count"] == 1
    assert 0 < AdapterSettings.read(tmp_path / "run" / "adapter").held_out < 1
    assert (tmp_path / "run" / "questions.jsonl").is_file()


def test_one_document_is_not_evaluated(
    given: list[str], questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing can be held out the adapter is made all the same, and one line says what is missing."""
    records = [{**json.loads(line), "source": "one.md"} for line in questions.read_text().splitlines()]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))

    code = run_command(given)

    assert code == 0
    assert "nothing is evaluated, because all questions are about one article" in capsys.readouterr().err
    assert "Nothing: no article was held out" in (tmp_path / "run" / "adapter" / "README.md").read_text("utf-8")


def test_memory_that_is_full_is_one_line(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says which option takes less; that option may change when the run goes on."""

    def fail(_: Trainer) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", fail)
        codes = [run_command(given)]
    told = capsys.readouterr().err.strip().splitlines()[-1]

    codes.append(run_command([*given, "--rows", "4"]))

    assert codes == [5, 0]
    assert "--rows 4" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["BASE"], "no questions to learn from; name --questions FILE"),
        (["nowhere", "--questions", "QUESTIONS"], "no folder or file 'nowhere'"),
        (["BASE", "--questions", "missing.jsonl"], "cannot read missing.jsonl"),
        (["BASE", "--questions", "QUESTIONS", "--recipe", "none"], "no recipe 'none'"),
        (["BASE", "--questions", "QUESTIONS", "--teacher", "x"], "--base-url and --teacher go together"),
        (["STRANGE", "--questions", "QUESTIONS"], "expected a model of"),
        (["BASE", "--folder", "EMPTY"], "expected readable documents"),
    ],
)
def test_wrong_input_is_one_line_and_makes_nothing(
    arguments: list[str], told: str, base: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No questions, an unknown family, a model that is missing: nothing is trained."""
    strange, empty = tmp_path / "strange", tmp_path / "empty"
    strange.mkdir()
    empty.mkdir()
    for path in base.iterdir():
        (strange / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (strange / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox", "architectures": None}))
    named = {"BASE": base, "QUESTIONS": questions, "STRANGE": strange, "EMPTY": empty}

    code = run_command(["adapt", *(str(named.get(one, one)) for one in arguments), "-o", str(tmp_path / "run")])

    shown = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert told in shown[-1]
    assert not list(tmp_path.glob("run/checkpoint-*"))


# Parts


def test_a_calibration_is_made_once(
    given: list[str],
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is fitted to held-out articles that nothing is measured with, and lies beside the adapter it names."""
    records = [
        {"context": f"Mill {n} has {n} wheels.", "question": f"Mill {n}?", "answer": str(n), "source": f"{n % 100}.md"}
        for n in range(1500)
    ]
    questions.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(adapting, "calibrate", lambda rag, asked, **about: calibration(len(asked), **about))
    monkeypatch.setattr(adapting.GistRAG, "from_folder", lambda *_, **__: Opened())
    command = [*given, "--evaluate", "0", "--calibrate", "50", "--json"]

    codes = [run_command(command), run_command(command)]

    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert codes == [0, 0]
    assert first["calibration"] == second["calibration"] == {"questions": 50}
    assert Calibration.read(tmp_path / "run" / "adapter") is not None
    assert "questions 50" in (tmp_path / "run" / "adapter" / "README.md").read_text("utf-8")


class Opened:
    """An index that is opened and asked nothing."""

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None: ...


def calibration(count: int, *, adapter: str, **_: Any) -> Calibration:
    """Return a calibration of nothing."""
    return Calibration(
        adapter=adapter, heads=((0, 0),), weights={}, bias=0.0, again=Again(), sure=0.9, found=0.1, doubtful=0.5,
        measured={"questions": count},
    )  # fmt: skip


def test_no_article_serves_calibration_and_comparison() -> None:
    """Every other article is for the calibration; a few are all compared with."""
    held = [Context("…", f"article {number % 5}") for number in range(20)]

    measured, calibrated = apart(held)

    assert {one.article for one in measured} == {"article 0", "article 2", "article 4"}
    assert {one.article for one in calibrated} == {"article 1", "article 3"}
    assert apart(held[:3]) == (held[:3], [])


def test_gains_are_of_the_same_questions(tmp_path: Path) -> None:
    """A question that only one of the two answered counts for neither."""
    rows = [
        {"part": "questions", "arm": arm, "name": name, "f1": f1}
        for arm, name, f1 in (
            ("text without adapter", "0", 0.2), ("text", "0", 0.7), ("text without adapter", "1", 0.0),
            ("text", "1", 1.0), ("text", "2", 0.0),
        )
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    (found,) = gains(tmp_path / "rows.jsonl", 4)

    assert (found.reading, found.adapter.count) == ("text", 2)
    assert [one.value for one in (found.base, found.adapter, found.gained)] == pytest.approx([0.1, 0.85, 0.75])


@pytest.mark.soak  # a minute and a half of both cores
@pytest.mark.model
def test_the_default_model_gains_in_minutes(tmp_path: Path) -> None:
    """Two dozen steps on a few facts make the default model answer as it is asked to, from text and from gists."""
    things = ("mill", "port", "tower", "bridge", "school", "archive", "garden", "ferry", "market", "library")
    places = (
        "Alder Birch Cedar Dogwood Elm Fir Gorse Hazel Iris Juniper Kale Linden Maple Nettle Oak Poplar Quince Rowan"
    )
    records = [
        {
            "context": f"The {thing} of {place}, built in {1700 + 7 * n + 13 * m}, stands beside the {things[n - 3]}.",
            "question": f"When was the {thing} of {place} built?",
            "answer": str(1700 + 7 * n + 13 * m),
            "source": place,
        }
        for m, place in enumerate(f"{places} Sorrel Teasel Umber Vetch Willow Yew".split())
        for n, thing in enumerate(things)
    ]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = [
        "adapt", "smollm2-135m-instruct", "--questions", str(tmp_path / "qa.jsonl"), "-o", str(tmp_path / "run"),
        "--tokens", "15000", "--evaluate", "30", "--calibrate", "0",
    ]  # fmt: skip

    code = run_command(command)

    rows = gains(next((tmp_path / "run").glob("evaluation-*")) / "rows.jsonl", 4)
    assert code == 0
    assert all(one.gained.low > 0 for one in rows), rows
