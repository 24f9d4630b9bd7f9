"""What a build would do, told without doing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gistrag.engine import Engine
from gistrag.errors import FingerprintMismatchError, UsageError
from gistrag.index.plan import Plan, making_rate
from gistrag.planning import plan_build
from gistrag.rag import GistRAG

MILLS = "The mill stands by the river and grinds the wheat of the whole valley."


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder of one document."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "mills.md").write_text(MILLS)
    return tmp_path / "docs"


def plan(docs: Path, engine: Engine, **options: Any) -> Plan:
    """Return what a build of the index beside *docs* would do."""
    return plan_build(docs, docs.parent / "index", {}, engine=engine, **options)[0]


def test_a_plan_is_what_the_build_does(docs: Path, engine: Engine) -> None:
    """The first build adds, compresses and writes what its plan says; the plan leaves no folder behind."""
    planned = plan(docs, engine)
    assert not (docs.parent / "index").exists()

    with GistRAG.from_folder(docs, index=docs.parent / "index", engine=engine, gists="now") as rag:
        report = rag.report

    assert report is not None
    assert (planned.added, planned.chunks, planned.tokens) == (report.added, report.chunks, report.tokens)
    assert planned.gist_bytes == report.gist_bytes
    assert plan(docs, engine) == Plan(unchanged=1)


def test_a_rename_costs_nothing(docs: Path, engine: Engine) -> None:
    """A moved file is told apart from a new one; what cannot be read is skipped with its reason, or counted."""
    GistRAG.from_folder(docs, index=docs.parent / "index", engine=engine, gists="now").close()
    (docs / "mills.md").rename(docs / "old-mills.md")
    (docs / "broken.md").write_bytes(b"\0\1")
    (docs / "a.png").write_bytes(b"x")

    planned = plan(docs, engine)

    assert planned.renamed == ["mills.md → old-mills.md"]
    assert (planned.tokens, planned.removed) == (0, [])
    assert [row.path for row in planned.skipped] == ["broken.md"]
    assert planned.left_out == {".png": 1}


def test_pending_gists_are_counted(docs: Path, engine: Engine) -> None:
    """Gists that the last build left pending cost what they will cost."""
    GistRAG.from_folder(docs, index=docs.parent / "index", engine=engine, gists="none").close()

    planned = plan(docs, engine)

    assert planned.unchanged == 1
    assert planned.tokens > 0


def test_a_rebuild_with_other_settings_makes_all_again(docs: Path, engine: Engine) -> None:
    """With another rate every document counts as changed; without --rebuild it is refused as the build would be."""
    index = docs.parent / "index"
    GistRAG.from_folder(docs, index=index, engine=engine, gists="now").close()

    again = plan_build(docs, index, {"tokens_per_gist": 2}, rebuild=True, engine=engine)[0]

    assert again.changed == ["mills.md"]
    with pytest.raises(FingerprintMismatchError):
        plan_build(docs, index, {"tokens_per_gist": 2}, engine=engine)


def test_a_single_file_takes_no_patterns(docs: Path, engine: Engine) -> None:
    """Patterns choose from a folder."""
    with pytest.raises(UsageError, match="leave them out"):
        plan_build(docs / "mills.md", docs.parent / "index", {}, include=["*.md"], engine=engine)


def test_the_rate_is_measured(engine: Engine) -> None:
    """The estimate rests on how fast this machine reads."""
    assert making_rate(engine.runtime) > 0
