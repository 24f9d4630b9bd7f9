"""The long forms run only when asked for: ``pytest -m soak``."""

from __future__ import annotations

import faulthandler
import random
from collections.abc import Iterator

import pytest
from support.process_pool import ProcessPool

SEED = 20261124


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long forms out unless the expression given with ``-m`` names them."""
    if "soak" in (config.getoption("markexpr") or ""):
        return
    long = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture(autouse=True)
def no_limit(request: pytest.FixtureRequest) -> None:
    """Lift the limit on the time of a test, see `pyproject.toml`, from the long forms."""
    if request.node.get_closest_marker("soak"):
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def randomness(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers that are the same each time for a test, whichever others run; the seed is printed."""
    seed = f"{SEED} {request.node.name}"
    print(f"seed: {seed!r}")
    return random.Random(seed)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPool]:
    """Builders and readers in processes of their own, with fake models."""
    with ProcessPool(tmp_path_factory.mktemp("pool")) as running:
        yield running
