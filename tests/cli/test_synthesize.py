"""The command `gistrag synthesize`, with an endpoint that behaves badly in every way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.teacher_endpoint import RUBBISH, Endpoint, serve
from support.tiny_models import tiny_model

from gistrag.cli import synthesize
from gistrag.cli.main import main as run_command
from gistrag.model.gist_model import GistModel

__all__ = ["serve"]  # a fixture

PLACES = ("harbour", "market", "station", "museum", "bridge", "library", "theatre", "garden", "mill", "castle")


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder of ten documents, one passage each."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for number, place in enumerate(PLACES):
        (folder / f"{place}.md").write_text(
            f"# The {place}\n\nThe {place} was opened by Adela Novak in {1900 + number}."
        )
    return folder


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> GistModel:
    """A tiny model in place of the base model."""
    model = tiny_model()
    monkeypatch.setattr(synthesize, "_load", lambda *arguments: model)
    for variable in synthesize.KEYS:
        monkeypatch.delenv(variable, raising=False)
    return model


def place_of(body: dict[str, Any]) -> str:
    """Return what the passage of a request is about."""
    return next(place for place in PLACES if f"The {place}" in body["messages"][-1]["content"])


def good(number: int, body: dict[str, Any]) -> str:
    """Return a question that is fine."""
    return f"Q: Which person opened the {place_of(body)} {place_of(body)}?\nA: Adela Novak"


def records(path: Path) -> list[dict[str, Any]]:
    """Return what is in a file of records."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def run(docs: Path, endpoint: Endpoint | None, *options: str) -> int:
    """Run the command on *docs*; it is quick to give up."""
    url = ("--base-url", endpoint.url, "--teacher", "tutor") if endpoint else ()
    output = str(docs.parent / "qa.jsonl")
    quick = ("--kinds", "detail", "--timeout", "0.3", "--retries", "1")
    return run_command(["synthesize", str(docs), "-o", output, *quick, *url, *options])


def test_a_bad_endpoint_costs_only_what_it_does_not_answer(
    docs: Path, base: GistModel, serve: Callable[..., Endpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors that pass are retried, what stays unanswered or rubbish is counted, and the next run gets the rest."""
    failed: set[str] = set()

    def moody(number: int, body: dict[str, Any]) -> Any:
        place = place_of(body)
        is_first = place not in failed
        failed.add(place)
        moods = {"market": RUBBISH[0], "station": "hang", "museum": RUBBISH[6]}
        once = {"bridge": RUBBISH[6], "library": RUBBISH[0], "theatre": (429, {"Retry-After": "0.01"}, b"")}
        if place == "mill":
            return "I am only a model."
        return moods.get(place) or (once.get(place) if is_first else None) or good(number, body)

    moods_code = run(docs, serve(moody), "--json")
    first = json.loads(capsys.readouterr().out)
    fine_code = run(docs, serve(good), "--json")
    second = json.loads(capsys.readouterr().out)

    assert moods_code == 0
    assert fine_code == 0
    assert first["written"] == {"detail": 6}
    assert first["dropped"] == {"unanswered": 3, "unreadable": 1}
    assert second["done_before"] == 7
    assert second["written"] == {"detail": 3}
    assert second["dropped"] == {}
    assert len({record["source"] for record in records(docs.parent / "qa.jsonl")}) == 9


def test_an_endpoint_that_is_down_ends_with_one_line(
    docs: Path, base: GistModel, serve: Callable[..., Endpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is lost: with the endpoint up again the same command does it all."""
    endpoint = serve(good)
    endpoint.close()

    code = run(docs, endpoint)
    told = capsys.readouterr().err

    assert code == 5
    assert "the teacher answered none of 10 requests" in told.splitlines()[-1]
    assert "Traceback" not in told
    assert run(docs, serve(good)) == 0
    assert len(records(docs.parent / "qa.jsonl")) == 10


def test_strict_ends_with_3(docs: Path, base: GistModel, serve: Callable[..., Endpoint]) -> None:
    """Where a request was not answered or a document not read, and only then."""
    (docs / "broken.pdf").write_text("no pdf")

    assert run(docs, serve(good)) == 0
    assert run(docs, serve(good), "--strict") == 3
    (docs / "broken.pdf").unlink()
    assert run(docs, serve(good), "--strict") == 0


@pytest.mark.parametrize("variable", synthesize.KEYS)
def test_the_key_comes_from_the_environment(
    docs: Path,
    base: GistModel,
    serve: Callable[..., Endpoint],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
) -> None:
    """It is sent, and shown nowhere."""
    monkeypatch.setenv(variable, "sesame")
    endpoint = serve(lambda number, body: good(number, body) if number else (401, {}, b"who are you?"))

    refused = run(docs, endpoint, "--debug")
    accepted = run(docs, endpoint, "--debug")

    captured = capsys.readouterr()
    assert refused == 2
    assert accepted == 0
    assert {headers["Authorization"] for headers in endpoint.headers} == {"Bearer sesame"}
    assert "GISTRAG_TEACHER_KEY" in captured.err
    assert "sesame" not in captured.err + captured.out + (docs.parent / "qa.jsonl").read_text()


def test_people_get_counts(
    docs: Path, base: GistModel, serve: Callable[..., Endpoint], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is ahead, what was written by kind, what was dropped and why, and which files were skipped."""
    (docs / "broken.pdf").write_text("no pdf")

    run(docs, serve(lambda number, body: good(number, body) if number else "nothing"), "--kinds", "detail,planted")

    told = capsys.readouterr()
    assert "writing 20 texts" in told.err
    assert "skipped broken.pdf: " in told.err
    assert "dropped: 1 unreadable" in told.err
    assert "9 detail, " in told.err
    assert told.out == ""


def test_json_is_one_line(docs: Path, base: GistModel, capsys: pytest.CaptureFixture[str]) -> None:
    """For programs, nothing else on standard output; with --quiet nothing on standard error."""
    code = run(docs, None, "--kinds", "planted", "--limit", "4", "--json", "--quiet")

    captured = capsys.readouterr()
    assert code == 0
    assert captured.err == ""
    assert sum(json.loads(captured.out)["written"].values()) == 4
    assert captured.out.count("\n") == 1


def test_the_local_model_can_write(docs: Path, base: GistModel, capsys: pytest.CaptureFixture[str]) -> None:
    """Without an endpoint the base model is asked; what a random one writes is dropped and counted."""
    assert run(docs, None, "--kinds", "detail,long", "--limit", "2", "--json") == 0

    done = json.loads(capsys.readouterr().out)
    assert sum(done["dropped"].values()) + sum(done["written"].values()) == 4


def test_a_file_of_contexts_needs_no_model_for_planted_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is loaded that is not needed."""
    monkeypatch.setattr(synthesize, "_load", lambda *arguments: pytest.fail("loaded the model"))
    line = {"title": "Towers", "context": "A tower.", "qas": [{"question": "What?", "answers": ["tower"]}]}
    (tmp_path / "squad.jsonl").write_text(json.dumps(line))

    code = run_command(
        ["synthesize", str(tmp_path / "squad.jsonl"), "-o", str(tmp_path / "p.jsonl"), "--kinds", "probe"]
    )

    assert code == 0
    assert records(tmp_path / "p.jsonl")[0]["source"] == "Towers"


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (("--kinds", "riddle"), "riddle"),
        (("--kinds", ","), "--kinds takes"),
        (("--teacher", "tutor"), "--base-url and --teacher go together"),
        (("--base-url", "localhost:8000", "--teacher", "tutor"), "http://localhost:8000/v1"),
        (("-o", "missing/folder/qa.jsonl"), "cannot write"),
    ],
)
def test_what_makes_no_sense_is_refused(
    docs: Path, base: GistModel, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], hint: str
) -> None:
    """One line and code 2."""
    assert run(docs, None, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert hint in line


def test_an_empty_folder_is_refused(tmp_path: Path, base: GistModel, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and code 2."""
    (tmp_path / "docs").mkdir()

    assert run(tmp_path / "docs", None) == 2
    assert "found none; check the folder" in capsys.readouterr().err


def test_a_missing_source_is_refused(tmp_path: Path, base: GistModel) -> None:
    """As any argument that names nothing."""
    assert run(tmp_path / "nowhere", None) == 2
