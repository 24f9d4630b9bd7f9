"""How the notebooks are tested: on less than they show, and those that load a model with the tests that do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["GISTRAG_TINY"] = "1"  # for the kernels

HERE = Path(__file__).parent
WITHOUT_A_MODEL = {"04_results.ipynb"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every notebook that loads the default model."""
    for item in items:
        if item.path.parent == HERE and item.path.name not in WITHOUT_A_MODEL:
            item.add_marker(pytest.mark.model)
