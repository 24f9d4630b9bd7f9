"""Checking and cleaning an index: whether every file is what was recorded of it, and what nothing refers to.

`check` changes nothing. It looks at gists and rows by their own hashes, and at the rest of index.db by the hash in the
manifest; in full at the structure of index.db, at the pairs of letters and at the vector file as well.
`collect` removes what a stopped build left behind, and every trace of what was deleted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from gistrag.errors import CorruptGistError, GistNotFoundError
from gistrag.index import manifest
from gistrag.index.chunk_rows import damaged_documents
from gistrag.index.doubt import differences
from gistrag.index.store import Store
from gistrag.storage import files

_LEFT_BY_A_BUILD = re.compile(
    r"[0-9a-f]{64}\.safetensors|faiss-[0-9a-f]{64}\.idx"
    rf"|\.([0-9a-f]{{64}}\.safetensors|faiss-[0-9a-f]{{64}}\.idx|manifest\.json)\.[0-9-]+{re.escape(files.TEMPORARY)}"
)


@dataclass(kw_only=True)
class Findings:
    """What is wrong with an index.

    Attributes:
        gists: how many gist files were read.
        damaged: a line for each gist file that differs from its hash.
        missing: a line for each gist without a file, or without a row in index.db.
        database: a line for each damage in index.db or of the vectors.
        documents: path of each document a build has to make again, with the number of gists it computes for it.
        unreferenced: files nothing refers to, which the next build removes.
        stale: documents whose file the last build could not read.
    """

    gists: int = 0
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    database: list[str] = field(default_factory=list)
    documents: dict[str, int] = field(default_factory=dict)
    unreferenced: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether every answer can come from gists."""
        return not (self.damaged or self.missing or self.database)


def check(store: Store, *, full: bool = False) -> Findings:
    """Return what is wrong with an index; *full* looks at the structure of the database and at the vector file too."""
    findings = Findings(stale=[row.path for row in store.documents() if row.stale])
    broken = _check_gists(store, findings)
    affected = _check_rows(store, findings)
    if full:
        _check_structure(store, findings)
    for row in store.documents():
        count = sum(chunk.gist_key in broken for chunk in store.chunks_of(row.path))
        if count or row.path in affected:
            findings.documents[row.path] = count
    findings.unreferenced = [str(path) for path in unreferenced(store)]
    return findings


def _check_gists(store: Store, findings: Findings) -> set[str]:
    """Read every gist file and return the keys of those that cannot be used."""
    broken = store.gists.unrecorded()
    findings.missing = [f"no row in index.db for gist {key}" for key in sorted(broken)]
    for row in store.gists.rows():
        findings.gists += 1
        try:
            store.gists.load(row.key)
        except GistNotFoundError as error:
            findings.missing.append(str(error).partition(";")[0])
        except CorruptGistError as error:
            findings.damaged.append(str(error).partition(";")[0])
        else:
            continue
        broken.add(row.key)
    return broken


def _check_rows(store: Store, findings: Findings) -> set[str]:
    """Compare index.db and its rows with their hashes; return the paths of documents that have to be written again."""
    damaged, differing = damaged_documents(store.database), differences(store.database)
    findings.database = [*differing, *(f"{path}: its path or a chunk differs from its hash" for path in damaged)]
    return {row.path for row in store.documents()} if differing else set(damaged)


def _check_structure(store: Store, findings: Findings) -> None:
    """Look at every page of index.db, at the pairs of letters, and at the vector file."""
    findings.database.extend(store.database.integrity())
    if count := len(store.pairs.differing()):
        findings.database.append(f"the keywords of {count:,} chunks are missing or of another text; run gistrag build")
    record = store.vectors.file()
    if record and store.vectors.read_file(record) is None:
        findings.database.append("the vector file is missing or damaged; the vectors in index.db serve instead")


@dataclass(frozen=True)
class Collected:
    """What was removed.

    Attributes:
        files: gist files, vector files and half-written ones.
        bytes: by how much the folder became smaller.
        is_gone: the write-ahead log is empty too, so that no byte of what was deleted is left.
    """

    files: int
    bytes: int
    is_gone: bool


def collect(store: Store) -> Collected:
    """Remove what nothing refers to, write the manifest, and return what was removed; *store* is open for writing."""
    before = _bytes_in(store.folder)
    count = remove_unused(store)
    manifest.write(store)
    return Collected(count, max(0, before - _bytes_in(store.folder)), store.database.checkpoint())


def remove_unused(store: Store) -> int:
    """Commit, remove what nothing refers to, and return how many files that were."""
    store.drop_unused()
    store.commit()
    strays = unreferenced(store)
    for path in strays:
        store.require_lock()  # or they may be what another builder is about to commit
        files.remove(path)
    return len(strays)


def unreferenced(store: Store) -> list[Path]:
    """Return the files a build left behind: gists without a row, old faiss files, half-written ones.

    Only names that a build gives count; whatever else somebody keeps in the folder stays.
    """
    kept = {store.gists.path(key) for key in store.gists.all_keys()}
    if record := store.vectors.file():
        kept.add(store.vectors.path(record))
    with files.explained("look at", store.folder):
        found = [*store.folder.iterdir(), *store.folder.glob("gists/??/*")]
    return sorted(path for path in found if is_by_a_build(path.name) and path not in kept)


def is_by_a_build(name: str) -> bool:
    """Return whether a build gives a file this name: a gist, a vector file, or something half written.

    >>> is_by_a_build(f"faiss-{'0' * 64}.idx"), is_by_a_build("notes.txt")
    (True, False)
    """
    return bool(_LEFT_BY_A_BUILD.fullmatch(name))


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
