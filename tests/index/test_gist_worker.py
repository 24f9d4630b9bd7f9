"""Gists made in the background: what was asked for first, resumable at any moment, never in the way of an answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import HashEmbedder, byte_tokenizer, tiny_model, tiny_network

from gistrag.answering import judge
from gistrag.engine import Engine
from gistrag.errors import FingerprintMismatchError, IndexLockedError, ResourceError
from gistrag.index import background, gist_maker, gist_worker
from gistrag.index.background import Inbox, work
from gistrag.index.integrity import check
from gistrag.index.store import BACKGROUND, Store, pending_chunks
from gistrag.kv.cache import GistCache
from gistrag.model.gist_model import GistModel
from gistrag.rag import GistRAG
from gistrag.settings import GistSettings
from gistrag.storage import files

LIMIT_S = 60.0
GOODS = ("salt", "rye", "honey", "wax", "silver", "rope", "tea", "wool")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a folder, which a child can load."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_network().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(GistModel.load(folder, device="cpu"), HashEmbedder())  # type: ignore[arg-type]


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder of documents, one chunk each."""
    return fill(tmp_path / "docs", 8)


def fill(docs: Path, count: int) -> Path:
    docs.mkdir(exist_ok=True)
    for number in range(count):
        goods = GOODS[number % len(GOODS)]
        text = f"Caravan {number} carried {goods} over the pass in the {number}th year, and {goods} it was that paid."
        (docs / f"{number:03}.md").write_text(text, "utf-8")
    return docs


@pytest.fixture
def build(docs: Path, engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., GistRAG]:
    """Build the index beside the documents, with a model that a child can load."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def made(**options: Any) -> GistRAG:
        settings = {"model": str(folder), "adapter": "none", "placement": "selected", "engine": engine, **options}
        return GistRAG.from_folder(docs, index=docs.parent / "index", device="cpu", **settings)

    return made


def await_true(is_so: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Return when something has become true."""
    end_s = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end_s, "not in time"
        time.sleep(0.02)


def is_complete(rag: GistRAG) -> bool:
    return rag.progress.done == rag.progress.chunks


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def child_of(rag: GistRAG) -> subprocess.Popen[bytes]:
    process = rag._worker._process
    assert process is not None
    return process


@pytest.fixture
def inbox() -> tuple[Inbox, Callable[[object], None]]:
    """An inbox, and a function that sends it a message; its parent is this process, which never goes."""
    reading, writing = os.pipe()

    def send(message: object) -> None:
        os.write(writing, json.dumps(message).encode() + b"\n")

    return Inbox(os.fdopen(reading, "rb"), os.getppid()), send  # the pipe stays open: at its end the process would end


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the gists that are made in this process from here on."""
    keys: list[str] = []
    real = gist_maker.make

    def spy(model: GistModel, wanted: Mapping[str, Sequence[int]], settings: GistSettings) -> Any:
        keys.extend(wanted)
        return real(model, wanted, settings)

    monkeypatch.setattr(background, "make", spy)
    monkeypatch.setattr(background, "register_module_forward_pre_hook", lambda hook: None)
    monkeypatch.setattr(background, "BATCH_TOKENS", 1)  # a chunk is a batch
    return keys


def test_an_index_answers_while_its_gists_are_made(build: Callable[..., GistRAG]) -> None:
    """`from_folder` returns with a working index; its gists come without a hand, and take the place of the text."""
    with build() as rag:
        first = rag.query("Who carried rye?", top_k=8, max_new_tokens=1)
        await_true(lambda: is_complete(rag))
        last = rag.query("Who carried rye?", top_k=8, max_new_tokens=1)

    assert (8, 0) == (first.usage.text_pending + sum(not source.as_text for source in first.sources),
                      first.usage.text_fallbacks)  # fmt: skip
    assert (0, 0, 0) == (last.usage.text_pending, last.usage.text_fallbacks, last.usage.text_tokens)
    assert len(last.sources) == 8


def test_gists_made_in_the_background_are_the_same(build: Callable[..., GistRAG], docs: Path) -> None:
    """In every number they are what a build makes, and the finished index is sound and has its manifest."""
    with build() as rag:
        await_true(lambda: is_complete(rag))
        await_true(lambda: not rag.progress.is_working)
        findings = check(rag.store, full=True)
        mine = {row.key: rag.store.gists.load(row.key) for row in rag.store.gists.rows()}
    (docs.parent / "index").rename(docs.parent / "first")
    with build(gists="now") as rag:
        its = [rag.store.gists.load(row.key) for row in rag.store.gists.rows()]

    assert (True, 8, []) == (findings.is_sound, len(mine), findings.unreferenced)
    found = sorted(GistCache.unpacked(cache).kv.sum().item() for cache in mine.values())
    assert found == pytest.approx(
        sorted(GistCache.unpacked(cache).kv.sum().item() for cache in its), abs=1e-3
    )  # batches differ


def test_what_was_asked_for_comes_first(
    build: Callable[..., GistRAG], inbox: tuple[Inbox, Callable[[object], None]], made: list[str]
) -> None:
    """The chunks of the last question, then those of earlier ones, then the documents in their order."""
    with build(gists="none") as rag:
        chunks = pending_chunks(rag.store, most=8)
    one, send = inbox
    send([chunks[6].id])
    send([chunks[4].id, chunks[2].id])
    await_true(lambda: len(one.asked()) == 3)

    work(rag.folder, one, on_demand=False, device="cpu")

    assert [chunks[i].gist_key for i in (4, 2, 6, 0, 1, 3, 5, 7)] == made


def test_on_demand_makes_nothing_else(build: Callable[..., GistRAG]) -> None:
    """Only the chunks that questions retrieved get gists."""
    with build(gists="on demand") as rag:
        assert not rag.progress.is_working
        answer = rag.query("Who carried rye?", top_k=1, max_new_tokens=1)
        await_true(lambda: rag.progress.done == 1)
        again = rag.query("Who carried rye?", top_k=1, max_new_tokens=1)
        assert (1, 8, True) == (rag.progress.done, rag.progress.chunks, rag.progress.is_working)

    assert (1, 0) == (answer.usage.text_pending, again.usage.text_pending)


def test_given_texts_are_asked_for_too(build: Callable[..., GistRAG]) -> None:
    """A text that equals a chunk is read as text while its gists are still to be made, and asks for them."""
    with build(gists="on demand") as rag:
        text = rag.chunks()[5].text
        answer = rag.stream_from("Who carried it?", [text], max_new_tokens=1).result()
        await_true(lambda: rag.progress.done == 1)
        again = rag.stream_from("Who carried it?", [text], max_new_tokens=1).result()

    assert (1, 0, 0) == (answer.usage.text_pending, answer.usage.gists_made, answer.usage.gist_slots)
    assert (0, 0, True) == (again.usage.text_pending, again.usage.gists_made, again.usage.gist_slots > 0)


def test_closing_ends_the_worker_and_the_next_goes_on(build: Callable[..., GistRAG], docs: Path) -> None:
    """What was committed stays, and nothing of it is made again."""
    fill(docs, 70)
    with build() as rag:
        child = child_of(rag)
        await_true(lambda: rag.progress.done > 0)
    assert child.returncode == 0
    with Store.open(rag.folder) as store:
        before = {row.key for row in store.gists.rows()}
    assert 0 < len(before) < 70

    with build() as rag:
        assert (70, 0) == (rag.report.unchanged, rag.report.chunks) if rag.report else ()
        await_true(lambda: is_complete(rag))
        assert before < {row.key for row in rag.store.gists.rows()}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_worker_loses_a_batch_at_most(
    build: Callable[..., GistRAG], docs: Path, caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    """The index answers on, one line says what happened, and the next worker makes the rest."""
    fill(docs, 70)
    with build() as rag:
        await_true(lambda: rag.progress.done > 0)
        child_of(rag).send_signal(number)
        await_true(lambda: bool(rag.progress.error))
        answer = rag.query("Who carried rye?", top_k=3, max_new_tokens=1)
        assert (3, 0) == (len(answer.sources), answer.usage.text_fallbacks)
        assert check(rag.store).is_sound
        rag.sync()
        await_true(lambda: is_complete(rag))

    told = [record.getMessage() for record in caplog.records if record.module == "gist_worker"]
    assert [True] == ["no gists are made for" in line for line in told]


PARENT = """
import sys, time
sys.path.insert(0, {tests!r})
from support.tiny_models import HashEmbedder
from gistrag.engine import Engine
from gistrag.model.gist_model import GistModel
from gistrag.rag import GistRAG
engine = Engine(GistModel.load({model!r}, device="cpu"), HashEmbedder())
rag = GistRAG.from_folder({docs!r}, index={index!r}, engine=engine, model={model!r}, adapter="none", gists="on demand")
rag.query("rye", top_k=1, max_new_tokens=1)
print(rag._worker._process.pid, flush=True)
time.sleep({sleep_s})
"""


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_a_worker_ends_with_its_process(docs: Path, folder: Path, end: str) -> None:
    """Killed or at its exit, a process leaves no worker behind."""
    values = {"tests": str(Path(__file__).parents[1]), "model": str(folder), "docs": str(docs)}
    code = PARENT.format(**values, index=str(docs.parent / "index"), sleep_s=0 if end == "exit" else 600)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if end == "kill":
            parent.kill()
        parent.wait()

    await_true(lambda: not is_running(pid))


def test_one_worker_for_an_index(build: Callable[..., GistRAG]) -> None:
    """A second one ends quietly while the first works."""
    with build(gists="none") as rag, files.lock(rag.folder / background.LOCK, command="another worker"):
        rag._start_worker("background", "cpu")
        child = child_of(rag)

        assert (0, "") == (child.wait(LIMIT_S), rag.progress.error)


@pytest.mark.parametrize("harm", ["another model", "no model", "no room"])
def test_a_worker_that_cannot_work_is_one_line(
    build: Callable[..., GistRAG],
    inbox: tuple[Inbox, Callable[[object], None]],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    made: list[str],
    harm: str,
) -> None:
    """The index answers on from text, and progress says why no gists come."""
    if harm == "no room":
        with build(gists="none") as rag, monkeypatch.context() as patch:
            patch.setattr(files, "free_bytes", lambda path: 10)
            with pytest.raises(ResourceError, match="has 10 "):
                work(rag.folder, inbox[0], on_demand=False, device="cpu")
        return
    other = Engine(tiny_model(), HashEmbedder())  # type: ignore[arg-type]
    model = str(folder) if harm == "another model" else str(folder.with_name("gone"))
    with build(engine=other, model=model) as rag:
        await_true(lambda: bool(rag.progress.error))
        answer = rag.query("rye", top_k=2, max_new_tokens=1)

    assert (2, 2) == (len(answer.sources), answer.usage.text_pending)
    told = [record.getMessage() for record in caplog.records if record.module == "gist_worker"]
    assert [(True, 0)] == [("it answers from text" in line, line.count("\n")) for line in told]


def test_a_folder_that_may_not_be_written_gets_no_worker(
    build: Callable[..., GistRAG], engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is answered from as it is, without a word."""
    with build(gists="none") as rag:
        monkeypatch.setattr(gist_worker.os, "access", lambda path, mode: False)

    with GistRAG.open(rag.folder, engine=engine, gists="background") as rag:
        assert 1 == len(rag.query("rye", top_k=1, max_new_tokens=1).sources)
        assert (False, "") == (rag.progress.is_working, rag.progress.error)
    assert [] == [record for record in caplog.records if record.module == "gist_worker"]


def test_sync_beside_the_own_worker(build: Callable[..., GistRAG], docs: Path) -> None:
    """A sync in the middle of the background work waits for no more than a batch, and its documents get gists too."""
    fill(docs, 50)
    with build() as rag:
        await_true(lambda: rag.progress.done > 0)
        for number in range(3):
            (docs / f"new{number}.md").write_text(f"A new caravan, the {number}th, carried glass.", "utf-8")
            assert [f"new{number}.md"] == rag.sync().added
        await_true(lambda: is_complete(rag))

        assert 53 == rag.progress.chunks


def test_builders_wait_while_a_batch_is_kept(tmp_path: Path) -> None:
    """They wait for a worker in the background, and for no other builder."""
    taken, release = threading.Event(), threading.Event()

    def hold(command: str) -> None:
        with files.lock(tmp_path / "lock", command=command):
            taken.set()
            release.wait(LIMIT_S)

    holder = threading.Thread(target=hold, args=(BACKGROUND,))
    holder.start()
    taken.wait(LIMIT_S)
    threading.Timer(0.2, release.set).start()
    with Store.build(tmp_path):
        assert release.is_set()
    holder.join()
    taken.clear()
    release.clear()
    holder = threading.Thread(target=hold, args=("gistrag build",))
    holder.start()
    taken.wait(LIMIT_S)
    with pytest.raises(IndexLockedError, match="gistrag build"), Store.build(tmp_path):
        pass
    release.set()
    holder.join()


def test_a_builder_that_holds_the_index_is_waited_for(
    build: Callable[..., GistRAG], inbox: tuple[Inbox, Callable[[object], None]], made: list[str]
) -> None:
    """Nothing is computed meanwhile, since the builder may be making the same gists."""
    with build(gists="none") as rag:
        worker = threading.Thread(
            target=work, args=(rag.folder, inbox[0]), kwargs={"on_demand": False, "device": "cpu"}
        )
        with files.lock(rag.folder / "lock", command="gistrag build"):
            worker.start()
            time.sleep(0.5)
            assert [] == made
        worker.join(LIMIT_S)

        assert is_complete(rag)


def test_gists_that_are_not_wanted_any_more_are_dropped(
    build: Callable[..., GistRAG],
    inbox: tuple[Inbox, Callable[[object], None]],
    made: list[str],
    docs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A document that goes while its gists are made leaves no gist behind."""
    rag = build(gists="none")
    real = background.make

    def meddle(*given: Any) -> Any:
        if not made:
            (docs / "000.md").unlink()
            rag._worker.is_wanted = True  # so that the sync makes no gists itself
            monkeypatch.setattr(rag._worker, "start", lambda: None)
            rag.sync()
        return real(*given)

    monkeypatch.setattr(background, "make", meddle)
    work(rag.folder, inbox[0], on_demand=False, device="cpu")

    with rag:
        assert (7, 7, []) == (rag.progress.done, len(rag.store.gists.rows()), check(rag.store).unreferenced)


def test_gists_that_are_not_finite_stay_text(
    build: Callable[..., GistRAG],
    inbox: tuple[Inbox, Callable[[object], None]],
    made: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such a chunk is read as text for good, and is no damage."""
    real = background.make

    def poisoned(*given: Any) -> dict[str, GistCache | None]:
        is_first = not made
        caches = real(*given)
        return dict.fromkeys(caches) if is_first else caches

    monkeypatch.setattr(background, "make", poisoned)
    with build(gists="none") as rag:
        work(rag.folder, inbox[0], on_demand=False, device="cpu")
        usage = rag.query("rye", top_k=8, max_new_tokens=1).usage

        assert (7, 7, 0, 0) == (rag.progress.done, rag.progress.chunks, usage.text_pending, usage.text_fallbacks)
        assert check(rag.store, full=True).is_sound


def test_another_model_is_loaded_when_the_index_is_rebuilt(
    build: Callable[..., GistRAG],
    inbox: tuple[Inbox, Callable[[object], None]],
    made: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker never puts gists of one model into an index of another."""
    other = Engine(tiny_model(), HashEmbedder())  # type: ignore[arg-type]
    real = background.make
    with build(gists="none") as rag:

        def meddle(*given: Any) -> Any:
            monkeypatch.setattr(background, "make", real)
            build(gists="none", engine=other, rebuild=True).close()
            return real(*given)

        monkeypatch.setattr(background, "make", meddle)
        with pytest.raises(FingerprintMismatchError):
            work(rag.folder, inbox[0], on_demand=False, device="cpu")
        with Store.open(rag.folder) as store:
            assert [] == store.gists.rows()


def test_a_pause_ends(inbox: tuple[Inbox, Callable[[object], None]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed until "go", or until the longest pause is over."""
    one, send = inbox
    waited = []
    for longest_s, ends in ((60.0, True), (0.3, False)):
        monkeypatch.setattr(background, "PAUSE_S", longest_s)
        send("pause")
        await_true(lambda: one._paused_until_s > time.monotonic())
        if ends:
            threading.Timer(0.1, send, ("go",)).start()
        started_s = time.monotonic()
        one.await_go()
        waited.append(0.05 < time.monotonic() - started_s < LIMIT_S)

    assert [True, True] == waited


def test_questions_pause_the_worker(build: Callable[..., GistRAG], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first of several questions to the end of the last, an abandoned one included."""
    sent: list[object] = []
    monkeypatch.setattr(judge, "generate_steps", lambda model, *given, **options: iter(model.encode("hello")))
    with build(gists="none") as rag:
        monkeypatch.setattr(rag._worker, "_send", sent.append)
        one, other = (rag.stream("rye", max_new_tokens=5) for _ in range(2))
        assert ["h", "h"] == [next(one), next(other)]
        one.result()
        assert ["pause"] == sent
        other.close()

    assert ["pause", "go"] == sent
