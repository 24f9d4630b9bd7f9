"""The manual builds as a site: no warning, no broken link, nothing fetched, every public name in its reference."""

from __future__ import annotations

import doctest
import inspect
import os
import re
import runpy
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

import gistrag

ROOT = Path(__file__).parents[1]
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")

pytest.importorskip("mkdocs")


def build(site: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    """Build a site as `make docs` does, with a network that leads nowhere."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(site)],
        cwd=ROOT,
        env={**os.environ, **OFFLINE, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of the manual."""
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["site_links", "site_doctests"])
def test_the_helpers_of_the_site_do_what_their_examples_say(name: str) -> None:
    """The examples in the docstrings of the build's two helpers hold."""
    program = runpy.run_path(str(ROOT / ".ci" / f"{name}.py"))
    functions = {key: value for key, value in program.items() if inspect.isfunction(value)}
    examples = [
        test for key, value in functions.items() for test in doctest.DocTestFinder().find(value, key, globs=program)
    ]

    assert sum(len(test.examples) for test in examples) > 0
    assert [str(failed) for test in examples if (failed := doctest.DocTestRunner().run(test)).failed] == []


def test_every_page_of_the_manual_is_in_the_menu() -> None:
    """The menu in `mkdocs.yml` names every page of `docs/`, and no other."""
    menu = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2].partition("\n\n")[0]

    assert sorted(re.findall(r"[\w-]+\.md", menu)) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_links_lead_to_files_of_the_site(site: Path) -> None:
    """A link of any page leads to a file of the site, those to files outside of `docs/` included."""
    broken = []
    for page in site.rglob("*.html"):
        for link in re.findall(r'<a [^>]*?href="([^"#]+)', page.read_text("utf-8")):
            is_inside = not re.match(r"[a-z]+:", link)
            if is_inside and page.name != "404.html" and not (page.parent / unescape(link)).exists():
                broken.append(f"{page.relative_to(site)}: {link}")

    assert broken == []


def test_a_reader_fetches_nothing_from_elsewhere(site: Path) -> None:
    """Scripts, style sheets, fonts and pictures are files of the site."""
    fetched = (
        r'<(?:script|img|iframe)\b[^>]*?\bsrc="([^"]+)|<link\b[^>]*?rel="(?:stylesheet|preconnect)"[^>]*?href="([^"]+)'
    )
    found = [found for page in site.rglob("*.html") for found in re.findall(fetched, page.read_text("utf-8"))]

    assert found
    assert [one for pair in found for one in pair if "//" in one] == []


def test_every_public_name_is_in_the_reference() -> None:
    """The reference names what `gistrag` offers; the error class stands in the module of errors."""
    page = (ROOT / "docs" / "api.md").read_text("utf-8")

    assert set(re.findall(r"^::: gistrag\.([A-Z]\w+)$", page, re.MULTILINE)) == {*gistrag.__all__} - {"GistRAGError"}


def test_the_public_names_are_listed() -> None:
    """The page on the Python API names what `gistrag` offers, and nothing else."""
    line = (ROOT / "docs" / "python-api.md").read_text("utf-8").partition("\n- `gistrag`: ")[2].partition("\n- ")[0]

    assert re.findall(r"`(\w+)`", line) == sorted(gistrag.__all__)


def test_the_reference_shows_docstrings(site: Path) -> None:
    """Methods of public classes and all errors stand on the page of the reference."""
    page = (site / "api.html").read_text("utf-8")

    for name in ("gistrag.GistRAG.query", "gistrag.errors.GistRAGError", "gistrag.compression.compress.compress"):
        assert f'id="{name}"' in page
    assert "doctest:" not in page


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    """A link to a page that is missing is a warning, and a warning fails the build."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A page\n\nSee [another](missing.md).\n", "utf-8")
    (tmp_path / "mkdocs.yml").write_text("site_name: broken\n", "utf-8")

    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")

    assert done.returncode == 1
    assert "missing.md" in done.stderr
