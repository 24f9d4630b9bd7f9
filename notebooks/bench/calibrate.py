"""Calibrate an adapter: which heads find evidence, and what makes a confidence of the signals of an answer.

    python notebooks/bench/calibrate.py squad.jsonl.gz --folder scratch

The articles were held out of training, since an adapter is surer and more often right on what it was trained on; those
of `believable.py`, which measures, are others. ``calibration.json`` is written into the folder of the adapter.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from gistrag import GistRAG
from gistrag.evaluation.calibration import Question, calibrate
from gistrag.qa.dataset import Context, read_contexts, split_by_article

SEED = 7


def shuffled_articles(contexts: Sequence[Context]) -> list[list[Context]]:
    """Return the held-out articles in the order that this script and `believable.py` share."""
    held = split_by_article(contexts)[1]
    titles = sorted({context.article for context in held})
    random.Random(SEED).shuffle(titles)
    return [[context for context in held if context.article == title] for title in titles]


def write_article(path: Path, paragraphs: Sequence[Context]) -> None:
    """Write an article as a Markdown document with its title."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "\n\n".join(context.text for context in paragraphs)
    path.write_text(f"# {' '.join(paragraphs[0].heading)}\n\n{body}", "utf-8")


def main() -> None:
    """Build, ask, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder of documents and index")
    parser.add_argument("--first", type=int, default=14, help="articles that are left to believable.py")
    parser.add_argument("--articles", type=int, default=14)
    parser.add_argument("--questions", type=int, default=420)
    given = parser.parse_args()
    contexts, _ = read_contexts(given.file)
    chosen = shuffled_articles(contexts)[given.first : given.first + given.articles]
    for number, paragraphs in enumerate(chosen):
        write_article(given.folder / "docs" / f"{number:02}.md", paragraphs)
    questions = [
        Question(task.question, task.answers, one.text) for each in chosen for one in each for task in one.tasks
    ]
    questions = random.Random(1).sample(questions, min(given.questions, len(questions)))
    with GistRAG.from_folder(given.folder / "docs", index=given.folder / "index", gists="now") as rag:
        folder = rag.engine.adapter_folder
        if folder is None:
            sys.exit("expected an index with an adapter, found one without")
        found = calibrate(rag, questions, adapter=rag.runtime.fingerprint["adapter"])
    found.write(folder)
    print(found)


if __name__ == "__main__":
    main()
