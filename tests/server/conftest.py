"""A server of two indexes for the tests of the application and of the socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.live_server import build, serving

from gistrag.engine import Engine
from gistrag.model.gist_model import GistModel


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Path:
    """An index of two documents."""
    return build(tmp_path_factory.mktemp("manual"), engine)


@pytest.fixture(scope="module")
def url(index: Path, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of that index and an empty one."""
    empty = build(tmp_path_factory.mktemp("empty"), engine, {})
    with serving({"manual": index, "empty": empty}, engine, metrics=True) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    """A plain HTTP client."""
    httpx = pytest.importorskip("httpx2")
    with httpx.Client(base_url=url, timeout=60) as opened:
        yield opened


@pytest.fixture
def no_early_end(model: GistModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no answer of the random model end before it is cut."""
    monkeypatch.setitem(model.__dict__, "stop_ids", frozenset())
