"""`gistrag verify`: is every file of an index what was recorded of it. Nothing is changed.

What is damaged is answered from its text meanwhile, and made again by the build that is named at the end. The full
check looks at every bit: at gists, rows and vectors by their own hashes, at the rest of index.db by the hash in the
manifest.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from gistrag.cli import command
from gistrag.errors import CorruptGistError, GistNotFoundError

if TYPE_CHECKING:
    from gistrag.index.store import Store

DAMAGED = 4
NAMED = 5
"""So many documents are named in the last line; the full check lists all."""

app = command.application()


@dataclass(kw_only=True)
class Findings:
    """What is wrong with an index.

    Attributes:
        gists: how many files were read; damaged, missing: what is wrong with each, a line.
        database: damage in index.db and of the vectors.
        documents: paths of those a build has to make again, with the number of gists that are computed for each.
        unreferenced: files nothing refers to, which the next build removes; stale: documents whose file could not be
            read by the last build.
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


@app.command("verify", epilog=command.examples("gistrag verify", "gistrag verify --full --index notes-index/"))
def verify(
    index: command.Index = command.INDEX,
    full: Annotated[bool, typer.Option("--full", help="Check every bit of index.db and of the vectors too.")] = False,
    as_json: command.Json = False,
    quiet: command.Quiet = False,
    debug: command.Debug = False,
) -> int:
    """Check every gist file against its hash.

    Nothing is changed. Ends with code 4 if a file is damaged or missing, and says which build makes it again.
    """
    from gistrag.index.store import Store

    with Store.open(index) as store, store.snapshot():
        findings = check(store, full=full)
        source = os.path.normpath(store.folder / store.source)
        build = shlex.join(["gistrag", "build", source, "--index", str(store.folder), "--verify"])
    if as_json:
        command.print_json({"index": str(index), "sound": findings.is_sound, **asdict(findings)})
    else:
        print("\n".join(_lines(findings, build, full=full)))
    return 0 if findings.is_sound else DAMAGED


def check(store: Store, *, full: bool = False) -> Findings:
    """Return what is wrong with an index; *full* looks at every bit of the database and of the vectors as well."""
    findings = Findings(stale=[row.path for row in store.documents() if row.stale])
    broken = _check_gists(store, findings)
    affected = _check_database(store, findings) if full else set()
    for row in store.documents():
        count = sum(chunk.gist_key in broken for chunk in store.chunks_of(row.path))
        if count or row.path in affected:
            findings.documents[row.path] = count
    findings.unreferenced = [str(path) for path in store.unreferenced()]
    return findings


def _check_gists(store: Store, findings: Findings) -> set[str]:
    """Read every gist file and return the keys of those that cannot be used."""
    broken = store.unrecorded()
    findings.missing = [f"no row in index.db for gist {key}" for key in sorted(broken)]
    for row in store.gist_rows():
        findings.gists += 1
        try:
            store.load(row.key)
        except GistNotFoundError as error:
            findings.missing.append(str(error).partition(";")[0])
        except CorruptGistError as error:
            findings.damaged.append(str(error).partition(";")[0])
        else:
            continue
        broken.add(row.key)
    return broken


def _check_database(store: Store, findings: Findings) -> set[str]:
    """Look into index.db and at the vectors, and return the paths of documents that have to be written again."""
    from gistrag.index import manifest

    damaged, differing = store.damaged_documents(), manifest.differences(store)
    chunks = (f"a chunk of {path} differs from its hash" for path in damaged)
    findings.database = [*differing, *store.integrity(), *chunks]
    record = store.snapshot_record()
    if record and store.snapshot_bytes(record) is None:
        findings.database.append("the vector file is missing or damaged; the vectors in index.db serve instead")
    return {row.path for row in store.documents()} if differing else set(damaged)


def _lines(findings: Findings, build: str, *, full: bool) -> list[str]:
    found = {
        "damaged": findings.damaged,
        "missing": findings.missing,
        "database": findings.database,
        "unreferenced": findings.unreferenced,
        "stale": findings.stale,
        "again": [f"{path}, {count:,} gists" for path, count in findings.documents.items() if full],
    }
    lines = [f"{name}: {line}" for name, listed in found.items() for line in listed]
    if findings.is_sound:
        return [*lines, f"{findings.gists:,} gist files are as recorded"]
    named = [*findings.documents][:NAMED]
    more = [f"{len(findings.documents) - NAMED:,} more"] if len(findings.documents) > NAMED else []
    again = f"; makes {', '.join([*named, *more])} again" if named else ""
    return [*lines, f"run {build}{again}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Check an index and return the exit code."""
    return command.run(app, argv, program="gistrag verify")


if __name__ == "__main__":
    sys.exit(main())
