"""The two stages of a build, as the commands tell of them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gistrag.cli import main
from gistrag.engine import Engine
from gistrag.index.gist_worker import GistWorker
from gistrag.rag import GistRAG

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command on the index of two documents, and return its code and what it printed to both outputs."""
    monkeypatch.setattr(Engine, "load", lambda *given, **options: engine)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "mill.md").write_text("The mill stands by the river and grinds the wheat of the whole valley.")
    (docs / "bees.md").write_text("Bees gather nectar in spring and keep the honey in combs of wax for winter.")

    def command(verb: str, *arguments: str) -> tuple[int, str, str]:
        made = ["--adapter", "none"] if verb == "build" else []
        code = main.main([verb, *([str(docs)] if verb == "build" else []), "--index", str(tmp_path / "i"), *made,
                          *arguments])  # fmt: skip
        output = capsys.readouterr()
        return code, output.out, output.err

    return command


def test_a_build_that_makes_no_gists(run: Run) -> None:
    """It says how many are pending; the next build makes them and reads nothing again."""
    code, out, err = run("build", "--no-gists")
    again = json.loads(run("build")[1])

    assert (0, 2, 0) == (code, json.loads(out)["gists_pending"], json.loads(out)["gists_made"])
    assert "reading 2 documents\n" in err
    assert "pending: 2 gists; until they are made, their chunks are read as text\n" in err
    assert (2, 2, 0) == (again["unchanged"], again["gists_made"], again["gists_pending"])


def test_an_answer_says_what_is_still_to_come(run: Run) -> None:
    """On the line of its costs, and in the JSON."""
    run("build", "--no-gists")
    asked = ("query", "honey", "--max-new-tokens", "1")

    assert "2 gists still to be made" in run(*asked)[2]
    usage = json.loads(run(*asked, "--json")[1])["usage"]
    assert (2, 0) == (usage["text_pending"], usage["text_fallbacks"])


def test_inspect_says_how_far_the_gists_are(run: Run) -> None:
    """While some are pending, and of a single chunk too."""
    run("build", "--no-gists")
    before, chunk = run("inspect")[1], run("inspect", "--chunk", "1")[1]
    run("build")

    assert "; 0 of 2 chunks\n" in before
    assert "gists still to be made: read as text" in chunk
    assert " chunks\n" not in next(line for line in run("inspect")[1].splitlines() if line.startswith("gists "))


def test_bench_measures_no_index_without_gists(run: Run) -> None:
    """It would compare text with text."""
    run("build", "--no-gists")

    code, _, err = run("bench")
    assert (2, True) == (code, "the gists of 2 chunks are still to be made" in err)


@pytest.mark.parametrize(("options", "is_wanted"), [((), True), (("--no-gists",), False)])
def test_a_chat_makes_missing_gists(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], is_wanted: bool
) -> None:
    """By a worker of its own, unless it is told not to."""
    run("build", "--no-gists")
    workers: list[GistWorker] = []
    monkeypatch.setattr(GistWorker, "start", lambda worker: workers.append(worker))
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))

    assert 0 == run("chat", *options)[0]
    assert is_wanted == any(worker.is_wanted for worker in workers)


def test_an_opened_index_makes_no_gists(run: Run, tmp_path: Path) -> None:
    """`GistRAG.open` starts no worker by itself."""
    run("build", "--no-gists")

    with GistRAG.open(tmp_path / "i") as rag:
        rag.query("honey", max_new_tokens=1)
        assert (0, 2, False) == (rag.progress.done, rag.progress.chunks, rag.progress.is_working)
