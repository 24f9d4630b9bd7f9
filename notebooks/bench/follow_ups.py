"""How follow-up questions are understood: the last turn of written dialogues, against the same question asked in full.

    python notebooks/bench/follow_ups.py tests/data/believable/dialogues.jsonl \
        --documents tests/data/believable/documents --folder scratch --output follow_ups.json

A turn that leans is right if the chunk with the evidence is among the best three, as it is for the full question. A
complete turn is right if it is searched as it is. Without --documents the documents are those of
`tests/data/breadth.jsonl` and of the dialogues themselves, and the manual: `notebooks/bench/dialogues.jsonl`, on which
the rule was chosen, is about them. With --answers both are also answered, and an answer is right if it contains an
accepted one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gistrag import GistRAG, Hit
from gistrag.qa.metrics import contains

ROOT = Path(__file__).parents[2]
TOP_K = 3


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_documents(folder: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Write the texts of `breadth.jsonl` but its programs, those of *records*, and the pages of the manual."""
    folder.mkdir(parents=True, exist_ok=True)
    texts: dict[str, dict[tuple[str, ...], str]] = {}
    for record in lines(ROOT / "tests" / "data" / "breadth.jsonl"):
        if not record["source"].startswith(("python", "code")):
            texts.setdefault(record["source"].replace("/", "-"), {})[tuple(record["heading"])] = record["context"]
    for name, sections in texts.items():
        title = next(iter(sections))[0]
        parts = ("\n\n".join([*(f"## {one}" for one in heading[1:]), text]) for heading, text in sections.items())
        (folder / f"{name}.md").write_text("\n\n".join((f"# {title}", *parts)) + "\n", "utf-8")
    for record in records:
        if "text" in record:
            (folder / record["document"]).write_text(record["text"], "utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        (folder / f"docs-{page.name}").write_text(page.read_text("utf-8"), "utf-8")
    return folder


def holds(hits: Sequence[Hit], record: dict[str, Any]) -> bool:
    """Return whether the evidence of a dialogue stands in one of the chunks."""
    wanted = " ".join(record["evidence"].split())
    return any(hit.chunk.path == record["document"] and wanted in " ".join(hit.chunk.text.split()) for hit in hits)


def measured(rag: GistRAG, record: dict[str, Any], *, with_answers: bool = False) -> dict[str, Any]:
    """Return what became of the last turn of a dialogue, and of its full form."""
    *history, turn = record["turns"]
    in_full = rag.retrieve(record["full"], top_k=TOP_K)
    alone = rag.retrieve(turn, top_k=TOP_K)
    found = rag.retrieve(turn, top_k=TOP_K, history=history)
    row = {
        "turns": record["turns"],
        "kind": record.get("kind", ""),
        "leans": record["leans"],
        "searched": rag.searched(turn, history),
        "full_found": holds(in_full, record),
        "alone_found": holds(alone, record),
        "found": holds(found, record),
        "same_document": bool(found and in_full and found[0].chunk.path == in_full[0].chunk.path),
    }
    if with_answers:
        for name, question, before in (("full_right", record["full"], []), ("right", turn, history)):
            row[name] = contains(rag.query(question, history=before, max_new_tokens=32).text, record["answers"])
    return row


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the shares: of follow-ups found where the full question finds, and of complete questions left alone."""
    asked = [row for row in rows if row["leans"] and row["full_found"]]
    complete = [row for row in rows if not row["leans"]]
    result: dict[str, Any] = {
        "leaning": len(asked),
        "leaning_found": sum(row["found"] for row in asked),
        "leaning_found_alone": sum(row["alone_found"] for row in asked),
        "complete": len(complete),
        "complete_untouched": sum(row["searched"] == row["turns"][-1] for row in complete),
    }
    if rows and "right" in rows[0]:
        leaning = [row for row in rows if row["leans"]]
        result |= {
            "right": sum(row["right"] for row in leaning),
            "full_right": sum(row["full_right"] for row in leaning),
        }
    return result


def main() -> None:
    """Measure, print the shares and the failures, and write all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dialogues", type=Path)
    parser.add_argument("--documents", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--answers", action="store_true")
    given = parser.parse_args()
    records = lines(given.dialogues)
    documents = given.documents or write_documents(given.folder / "documents", records)
    gists = "now" if given.answers else "on demand"
    with GistRAG.from_folder(documents, index=given.folder / "index", gists=gists) as rag:
        asked = [record for record in records if "turns" in record]
        rows = [measured(rag, record, with_answers=given.answers) for record in asked]
    for row in rows:
        if row["searched"] != row["turns"][-1] if not row["leans"] else row["full_found"] and not row["found"]:
            print("wrong:", row["leans"], row["kind"], row["turns"], "→", row["searched"])
    result = summary(rows)
    print(json.dumps(result))
    if given.output:
        given.output.write_text(json.dumps({"summary": result, "rows": rows}, ensure_ascii=False, indent=1), "utf-8")


if __name__ == "__main__":
    main()
