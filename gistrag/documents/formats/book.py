"""EPUB books: their chapters in reading order, each read as a web page."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote

from gistrag.documents.formats.archive import Tags, opened, part, properties, read_xml, resolved
from gistrag.documents.formats.web_page import html_blocks
from gistrag.documents.markup import join
from gistrag.documents.text import Text, decode
from gistrag.errors import DocumentError

CHAPTERS_MAX = 10_000


class _Package(Tags):
    """The chapters of a book, in reading order, and where its container says that the package is."""

    def __init__(self) -> None:
        self.place = ""
        self._files: dict[str, str] = {}
        self._spine: list[str] = []

    def begin(self, name: str, attributes: Mapping[str, str]) -> None:
        """Keep the package, a file or a place in the spine."""
        if name == "rootfile":
            self.place = self.place or attributes.get("full-path", "")
        elif name == "item" and "html" in attributes.get("media-type", ""):
            self._files[attributes.get("id", "")] = attributes.get("href", "")
        elif name == "itemref":
            self._spine.append(attributes.get("idref", ""))

    @property
    def chapters(self) -> list[str]:
        """The files of the chapters, each once."""
        return list(dict.fromkeys(self._files[one] for one in self._spine if one in self._files))


def read_epub(data: bytes) -> Text:
    """Return a book, chapter by chapter, with title, author and date of publication as metadata."""
    archive, package = opened(data, "epub"), _Package()
    read_xml(part(archive, "META-INF/container.xml"), package)
    described = part(archive, package.place) if package.place else b""
    read_xml(described, package)
    if not package.chapters or len(package.chapters) > CHAPTERS_MAX:
        raise DocumentError("not an epub file: the archive holds no chapters")
    folder = package.place.rpartition("/")[0]
    names = [resolved(folder, unquote(chapter.partition("#")[0])) for chapter in package.chapters]
    locked = part(archive, "META-INF/encryption.xml")
    if any(name.encode() in locked for name in names):
        raise DocumentError("its chapters are encrypted; choose a copy without copy protection")
    blocks = (block for name in names for block in html_blocks(decode(part(archive, name))))
    return Text(text=join(blocks), kind="epub", metadata=properties(described))
