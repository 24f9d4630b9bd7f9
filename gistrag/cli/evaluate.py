"""`gistrag evaluate`: what gists keep of the answers text gives, on questions whose answers are known.

The contexts of a file become a corpus that is searched as an index is, and every arm answers the questions from the
same passages. An output folder is one evaluation::

    settings.json   what the answers depend on; a later run with the same goes on
    corpus/         the contexts, indexed
    rows.jsonl      grows answer by answer
    summary.json, table.md, figures/   made of the rows at the end
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gistrag import __version__
from gistrag.cli.options import Debug, Device, Json, MaxNewTokens, Quiet
from gistrag.cli.output import loading, logger, print_json, print_table, require_output, say, waiting
from gistrag.errors import FingerprintMismatchError, UsageError
from gistrag.settings import DEFAULT_EMBEDDER, DEFAULT_MODEL, HELD_OUT, KvCacheDtype, Placement
from gistrag.storage import files
from gistrag.storage.fingerprint import require_same

if TYPE_CHECKING:
    from gistrag.engine import Engine
    from gistrag.evaluation.cases import Case, Corpus, Plan
    from gistrag.evaluation.runner import Arm, Examiner, Journal, Pair, Row
    from gistrag.evaluation.speed import Stopwatch
    from gistrag.model.gist_model import GistModel
    from gistrag.qa.dataset import Context
    from gistrag.settings import IndexSettings

DOCUMENT_TOKENS = 6000
"""Most tokens of an article that the full-context arm reads, where the model's window holds as many."""
TIMED_QUESTIONS = 3
INTERVAL_S = 10.0
BUSY_SHARE = 0.5


EXAMPLES = (
    "gistrag evaluate squad.jsonl.gz --held-out --questions 500 --seed 0",
    "gistrag evaluate qa.jsonl --adapter run/adapter --output run/evaluation",
    "gistrag evaluate qa.jsonl --arms text,gist --rates 4 --sweep 0.9",
    "gistrag evaluate squad.jsonl.gz --held-out --questions 200 --frontier --rates 4,8",
    "gistrag evaluate qa.jsonl --questions 50 --probes 0 --passkey 0 --unanswerable 0 --orders 0 --repeats 0",
)


def evaluate(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="SQuAD or question records as JSON lines, may be gzipped.")
    ],
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="Where rows and figures go.")] = Path(
        "evaluation"
    ),
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Only the articles that gistrag train holds out.")
    ] = False,
    questions: Annotated[int, typer.Option("--questions", metavar="N", help="Sampled over articles.")] = 500,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of everything drawn.")] = 0,
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="Base model: hub id, folder or catalogue name.")
    ] = DEFAULT_MODEL,
    adapter: Annotated[
        str, typer.Option("--adapter", metavar="ADAPTER", help="Trained adapter: folder, name, none or auto.")
    ] = "auto",
    embedder: Annotated[
        str, typer.Option("--embedder", metavar="MODEL", help="Embedding model: hub id, folder or catalogue name.")
    ] = DEFAULT_EMBEDDER,
    quantize: Annotated[
        Literal["none", "nf4"], typer.Option("--quantize", help="Whether the base model is loaded in 4 bits.")
    ] = "none",
    kv_cache_dtype: Annotated[
        KvCacheDtype, typer.Option("--kv-cache-dtype", help="Numbers that gists are kept in, as in gistrag build.")
    ] = "int8",
    arms: Annotated[
        str, typer.Option("--arms", metavar="A,B", help="Some of none, full, untuned, text, kv, gist and hybrid.")
    ] = "none,full,untuned,text,kv,gist,hybrid",
    rates: Annotated[
        str, typer.Option("--rates", metavar="R,S", help="Tokens per gist of the gist arms.")
    ] = "2,4,8,16",
    placement: Annotated[
        Placement | None, typer.Option("--placement", help="Where gists come from; else what the adapter reads best.")
    ] = None,
    chunk_tokens: Annotated[int, typer.Option("--chunk-tokens", min=16, metavar="N", help="Most of a chunk.")] = 256,
    top_k: Annotated[
        str, typer.Option("--top-k", metavar="K,L", help="Chunks to answer from; 3 is the main one, else the first.")
    ] = "1,3,5",
    oracle: Annotated[bool, typer.Option("--oracle/--no-oracle", help="Also with the one right chunk.")] = True,
    probes: Annotated[int, typer.Option("--probes", metavar="N", help="Facts planted in the corpus.")] = 100,
    unanswerable: Annotated[
        int, typer.Option("--unanswerable", metavar="N", help="Questions asked without the passage that answers.")
    ] = 100,
    passkey: Annotated[int, typer.Option("--passkey", metavar="N", help="Passkeys of each length and depth.")] = 2,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,M", help="Of passkey contexts and of those timed, in tokens.")
    ] = "1000,2000,4000",
    orders: Annotated[int, typer.Option("--orders", metavar="N", help="Questions asked in other orders too.")] = 50,
    whole: Annotated[int, typer.Option("--whole", metavar="N", help="Questions about whole documents.")] = 50,
    max_new_tokens: MaxNewTokens = 24,
    repeats: Annotated[
        int, typer.Option("--repeats", min=0, metavar="N", help="Timings of each kind; 0 measures no time.")
    ] = 3,
    sweep: Annotated[
        float | None,
        typer.Option("--sweep", metavar="X", help="Find the most tokens per gist that keep this share of text's F1."),
    ] = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Give text and gists the same number of slots instead, and nothing else.")
    ] = False,
    budgets: Annotated[
        str, typer.Option("--budgets", metavar="N,M", help="Slots for passages with --frontier.")
    ] = "128,256,512,1024,2048",
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare answers from gists with answers from text, on questions with known answers.

    A run that was stopped goes on where it was. With --json the last line on standard output is the summary.
    """
    wanted = Wanted(
        arms=_names(arms),
        rates=_numbers(rates, "rates"),
        repeats=repeats,
        sweep=sweep,
        budgets=tuple(sorted(_numbers(budgets, "budgets"))) if frontier else (),
    )
    with waiting("reading"):
        from gistrag.evaluation.cases import Plan

        plan = Plan(
            questions=questions,
            seed=seed,
            top_k=tuple(sorted(_numbers(top_k, "top-k"), key=lambda k: k != 3)),
            oracle=oracle,
            probes=probes,
            unanswerable=unanswerable,
            passkey=passkey,
            lengths=_numbers(lengths, "lengths"),
            orders=orders,
            whole=whole,
            max_new_tokens=max_new_tokens,
        )
        wanted.require_sense()
        contexts = _read(file)
    require_output(output)
    with loading():
        settings, engine = _load(
            {
                "model": model,
                "adapter": adapter,
                "embedder": embedder,
                "quantize": quantize,
                "kv_cache_dtype": kv_cache_dtype,
                "chunk_tokens": chunk_tokens,
            },
            placement=placement,
            device=device,
        )
    if held_out:
        contexts = _held_out(contexts, engine.model, file)
    made_with = _made_with(file, plan, settings, engine, is_held_out=held_out)
    _prepare(output, made_with)
    summary = _evaluated(contexts, plan, wanted, settings, engine, output)
    summary |= {
        "title": _title(settings),
        "made_with": made_with,
        "plan": asdict(plan),
        "machine": _machine(engine.model),
    }
    summary["notes"] = _notes(summary, file)
    _write(summary, output)
    _print(summary, output, as_json=as_json)


# What was asked for


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is done with the cases.

    Attributes:
        arms: by the names of `gistrag.evaluation.runner.ARMS`; rates: tokens per gist of the gist arms.
        repeats: timings of each kind; sweep: share of text's F1 to keep, None for no sweep.
        budgets: slots that text and gists both may fill; where there are any, nothing else is asked.
    """

    arms: tuple[str, ...]
    rates: tuple[int, ...]
    repeats: int
    sweep: float | None
    budgets: tuple[int, ...] = ()

    def require_sense(self) -> None:
        """Return if this can be done.

        Raises:
            UsageError: it cannot, whatever the model.
        """
        from gistrag.evaluation.runner import arms

        if self.sweep is not None and not 0 < self.sweep <= 1:
            raise UsageError(f"--sweep must be a share above 0 and at most 1, got {self.sweep}")
        if self.sweep is not None and not {"text", "gist"} <= set(self.arms):
            raise UsageError("--sweep compares gists with text; add both to --arms")
        if self.sweep is not None and self.budgets:
            raise UsageError("--sweep and --frontier are two evaluations; ask for one after the other")
        if min(self.budgets, default=1) < 1:
            raise UsageError(f"--budgets must be at least 1, got {min(self.budgets)}")
        if not self.arms:
            raise UsageError("--arms names none; leave it out for all of them")
        arms(self.arms, rates=self.rates, placement="matched", main_rate=1, has_adapter=False)


def _names(line: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in line.split(",") if name.strip())


def _numbers(line: str, option: str) -> tuple[int, ...]:
    """Return the whole numbers of a list, each once.

    Raises:
        UsageError: something else in it, or nothing.

    >>> _numbers("2,4, 8", "rates")
    (2, 4, 8)
    """
    with suppress(ValueError):
        if numbers := tuple(dict.fromkeys(map(int, _names(line)))):
            return numbers
    raise UsageError(f"--{option} takes whole numbers with commas between them, got {line!r}; for example 2,4")


def _read(file: Path) -> list[Context]:
    """Return the contexts of a file, and say what of it is strange.

    Raises:
        UsageError: it cannot be read, or nothing is left of it.
    """
    from gistrag.qa.dataset import read_contexts, unsupported

    contexts, dropped = read_contexts(file)
    if dropped:
        say(f"{dropped:,} lines of {file} left out: not JSON, or without context, question or answer")
    if count := unsupported(contexts):
        say(f"{count:,} answers of {file} do not stand in their context; retrieval is judged by the whole context")
    return contexts


def _held_out(contexts: Sequence[Context], model: GistModel, file: Path) -> list[Context]:
    """Return the contexts of the articles that the adapter was not trained on.

    Raises:
        UsageError: there is none.
    """
    from gistrag.qa.dataset import split_by_article

    share = model.adapter.settings.held_out if model.adapter else HELD_OUT
    if not (kept := split_by_article(contexts, held_out=share)[1]):
        why = "the adapter was trained on all articles" if not share else f"{file} has no article that is held out"
        raise UsageError(f"{why}; leave --held-out away to ask about all of them")
    return kept


def _load(given: dict[str, Any], *, placement: Placement | None, device: str | None) -> tuple[IndexSettings, Engine]:
    """Return the settings of an index made like this, and its models.

    Raises:
        UsageError: the adapter is not one of this model.
        ModelNotFoundError: model or adapter is nowhere.
    """
    from gistrag.engine import Engine
    from gistrag.model.hub import adapter_name, find, find_adapter
    from gistrag.settings import AdapterSettings, IndexSettings

    folder = find_adapter(given["adapter"], find(given["model"]).path)
    given = {**given, "adapter": adapter_name(folder), **({"placement": placement} if placement else {})}
    settings = IndexSettings.fitting(given, AdapterSettings.read(folder) if folder else None)
    try:
        return settings, Engine.load(settings, device=device)
    except FingerprintMismatchError as error:
        raise UsageError(str(error)) from error


# One output folder is one evaluation


def _made_with(file: Path, plan: Plan, settings: IndexSettings, engine: Engine, *, is_held_out: bool) -> dict[str, str]:
    """Return all that an answer depends on besides its case and arm; how many are asked for may grow."""
    from gistrag.compression.compress import making
    from gistrag.model.hashing import file_sha256

    embedder = {f"embedder_{name}": value for name, value in engine.embedder.fingerprint.items()}
    stored = {} if settings.kv_cache_dtype == "auto" else {"kv_cache_dtype": settings.kv_cache_dtype}
    dials = {
        "placement": settings.placement,
        "chunk_tokens": settings.chunk_tokens,
        **stored,
        **making(settings.placement),
    }
    asked = {"seed": plan.seed, "probes": plan.probes, "top_k": plan.top_k[0], "max_new_tokens": plan.max_new_tokens}
    data = {"gistrag": __version__, "file": file_sha256(file), "held_out": is_held_out}
    return {
        name: str(value) for name, value in {**data, **asked, **dials, **engine.model.fingerprint, **embedder}.items()
    }


def _prepare(output: Path, made_with: dict[str, str]) -> None:
    """Make the output folder, or return if the evaluation that is there is this one.

    Raises:
        UsageError: it is another one.
    """
    path = output / "settings.json"
    if not path.exists():
        output.mkdir(parents=True, exist_ok=True)
        _write_json(path, made_with)
        return
    try:
        found = json.loads(path.read_text("utf-8"))
        require_same(
            found, made_with, where=f"the evaluation in {output}", remedy="name another --output, or remove it"
        )
    except (ValueError, AttributeError) as error:  # a mismatch is a ValueError too
        told = (
            str(error) if isinstance(error, FingerprintMismatchError) else f"{path} is damaged; name another --output"
        )
        raise UsageError(told) from error


def _write(summary: dict[str, Any], output: Path) -> None:
    from gistrag.evaluation.report import draw, markdown

    _write_json(output / "summary.json", summary)
    files.write_atomic(output / "table.md", markdown(summary).encode())
    draw(summary, output / "figures")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    files.write_atomic(path, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())


def _print(summary: dict[str, Any], output: Path, *, as_json: bool) -> None:
    if as_json:
        print_json(summary)
        return
    from gistrag.evaluation.report import frontier_table, main_table

    print_table(*(frontier_table if summary["frontier"] else main_table)(summary))
    say(*summary["notes"], f"{output}: rows.jsonl, summary.json, table.md, figures/")


# The work


def _evaluated(
    contexts: Sequence[Context], plan: Plan, wanted: Wanted, settings: IndexSettings, engine: Engine, output: Path
) -> dict[str, Any]:
    """Answer what is not answered yet, measure times, and return all figures."""
    from gistrag.evaluation.cases import passkeys
    from gistrag.evaluation.report import summarised, timed
    from gistrag.evaluation.runner import Examiner, Journal, answered, arms, missing
    from gistrag.evaluation.speed import Stopwatch

    model = engine.model
    chosen = arms(
        wanted.arms,
        rates=wanted.rates,
        placement=settings.placement,
        main_rate=settings.tokens_per_gist,
        has_adapter=model.adapter is not None,
    )
    with ExitStack() as held:
        with waiting("indexing and retrieving"):
            corpus, asked = _asked(contexts, plan, settings, engine, held, output / "corpus")
            fillers = list(passkeys(corpus, plan, samples=1, depths=(0.5,)))
        if too_long := sorted(set(plan.lengths) - {case.about["length"] for case in fillers}):
            say(f"the corpus is too small for contexts of {', '.join(map(str, too_long))} tokens; left out")
        main = [case for case in asked if case.part == "questions"]
        journal = held.enter_context(Journal(output / "rows.jsonl"))
        examiner = Examiner(model, kv_cache_dtype=settings.kv_cache_dtype)
        sweep, samples, frontier = None, [], None
        if wanted.budgets:
            frontier = _frontier(corpus, plan, wanted, settings, model, journal, output / "gists")
        else:
            _answer(examiner, missing(asked, chosen, journal), journal)
            sweep = _swept(examiner, main, settings, wanted.sweep, journal) if wanted.sweep else None
            with Stopwatch(model, settings.kv_cache_dtype) as stopwatch:
                samples = _timings(stopwatch, main[:TIMED_QUESTIONS], fillers, chosen, repeats=wanted.repeats)
        rows = answered(asked, chosen, journal)
    facts = {"questions": len(main), "contexts": len(contexts), **corpus.facts}
    figures = {**summarised(rows), "speed": timed(samples), "timings": samples, "sweep": sweep, "frontier": frontier}
    return {"corpus": facts, **figures}


def _frontier(
    corpus: Corpus,
    plan: Plan,
    wanted: Wanted,
    settings: IndexSettings,
    model: GistModel,
    journal: Journal,
    folder: Path,
) -> dict[str, Any]:
    """Answer what text and gists do with the same slots, and return the figures; *folder* is for gists meanwhile."""
    from gistrag.evaluation.frontier import frontier
    from gistrag.evaluation.report import frontier_figures
    from gistrag.evaluation.runner import Examiner, arms, rows_of, unanswered
    from gistrag.evaluation.speed import Stopwatch

    rivals = arms(("text", "gist"), rates=wanted.rates, placement=settings.placement, main_rate=1, has_adapter=False)
    with waiting("retrieving"):
        pairs = frontier(corpus, plan, model, rivals, wanted.budgets)
    files.make_folder(folder)
    examiner = Examiner(model, kv_cache_dtype=settings.kv_cache_dtype, folder=folder)
    _answer(examiner, unanswered(pairs, journal), journal)
    shutil.rmtree(folder)
    timed = [pair for pair in pairs if int(pair[0].name) < TIMED_QUESTIONS]
    samples: list[Row] = []
    with Stopwatch(model, settings.kv_cache_dtype) as stopwatch, waiting("measuring"):
        for (budget, _), listed in groupby(timed, key=lambda pair: (pair[0].about["budget"], pair[0].name)):
            if wanted.repeats:
                samples += stopwatch.turns(f"{budget}", list(listed), repeats=wanted.repeats)
    return frontier_figures(rows_of(pairs, journal), samples)


def _asked(
    contexts: Sequence[Context], plan: Plan, settings: IndexSettings, engine: Engine, held: ExitStack, folder: Path
) -> tuple[Corpus, list[Case]]:
    """Return the indexed contexts, open as long as *held* is, and all that is asked of them.

    Raises:
        UsageError: nothing can be asked.
    """
    from gistrag.evaluation.cases import cases, indexed, planted, split_whole

    chunked, wholes = split_whole(contexts)
    chunked = planted(chunked, plan)
    say(f"indexing {len(chunked):,} contexts")
    model, tokenizer = engine.model, engine.model.text_tokenizer
    indexing = indexed(folder, chunked, engine.embedder, tokenizer=tokenizer, chunk_tokens=settings.chunk_tokens)
    corpus = held.enter_context(indexing)
    asked = cases(corpus, wholes, plan, document_tokens=min(DOCUMENT_TOKENS, model.window * 3 // 4))
    if not asked:
        raise UsageError("expected questions that can be asked, found only long-form ones")
    return corpus, asked


def _answer(examiner: Examiner, pairs: Sequence[Pair], journal: Journal) -> None:
    for row in _watched(examiner.rows(pairs), len(pairs)):
        journal.add(row)


def _swept(
    examiner: Examiner, main: Sequence[Case], settings: IndexSettings, floor: float, journal: Journal
) -> dict[str, Any]:
    """Return the most tokens per gist that keep the share *floor* of text's F1, and what was tried."""
    from gistrag.evaluation.report import summarised
    from gistrag.evaluation.runner import Arm, answered, gist_arm, largest, missing

    points: list[dict[str, Any]] = []

    def keeps(rate: int) -> bool:
        pair = [Arm("text", "text"), gist_arm(settings.placement, rate)]
        _answer(examiner, missing(main, pair, journal), journal)
        figures = summarised(answered(main, pair, journal))["parts"]["questions"][pair[1].name]
        points.append(
            {"tokens_per_gist": rate, **{name: figures[name] for name in ("f1_kept", "bytes_per_source_token")}}
        )
        return figures["f1_kept"] is not None and figures["f1_kept"]["value"] >= floor

    return {"floor": floor, "tokens_per_gist": largest(keeps), "points": points}


def _timings(
    stopwatch: Stopwatch, main: Sequence[Case], fillers: Sequence[Case], chosen: Sequence[Arm], *, repeats: int
) -> list[Row]:
    if not repeats:
        return []
    if os.getloadavg()[0] > BUSY_SHARE * (os.cpu_count() or 1):
        say(f"this machine is busy (load {os.getloadavg()[0]:.1f}); times from a quiet one say more")
    contexts = {"question": main, **{f"{case.about['length']:,} tokens": [case] for case in fillers}}
    timed = [arm for arm in chosen if arm.is_tuned and arm.give != "document"]
    with waiting("measuring"):
        return list(stopwatch.samples(contexts, timed, repeats=repeats))


def _watched(rows: Iterable[Row], total: int) -> Iterator[Row]:
    """Yield rows and tell how far they are: a bar on a terminal, else a line now and then."""
    from rich.console import Console
    from rich.progress import track

    if sys.stderr.isatty():
        console = Console(stderr=True, quiet=not logger.isEnabledFor(logging.INFO))
        yield from track(rows, "answering", total=total, console=console)
        return
    started_s = spoke_s = time.monotonic()
    for done, row in enumerate(rows, 1):
        yield row
        now_s = time.monotonic()
        if now_s - spoke_s >= INTERVAL_S:
            spoke_s, rate = now_s, done / (now_s - started_s)
            say(f"{done:,} of {total:,} answers, {rate:.1f}/s, {(total - done) / rate:,.0f} s left")


# What it was done with


def _title(settings: IndexSettings) -> str:
    adapter = f"adapter {Path(settings.adapter).name}" if settings.adapter != "none" else "no adapter"
    stored = "" if settings.kv_cache_dtype == "auto" else f", gists in {settings.kv_cache_dtype}"
    return f"{Path(settings.model).name}, {adapter}{stored}"


def _machine(model: GistModel) -> dict[str, Any]:
    import torch

    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("gistrag", "torch", "transformers", "peft", "sentence-transformers")},
    }


def _notes(summary: dict[str, Any], file: Path) -> list[str]:
    """Return what a reader has to know besides the figures."""
    corpus, plan, machine = summary["corpus"], summary["plan"], summary["machine"]
    lines = [
        f"{corpus['questions']:,} questions of {file.name}, seed {plan['seed']}, {plan['top_k'][0]} chunks each; "
        f"corpus of {corpus['articles']:,} articles, {corpus['chunks']:,} chunks, {corpus['tokens']:,} tokens.",
        f"gistrag {machine['gistrag']}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"{machine['device']}, {machine['threads']} threads.",
        "In brackets: 95 % bootstrap intervals over questions, drawn in pairs where arms are compared with text.",
    ]
    if left_out := {arm: sum(parts.values()) for arm, parts in summary["left_out"].items()}:
        listed = ", ".join(f"{count:,} of {arm}" for arm, count in left_out.items())
        lines.append(f"Left out, because the window of the model is too short: {listed}.")
    if (sweep := summary["sweep"]) is not None:
        most = sweep["tokens_per_gist"]
        found = f"{most} tokens per gist" if most else "no number of gists"
        lines.append(f"{100 * sweep['floor']:g} % of text's F1 are kept by at most {found}.")
    return lines
