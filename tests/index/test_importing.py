"""Documents leave an index as one file and answer in another; a file that is not right changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from support.tiny_models import HashEmbedder, byte_tokenizer, tiny_network

from gistrag import rag as rag_module
from gistrag.cli.main import main as run_command
from gistrag.engine import Engine
from gistrag.errors import CorruptGistError, FingerprintMismatchError, UsageError
from gistrag.index import document_file
from gistrag.index.store import Store
from gistrag.kv.cache import GistCache
from gistrag.model.gist_model import GistModel
from gistrag.rag import GistRAG

BEES = "# Bees\n\nBees gather nectar in spring and keep the honey in combs of wax for winter.\n"
MILLS = "# Mills\n\nThe mill by the river grinds the wheat of the valley.\n\n## Price\n\nA sack costs nine coins.\n"
MODEL_OF_TESTS = {"chunk_tokens": 64, "gists": "now"}


@pytest.fixture
def file(tmp_path: Path, engine: Engine) -> Path:
    """The file of a document, exported from a first index."""
    docs = tmp_path / "first docs"
    docs.mkdir()
    (docs / "mills.md").write_text(MILLS, "utf-8")
    with GistRAG.from_folder(docs, index=tmp_path / "first", engine=engine, **MODEL_OF_TESTS) as made:
        made.export_documents(["mills.md"], tmp_path / "mills.gists")
    return tmp_path / "mills.gists"


@pytest.fixture
def second(tmp_path: Path, engine: Engine) -> GistRAG:
    """A second index, of another folder."""
    docs = tmp_path / "second docs"
    docs.mkdir()
    (docs / "bees.md").write_text(BEES, "utf-8")
    return GistRAG.from_folder(docs, index=tmp_path / "second", engine=engine, **MODEL_OF_TESTS)


def gists_of(store: Store, path: str) -> list[torch.Tensor]:
    """Return keys and values of every chunk of a document."""
    return [GistCache.unpacked(store.gists.load(str(chunk.gist_key))).kv for chunk in store.chunks_of(path)]


def state(folder: Path) -> list[tuple[str, bytes]]:
    """Return the rows that an answer depends on, and every gist file."""
    with Store.open(folder) as store:
        rows = repr([store.documents(), [store.chunks_of(row.path) for row in store.documents()], store.skipped()])
    files = sorted((folder / "gists").rglob("*.safetensors"))
    return [("rows", rows.encode()), *((path.name, path.read_bytes()) for path in files)]


def test_an_imported_document_answers_and_is_cited(file: Path, second: GistRAG, tmp_path: Path) -> None:
    """From the gists it brought, bit by bit, with its headings; its summary and words are searched too."""
    assert ["mills.md"] == second.import_documents(file)

    with Store.open(tmp_path / "first") as first, Store.open(tmp_path / "second") as store:
        one, other = gists_of(first, "mills.md"), gists_of(store, "mills.md")
        assert len(one) > 1
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
        names = ("text", "heading", "start", "end", "page", "tokens", "ordinal")
        chunks = [
            [[getattr(row, name) for name in names] for row in held.chunks_of("mills.md")] for held in (first, store)
        ]
        assert chunks[0] == chunks[1]
        assert not store.gists.pending()
    answer = second.query("What does a sack cost?", top_k=1, max_new_tokens=2)
    assert (["mills.md"], 0) == ([source.path for source in answer.sources], answer.usage.text_fallbacks)
    assert ["bees.md", "mills.md"] == [row.path for row in second.documents()]
    assert 0 == run_command(["verify", "--index", str(tmp_path / "second"), "--full"])


def test_builds_leave_imported_documents_alone(file: Path, second: GistRAG, tmp_path: Path) -> None:
    """A sync, one that verifies, a damaged gist and a rebuild with other settings: it stays and has its gists."""
    second.import_documents(file)
    options: dict[str, Any] = {"index": tmp_path / "second", "engine": second.engine, "gists": "now"}
    docs = tmp_path / "second docs"
    (docs / "tea.md").write_text("Tea is picked by hand in the hills above the town.", "utf-8")

    for given in ({}, {"verify": True}, {"rebuild": True, "tokens_per_gist": 3}):
        with GistRAG.from_folder(docs, **options, **given) as rag:
            assert rag.report is not None
            assert [] == rag.report.removed
            assert ["bees.md", "mills.md", "tea.md"] == [row.path for row in rag.documents()]
            assert all(row.gists_current and row.vectors_current for row in rag.documents())
            assert gists_of(rag.store, "mills.md")
            broken = rag.store.gists.path(str(rag.store.chunks_of("mills.md")[0].gist_key))
        broken.write_bytes(b"no gist")
    with GistRAG.from_folder(docs, **options, verify=True) as rag:
        assert gists_of(rag.store, "mills.md")


def test_a_file_of_the_folder_at_the_same_path_is_told(file: Path, second: GistRAG, tmp_path: Path) -> None:
    """Neither replaces the other without a word: the build skips the file, and an import is refused."""
    second.import_documents(file)
    own = tmp_path / "second docs" / "mills.md"
    own.write_text("Another document about mills, in the folder of this index.", "utf-8")
    report = second.sync()
    assert [("mills.md", "an imported document has this path; gistrag import --remove gives it up")] == [
        (row.path, row.reason) for row in report.skipped
    ]

    second.remove_imported(["mills.md"])
    assert ["bees.md"] == [row.path for row in second.documents()]
    assert ["mills.md"] == second.sync().added
    with pytest.raises(UsageError, match=r"holds mills\.md of its own folder, and .*mills\.gists another"):
        second.import_documents(file)
    with pytest.raises(UsageError, match=r"no imported document 'mills\.md' in .*; these are: none"):
        second.remove_imported(["mills.md"])


def test_a_gist_that_is_missing_is_made(file: Path, second: GistRAG, tmp_path: Path) -> None:
    """A pending or damaged gist is left out of the file; the next build of the other index makes it."""
    with GistRAG.open(tmp_path / "first", engine=second.engine) as first:
        expected = gists_of(first.store, "mills.md")
        first.store.gists.path(str(first.store.chunks_of("mills.md")[0].gist_key)).write_bytes(b"no gist")
        first.export_documents(["mills.md"], tmp_path / "part.gists")

    second.import_documents(tmp_path / "part.gists")
    assert 1 == len(second.store.gists.pending())
    second.sync()

    for one, other in zip(expected, gists_of(second.store, "mills.md"), strict=True):
        torch.testing.assert_close(one, other)


# A file that is not right


def changed(file: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> Path:
    """Rewrite a file with other contents, and a hash that fits them: an attacker can do that too."""
    data = file.read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    contents, tensors = json.loads(metadata["contents"]), safetensors.numpy.load(data)
    change(contents, tensors)
    metadata["contents"] = json.dumps(contents)
    gists = [tensors[f"gist {number}"].tobytes() for number in range(sum(name != "none" for name in tensors))]
    metadata["sha256"] = document_file._seal(metadata["contents"], gists)
    file.write_bytes(safetensors.numpy.save(tensors, metadata))
    return file


def document(contents: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = contents["documents"][0]
    return found


PATHS = (
    "../mills.md", "a/../../mills.md", "/etc/mills.md", "mills\0.md", "a//b.md", "./a.md", "", "..", "a\nb.md",
    "C:\\mills.md", "..\\mills.md", "\\\\host\\mills.md", "x" * 300, "x/" * 3000 + "y.md", "\ud800.md", 7, None,
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_escapes_is_refused(file: Path, second: GistRAG, tmp_path: Path, path: object) -> None:
    """Whatever system it would escape on; the index stays as it was."""
    before = state(tmp_path / "second")
    changed(file, lambda contents, _: document(contents).update(path=path))

    with pytest.raises(CorruptGistError, match=r"mills\.gists: expected a whole file of gistrag export"):
        second.import_documents(file)

    assert before == state(tmp_path / "second")


@pytest.mark.parametrize(
    "change",
    [
        lambda contents, _: contents.update(documents=7),
        lambda contents, _: contents.update(gist_fingerprint=[]),
        lambda contents, _: contents["documents"].append(document(contents)),
        lambda contents, _: document(contents).update(kind="x" * 99),
        lambda contents, _: document(contents).update(sha256="no hash"),
        lambda contents, _: document(contents).update(size=-1),
        lambda contents, _: document(contents)["chunks"][0].update(text=""),
        lambda contents, _: document(contents)["chunks"][0].update(text="\ud800"),
        lambda contents, _: document(contents)["chunks"][0].update(heading="Mills"),
        lambda contents, _: document(contents)["chunks"][0].update(page=True),
        lambda contents, _: document(contents)["chunks"][0].update(start=2**80),
        lambda contents, _: document(contents)["chunks"][0].update(gist=99),
        lambda contents, _: document(contents)["chunks"][0].update(gist=1),
        lambda contents, _: document(contents)["chunks"][0].update(text="Other words than those of the gists."),
        lambda contents, _: document(contents)["chunks"][0].update(text="word " * 900, gist=None),
        lambda contents, _: document(contents)["chunks"][0].update(metadata={"date": "2026-13-45"}),
        lambda contents, _: document(contents)["chunks"][0].update(metadata={"owner": "Ada"}),
        lambda contents, _: document(contents)["chunks"][0].update(metadata={"title": 7}),
        lambda contents, _: document(contents)["chunks"][0].update(metadata=[]),
        lambda _, tensors: tensors.update({"gist 0": tensors["gist 0"][:-9]}),
        lambda _, tensors: tensors.update({"gist 0": tensors["gist 0"] ^ 1}),
    ],
)
def test_contents_that_are_not_right_are_refused(
    file: Path, second: GistRAG, tmp_path: Path, change: Callable[..., None]
) -> None:
    """Even with a hash that fits: types, counts, and gists of other texts, in one line."""
    before = state(tmp_path / "second")
    changed(file, change)

    with pytest.raises(CorruptGistError, match=r"mills\.gists: ") as raised:
        second.import_documents(file)

    assert "\n" not in str(raised.value)
    assert before == state(tmp_path / "second")


@pytest.mark.parametrize("what", ["shape", "not finite"])
def test_gists_that_no_model_of_the_index_made_are_refused(
    file: Path, second: GistRAG, tmp_path: Path, what: str
) -> None:
    """Other heads, or numbers that are none, are found before anything is written."""
    from gistrag.kv import gist_file
    from gistrag.storage.fingerprint import digest

    def change(contents: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        by = digest(contents["gist_fingerprint"])
        found = gist_file.decode(tensors["gist 0"].tobytes(), file, key="0", fingerprint=by)
        kv, positions = GistCache.unpacked(found).kv, torch.arange(2)
        kv = kv[:2, ..., :2, :] if what == "shape" else torch.full_like(kv[..., :2, :], torch.inf)
        bad = GistCache(kv.to(torch.float32), positions, found.source_tokens)
        data = gist_file.encode(bad, key="0", fingerprint=by, kv_cache_dtype="int8" if what == "shape" else "auto")
        tensors["gist 0"] = np.frombuffer(data, np.uint8)

    before = state(tmp_path / "second")
    changed(file, change)

    with pytest.raises(CorruptGistError, match=r"expected (heads|numbers)"):
        second.import_documents(file)
    assert before == state(tmp_path / "second")


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign", "header"])
def test_a_cut_or_altered_file_is_refused_in_one_line(
    file: Path, second: GistRAG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], damage: str,
) -> None:  # fmt: skip
    """The command ends with code 4, and the index is as before."""
    data = file.read_bytes()
    middle = len(data) - len(data) // 4
    file.write_bytes({
        "empty": b"", "cut": data[:middle], "foreign": b"PK\3\4 a zip", "header": b"\xff" * 8 + data[8:],
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
    }[damage])  # fmt: skip
    before = state(tmp_path / "second")
    monkeypatch.setattr(rag_module.Engine, "load", lambda settings, **_: second.engine)

    assert 4 == run_command(["import", str(file), "--index", str(tmp_path / "second")])

    told = capsys.readouterr().err
    assert 1 == told.count("\n")
    assert "expected a whole file of gistrag export" in told
    assert before == state(tmp_path / "second")


def test_a_file_of_another_model_is_refused(file: Path, tmp_path: Path, engine: Engine, second: GistRAG) -> None:
    """Or of other settings: what differs is named, and the index is as before."""
    other = Engine(GistModel(tiny_network(), byte_tokenizer(), identity="another"), HashEmbedder())  # type: ignore[arg-type]
    before = state(tmp_path / "second")
    for name, given in (("model", {"engine": other}), ("tokens_per_gist", {"engine": engine, "tokens_per_gist": 3})):
        with GistRAG.from_folder(tmp_path / "first docs", index=tmp_path / name, **given, **MODEL_OF_TESTS) as made:
            made.export_documents(["mills.md"], tmp_path / f"{name}.gists")

        with pytest.raises(FingerprintMismatchError, match=f"{name}.gists was made with {name}"):
            second.import_documents(tmp_path / f"{name}.gists")
    assert before == state(tmp_path / "second")


def test_a_file_that_is_too_large_is_not_read(file: Path, second: GistRAG, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that is not there, or a folder."""
    monkeypatch.setattr(document_file, "BYTES_MAX", 99)
    for path in (file, file.parent, file.with_name("none.gists")):
        with pytest.raises(UsageError, match="expected a file of gistrag export at"):
            second.import_documents(path)


def test_an_import_that_fails_midway_changes_nothing(
    file: Path, second: GistRAG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows appear with one commit; gist files without a row go with the next build."""
    before = state(tmp_path / "second")[0]

    def failing(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gistrag.index.importing.mark_imported", failing)
        with pytest.raises(OSError, match="No space"):
            second.import_documents(file)

    assert before == state(tmp_path / "second")[0]
    second.sync()
    assert before == state(tmp_path / "second")[0]


# The commands


def test_the_commands_export_import_and_remove(
    file: Path, second: GistRAG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is private and written once; what was imported is listed and can be given up."""
    monkeypatch.setattr(rag_module.Engine, "load", lambda settings, **_: second.engine)
    out, index = tmp_path / "out.gists", str(tmp_path / "second")
    arguments = ["export", "--scope", "mills.md", "-o", str(out), "--index", str(tmp_path / "first")]

    assert 0 == run_command(arguments)
    packed = [document_file.read(path).documents[0] for path in (file, out)]
    assert packed[0].document == packed[1].document
    assert 0o600 == out.stat().st_mode & 0o777
    assert 2 == run_command(arguments)
    assert 2 == run_command(["export", "--chunk", "1", "-o", str(tmp_path / "x.gists"), "--index", index])
    assert 2 == run_command(["export", "--scope", "none.md", "-o", str(tmp_path / "x.gists"), "--index", index])
    assert 2 == run_command(["import", "--index", index])
    assert 4 == capsys.readouterr().err.count("\n")
    assert 0 == run_command(["import", str(out), "--index", index])
    assert "imported: mills.md\n" == capsys.readouterr().out
    assert 0 == run_command(["inspect", "--index", index])
    assert "imported" in capsys.readouterr().out
    assert 0 == run_command(["import", "--remove", "mills.md", "--index", index, "--json"])
    assert {"index": index, "removed": ["mills.md"]} == json.loads(capsys.readouterr().out)


def test_metadata_come_along(second: GistRAG, tmp_path: Path, engine: Engine) -> None:
    """What a document said of itself is filtered by after the import, and after a rebuild."""
    docs = tmp_path / "diary"
    docs.mkdir()
    (docs / "2026-01-05 minutes.md").write_text(MILLS, "utf-8")
    with GistRAG.from_folder(docs, index=tmp_path / "first", engine=engine, **MODEL_OF_TESTS) as made:
        made.export_documents(["2026-01-05 minutes.md"], tmp_path / "diary.gists")

    second.import_documents(tmp_path / "diary.gists")
    found = second.retrieve("sack", filters={"date": "2026-01"})
    options: dict[str, Any] = {"index": tmp_path / "second", "engine": second.engine, "gists": "none"}
    with GistRAG.from_folder(tmp_path / "second docs", **options, rebuild=True, tokens_per_gist=3) as rag:
        again = rag.retrieve("sack", filters={"date": "2026-01"})

    assert {hit.chunk.path for hit in found} == {hit.chunk.path for hit in again} == {"2026-01-05 minutes.md"}
    assert not second.retrieve("sack", filters={"date": "2025"})
