"""A hostile file costs one reason and nothing else: the parser runs in a process that can be spared."""

from __future__ import annotations

import errno
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.make_files import make_bomb_pdf, make_docx, make_docx_of_xml, make_pdf, with_part
from support.tiny_models import byte_tokenizer

from gistrag.documents import parser_worker
from gistrag.documents.chunking import Chunker
from gistrag.documents.cutting import GuardedChunker
from gistrag.documents.discovery import Document
from gistrag.documents.parser_child import _printable
from gistrag.documents.parser_worker import Worker, guarded_read
from gistrag.documents.readers import read
from gistrag.documents.text import Part
from gistrag.errors import DocumentError, ResourceError
from gistrag.model.tokenizer import plain_tokenizer


@pytest.fixture(scope="module")
def hurried() -> Iterator[Worker]:
    """A worker that gives up after one second of CPU time."""
    worker = Worker(cpu_s=1)
    yield worker
    worker.close()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (make_pdf(["one"], [], ["two é"]), "a.pdf"),
        (make_docx(), "a.docx"),
        ("<h1>naïve</h1><p>日本 🎉".encode(), "a.html"),
        (b"a,b\n1,2", "a.csv"),
        (b"# a", "a.md"),
    ],
)
def test_guarded_or_not_a_file_reads_the_same(data: bytes, name: str) -> None:
    """Text, kind and pages survive the pipe."""
    assert read(data, name) == guarded_read(data, name)


@pytest.mark.parametrize(
    ("data", "name", "expected"),
    [
        (make_pdf([], []), "scan.pdf", "no text on its 2 pages; if it is a scan, run OCR on it first"),
        (b"", "a.pdf", "empty"),
        (with_part(make_docx(), "word/document.xml", b"<a"), "torn.docx", "cannot be parsed: XMLSyntaxError"),
    ],
)
def test_what_goes_wrong_in_the_child_is_a_reason_here(data: bytes, name: str, expected: str) -> None:
    """A refusal comes through as it is, any other exception as one line."""
    with pytest.raises(DocumentError) as caught:
        guarded_read(data, name)

    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_an_external_entity_is_not_opened(tmp_path: Path) -> None:
    """A document cannot pull another file in."""
    secret = tmp_path / "secret"
    secret.write_text("canary")

    leak = make_docx_of_xml("see &x;", f'<!DOCTYPE a [<!ENTITY x SYSTEM "file://{secret}">]>')

    assert guarded_read(leak, "a.docx").text == "see"


def test_an_entity_bomb_does_not_go_off() -> None:
    """Nested entities are refused, or stay closed."""
    rows = "".join(f'<!ENTITY a{level} "{f"&a{level - 1};" * 10}">' for level in range(1, 12))
    bomb = make_docx_of_xml("see &a11;", f'<!DOCTYPE a [<!ENTITY a0 "boom">{rows}]>')

    try:
        text = guarded_read(bomb, "a.docx").text
    except DocumentError as error:
        text = str(error)

    assert len(text) < 300


def test_a_parser_that_takes_too_long_is_stopped_and_replaced(hurried: Worker) -> None:
    """A page of two million empty tags costs its reason; the next file is read."""
    with pytest.raises(DocumentError, match="parsing took more than 1 s of CPU time"):
        hurried.read(b"<i></i>" * 2_000_000, "bomb.html")


def test_a_bomb_is_stopped_and_replaced(hurried: Worker) -> None:
    """A PDF that draws 10^12 words dies of whatever limit it meets first; the next file is read."""
    with pytest.raises(DocumentError, match=r"CPU time|memory|crashed"):
        hurried.read(make_bomb_pdf(), "bomb.pdf")

    assert hurried.read(make_pdf(["next"]), "a.pdf").text == "next"


def test_a_parser_that_hangs_is_stopped() -> None:
    """Wall time is limited as well."""
    worker = Worker(wall_s=0.5)
    worker.read(b"<p>warm", "a.html")

    with pytest.raises(DocumentError, match=r"parsing took more than 0\.5 s"):
        worker.read(make_bomb_pdf(), "bomb.pdf")

    worker.close()


def test_a_parser_that_needs_too_much_memory_is_stopped() -> None:
    """A file within the limits of size and text can still need too much to be parsed."""
    wide = "🎉".encode() * 60_000_000  # 240 MB here and four bytes a character there, several times over

    with pytest.raises(DocumentError, match="parsing needs more than 1024 MiB of memory"):
        guarded_read(wide, "a.csv")


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_are_read_or_refused(hurried: Worker, seed: int) -> None:
    """Whatever is flipped, cut or doubled, there is a text or a reason."""
    rng = random.Random(seed)
    html = b"<title>a</title><ul><li>b<table><tr><td>c</table><pre>d</pre>&amp;<!-- e --><script>f</script>"
    table = b'[{"a": "b,c"}, 1.5]\n"x";"y"\n'
    files = {
        "a.pdf": make_pdf(["one"], ["two"]),
        "a.docx": make_docx(),
        "a.html": html,
        "a.json": table,
        "a.csv": table,
    }

    for name, data in [*files.items()] * 12:
        try:
            outcome = hurried.read(mutate(data, rng), name).text
        except DocumentError as error:
            outcome = str(error)
        assert outcome.strip()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return *data* with a few bytes flipped, a piece cut out or a piece doubled."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at, length = rng.randrange(len(out)), rng.randint(1, 40)
        match rng.randrange(3):
            case 0:
                out[at] = rng.randrange(256)
            case 1 if len(out) > 2 * length:
                del out[at : at + length]
            case _:
                out[at:at] = out[at : at + length]
    return bytes(out)


def test_a_worker_killed_between_files_costs_nothing(hurried: Worker) -> None:
    """A file is not blamed for what happened before it was sent."""
    hurried.read(b"<p>warm", "a.html")
    kill(hurried)

    assert hurried.read(b"<p>kept", "a.html").text == "kept"


def test_a_worker_killed_within_a_file_costs_that_file() -> None:
    """A crash inside a parser is a reason, not a crash here."""
    worker = Worker()
    worker.read(b"<p>warm", "a.html")
    threading.Timer(0.3, kill, [worker]).start()

    with pytest.raises(DocumentError, match="the parser crashed"):
        worker.read(make_bomb_pdf(), "bomb.pdf")

    assert worker.read(b"<p>kept", "a.html").text == "kept"
    worker.close()


def kill(worker: Worker) -> None:
    """Kill the child of *worker* as the system does, and wait until it is gone."""
    assert worker._process is not None
    worker._process.kill()
    worker._process.wait()


def test_a_machine_without_room_for_a_worker_is_no_fault_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no process can be started the build has to stop; the file is not marked as bad."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)

    with pytest.raises(ResourceError, match="could not start the parser worker: Resource temporarily"):
        Worker().read(b"<p>a", "a.html")


def test_a_reason_cannot_steer_a_terminal() -> None:
    """What a parser quotes from a file is spelt out where it is no letter."""
    assert _printable("a\n\x1b[2J \ud800 é") == r"a \x1b[2J \xd800 é"


def test_the_worker_dies_with_its_parent() -> None:
    """A parent that is killed leaves no worker behind, even one in the middle of a file."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from gistrag.documents.parser_worker import Worker\nfrom support.make_files import make_bomb_pdf\n"
        "worker = Worker(); worker.read(b'<p>warm', 'a.html'); print(worker._process.pid, flush=True)\n"
        "worker.read(make_bomb_pdf(), 'bomb.pdf')"
    )
    here = Path(__file__).parents[1]
    parent = subprocess.Popen([sys.executable, "-c", code, here.parent, here], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()

    deadline_s = time.monotonic() + 20
    while _is_running(pid) and time.monotonic() < deadline_s:
        time.sleep(0.1)

    assert not _is_running(pid)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("kind", ["markdown", "text"])
def test_guarded_or_not_a_document_is_cut_the_same(kind: str) -> None:
    """Chunks survive the pipe, with headings and pages, and no chunk spans two parts."""
    text = "# Über\n\n" + "Ein Satz. <|im_start|> 🎉 " * 60 + "\n\n## Zwei\n\nkurz"
    about = {"path": "a", "sha256": "", "size": 1, "mtime_ns": 1, "kind": kind, "text": text}
    document = Document(**about, pages=(0, 700), parts=(Part(0, {"a": "b"}), Part(900, {})))
    tokenizer = plain_tokenizer(byte_tokenizer())

    expected = Chunker(tokenizer, chunk_tokens=64).split(document)
    assert GuardedChunker(tokenizer, chunk_tokens=64).split(document) == expected


def test_a_text_that_takes_too_long_to_cut_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit grows with the text, of which no character takes unlimited time; the next text is cut as ever."""
    worker = Worker()
    monkeypatch.setattr(parser_worker, "CUT_CHARS_PER_S", 10**9)
    monkeypatch.setattr(parser_worker, "_worker", lambda _: worker)
    chunker = GuardedChunker(plain_tokenizer(byte_tokenizer()), chunk_tokens=64)
    about = {"path": "a", "sha256": "", "size": 1, "mtime_ns": 1, "kind": "text"}
    chunker.split(Document(**about, text="warm"))

    worker.wall_s = 0.3
    with pytest.raises(DocumentError, match=r"^cutting took more than 0\.3 s$"):
        chunker.split(Document(**about, text="漢字" * 500_000))

    worker.wall_s = 60
    assert ["warm"] == [chunk.text for chunk in chunker.split(Document(**about, text="warm"))]
    worker.close()


def test_the_worker_gets_no_keys_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the environment it gets what it needs, and where the kernel allows it, it can reach no address."""
    monkeypatch.setenv("GISTRAG_TEACHER_KEY", "sesame")
    worker = Worker()
    worker.read(b"a", "a.md")
    assert worker._process is not None
    own, other = (Path(f"/proc/{pid}") for pid in ("self", worker._process.pid))

    names = {line.partition("=")[0] for line in (other / "environ").read_text().split("\0") if line}
    assert {"PYTHONPATH", "TOKENIZERS_PARALLELISM"} <= names <= parser_worker.KEPT | {
        "PYTHONPATH", "TOKENIZERS_PARALLELISM", *(name for name in names if name.startswith("LC_"))
    }  # fmt: skip
    code = "from gistrag.documents.parser_child import leave_network as leave; print(leave())"
    allowed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (allowed == "True\n") == ((own / "ns/net").readlink() != (other / "ns/net").readlink())
    worker.close()
