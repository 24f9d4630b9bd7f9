"""What is answered to questions about whole documents: the share of their key points that the answer names.

    python notebooks/bench/whole_documents.py tests/data/believable/whole.jsonl \
        --documents tests/data/believable/documents --folder scratch --output whole.json

The document is in scope. `summary` is what gistrag answers, `model` what the language model answers from all chunks of
the document, `first` the first sentences of the document of the same length as the summary. A point is named if one of
its words stands in the answer. Without --documents the documents are those of `follow_ups.py`:
`notebooks/bench/whole.jsonl`, on which summaries were tried out, is about them.
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gistrag import GistRAG

ROOT = Path(__file__).parents[2]
FOLLOW_UPS: dict[str, Any] = runpy.run_path(str(Path(__file__).with_name("follow_ups.py")))
IN_PASSING = "Answer in some sentences. "
"""Put before a question, it keeps the question from being taken for one about a whole document."""


def covered(answer: str, points: Sequence[Sequence[str]]) -> float:
    """Return the share of the points that an answer names."""
    plain = " ".join(answer.lower().split())
    return sum(any(word.lower() in plain for word in point) for point in points) / len(points)


def measured(rag: GistRAG, record: dict[str, Any], *, with_model: bool) -> dict[str, Any]:
    """Return what is answered to a question, and how much of its points that names."""
    path, question = record["document"], record["question"]
    ready = rag.ready(question, scope=path)
    chunks = rag.chunks(document=path)
    text = "\n\n".join(chunk.text for chunk in chunks)
    answers = {"summary": ready.text if ready else ""}
    answers["first"] = text[: len(answers["summary"]) or 600]
    if with_model:
        asked = rag.stream(IN_PASSING + question, scope=path, mode="text", max_new_tokens=200, second_reading=False)
        answers["model"] = asked.result().text
    return {
        **record,
        "is_ready": ready is not None,
        "characters": {name: len(answer) for name, answer in answers.items()},
        "covered": {name: covered(answer, record["points"]) for name, answer in answers.items()},
    }


def main() -> None:
    """Measure, print the means, and write all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--documents", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--model", action="store_true", help="Let the language model answer too.")
    given = parser.parse_args()
    documents = given.folder / "documents"
    if given.documents:
        shutil.copytree(given.documents, documents, dirs_exist_ok=True)
    else:
        FOLLOW_UPS["write_documents"](documents, FOLLOW_UPS["lines"](Path(__file__).with_name("dialogues.jsonl")))
    shutil.copytree(ROOT / "docs", documents / "docs", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.svg"))
    with GistRAG.from_folder(documents, index=given.folder / "index", gists="on demand") as rag:
        records = FOLLOW_UPS["lines"](given.questions)
        rows = [measured(rag, record, with_model=given.model) for record in records]
    for row in rows:
        print(f"{row['covered']['summary']:.2f} {row['is_ready']!s:5} {row['document']}: {row['question']}")
    names = rows[0]["covered"]
    result = {name: round(sum(row["covered"][name] for row in rows) / len(rows), 3) for name in names}
    result["at_least_half"] = round(sum(row["covered"]["summary"] >= 0.5 for row in rows) / len(rows), 3)
    result["recognized"] = round(sum(row["is_ready"] for row in rows) / len(rows), 3)
    print(json.dumps(result))
    if given.output:
        given.output.write_text(json.dumps({"summary": result, "rows": rows}, ensure_ascii=False, indent=1), "utf-8")


if __name__ == "__main__":
    main()
