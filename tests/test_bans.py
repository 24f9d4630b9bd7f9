"""Promise 11: data never becomes code. What would make it so is written nowhere, and is not done by a run either."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.hostile_files import SEEDS, bombs

ROOT = Path(__file__).parents[1]
SOURCES = [
    *sorted((ROOT / "gistrag").rglob("*.py")),
    *(path for path in sorted((ROOT / "integrations").rglob("*.py")) if "tests" not in path.relative_to(ROOT).parts),
]
MODULES = frozenset({"cloudpickle", "dill", "joblib", "marshal", "mmap", "pickle", "runpy", "shelve"})
CALLS = frozenset(
    {
        *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "os.system", "os.popen"),
        *("torch.load", "torch.hub.load", "np.load", "numpy.load", "np.memmap", "numpy.memmap", "pandas.read_pickle"),
        *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "tempfile.mktemp"),
    }
)
FALSE_ONLY = frozenset({"shell", "trust_remote_code", "allow_pickle"})
TRUE_ONLY = frozenset({"weights_only", "use_safetensors"})
RUNS_SQL = frozenset({"execute", "executemany", "executescript"})
SQL = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|CREATE|DROP|ALTER|ATTACH|PRAGMA|REPLACE|VACUUM|WITH)\s", re.ASCII)
GIST_MODULES = frozenset({"cache.py", "files.py", "gist_file.py", "gist_store.py", "store.py"})
MAPS = frozenset({"load_file", "safe_open"})  # of safetensors: a file that is cut under a mapping kills the process


def banned(source: str, name: str = "any.py") -> Iterator[str]:
    """Yield what is banned in the text of a module, with its line."""
    for node in ast.walk(ast.parse(source)):
        for what in _faults(node, name):
            yield f"line {getattr(node, 'lineno', 0)}: {what}"


def _faults(node: ast.AST, module: str) -> Iterator[str]:
    match node:
        case ast.Import():
            yield from (f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in MODULES)
        case ast.ImportFrom() if (node.module or "").split(".")[0] in MODULES:
            yield f"import {node.module}"
        case ast.Call():
            yield from _call_faults(node, module)
        case ast.Dict():
            pairs = [(key.value, value) for key, value in zip(node.keys, node.values, strict=True) if _is_text(key)]
            yield from _setting_faults(pairs)
        case ast.JoinedStr() if node.values and _is_sql(node.values[0]):
            yield "SQL from an f-string"
        case ast.BinOp(left=left, op=ast.Mod()) if _is_sql(left):
            yield "SQL from %"


def _call_faults(call: ast.Call, module: str) -> Iterator[str]:
    name = _dotted(call.func)
    last = name.rpartition(".")[2]
    if name in CALLS:
        yield f"{name}()"
    if module in GIST_MODULES and last in MAPS:
        yield f"{name}() maps a gist file"
    if last == "format" and isinstance(call.func, ast.Attribute) and _is_sql(call.func.value):
        yield "SQL from format()"
    if last in RUNS_SQL and call.args and not isinstance(call.args[0], ast.Constant | ast.Name | ast.Attribute):
        yield "SQL that is no constant"
    if last == "from_pretrained" and not name.startswith("peft."):  # which has no code to trust
        given = {keyword.arg for keyword in call.keywords}
        if not given & {"trust_remote_code", None}:  # None: from a dictionary, whose own keys are looked at
            yield "from_pretrained() without trust_remote_code=False"
    yield from _setting_faults([(keyword.arg, keyword.value) for keyword in call.keywords])


def _setting_faults(settings: list[tuple[object, ast.expr]]) -> Iterator[str]:
    for name, value in settings:
        given = value.value if isinstance(value, ast.Constant) else None
        if (name in FALSE_ONLY and given is not False) or (name in TRUE_ONLY and given is not True):
            yield f"{name}={ast.unparse(value)}"


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_sql(node: ast.expr) -> bool:
    return _is_text(node) and bool(SQL.match(str(ast.literal_eval(node))))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_banned_is_written(path: Path) -> None:
    """No module can turn data into code, a shell command or SQL, or map a gist file."""
    assert [] == list(banned(path.read_text("utf-8"), path.name))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch; torch.load(path)",
        "eval(text)",
        "exec(text)",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "os.system(command)",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=is_shell)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "AutoModel.from_pretrained(folder)",
        "options = {'trust_remote_code': True}",
        "AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=False)",
        "np.load(path, allow_pickle=True)",
        "torch.anything(path, weights_only=False)",
        "yaml.load(text)",
        "tempfile.mktemp()",
        "import mmap",
        "safetensors.torch.load_file(path)",
        "database.execute(f'SELECT {name}')",
        "statement = f'DELETE FROM {table}'",
        "statement = 'SELECT %s' % name",
        "statement = 'SELECT {}'.format(name)",
        "database.execute('SELECT 1 WHERE x = ' + value)",
        "database.executescript(read())",
    ],
)
def test_what_is_banned_would_be_found(line: str) -> None:
    """Each ban catches what it is there for."""
    assert list(banned(line, "gist_file.py"))


@pytest.mark.parametrize(
    "line",
    [
        "re.compile(pattern)",
        "network.eval()",
        "subprocess.run([program, argument], check=True)",
        "AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True)",
        "AutoModel.from_pretrained(folder, **options)",
        "database.execute('SELECT ?', (value,))",
        "database.execute(schema.GIST, (key,))",
        "message = f'selected {count} of them'",
    ],
)
def test_what_is_harmless_is_not(line: str) -> None:
    """What looks alike and turns nothing into code stays allowed."""
    assert [] == list(banned(line, "gist_file.py"))


def test_every_test_listens_for_pickles(nothing_unpickled: list[str]) -> None:
    """What is unpickled in this process is heard, and would fail the test it happens in."""
    pickle.loads(pickle.dumps(Path))

    assert any("Path" in name for name in nothing_unpickled)
    nothing_unpickled.clear()


# What a run does


CODE_ALIKE = {
    "reduce.json": b'{"__reduce__": ["os.system", "touch pwned"], "py/object": "os.system", "$(touch pwned)": "`id`"}',
    "yaml.yaml": b"!!python/object/apply:os.system ['touch pwned']\n",
    "template.md": b"# {{ ''.__class__.__mro__[1] }}\n\n{% include '/etc/passwd' %} ${7*7} %s {0.__class__}",
    "query.csv": b"name,note\n'); DROP TABLE chunks; --,=cmd|'/C calc'!A0\n",
    "pickle.txt": b"cos\nsystem\n(S'touch pwned'\ntR.",
    "x'); DROP TABLE documents; --.md": b"The name is the message.",
    "$(touch pwned).md": b"So is this one.",
}


def heard(folder: Path, real: Mapping[str, bytes], *options: str) -> dict[str, Any]:
    """Return what `audited` prints of an index of files that look like code, *real* ones and a few bombs."""
    quick = ("xxe.docx", "laughs.docx", "script.pdf", "launch.pdf", "frame.html", "control.txt", "words.docx")
    wanted = {name: make() for name, make in bombs(str(folder / "canary")).items() if name in quick}
    for name, files in {"warm": real, "docs": {**real, **CODE_ALIKE, **wanted}}.items():
        (folder / name).mkdir()
        (folder / name / "harbour.md").write_text(f"# Harbour {name}\n\nThe harbour has three cranes.")
        for path, data in files.items():
            (folder / name / path).write_bytes(data)
    script = Path(__file__).parent / "support" / "audit_run.py"
    ran = subprocess.run(
        [sys.executable, script, folder, *options],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def require_expected(found: dict[str, Any], folder: Path) -> None:
    """Return if the only process was the parser worker, and the only files written are those of the index.

    Nor may torch's compiler be there, which takes longer to load than most of what is needed.
    """
    events = [(event, what) for event, what in found["heard"]]
    workers = [what for event, what in events if event == "subprocess.Popen"]
    writes = [what for event, what in events if event == "write"]
    rest = [pair for pair in events if pair[0] not in ("subprocess.Popen", "write")]

    assert [] == rest
    assert not found["has_compiler"]
    assert 1 == len(workers)
    assert f"{sys.executable} -P -m gistrag.documents.parser_child " in workers[0]
    assert writes
    assert [] == [path for path in writes if not Path(path).is_relative_to(folder / "docs-index")]
    assert 2 == found["sources"]
    assert {"laughs.docx", "words.docx"} <= set(found["skipped"])
    assert [] == list(folder.rglob("pwned"))


def test_a_run_compiles_executes_and_sends_nothing(tmp_path: Path) -> None:
    """A build and three answers unpickle, compile, execute and send nothing, and write to the index only."""
    require_expected(heard(tmp_path, SEEDS), tmp_path)


@pytest.mark.model
def test_a_run_of_the_real_models_does_not_either(tmp_path: Path) -> None:
    """The same with the default models, loading them included as far as processes, pickles and sockets go."""
    small = {name: data for name, data in SEEDS.items() if len(data) < 300}

    require_expected(heard(tmp_path, small, "--real"), tmp_path)
