"""What comes after the training of `gistrag adapt`: calibration, comparison with the untrained base, and the card.

::

    held-out articles ─┬─→ an index ─→ calibration.json in the adapter's folder
                       └─→ evaluation/ ─→ F1 of base and adapter, from text and from gists ─→ what was gained

An adapter is surer, and more often right, about what it was trained on, so both need articles that it never saw; no
article serves both.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gistrag.answering.confidence import Calibration
from gistrag.errors import UsageError
from gistrag.evaluation import evaluate as evaluation
from gistrag.evaluation.calibration import QUESTIONS_MIN, Question, calibrate
from gistrag.evaluation.cases import Plan
from gistrag.evaluation.evaluate import Evaluation, Watch
from gistrag.evaluation.report import Figures
from gistrag.model.hashing import folder_sha256
from gistrag.qa.dataset import LONG_KINDS, UNANSWERABLE, Context, write_contexts
from gistrag.qa.metrics import Estimate, contains, mean
from gistrag.rag import GistRAG

logger = logging.getLogger("gistrag")

CONTEXTS_MOST = 600
"""Most contexts that a comparison searches, and most that a calibration indexes."""

ARTICLES_MIN = 4
"""Fewest held-out articles of which some are kept for the calibration."""

SIDE = 4
"""Of each so many questions one more is asked without its answer, and one for a long answer."""

ARM_NAMES = ("without-adapter", "text", "gist-without-adapter", "gist")
HELD_OUT_FILE = "held-out.jsonl"


@dataclass(frozen=True)
class Gain:
    """F1 of the untrained base and of the adapter, reading the same passages in one way, and their difference."""

    reading: str
    base: Estimate
    adapter: Estimate
    gained: Estimate


def apart(held: Sequence[Context]) -> tuple[list[Context], list[Context]]:
    """Return the contexts of the articles to measure with, and of those to calibrate with.

    Every other article is for the calibration; none where fewer than `ARTICLES_MIN` were held out.
    """
    titles = sorted({context.article for context in held})
    second = set(titles[1::2]) if len(titles) >= ARTICLES_MIN else set()
    return [one for one in held if one.article not in second], [one for one in held if one.article in second]


def compared(
    held: Sequence[Context],
    output: Path,
    given: Mapping[str, Any],
    *,
    questions: int,
    seed: int = 0,
    device: str | None = None,
    watch: Watch | None = None,
) -> tuple[Figures, list[Gain]]:
    """Return the summary of an evaluation on held-out articles, and what the adapter gained.

    Args:
        held: contexts that the adapter was not trained on.
        output: folder of the evaluation; the questions go to a file beside it.
        given: settings of an index: model, adapter, embedder, quantize.
        questions: number asked, from text and from gists, of base and adapter each.
        watch: shows the progress.

    Raises:
        UsageError: no question with a short answer is held out.
    """
    few = sorted(random.Random(seed).sample(held, min(len(held), CONTEXTS_MOST)), key=lambda one: one.article)
    file = output.parent / HELD_OUT_FILE
    write_contexts(file, few)
    settings, engine = evaluation.load(dict(given), device=device)
    side = max(1, questions // SIDE)
    asked = Evaluation(
        file=file,
        output=output,
        plan=Plan.of_suite("quick", questions=questions, seed=seed, unanswerable=side, long=side),
        arm_names=ARM_NAMES,
        rates=(settings.tokens_per_gist,),
    )
    summary = asked.run(few, settings, engine, watch=watch)
    return summary, gains(output / "rows.jsonl", settings.tokens_per_gist)


def gains(rows_file: Path, tokens_per_gist: int) -> list[Gain]:
    """Return what an adapter gained over its base, by the rows of an evaluation: from text, and from gists."""
    f1: dict[str, dict[str, float]] = {}
    for line in rows_file.read_text("utf-8").splitlines():
        row = json.loads(line)
        if row["part"] == "questions" and "f1" in row:
            f1.setdefault(row["arm"], {})[row["name"]] = row["f1"]
    found = []
    for arm, reading in (("text", "text"), (f"gist {tokens_per_gist}", f"gists of {tokens_per_gist} tokens")):
        base, adapter = f1.get(f"{arm} without adapter", {}), f1.get(arm, {})
        names = sorted(base.keys() & adapter.keys())
        before, after = [base[name] for name in names], [adapter[name] for name in names]
        three = mean(before), mean(after), mean([a - b for a, b in zip(after, before, strict=True)])
        if names and all(three):
            found.append(Gain(reading, *(one for one in three if one)))
    return found


# Calibration


def calibrated(
    contexts: Sequence[Context],
    work: Path,
    adapter: Path,
    given: Mapping[str, Any],
    *,
    questions: int,
    device: str | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Calibration | None:
    """Return the calibration of an adapter, which lies in its folder; None where there is too little to fit one.

    Args:
        contexts: of articles it was not trained on.
        work: folder for the index that is asked.
        adapter: its folder; one that holds its calibration is left as it is.
        given: as in `compared`.
        questions: number asked.
        progress: called with the number of questions done, and of all.
    """
    if (adapter / "calibration.json").is_file() and (found := Calibration.read(adapter)):
        return found
    asked = _documents(contexts, work / "documents", questions)
    if len(asked) < QUESTIONS_MIN:
        logger.info("a calibration takes %d questions with short answers, found %d", QUESTIONS_MIN, len(asked))
        return None
    with GistRAG.from_folder(
        work / "documents", index=work / "index", gists="now", rebuild=True, device=device, **given
    ) as rag:
        try:
            found = calibrate(rag, asked, adapter=folder_sha256(adapter), progress=progress)
        except UsageError as error:
            logger.info("answers will have no confidence: %s", error)
            return None
    found.write(adapter)
    return found


def _documents(contexts: Sequence[Context], folder: Path, count: int) -> list[Question]:
    """Write some of the articles as documents, and return questions about them."""
    articles: dict[str, list[Context]] = {}
    for context in contexts:
        articles.setdefault(context.article, []).append(context)
    titles = random.Random(0).sample(sorted(articles), len(articles))
    folder.mkdir(parents=True, exist_ok=True)
    asked: list[Question] = []
    written = 0
    for number, title in enumerate(titles):
        if written >= CONTEXTS_MOST or (written and len(asked) >= 4 * count):
            break
        heading = " ".join(articles[title][0].heading) or title
        text = "\n\n".join(context.text for context in articles[title])
        (folder / f"{number:03}.md").write_text(f"# {heading}\n\n{text}\n", "utf-8")
        written += len(articles[title])
        asked += [
            Question(task.question, task.answers, context.text)
            for context in articles[title]
            for task in context.tasks
            if task.kind not in LONG_KINDS and task.kind != UNANSWERABLE and contains(context.text, task.answers)
        ]
    return random.Random(1).sample(asked, min(count, len(asked)))
