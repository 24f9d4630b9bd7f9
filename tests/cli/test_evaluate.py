"""`gistrag evaluate` from a file of questions to a folder of figures, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.tiny_models import HashEmbedder, byte_tokenizer, tiny_model, tiny_network

from gistrag import engine as engine_module
from gistrag.cli.main import main as run_command
from gistrag.engine import Engine
from gistrag.errors import UsageError
from gistrag.evaluation import cases
from gistrag.evaluation import evaluate as evaluation
from gistrag.model.gist_model import GistModel
from gistrag.qa.dataset import read_contexts, split_by_article

SMALL: dict[str, Any] = {
    "top_k": (2, 1), "planted_facts": 2, "unanswerable": 1, "passkey": 1, "lengths": (100, 200), "orders": 1,
    "max_new_tokens": 4, "repeats": 1,
}  # fmt: skip
QUICK = ("--suite", "quick", "--rates", "2")
FULL = ("--questions", "3", "--rates", "2,4")
THINGS = {"crane": "frogs", "deer": "grass", "finch": "seeds", "goat": "thistles", "bear": "honey", "owl": "mice"}


def records() -> list[dict[str, Any]]:
    """One SQuAD line for each animal, an article each."""
    return [
        {"title": f"The_{one}", "context": f"The {one} of the valley eats {food}. It sleeps at noon.",
         "qas": [{"question": f"What does the {one} eat?", "answers": [food]}]}
        for one, food in THINGS.items()
    ]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of questions."""
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records()), "utf-8")
    return path


@pytest.fixture(scope="module")
def tiny() -> GistModel:
    """A tiny model of its own."""
    return tiny_model()


@pytest.fixture
def folder(tmp_path: Path, private_cache: Path) -> Path:
    """A model folder that `find` finds."""
    path = tmp_path / "model"
    tiny_network().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def given(tmp_path: Path, file: Path, folder: Path, tiny: GistModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that evaluate a tiny model, which is loaded already."""
    monkeypatch.setattr(Engine, "load", lambda settings, **_: Engine(tiny, HashEmbedder()))
    monkeypatch.setitem(cases.SUITES, "full", SMALL)
    quick = {**cases.SUITES["quick"], "top_k": (1,), "unanswerable": 0, "max_new_tokens": 4}
    monkeypatch.setitem(cases.SUITES, "quick", quick)
    return [str(file), "--model", str(folder), "--output", str(tmp_path / "out")]


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "rows.jsonl").read_text("utf-8").splitlines()]


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


# Doing it


def test_an_evaluation_is_a_folder(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows, summary, table and pictures are there, and the table is printed with a line for each arm."""
    code = run_command(["evaluate", *given, *FULL])

    printed = capsys.readouterr()
    output = tmp_path / "out"
    summary = json.loads((output / "summary.json").read_text("utf-8"))
    arms = ["none", "full context", "text", "uncompressed KV", "gist 2", "gist 4", "hybrid 4"]
    assert 0 == code, printed.err
    assert arms == [line.split("  ")[0].strip() for line in printed.out.splitlines()[1:]]
    assert arms == list(summary["parts"]["questions"])
    assert (3, 6) == (summary["parts"]["questions"]["text"]["count"], summary["corpus"]["chunks"])
    parts = {"questions", "top 1", "oracle", "refusal", "planted date", "planted identifier", "planted", "passkey"}
    assert parts == set(summary["parts"])
    assert {"question", "100 tokens", "200 tokens"} == set(summary["speed"])
    assert (output / "table.md").read_text("utf-8").startswith("# Evaluation of model, no adapter, gists in int8\n")
    assert {"quality.png", "ttft.png", "passkey.png"} == {path.name for path in (output / "figures").iterdir()}
    assert "3 questions of questions.jsonl" in printed.err


def test_an_evaluation_goes_on(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is not answered again, what is missing is, and the figures are those of one go."""
    monkeypatch.setattr("gistrag.evaluation.provenance.draw", lambda summary, folder: [])
    monkeypatch.setitem(SMALL, "repeats", 0)
    given += FULL
    assert 0 == run_command(["evaluate", *given])
    path, summary = tmp_path / "out" / "rows.jsonl", tmp_path / "out" / "summary.json"
    whole, figures = path.read_bytes(), json.loads(summary.read_bytes())
    lines = whole.splitlines(keepends=True)

    assert 0 == run_command(["evaluate", *given])
    again = path.read_bytes()
    path.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:20])
    assert 0 == run_command(["evaluate", *given])

    assert whole == again
    assert sorted(lines) == sorted(path.read_bytes().splitlines(keepends=True))
    for name in ("parts", "mixing", "orders", "passkey", "retrieval", "corpus"):
        assert figures[name] == json.loads(summary.read_bytes())[name]


def test_more_questions_and_rates_go_on_too(given: list[str], tmp_path: Path) -> None:
    """How much is asked may grow; the rows so far stay."""
    assert 0 == run_command(["evaluate", *given, *QUICK, "--questions", "2", "--arms", "text"])
    before = rows(tmp_path / "out")

    assert 0 == run_command(["evaluate", *given, *QUICK, "--questions", "4", "--arms", "text,gist"])

    after = rows(tmp_path / "out")
    assert before == after[:2]
    assert {("text", 4), ("gist 2", 4)} == {
        (arm, sum(row["arm"] == arm for row in after)) for arm in ("text", "gist 2")
    }


def test_other_settings_need_another_folder(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An evaluation is never mixed with one of another seed; the rows stay as they are."""
    assert 0 == run_command(["evaluate", *given, *QUICK, "--arms", "none"])
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()

    code = run_command(["evaluate", *given, *QUICK, "--arms", "none", "--seed", "1"])

    assert 2 == code
    assert "was made with seed '0', this one has '1'; name another --output" in last_line(capsys)
    assert before == (tmp_path / "out" / "rows.jsonl").read_bytes()


def test_json_is_one_line(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With --json standard output is the summary."""
    assert 0 == run_command(["evaluate", *given, *QUICK, "--arms", "none,text", "--json", "--quiet"])

    (line,) = capsys.readouterr().out.splitlines()
    assert ["none", "text"] == list(json.loads(line)["parts"]["questions"])


def test_only_held_out_articles_are_asked(given: list[str], file: Path, tmp_path: Path) -> None:
    """The corpus is that of the articles training never sees."""
    held = [*records(), *({**records()[0], "title": f"Article {number}"} for number in range(30))]
    file.write_text("".join(json.dumps(record) + "\n" for record in held), "utf-8")
    expected = {context.article for context in split_by_article(read_contexts(file)[0])[1]}

    assert 0 == run_command(["evaluate", *given, *QUICK, "--arms", "none", "--held-out"])

    assert expected == {row["article"] for row in rows(tmp_path / "out")}
    assert 0 < len(expected) < 30


def test_what_is_held_out_is_what_the_adapter_never_saw(file: Path) -> None:
    """Its own share counts; one that was trained on everything cannot be measured like this."""
    held = [{**records()[0], "title": f"Article {number}"} for number in range(30)]
    file.write_text("".join(json.dumps(record) + "\n" for record in held), "utf-8")
    contexts, _ = read_contexts(file)
    model: Any = SimpleNamespace(adapter=SimpleNamespace(settings=SimpleNamespace(held_out=0.2)))
    expected = [one.article for one in split_by_article(contexts, held_out=0.2)[1]]

    assert expected == [one.article for one in evaluation.held_out(contexts, model, file)]
    model.adapter.settings.held_out = 0.0
    with pytest.raises(UsageError, match="trained on all articles"):
        evaluation.held_out(contexts, model, file)


# Refusing


def test_bad_lines_are_counted(given: list[str], file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line that is no record is left out and said; the rest is evaluated."""
    with file.open("a", encoding="utf-8") as opened:
        opened.write('no json\n{"context": "Nothing is asked."}\n')

    assert 0 == run_command(["evaluate", *given, *QUICK, "--arms", "none"])

    assert "2 lines of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "cannot read"), ("", "found none that can be used"), ("[1]\nx\n", "found none that can be used")],
)
def test_a_file_without_questions_is_refused(
    given: list[str], file: Path, content: str | None, told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Missing, empty or of something else: one line, code 2, nothing written."""
    file.unlink()
    if content is not None:
        file.write_text(content, "utf-8")

    assert 2 == run_command(["evaluate", *given])

    assert told in last_line(capsys)
    assert not (tmp_path / "out").exists()


def test_only_long_form_is_not_enough(given: list[str], file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tasks that have no short answer cannot be scored."""
    record = {"context": "A pump.", "question": "Summarise it.", "answer": "A pump stands there.", "kind": "long"}
    file.write_text(json.dumps(record) + "\n", "utf-8")

    assert 2 == run_command(["evaluate", *given, *QUICK])

    assert "found only long-form ones" in last_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rates", "0,2"], "--rates must be at least 1, got 0"),
        (["--rates", "two"], "--rates takes integers"),
        (["--top-k", "0"], "--top-k must be at least 1, got 0"),
        (["--top-k", ","], "--top-k takes integers"),
        (["--questions", "0"], "--questions must be at least 1, got 0"),
        (["--arms", "text,txt"], "got txt"),
        (["--arms", ""], "--arms names no arm"),
        (["--adapter", "no/such/adapter"], "no adapter 'no/such/adapter'"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--suite", "none"], "quick"),
    ],
)
def test_what_makes_no_sense_is_refused(
    given: list[str], arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One line says what was expected and found, before anything is written."""
    assert 2 == run_command(["evaluate", *given, *arguments])

    lines = capsys.readouterr().err.strip().splitlines()
    assert 1 == len(lines)
    assert told in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_file_without_held_out_articles_is_refused(
    given: list[str], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is all for training has nothing to ask."""
    train = {context.article for context in split_by_article(read_contexts(file)[0])[0]}
    file.write_text("".join(json.dumps(record) + "\n" for record in records() if record["title"] in train), "utf-8")

    assert 2 == run_command(["evaluate", *given, "--held-out"])

    assert "no article that is held out" in last_line(capsys)


def test_an_adapter_of_another_base_is_refused(
    file: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are named in one line, and nothing was written."""
    model = tiny_model()
    model.new_adapter(rank=2, gists=1)
    assert model.adapter is not None
    model.adapter.save(tmp_path / "adapter")
    monkeypatch.setattr(engine_module, "Embedder", lambda path, **_: HashEmbedder())

    code = run_command(
        ["evaluate", str(file), "--model", str(folder), "--embedder", str(folder),
         "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]
    )  # fmt: skip

    assert 2 == code
    assert "base model 'tiny llama'" in last_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_damaged_settings_file_is_refused(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be compared is not gone on with."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text("{", "utf-8")

    assert 2 == run_command(["evaluate", *given, *QUICK])

    assert "settings.json is damaged" in last_line(capsys)
