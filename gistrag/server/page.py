"""The files of the web page: read once, served as they are, under a policy that lets them load nothing else.

The page has no build step. Two libraries lie beside it in ``static/vendor/``, byte for byte as their authors published
them; ``VERSIONS.txt`` there names version, license and sha256 of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).with_name("static")
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
"""Nothing comes from elsewhere, no script stands in the page, and only DOMPurify may turn a text into markup."""


@dataclass(frozen=True)
class PageFile:
    """A file of the page: the path it is served at, its bytes, and their media type."""

    path: str
    body: bytes
    media_type: str


def page_files() -> Iterator[PageFile]:
    """Yield the page itself, at ``/``, and what it loads, below ``/static/``."""
    for file in sorted(FOLDER.rglob("*")):
        if media_type := MEDIA_TYPES.get(file.suffix):
            name = file.relative_to(FOLDER).as_posix()
            yield PageFile("/" if name == "page.html" else f"/static/{name}", file.read_bytes(), media_type)
