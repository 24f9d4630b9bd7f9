"""`gistrag gc`: remove the files that a stopped build left behind, and all traces of deleted text.

A build does the same at its end. The command is for an index whose last build was stopped, or could not empty the
write-ahead log because a reader used it. SQLite overwrites deleted rows in index.db with zeros, and later builds use
their space.
"""

from __future__ import annotations

from dataclasses import asdict

from gistrag.cli.exit_codes import LOCKED
from gistrag.cli.options import INDEX, Debug, Index, Json, Quiet
from gistrag.cli.output import print_json, tell
from gistrag.progress import megabytes

EXAMPLES = (
    "gistrag gc",
    "gistrag gc --index notes-index/ --json",
)


def gc(
    index: Index = INDEX,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Remove unreferenced files and all traces of deleted text.

    Takes the lock, as a build does. Exits with code 6 if a reader kept the write-ahead log from being emptied.
    """
    from gistrag.index.integrity import collect
    from gistrag.index.store import Store

    Store.open(index).close()  # makes no index where none exists
    with Store.build(index, command="gistrag gc") as store:
        done = collect(store)
    if as_json:
        print_json({"index": str(index), **asdict(done)})
    else:
        tell(f"{done.files:,} files removed, {megabytes(done.bytes)} freed")
    return 0 if done.is_gone else LOCKED
