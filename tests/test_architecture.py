"""The shape of the package: floors, doors and a light front step."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gistrag"

FLOORS = [
    {"errors"},
    {"files", "markup", "schema", "prompt", "settings", "progress", "metrics", "turns"},
    {"readers", "rope", "mask", "quantisation", "report", "tasks"},
    {"worker"},
    {"documents", "cache", "catalog"},
    {"chunking", "gistfile", "embedder", "vectors", "adapter", "matching"},
    {"model"},
    {"store", "compression", "generation", "examples"},
    {"manifest", "retrieval", "training", "together", "teacher", "fidelity"},
    {"indexing", "answering", "cartridge", "cases", "conversation", "run", "planner", "synthesis"},
    {"rag", "evaluation", "monitoring"},
    {"shelf", "timing", "frontier"},
    {"openai_api", "tools"},
    {"guard"},
    {"listener", "server"},
    {"command"},
    {
        "build",
        "query",
        "chat",
        "inspect",
        "verify",
        "bench",
        "models",
        "train",
        "evaluate",
        "export",
        "synthesize",
        "gc",
        "backup",
        "serve",
        "mcp",
    },
    {"cli"},
    {"__main__"},
]
VERBS = FLOORS[-3]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
DOORS = {
    "accelerate": {"training"},
    "docx": {"readers"},
    "faiss": {"vectors"},
    "fastapi": {"server"},
    "h11": {"listener"},
    "huggingface_hub": {"catalog"},
    "matplotlib": {"report", "run"},
    "mcp": {"tools"},
    "pathspec": {"documents"},
    "prometheus_client": {"monitoring"},
    "pypdfium2": {"readers"},
    "peft": {"adapter"},
    "safetensors": {"gistfile", "adapter", "run"},
    "semantic_text_splitter": {"chunking"},
    "sentence_transformers": {"embedder"},
    "sklearn": {"examples"},
    "sqlite3": {"store"},
    "transformers": {"model", "catalog"},  # the catalogue only quiets it
    "typer": {"command", "cli"} | VERBS,
    "uvicorn": {"listener", "serve"},
    **{name: set() for name in ("bitsandbytes", "langchain_core", "llama_index", "pickle")},
}
WORDS = {"errors", "files", "readers", "schema", "prompt", "settings", "progress", "worker", "documents", "catalog"}


def imports(module: str) -> set[str]:
    """Every dotted name *module* imports, at any depth of its source."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def test_every_module_has_a_floor() -> None:
    """A new module must say where it stands."""
    assert sorted(FLOOR) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    """A module imports only from floors below its own."""
    inner = {name.split(".")[1] for name in imports(module) if name.startswith("gistrag.")} & FLOOR.keys()
    assert not {name for name in inner if FLOOR[name] >= FLOOR[module]}


@pytest.mark.parametrize("module", MODULES)
def test_each_foreign_library_has_one_door(module: str) -> None:
    """Only the named module may import the named library."""
    roots = {name.split(".")[0] for name in imports(module)}
    assert not {lib for lib, allowed in DOORS.items() if lib in roots and module not in allowed}


@pytest.mark.parametrize("module", sorted(WORDS))
def test_words_need_no_tensors(module: str) -> None:
    """Modules of words, files and names import no tensor library, at any depth."""
    assert not {"torch", "numpy", "faiss"} & {name.split(".")[0] for name in imports(module)}


def test_importing_the_package_is_cheap() -> None:
    """`import gistrag` loads no tensor library."""
    code = "import sys, gistrag; print([m for m in ('torch', 'transformers', 'faiss') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "[]" == out.strip()
