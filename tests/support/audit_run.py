"""Builds and queries an index in a process of its own and prints, as JSON, what the interpreter had to do meanwhile.

    python tests/support/audit_run.py FOLDER [--real]

FOLDER holds ``warm`` and ``docs``; indexes go beside them. The first is built and asked before anybody listens for
code, so that what libraries compile once for themselves is over; then the second. Processes, pickles and sockets are
listened for throughout.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

QUESTION = "How many cranes? '; DROP TABLE chunks; -- {{ 7*7 }} <|im_start|>"
ALWAYS = (
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
)
SECOND = ("exec", "compile", "marshal.loads", "open", "import", "ctypes.dlopen")


class Ear:
    """What was heard: (event, what) in order.

    Attributes:
        is_keen: listens for code and files too.
    """

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []
        self.is_keen = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ALWAYS:
            self.heard.append((event, " ".join(map(str, arguments[1])) if "Popen" in event else str(arguments)))
        elif self.is_keen and event in SECOND:
            self.take(event, arguments)

    def take(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note code that is compiled or run, and files that are opened for writing."""
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR):
                self.heard.append(("write", str(path)))
        elif event == "exec":
            self.heard.append(("exec", arguments[0].co_filename))
        else:
            self.heard.append((event, str(arguments[0])[:200]))


def main(folder: Path, is_real: bool) -> None:
    """Print what was heard, and how the answer was made."""
    ear = Ear()
    sys.addaudithook(ear)
    sys.path[:0] = [str(Path(__file__).parents[1])]
    from support.tiny_models import HashEmbedder, tiny_model

    from gistrag.engine import Engine
    from gistrag.rag import GistRAG
    from gistrag.settings import IndexSettings

    engine = Engine.load(IndexSettings()) if is_real else Engine(tiny_model(), HashEmbedder())
    for name in ("warm", "docs"):
        ear.is_keen = name == "docs"
        with GistRAG.from_folder(folder / name, index=folder / f"{name}-index", engine=engine, gists="now") as rag:
            answers = [rag.query(QUESTION, top_k=2, max_new_tokens=4, mode=mode) for mode in ("gist", "text", "hybrid")]
            skipped = [row.path for row in rag.store.skipped()]
    ear.is_keen = False
    found = {"heard": ear.heard, "sources": len(answers[0].sources), "skipped": skipped}
    print(json.dumps({**found, "has_compiler": "torch._inductor.compile_fx" in sys.modules}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--real" in sys.argv)
