"""Whether an index answers the same after it moved to another user with another release of transformers.

    python notebooks/bench/two_environments.py 5.24.0 docs/safety.md docs/sync.md --folder scratch --output moved.json

The first user builds an index of the documents with the transformers of this environment and answers from it. The index
folder then moves to the second user: another home, another cache, so that the default model is converted anew, and an
environment whose transformers is the release named. All else that is installed is shared. Both runtimes answer. Tokens,
sources and the confidence, which follows from the logits, must be the same to the last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUESTIONS = (
    "What happens to a gist file whose hash differs?",
    "What does a build do with a renamed file?",
    "Which files are left out?",
    "Who may read the index folder?",
    "What is a stale document?",
    "How are gist files protected against damage?",
    "What happens when a file is deleted?",
    "Which setting needs --rebuild?",
)
RUNTIMES = ("torch", "cpu")
ASK = """
import json, sys, transformers
from gistrag import GistRAG
index, documents, runtime, questions = json.loads(sys.argv[1])
if documents:
    GistRAG.from_folder(documents, index=index, gists="now", runtime=runtime).close()
with GistRAG.open(index, runtime=runtime) as rag:
    told = []
    for question in questions:
        answer = rag.query(question, second_reading=False)
        said = {name: getattr(answer, name) for name in ("text", "withheld", "confidence", "unsupported")}
        tokens = rag.runtime.encode(answer.withheld or answer.text)
        places = [source.place for source in answer.sources]
        read_as_text = answer.usage.text_fallbacks + answer.usage.text_pending
        told.append({"question": question, **said, "tokens": tokens, "sources": places, "read_as_text": read_as_text})
print(json.dumps({"transformers": transformers.__version__, "answers": told}))
"""


def environment(folder: Path, release: str) -> Path:
    """Make an environment that shares all packages of this one but transformers, and return its Python."""
    venv.create(folder, with_pip=False)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
    wanted = ["--no-deps", "--target", packages, f"transformers=={release}"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *wanted], check=True)
    (Path(packages) / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n", "utf-8")
    return folder / "bin" / "python"


def asked(python: Path, home: Path, documents: Path | None, runtime: str) -> dict[str, Any]:
    """Return what the user of *home* is answered, from an index that is built first if there are documents."""
    home.mkdir(parents=True, exist_ok=True)
    arguments = [str(home / "index"), str(documents) if documents else None, runtime, QUESTIONS]
    own = {"HOME": str(home), "GISTRAG_CACHE": str(home / "cache")}
    command = [str(python), "-c", ASK, json.dumps(arguments)]
    told = subprocess.run(command, env={**os.environ, **own}, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    return found


def compared(folder: Path, release: str, documents: Sequence[Path]) -> list[dict[str, Any]]:
    """Return what both users were answered by either runtime."""
    python = environment(folder / "environment", release)
    source, here, there = folder / "documents", folder / "first", folder / "second" / "deeper"
    source.mkdir()
    for path in documents:
        shutil.copy(path, source)
    first = [asked(Path(sys.executable), here, source, runtime) for runtime in RUNTIMES]
    there.mkdir(parents=True)
    shutil.move(here / "index", there / "index")
    shutil.rmtree(here)
    second = [asked(python, there, None, runtime) for runtime in RUNTIMES]
    return [
        {"runtime": runtime, "first": one, "second": other, "is_same": one["answers"] == other["answers"]}
        for runtime, one, other in zip(RUNTIMES, first, second, strict=True)
    ]


def main() -> None:
    """Move an index and write what was answered before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", help="of transformers, in the second environment")
    parser.add_argument("documents", type=Path, nargs="+")
    parser.add_argument("--folder", type=Path, required=True, help="new, for both users and the environment")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    rows = compared(given.folder.absolute(), given.release, given.documents)
    given.output.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for row in rows:
        releases = " and ".join(row[user]["transformers"] for user in ("first", "second"))
        print(f"{row['runtime']}: {len(QUESTIONS)} answers with transformers {releases}, same: {row['is_same']}")


if __name__ == "__main__":
    main()
