"""The examples of README and manual run as they stand: Python, command lines, and what stands around them.

A tiny model takes the place of the real one, and a few short pages that of the manual. The tests of the packages for
LlamaIndex and LangChain run the pages about these; tests/server/ runs those about the server and MCP.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.live_server import serving
from support.pages import PAGES, PROGRAM, ROOT, fences, parse
from support.tiny_models import HashEmbedder, tiny_model

from gistrag import Engine, GistRAG, configure, searching
from gistrag.cli import main

ELSEWHERE = {"llama-index", "langchain", "server", "mcp"}  # run by other tests, see above
REAL = {"export"}  # needs the real model, in Python
PARSED_ONLY = {
    "serve": "runs until it is stopped; tests/cli/test_serve.py",
    "mcp": "runs until it is stopped; tests/server/test_mcp.py",
    "adapt": "trains for an hour; tests/cli/test_adapt.py",
    "synthesize": "loads a model by itself; tests/cli/test_synthesize.py",
    "train": "loads a model by itself; tests/cli/test_train.py",
    "evaluate": "loads a model by itself; tests/cli/test_evaluate.py",
    "bench": "measures for minutes; tests/cli/test_cli.py",
}
PARAGRAPH = "Paragraph {number} says what is in the house: the mill, the river and {number} sacks of wheat. " * 2
STAND_INS = ("command-line.md", "concepts.md", "safety.md", "sync.md")

with_python = [page for page in PAGES if fences(page, "python") and page.stem not in ELSEWHERE | REAL]
with_shell = [page for page in PAGES if fences(page, "bash") and page.stem not in ELSEWHERE]


@pytest.fixture(scope="module")
def wide() -> Engine:
    """A tiny model with a window wide enough for answers of the default length."""
    return Engine(tiny_model(dtype=torch.float32, max_position_embeddings=8192), HashEmbedder())


@pytest.fixture(scope="module")
def built(wide: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short pages and their indexes, under the names that the manual uses."""
    folder = tmp_path_factory.mktemp("manual")
    (folder / "docs").mkdir()
    (folder / "reports").mkdir()
    for name in STAND_INS:
        text = "\n\n".join(PARAGRAPH.format(number=number) for number in range(5))
        (folder / "docs" / name).write_text(f"# {name}\n\n{text}\n", "utf-8")
    (folder / "questions.txt").write_text("What is in the house?\n", "utf-8")
    GistRAG.from_folder(folder / "docs", index=folder / "index", engine=wide, adapter="none", gists="now").close()
    shutil.copytree(folder / "index", folder / "manual-index")
    (folder / "notes").mkdir()
    (folder / "notes" / "tea.md").write_text(f"# Tea\n\n{PARAGRAPH.format(number=1)}\n", "utf-8")
    notes = folder / "notes-index"
    GistRAG.from_folder(folder / "notes", index=notes, engine=wide, adapter="none", gists="now").close()
    return folder


@pytest.fixture
def place(built: Path, wide: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to follow the manual in, with a tiny model under any name."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Engine, "load", lambda *given, **options: wide)
    monkeypatch.setattr(searching, "find", lambda name: SimpleNamespace(path=Path(name)))
    monkeypatch.setattr(searching, "Embedder", lambda *given, **options: wide.embedder)
    monkeypatch.setattr(configure, "find", lambda name: SimpleNamespace(path=Path(name)))
    monkeypatch.setattr(configure, "find_adapter", lambda name, model: None)
    return tmp_path


def run_python(page: Path, blocks: list[str], **values: Any) -> None:
    """Run the Python examples of a page one after the other."""
    for block in blocks:
        exec(compile(block, str(page), "exec"), values)


@pytest.mark.parametrize("page", with_python, ids=lambda page: page.stem)
def test_python_runs(page: Path, place: Path, wide: Engine) -> None:
    """Every Python example of a page runs; a server answers where one is asked."""
    for package in ("llama_index.retrievers.gistrag", "langchain_gistrag", "openai", "fastapi"):
        pytest.importorskip(package)
    with serving({"index": place / "index"}, wide) as url, GistRAG.open("index") as opened:
        blocks = [block.replace("http://localhost:8000", url) for block in fences(page, "python")]
        run_python(page, blocks, rag=opened)


# Command lines


def shell_lines(page: Path) -> Iterator[tuple[list[str], str | None]]:
    """Yield the words of every command line of a page, up to a pipe or redirection, and the file it reads."""
    for line in "".join(fences(page, "bash")).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        stops = [at for at, word in enumerate(words) if set(word) <= set("<>|&;")]
        reads = words[words.index("<") + 1] if "<" in words else None
        if words:
            yield words[: stops[0] if stops else None], reads


@pytest.mark.parametrize("page", with_shell, ids=lambda page: page.stem)
def test_command_lines_run(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the program that a page shows ends well, in the order of the page."""
    for words, reads in shell_lines(page):
        if words[0] != "gistrag" or words[1] in PARSED_ONLY or words[1].startswith("--"):
            continue
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            monkeypatch.setattr(sys, "stdin", io.StringIO(Path(reads).read_text("utf-8") if reads else ""))
            code = main.main(words[1:])
        assert code == 0 or words[1] == "models", (words, shown.getvalue())  # 2 where the real models are missing


@pytest.mark.parametrize("page", [*with_shell, ROOT / "notebooks" / "README.md"], ids=lambda page: page.stem)
def test_other_lines_name_what_exists(page: Path) -> None:
    """Lines of pip name extras of the package, lines of make their targets, lines of torchrun a command that parses."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    known = {"gistrag", "pip", "make", "torchrun", "curl", "jupyter", "git", "cd", "pre-commit"}
    for words, _ in shell_lines(page):
        assert words[0] in known, words
        if words[0] == "make":
            assert set(words[1:]) <= set(targets)
        if words[0] == "torchrun":
            parse(["train", *words[words.index("gistrag") + 2 :]])
        if words[0] == "pip":
            named = {extra for word in words for extra in re.findall(r"^\.\[(.*)\]$", word)}
            assert {one for extra in named for one in extra.split(",")} <= set(project["optional-dependencies"])


def test_what_is_only_parsed_is_still_a_command() -> None:
    """The list of commands that are not run here names commands of the program, and tests that name the command."""
    assert set(PARSED_ONLY) - set(PROGRAM.commands) == set()
    for verb, reason in PARSED_ONLY.items():
        assert verb in (ROOT / reason.rpartition("; ")[2]).read_text("utf-8")


# With the real models


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # asked for by peft
def test_a_cartridge_answers_through_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page on export, from the command to the answer, on the default model with its adapter merged into it."""
    page = ROOT / "docs" / "export.md"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    text = "# Building\n\nA build does not follow symbolic links, whatever they point to."
    (tmp_path / "docs" / "safety.md").write_text(text, "utf-8")
    assert main.main(["build", "docs/", "--index", "index/", "--tokens-per-gist", "1", "--json"]) == 0
    assert main.main(["export", "--scope", "safety.md", "--output", "safety-cartridge/", "--json"]) == 0
    capsys.readouterr()

    run_python(page, fences(page, "python"))

    printed = capsys.readouterr().out
    with GistRAG.open("index/") as opened:
        answer = opened.query("What does a build do with symbolic links?", max_new_tokens=24)
    words, same = (text.replace(".", " ").split()[:2] for text in (answer.text, printed))
    assert words == same  # later, merged weights are rounded otherwise
