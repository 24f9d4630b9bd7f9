"""What is public: the names of `gistrag`, its errors, and the research surface; users of the package hold to them."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import gistrag
from gistrag import errors

ROOT = Path(__file__).parents[1]
RESEARCH = re.compile(r"gistrag\.kv(\.\w+)*|gistrag\.compression\.compress(\.\w+)?")
# Scripts and notebooks that open the machine, and the rooms they need for it. What a user copies is not among them.
OPEN_MACHINE = {
    "notebooks/bench/embedders.py": {"documents", "index", "model", "qa", "settings"},  # searches by each list alone
    "notebooks/bench/follow_ups.py": {"qa"},  # compares answers
    "notebooks/bench/frontier.py": {"compression", "evaluation", "model", "qa", "settings", "storage"},  # own cases
    "notebooks/bench/home_gpu.py": {"evaluation", "model", "qa", "training"},  # times parts of a step
    "notebooks/bench/making.py": {"answering", "compression", "evaluation", "model", "qa", "settings"},  # times parts
    "notebooks/bench/believable.py": {"evaluation", "qa"},  # scores confidence, and reads question files
    "notebooks/bench/calibrate.py": {"evaluation", "qa"},  # fits on a question file
    "notebooks/bench/peers.py": {"evaluation", "model"},  # gives another program the words of the prompt
    "notebooks/bench/plan.py": {"index"},  # times what the estimate rests on
    "notebooks/bench/query_map.py": {"compression", "model", "qa", "settings"},  # looks at the reconstruction pass
    "notebooks/bench/retrain.py": {"evaluation", "model", "qa", "settings", "training"},  # trains, and compares
    "notebooks/bench/results.py": {"evaluation", "qa", "settings", "storage"},  # gathers rows of many evaluations
    "notebooks/bench/runtime_quality.py": {"model", "qa", "settings"},  # converts a model with weights of either kind
    "notebooks/bench/safety.py": {
        "documents",
        "evaluation",
        "index",
        "storage",
    },  # runs a build with one protection left out
    "notebooks/bench/fairness.py": {"evaluation"},  # asks the questions of `gistrag bench`
    "notebooks/bench/serving.py": {"evaluation"},  # asks the questions of `gistrag bench`
    "notebooks/bench/untrained.py": {"answering", "compression", "model", "qa"},  # reads without an index
}


def sources(folder: str) -> dict[str, str]:
    """Return the code of the modules and notebooks below *folder*, by path."""
    paths = sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".ipynb"})
    return {
        path.relative_to(ROOT).as_posix(): _code(path)
        for path in paths
        if not {"tests", ".ipynb_checkpoints"} & {*path.relative_to(ROOT).parts}
    }


def _code(path: Path) -> str:
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        return text
    cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return re.sub(r"^(\s*)[!%].*$", r"\1pass", "\n".join(cells), flags=re.MULTILINE)


def internal_names(code: str) -> set[str]:
    """Return the dotted names that *code* imports from gistrag and that are not public.

    >>> sorted(internal_names("from gistrag import GistRAG, rag; from gistrag.kv.cache import relocate"))
    ['gistrag.rag']
    """
    return {name for name in _imported(ast.parse(code)) if name.split(".")[0] == "gistrag" and not _is_public(name)}


def _imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _is_public(name: str) -> bool:
    home, _, last = name.rpartition(".")
    is_error = home == "gistrag.errors" and hasattr(errors, last)
    return name in {"gistrag", "gistrag.errors"} or is_error or _is_listed(home, last) or bool(RESEARCH.fullmatch(name))


def _is_listed(home: str, last: str) -> bool:
    return home == "gistrag" and last in gistrag.__all__


def test_the_package_shows_the_public_names_and_no_others() -> None:
    """What `import gistrag` puts into the module, or imports at first use, is what `__all__` lists."""
    shown = {name for name, value in vars(gistrag).items() if name[0] != "_" and not isinstance(value, ModuleType)}

    assert sorted(shown | set(gistrag._HOMES)) == gistrag.__all__


def test_import_brings_no_module_but_the_errors() -> None:
    """A fresh `import gistrag` opens no room: every other name waits until it is asked for."""
    code = (
        "import gistrag, types; print([n for n, v in vars(gistrag).items() if n[0] != '_' and type(v) is type(types)])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "['errors']"


@pytest.mark.parametrize("name", gistrag.__all__)
def test_a_public_name_is_a_class_of_its_home(name: str) -> None:
    """A public name is defined, under that name, in the module where the package looks for it."""
    value = getattr(gistrag, name)

    assert value.__name__ == name
    assert value is getattr(import_module(gistrag._HOMES.get(name, "gistrag.errors")), name)


def test_star_import_gives_the_public_names() -> None:
    """`from gistrag import *` brings the names of `__all__`."""
    names: dict[str, object] = {}

    exec("from gistrag import *", names)

    assert sorted(names.keys() - {"__builtins__"}) == sorted(gistrag.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    """A name that does not exist fails as in any module."""
    assert not hasattr(gistrag, "GistRag")


@pytest.mark.parametrize("path", sources("integrations"))
def test_an_integration_imports_public_names_only(path: str) -> None:
    """An integration survives every change inside of gistrag, as it imports public names only."""
    assert internal_names(sources("integrations")[path]) == set()


@pytest.mark.parametrize("path", sources("notebooks"))
def test_a_notebook_imports_public_names_only(path: str) -> None:
    """A notebook or script imports public names; those that open the machine say which rooms they open."""
    rooms = {name.split(".")[1] for name in internal_names(sources("notebooks")[path])}

    assert rooms <= OPEN_MACHINE.get(path, set())


def test_what_opens_the_machine_exists() -> None:
    """The list of exceptions names no notebook or script that is gone."""
    assert OPEN_MACHINE.keys() <= sources("notebooks").keys()


def test_an_internal_import_is_found() -> None:
    """A submodule, a name of a submodule and a name that is not listed are internal in every form of import."""
    code = """
import gistrag.rag
from gistrag import engine, Answer
from gistrag.errors import os
def late():
    from gistrag.index.store import Store
"""

    assert internal_names(code) == {"gistrag.rag", "gistrag.engine", "gistrag.errors.os", "gistrag.index.store.Store"}


def drawn(tree: str) -> dict[str, tuple[str, ...]]:
    """Return the classes of a drawn tree with their bases, the one above first."""
    found: dict[str, tuple[str, ...]] = {}
    above = ["Exception"]
    for line in tree.strip().splitlines():
        if not (match := re.match(r"([ │├└─]*)(\w+)(?:\((\w+)\))?", line.strip())):
            continue
        depth, name, also = len(match[1]) // 3, match[2], match[3]
        found[name] = (above[depth], *([also] if also else []))
        above[depth + 1 :] = [name]
    return found


def test_a_drawn_tree_is_read() -> None:
    """Indentation says which class is above; brackets hold a second base."""
    tree = """
        Base
        ├─ One(ValueError)  some words
        │  └─ Two           others
        └─ Three            more
    """

    assert drawn(tree) == {
        "Base": ("Exception",),
        "One": ("Base", "ValueError"),
        "Two": ("One",),
        "Three": ("Base",),
    }


def test_the_tree_of_errors_is_complete() -> None:
    """The docstring of `gistrag.errors` draws every class with its bases, and no class that is gone."""
    block = (errors.__doc__ or "").partition("::\n\n")[2].partition("\n\n")[0]
    classes = {
        name: tuple(base.__name__ for base in value.__bases__)
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }

    assert drawn(block) == classes
