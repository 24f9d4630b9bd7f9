"""One evaluation from start to end: a file of questions becomes a folder of figures.

The contexts of the file become a corpus that is searched as an index is, and every arm answers the questions from the
same passages. `gistrag evaluate` is this, with options.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gistrag.engine import Engine
from gistrag.errors import FingerprintMismatchError, UsageError
from gistrag.evaluation import provenance
from gistrag.evaluation.arms import Arm, MemoryCache, Row, arms
from gistrag.evaluation.cases import LONG, Case, Plan, cases, passkeys, planted, split_whole
from gistrag.evaluation.corpus import Corpus, indexed
from gistrag.evaluation.report import Figures, summarized, timed
from gistrag.evaluation.runner import Journal, Runner, answered, pairs_of, unanswered
from gistrag.evaluation.speed import Stopwatch, is_busy, machine
from gistrag.model.gist_model import GistModel
from gistrag.model.hub import adapter_name, find, find_adapter
from gistrag.qa.dataset import Context, read_contexts, split_by_article, unsupported
from gistrag.settings import HELD_OUT, AdapterSettings, IndexSettings

logger = logging.getLogger("gistrag")

DOCUMENT_TOKENS = 6000
"""Most tokens of an article that the full-context arm reads, if the model's context window holds as many."""
TIMED_QUESTIONS = 3

Watch = Callable[[Iterator[Row], int], Iterator[Row]]
"""Passes rows on, and shows how many of the total are done."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation does, and where its figures go.

    Attributes:
        file: of questions, see `gistrag.qa.dataset`.
        output: folder of the evaluation; one that holds the same evaluation is resumed.
        plan: how much is asked.
        arm_names: some of `gistrag.evaluation.arms.ARMS`.
        rates: tokens per gist of the gist arms.
        is_held_out: ask only about articles that the adapter was not trained on.
    """

    file: Path
    output: Path
    plan: Plan
    arm_names: tuple[str, ...]
    rates: tuple[int, ...]
    is_held_out: bool = False

    def __post_init__(self) -> None:
        arms(self.arm_names, rates=self.rates, placement="matched", main_rate=1, has_adapter=False)  # or raises

    def run(
        self, contexts: Sequence[Context], settings: IndexSettings, engine: Engine, *, watch: Watch | None = None
    ) -> Figures:
        """Answer what is not answered yet, measure time, write everything to `output`, and return the summary.

        Args:
            contexts: as from `read`.
            settings, engine: as from `load`.
            watch: shows the progress.

        Raises:
            UsageError: nothing can be asked, or the folder holds another evaluation.
        """
        if self.is_held_out:
            contexts = held_out(contexts, engine.model, self.file)
        made_with = provenance.made_with(self.file, self.plan, settings, engine, is_held_out=self.is_held_out)
        provenance.prepare(self.output, made_with)
        chosen = arms(
            self.arm_names,
            rates=self.rates,
            placement=settings.placement,
            main_rate=settings.tokens_per_gist,
            has_adapter=engine.model.adapter is not None,
        )
        summary = {
            **self._figures(contexts, chosen, settings, engine, watch or _unwatched),
            "title": provenance.title(settings),
            "made_with": made_with,
            "plan": asdict(self.plan),
            "machine": machine(engine.model),
        }
        summary["notes"] = provenance.notes(summary, self.file)
        provenance.write(summary, self.output)
        return summary

    def _figures(
        self, contexts: Sequence[Context], chosen: Sequence[Arm], settings: IndexSettings, engine: Engine, watch: Watch
    ) -> Figures:
        with ExitStack() as held:
            corpus, asked = self._asked(contexts, settings, engine, held)
            fillers = self._fillers(corpus)
            main = [case for case in asked if case.part == "questions"]
            journal = held.enter_context(Journal(self.output / "rows.jsonl"))
            pairs = pairs_of(asked, chosen)
            pending = unanswered(pairs, journal)
            runner = Runner(MemoryCache(engine.model, settings.kv_cache_dtype))
            for row in watch(runner.rows(pending), len(pending)):
                journal.add(row)
            samples = self._timings(main[:TIMED_QUESTIONS], fillers, chosen, settings, engine.model)
            rows = answered(pairs, journal)
        long = sum(case.part == LONG for case in asked)
        counts = {"questions": len(main), "long_questions": long, "contexts": len(contexts), **corpus.counts}
        return {"corpus": counts, **summarized(rows), "speed": timed(samples), "timings": samples}

    def _asked(
        self, contexts: Sequence[Context], settings: IndexSettings, engine: Engine, held: ExitStack
    ) -> tuple[Corpus, list[Case]]:
        """Return the indexed contexts, open as long as *held* is, and all cases.

        Raises:
            UsageError: nothing can be asked.
        """
        chunked, wholes = split_whole(contexts)
        chunked = planted(chunked, self.plan)
        logger.info("indexing %s contexts", f"{len(chunked):,}")
        model = engine.model
        corpus = held.enter_context(
            indexed(
                self.output / "corpus",
                chunked,
                engine.embedder,
                tokenizer=model.text_tokenizer,
                chunk_tokens=settings.chunk_tokens,
            )
        )
        asked = cases(corpus, wholes, self.plan, document_tokens=min(DOCUMENT_TOKENS, model.window * 3 // 4))
        if not asked:
            raise UsageError("expected questions with short answers or marked evidence, found only long-form ones")
        return corpus, asked

    def _fillers(self, corpus: Corpus) -> list[Case]:
        """Return one context of each length, to be timed."""
        fillers = list(passkeys(corpus, self.plan, samples=1, depths=(0.5,)))
        if too_long := sorted(set(self.plan.lengths) - {case.about["length"] for case in fillers}):
            listed = ", ".join(map(str, too_long))
            logger.info("the corpus is too small for contexts of %s tokens; left out", listed)
        return fillers

    def _timings(
        self,
        main: Sequence[Case],
        fillers: Sequence[Case],
        chosen: Sequence[Arm],
        settings: IndexSettings,
        model: GistModel,
    ) -> list[Row]:
        if not self.plan.repeats:
            return []
        logger.info("measuring time%s", "; this machine is busy, a quiet one gives better figures" if is_busy() else "")
        contexts = {"question": main, **{f"{case.about['length']:,} tokens": [case] for case in fillers}}
        to_time = [arm for arm in chosen if arm.has_adapter and arm.give != "document"]
        with Stopwatch(model, settings.kv_cache_dtype) as stopwatch:
            return list(stopwatch.samples(contexts, to_time, repeats=self.plan.repeats))


def _unwatched(rows: Iterator[Row], total: int) -> Iterator[Row]:
    return rows


def read(file: Path) -> list[Context]:
    """Return the contexts of a file, and log what is wrong with it.

    Raises:
        UsageError: it cannot be read, or no context is usable.
    """
    contexts, dropped = read_contexts(file)
    if dropped:
        logger.info("%s lines of %s left out: not JSON, or no context, question or answer", f"{dropped:,}", file)
    if count := unsupported(contexts):
        logger.info(
            "%s answers of %s are not in their context; for them, the whole context counts as the right passage",
            f"{count:,}",
            file,
        )
    return contexts


def held_out(contexts: Sequence[Context], model: GistModel, file: Path) -> list[Context]:
    """Return the contexts of the articles that the adapter was not trained on.

    Raises:
        UsageError: none.
    """
    share = model.adapter.settings.held_out if model.adapter else HELD_OUT
    if not (kept := split_by_article(contexts, held_out=share)[1]):
        why = "the adapter was trained on all articles" if not share else f"{file} has no article that is held out"
        raise UsageError(f"{why}; leave --held-out out to ask about all articles")
    return kept


def load(given: dict[str, Any], *, device: str | None = None) -> tuple[IndexSettings, Engine]:
    """Return the settings of an index made with the settings *given*, and its models.

    Raises:
        UsageError: the adapter was made for another model.
        ModelNotFoundError: model or adapter is missing.
    """
    folder = find_adapter(given["adapter"], find(given["model"]).path)
    given = {**given, "adapter": adapter_name(folder)}
    settings = IndexSettings.fitting(given, AdapterSettings.read(folder) if folder else None)
    try:
        return settings, Engine.load(settings, device=device, runtime="torch")
    except FingerprintMismatchError as error:
        raise UsageError(str(error)) from error
