"""Documents of an index as one file: their text, headings and gist caches, to be taken into another index.

The file is of safetensors, so nothing in it is ever run::

    metadata    format, sha256 of all the rest, and as JSON: fingerprint, documents, chunks
    gist 0 …    each the bytes of a gist file, see `gistrag.kv.gist_file`

Vectors are not in it: whoever takes it in embeds the text anew. What comes back from `unpack` is whole and well-formed,
whoever wrote it; whether its gists are those of a model, and of these texts, is for `gistrag.index.importing` to find.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from gistrag.documents.chunking import Chunk
from gistrag.documents.discovery import PATH_CHARS_MAX, Document
from gistrag.documents.metadata import FIELDS, is_date
from gistrag.documents.text import Part
from gistrag.errors import CorruptGistError, GistNotFoundError, UsageError
from gistrag.index.store import Store
from gistrag.kv import gist_file
from gistrag.kv.packed import PackedGists
from gistrag.storage import files
from gistrag.storage.fingerprint import digest

FORMAT = "gistrag-documents-1"
BYTES_MAX = 2**31
CONTENTS_BYTES_MAX = 40_000_000  # safetensors reads 100 MB of metadata, in which quotes take two bytes
NAME_CHARS_MAX = 255
"""Longest name in a path, as file systems have it."""
_FIELDS = ("text", "heading", "start", "end", "page", "tokens")


@dataclass(frozen=True)
class Exported:
    """A document, its chunks in order, and the gists of each; None for a chunk that is read as text."""

    document: Document
    chunks: tuple[tuple[Chunk, PackedGists | None], ...]


@dataclass(frozen=True)
class Contents:
    """What a file holds: documents, and the fingerprint of their gists."""

    fingerprint: Mapping[str, str]
    documents: tuple[Exported, ...]


def export(store: Store, paths: Sequence[str], file: Path) -> None:
    """Write documents of an index, as of one commit, into a new file, private as gists are.

    Raises:
        UsageError: no such document, or something is at *file* already.
        ResourceError: the disk is full.
    """
    if file.exists():
        raise UsageError(f"expected nothing at {file}, found something; name another file")
    with store.snapshot():
        data = pack(store, paths)
    files.write_atomic(file.absolute(), data)


def pack(store: Store, paths: Sequence[str]) -> bytes:
    """Return documents of an index as a file; a gist that is pending or damaged is left out, and made by the importer.

    Raises:
        UsageError: no such document, or none named.
    """
    rows = {row.path: row for row in store.documents()}
    if not paths or (unknown := [path for path in paths if path not in rows]):
        what = f"no document {unknown[0]!r} in {store.folder}" if paths else "no document named"
        raise UsageError(f"{what}; gistrag inspect lists the documents")
    gists: list[bytes] = []
    by = digest(store.config.gist_fingerprint)
    documents = []
    for path in dict.fromkeys(paths):
        row, chunks = rows[path], []
        for chunk in store.metadata.added_to(store.chunks_of(path)):
            found = _gists(store, chunk.gist_key) if row.gists_current else None
            if found is not None:
                gists.append(gist_file.encode(found, key=str(len(gists)), fingerprint=by))
            number = None if found is None else len(gists) - 1
            about = {"gist": number, "metadata": dict(chunk.metadata)}
            chunks.append({**{name: getattr(chunk, name) for name in _FIELDS}, **about})
        named = {"path": path, "sha256": row.sha256, "size": row.size, "kind": row.kind}
        documents.append({**named, "chunks": chunks})
    contents = json.dumps({"gist_fingerprint": store.config.gist_fingerprint, "documents": documents})
    tensors = {f"gist {number}": np.frombuffer(data, np.uint8) for number, data in enumerate(gists)}
    if len(contents) > CONTENTS_BYTES_MAX:
        raise UsageError(
            f"the documents hold {len(contents):,} bytes of text, a file {CONTENTS_BYTES_MAX:,}; name fewer"
        )
    metadata = {"format": FORMAT, "contents": contents, "sha256": _seal(contents, gists)}
    data: bytes = safetensors.numpy.save(tensors or {"none": np.zeros(1, np.uint8)}, metadata)
    return data


def _gists(store: Store, key: str | None) -> PackedGists | None:
    with suppress(GistNotFoundError, CorruptGistError):
        return store.gists.load(key) if key else None
    return None


def read(path: Path) -> Contents:
    """Return what the file at *path* holds.

    Raises:
        UsageError: no such file, or a larger one than `BYTES_MAX`.
        CorruptGistError: it is cut, altered, or no such file at all.
    """
    try:
        data = files.read(path, bytes_max=BYTES_MAX)
    except OSError as error:
        raise UsageError(f"expected a file of gistrag export at {path}: {error.strerror or error}") from error
    return unpack(data, path)


def unpack(data: bytes, path: Path) -> Contents:
    """Return what the bytes of a file hold; *path* is for messages.

    Raises:
        CorruptGistError: as for `read`.
    """
    try:
        parts: Any = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        gists = {name: bytes(part["data"]) for name, part in parts if name.startswith("gist ")}
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']!r}, this gistrag reads {FORMAT}")
        ordered = [gists[f"gist {number}"] for number in range(len(gists))]
        if metadata["sha256"] != _seal(metadata["contents"], ordered):
            raise ValueError("another content than its sha256 says")
        return _contents(json.loads(metadata["contents"]), ordered, path)
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptGistError(
            f"{path}: expected a whole file of gistrag export, found {_told(error)}; export or copy it again"
        ) from error


def _told(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def _seal(contents: str, gists: Sequence[bytes]) -> str:
    seal = hashlib.sha256(contents.encode())
    for data in gists:
        seal.update(hashlib.sha256(data).digest())
    return seal.hexdigest()


def _contents(values: Any, gists: Sequence[bytes], path: Path) -> Contents:
    json.dumps(values, ensure_ascii=False).encode()  # no half of a surrogate pair, which no database takes
    fingerprint = values["gist_fingerprint"]
    _require(isinstance(fingerprint, dict), "a fingerprint")
    _require(all(isinstance(part, str) for pair in fingerprint.items() for part in pair), "a fingerprint")
    by = digest(fingerprint)

    def load(number: int) -> PackedGists:
        return gist_file.decode(gists[number], path, key=str(number), fingerprint=by, check_seal=True)

    documents = tuple(_document(one, load) for one in values["documents"])
    _require(len({one.document.path for one in documents}) == len(documents), "every path once")
    return Contents(fingerprint, documents)


def _document(values: Any, load: Callable[[int], PackedGists]) -> Exported:
    path, sha256, size, kind = (values[name] for name in ("path", "sha256", "size", "kind"))
    require_inside(path)
    _require(isinstance(sha256, str) and bool(re.fullmatch("[0-9a-f]{64}", sha256)), "a sha256")
    _require(isinstance(kind, str) and bool(re.fullmatch("[a-z0-9_-]{1,32}", kind)), "a kind")
    _require(_is_count(size), "a size")
    parts = tuple(Part(one["start"], _metadata(one.get("metadata", {}))) for one in values["chunks"])
    document = Document(path=path, sha256=sha256, size=size, mtime_ns=0, kind=kind, text="", parts=parts)
    return Exported(document, tuple(_chunk(one, place, load) for place, one in enumerate(values["chunks"])))


def _chunk(values: Any, ordinal: int, load: Callable[[int], PackedGists]) -> tuple[Chunk, PackedGists | None]:
    given = {name: values[name] for name in _FIELDS}
    heading, page, number = given["heading"], given["page"], values["gist"]
    _require(isinstance(given["text"], str) and bool(given["text"].strip()), "a text")
    _require(isinstance(heading, list) and all(isinstance(one, str) for one in heading), "headings")
    _require(all(_is_count(given[name]) for name in ("start", "end", "tokens")), "counts")
    _require(page is None or _is_count(page), "a page")
    _require(number is None or _is_count(number), "a number of a gist")
    chunk = Chunk(ordinal=ordinal, **{**given, "heading": tuple(heading)})
    return chunk, None if number is None else load(number)


def _metadata(values: Any) -> dict[str, str]:
    _require(isinstance(values, dict) and set(values) <= set(FIELDS), "metadata")
    _require(all(isinstance(value, str) for value in values.values()), "texts as metadata")
    _require("date" not in values or is_date(values["date"]), "a date")
    return dict(values)


def require_inside(path: object) -> None:
    """Return if *path* is that of a file inside of a folder, on any system.

    Raises:
        ValueError: it is absolute, leads out of the folder, holds a control character, or is too long.

    >>> require_inside("notes/tea.md")
    """
    _require(isinstance(path, str), "a path")
    parts = re.split(r"[/\\]", str(path))
    is_long = len(str(path)) > PATH_CHARS_MAX or max(map(len, parts)) > NAME_CHARS_MAX
    is_rooted = PurePosixPath(str(path)).is_absolute() or bool(PureWindowsPath(str(path)).anchor)
    is_plain = str(path).isprintable() and not {"", ".", ".."} & set(parts)
    _require(is_plain and not is_long and not is_rooted, f"a path inside of a folder, not {str(path)[:80]!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _require(is_so: bool, what: str) -> None:
    if not is_so:
        raise ValueError(f"something where {what} was expected")
