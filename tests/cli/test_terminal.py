"""No document, file name or message steers the terminal of who looks at an index."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support import small_index

from gistrag.answering.answer import Answer, Source
from gistrag.cli import output
from gistrag.cli.main import main
from gistrag.documents.discovery import Skipped
from gistrag.index.store import Store
from gistrag.terminal import steers

STEERING = {
    "title": "\x1b]0;PWNED\a",
    "clipboard": "\x1b]52;c;ZXZpbA==\a",
    "erased line": "\x1b[2K",
    "8-bit sequence": "\x9b31m",
    "carriage return": "\r",
    "forged line": "\n264 gist files are as recorded\n",
    "direction": "\u202e",
    "separator": "\u2028",
}
INVOCATIONS: tuple[tuple[str, ...], ...] = (
    ("inspect",),
    ("inspect", "--json"),
    ("inspect", "--document", "{path}"),
    ("inspect", "--chunk", "1"),
    ("inspect", "--chunk", "1", "--json"),
    ("inspect", "--document", "{path}.md"),
    ("verify",),
    ("verify", "--json"),
)


@pytest.fixture(params=STEERING.values(), ids=STEERING)
def hostile(request: pytest.FixtureRequest) -> str:
    """Characters that steer a terminal."""
    return str(request.param)


@pytest.fixture
def index(tmp_path: Path, hostile: str) -> Path:
    """An index with such characters in names, headings, text and reasons, and with a damaged gist."""
    folder = tmp_path / "index"
    with Store.build(folder) as store:
        small_index.configure(store)
        key = store.gists.key([1, 2, 3])
        store.gists.put({key: small_index.cache()})
        chunks = small_index.entries([f"Salt {hostile} and bread."], key=key, heading=(f"Trade{hostile}",))
        store.replace_document(small_index.document(f"salt{hostile}.md"), chunks)
        store.set_skipped([Skipped(path=f"x{hostile}.pdf", sha256="", reason=f"broken {hostile}")])
    small_index.gist_file(folder).write_bytes(b"damaged")
    return folder


@pytest.mark.parametrize("arguments", INVOCATIONS, ids=" ".join)
def test_commands_print_no_steering_character(
    arguments: tuple[str, ...], index: Path, hostile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is in an index, its names and its text come out as ordinary characters, a line for each thing."""
    main([*(argument.format(path=f"salt{hostile}.md") for argument in arguments), "--index", str(index)])

    printed = capsys.readouterr()
    assert printed.out or printed.err
    for line in (printed.out + printed.err).split("\n"):
        assert not any(map(steers, line)), line
    if arguments != ("inspect", "--chunk", "1"):  # which prints the text as it stands
        assert "264 gist files are as recorded" not in printed.out.split("\n")
    if "--json" in arguments and printed.out:
        assert json.loads(printed.out)


def test_answers_print_no_steering_character(hostile: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What a model repeats from a document, and the places of its sources, steer nothing; an answer keeps its lines."""
    source = Source(f"a{hostile}.md", None, (f"Head{hostile}",), 0, 1, 1.0, "", 1, as_text=True)

    class Told:
        answer = Answer(f"bread{hostile}", (source,))

        def __init__(self) -> None:
            self.pieces = iter([f"bread{hostile}"])

        def __iter__(self) -> Told:
            return self

        def __next__(self) -> str:
            return next(self.pieces)

    told: Any = Told()
    logging.getLogger("gistrag").setLevel(logging.INFO)
    output.print_answer(told)

    printed = capsys.readouterr()
    assert not any(steers(one) for one in (printed.out + printed.err) if one != "\n")


def test_messages_are_one_line(hostile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message of the library with a hostile name in it is one line."""
    printed = io.StringIO()
    monkeypatch.setattr("sys.stderr", printed)

    code = main(["inspect", "--index", f"/nowhere{hostile}"])

    assert code in (2, 4)
    assert printed.getvalue().count("\n") == 1
    assert not any(map(steers, printed.getvalue()[:-1]))
