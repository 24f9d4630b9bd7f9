"""`gistrag gc`: remove what a stopped build left behind, and every trace of what was deleted.

A build does the same at its end, so this is for an index whose last build was stopped, or was kept by a reader from
emptying the write-ahead log. Space that deleted rows took in index.db is filled with zeros and used by later builds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

from gistrag.cli import command
from gistrag.progress import megabytes

LOCKED = 6

app = command.application()


@app.command("gc", epilog=command.examples("gistrag gc", "gistrag gc --index notes-index/ --json"))
def gc(
    index: command.Index = command.INDEX,
    as_json: command.Json = False,
    quiet: command.Quiet = False,
    debug: command.Debug = False,
) -> int:
    """Remove what nothing refers to.

    Takes the lock, as a build does. Ends with code 6 if a reader kept the write-ahead log from being emptied.
    """
    from gistrag.index.integrity import collect
    from gistrag.index.store import Store

    Store.open(index).close()  # where there is no index, none is made
    with Store.build(index, command="gistrag gc") as store:
        done = collect(store)
    if as_json:
        command.print_json({"index": str(index), **asdict(done)})
    else:
        print(f"{done.files:,} files removed, {megabytes(done.bytes)} freed")
    return 0 if done.is_gone else LOCKED


def main(argv: Sequence[str] | None = None) -> int:
    """Clean an index and return the exit code."""
    return command.run(app, argv, program="gistrag gc")


if __name__ == "__main__":
    sys.exit(main())
