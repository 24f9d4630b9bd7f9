"""Links of the manual that leave `docs/`, on the site: every file that they name becomes a part of it.

The manual links to files beside it, such as ``../notebooks/README.md``, and so do those files in turn. On a page that
shows the repository these links work as they are. The site gets a copy of each such file below ``repository/``, and
links to the copy; a link to a folder loses its link and keeps its words.
"""

from __future__ import annotations

import re
from os.path import normpath, relpath
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
COPIES = "repository"
CODE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add every file outside of `docs/` that a page names, and what these name, to the site."""
    waiting = [file.src_uri for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for target in linked(repository_path(page)):
            uri = site_path(target)
            if (ROOT / target).is_file() and uri not in files.src_uris:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
                waiting += [uri] if uri.endswith(".md") else []
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page whose links lead to where the site has what they name."""
    here = page.file.src_uri

    def moved(found: re.Match[str]) -> str:
        words, link, anchor = found[1], found[2], found[3] or ""
        if is_foreign(link):
            return found[0]
        target = absolute(repository_path(here), link)
        if (ROOT / target).is_dir():
            return words
        return f"[{words}]({relpath(site_path(target), PurePosixPath(here).parent)}{anchor})"

    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(moved, prose) for prose in parts[::2]]
    return "".join(parts)


def linked(path: str) -> set[str]:
    """Return the files, relative to the repository, that a page of it links to."""
    prose = CODE.sub("", (ROOT / path).read_text("utf-8"))
    return {absolute(path, found[2]) for found in LINK.finditer(prose) if not is_foreign(found[2])}


def is_foreign(link: str) -> bool:
    """Whether a link leads out of the repository."""
    return "://" in link or link.startswith("mailto:")


def absolute(path: str, link: str) -> str:
    """Return the target of a link on a page, relative to the repository.

    >>> absolute("docs/performance.md", "../notebooks/README.md")
    'notebooks/README.md'
    """
    return normpath(f"{PurePosixPath(path).parent}/{link}")


def site_path(path: str) -> str:
    """Return where the site has a file of the repository.

    >>> site_path("docs/limits.md"), site_path("notebooks/README.md")
    ('limits.md', 'repository/notebooks/README.md')
    """
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIES}/{path}"


def repository_path(uri: str) -> str:
    """Return the file of the repository that the site has in this place.

    >>> repository_path("limits.md"), repository_path("repository/notebooks/README.md")
    ('docs/limits.md', 'notebooks/README.md')
    """
    return uri.removeprefix(f"{COPIES}/") if uri.startswith(f"{COPIES}/") else f"docs/{uri}"
