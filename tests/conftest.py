"""Tiny models for the fast tests, the real default ones for the tests marked `model`."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.tiny_models import FAMILIES, HashEmbedder, one_thread, tiny_model  # noqa: F401  a fixture

from gistrag.model.gist_model import GistModel

if TYPE_CHECKING:
    from gistrag.engine import Engine

gc.disable()  # until all is imported and collected, see pytest_collection_finish
os.environ["GISTRAG_TINY"] = "1"  # notebooks run on less than they show
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker and for what it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell, where builds could not be
    signal.signal(signal.SIGINT, signal.default_int_handler)  # interrupted: what is started here inherits it
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
WITHOUT_A_MODEL = {"04_results.ipynb"}
collect_ignore = ["data", "fuzz"]  # documents, some of them Python, and a program that is no test


def pytest_collection_finish() -> None:
    """Look for garbage from here on, and not among the modules and tests that stay until the end."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every notebook that loads the default model."""
    for item in items:
        if item.path.parent == NOTEBOOKS and item.path.name not in WITHOUT_A_MODEL:
            item.add_marker(pytest.mark.model)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what tests measured and recorded as ``report``."""
    for report in terminalreporter.stats.get("passed", []):
        for name, line in report.user_properties:
            if name == "report":
                terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def model() -> GistModel:
    """A tiny random llama."""
    return tiny_model()


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def any_model(request: pytest.FixtureRequest) -> GistModel:
    """A tiny random model of every supported family."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def default_model() -> GistModel:
    """The real default model."""
    from gistrag.model.hub import find
    from gistrag.settings import DEFAULT_MODEL

    return GistModel.load(find(DEFAULT_MODEL).path)


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user cache of its own."""
    monkeypatch.setenv("GISTRAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def engine(model: GistModel) -> Engine:
    """A tiny model and an embedder without one."""
    from gistrag.engine import Engine

    return Engine(model, HashEmbedder())


_unpickled: list[str] = []


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        _unpickled.append(".".join(map(str, arguments)))


sys.addaudithook(_listen)  # cannot be taken back: it listens for as long as the process lives


@pytest.fixture(autouse=True)
def nothing_unpickled() -> Iterator[list[str]]:
    """Let no test load a class or function by a name that stands in data, as pickle does."""
    _unpickled.clear()
    yield _unpickled
    assert [] == _unpickled
