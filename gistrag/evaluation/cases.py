"""What an evaluation asks: questions, and the passages each is answered from.

A `Case` is complete before any model answers, so all arms get the same passages in the same order. Cases belong to
parts::

    questions      sampled over articles, with the best chunks of the main top_k, best one last as in the product
    top 1, top 5   the same questions with fewer or more chunks
    oracle         the same questions with the one chunk that contains the answer
    order 1 …      the same chunks in other orders
    refusal        the same questions, every passage with an answer removed
    planted …      facts planted in contexts of the corpus, found by retrieval
    passkey        an identifier planted at some depth of a long filler, all of which is given
    long           questions with long answers whose evidence somebody marked, as in CLAP-NQ
    whole          questions about a whole document (kind ``whole``), all of which is given

Long-form tasks without evidence are not asked, because a model wrote their answers. Nothing here runs a language model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Literal, Self

from gistrag.errors import UsageError
from gistrag.evaluation.corpus import CANDIDATES, Corpus, Passage
from gistrag.model.prompt import REFUSAL
from gistrag.qa.dataset import LONG_KINDS, Context, Task
from gistrag.qa.metrics import contains, is_refusal
from gistrag.qa.planted_facts import FACTS, is_planted, plant

LONG, WHOLE = "long", "whole"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ORDERS = 3
WHOLE_FACTOR = 4
"""An answer about a whole document, and a long one, may be this many times longer."""

Suite = Literal["quick", "full"]
SUITES: dict[Suite, dict[str, Any]] = {
    "quick": {"top_k": (3,), "oracle": False, "planted_facts": 0, "passkey": 0, "lengths": (), "orders": 0,
              "repeats": 0},
    "full": {},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is asked; the same plan and file give the same cases.

    Attributes:
        questions: number sampled over articles.
        seed: of everything random.
        top_k: numbers of chunks to answer from; the first is the main one.
        oracle: whether to ask with the one right chunk too.
        planted_facts: number of planted facts, of all kinds alternately.
        unanswerable: number of questions asked without the passage that answers them.
        passkey: fillers of each length, each asked at all of `DEPTHS`.
        lengths: tokens of the fillers, and of the contexts that are timed.
        orders: number of questions asked again in `ORDERS` other orders.
        long: number of questions with long answers.
        whole: number of questions about whole documents.
        repeats: timings of each context and arm; 0 measures no time.
        max_new_tokens: most tokens of an answer.

    Raises:
        UsageError: a value out of range.
    """

    questions: int = 500
    seed: int = 0
    top_k: tuple[int, ...] = (3, 1, 5)
    oracle: bool = True
    planted_facts: int = 100
    unanswerable: int = 100
    passkey: int = 2
    lengths: tuple[int, ...] = (1000, 2000, 4000)
    orders: int = 50
    long: int = 100
    whole: int = 50
    repeats: int = 3
    max_new_tokens: int = 24

    def __post_init__(self) -> None:
        _require(self.questions >= 1, "--questions", "at least 1", self.questions)
        _require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens)
        for name in ("planted_facts", "unanswerable", "passkey", "orders", "long", "whole", "repeats"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        _require(bool(self.top_k), "--top-k", "one number or several", self.top_k)
        _require(min(self.top_k) >= 1, "--top-k", "at least 1", min(self.top_k))
        _require(max(self.top_k) <= CANDIDATES, "--top-k", f"at most {CANDIDATES}", max(self.top_k))
        _require(min(self.lengths, default=1) >= 1, "lengths", "at least 1", self.lengths)

    @classmethod
    def of_suite(cls, suite: Suite, **given: Any) -> Self:
        """Return the plan of a suite, with the values *given* in place of its own; None leaves its own.

        ``quick`` asks the questions themselves, refusals and whole documents; ``full`` also asks everything derived
        from them, and measures time.
        """
        return cls(**SUITES[suite] | {name: value for name, value in given.items() if value is not None})


def _require(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise UsageError(f"{name} must be {expected}, got {found}")


@dataclass(frozen=True)
class Case:
    """A question and what it is answered from.

    Attributes:
        part, name: identify the case; the same question has the same name in every part.
        question, answers: as in the file; a refusal among the answers means that no passage answers.
        passages: in prompt order.
        document: consecutive passages of the article that contains the answer, for the arm that reads the article.
        about: further fields of its row.
        evidence: sentences that support each answer, where somebody marked them.
    """

    part: str
    name: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    max_new_tokens: int
    document: tuple[Passage, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)
    evidence: tuple[str, ...] = ()


NumberedTask = tuple[int, Task]
"""A question with the number of the context it is about."""


def split_whole(contexts: Sequence[Context]) -> tuple[list[Context], list[Context]]:
    """Return the contexts of the corpus, and the whole documents, which are never retrieved."""
    chunked = [context for context in contexts if any(task.kind != WHOLE for task in context.tasks)]
    return chunked, [context for context in contexts if any(task.kind == WHOLE for task in context.tasks)]


def planted(contexts: Sequence[Context], plan: Plan) -> list[Context]:
    """Return the contexts with the facts of the plan planted in some of them, no question twice."""
    randomness = random.Random(f"{plan.seed} probes")
    contexts, asked = list(contexts), {task.question for context in contexts for task in context.tasks}
    places = randomness.sample(range(len(contexts)), len(contexts))
    places = places[: max(1, len(places) // 2)]  # the others make the fillers of passkeys
    for number in range(plan.planted_facts if places else 0):
        kind = sorted(FACTS)[number % len(FACTS)]
        place = places[number % len(places)]
        contexts[place] = _with_fact(contexts[place], randomness, kind, asked)
        asked.add(contexts[place].tasks[-1].question)
    return contexts


def _with_fact(context: Context, randomness: random.Random, kind: str, asked: set[str]) -> Context:
    """Return a context with a planted fact that is not asked for yet, where possible without splitting an answer.

    Raises:
        UsageError: every fact that can be planted is asked for already.
    """
    for attempt in range(10_000):
        found = plant(context, randomness, kind)
        if found.tasks[-1].question not in asked and (attempt > 100 or _keeps_answers(context, found)):
            return found
    raise UsageError(
        "the file already asks for every fact that could be planted; name --suite quick, which plants none"
    )


def _keeps_answers(before: Context, after: Context) -> bool:
    answers = (answer for task in before.tasks for answer in task.answers)
    return all(answer in after.text for answer in answers if answer in before.text)


def sampled(contexts: Sequence[Context], count: int, seed: int, wanted: Callable[[Task], bool]) -> list[NumberedTask]:
    """Return up to *count* questions with the number of their context, from all articles alternately."""
    randomness = random.Random(f"{seed} sample")
    articles: dict[str, list[NumberedTask]] = {}
    for number, context in enumerate(contexts):
        articles.setdefault(context.article, []).extend((number, task) for task in context.tasks if wanted(task))
    queues = [randomness.sample(asked, len(asked)) for asked in articles.values()]
    randomness.shuffle(queues)
    return [asked for turn in zip_longest(*queues) for asked in turn if asked is not None][:count]


def is_plain(task: Task) -> bool:
    """Return whether a task is a main question: with a short answer, which the contexts hold."""
    is_short = task.kind not in LONG_KINDS and task.kind != WHOLE
    return is_short and not is_planted(task) and not _is_unanswerable(task)


def _is_unanswerable(task: Task) -> bool:
    return all(map(is_refusal, task.answers))


def main_questions(corpus: Corpus, plan: Plan) -> list[tuple[str, int, Task]]:
    """Return the name of each main question, the number of its context, and its task, sorted by article."""
    asked = enumerate(sampled(corpus.contexts, plan.questions, plan.seed, is_plain))
    named = [(f"{name}", number, task) for name, (number, task) in asked]
    return sorted(named, key=lambda one: (corpus.contexts[one[1]].article, one[1]))


def cases(corpus: Corpus, wholes: Sequence[Context], plan: Plan, *, document_tokens: int) -> list[Case]:
    """Return all cases, those that share passages near each other.

    Args:
        corpus: of the contexts that are retrieved.
        wholes: whole documents.
        document_tokens: about the most of an article that the full-context arm reads.
    """
    facts = sampled(corpus.contexts, plan.planted_facts, plan.seed, is_planted)
    return [
        *(
            case
            for name, number, task in main_questions(corpus, plan)
            for case in _asking(corpus, plan, name, number, task, document_tokens)
        ),
        *_unanswered(corpus, plan),
        *(_asking_fact(corpus, plan, place, number, task) for place, (number, task) in enumerate(facts)),
        *passkeys(corpus, plan, samples=plan.passkey),
        *_longs(corpus, plan),
        *_wholes(corpus, wholes, plan),
    ]


def _asking(corpus: Corpus, plan: Plan, name: str, number: int, task: Task, document_tokens: int) -> Iterator[Case]:
    """Yield all cases of one question."""
    found, gold = corpus.search(task.question), corpus.gold(number, task.answers)

    def case(part: str, ids: Sequence[int], **about: Any) -> Case:
        about = {"kind": task.kind, "article": corpus.contexts[number].article, **about}
        passages = tuple(corpus.chunks[chunk] for chunk in ids)
        return Case(part, name, task.question, task.answers, passages, plan.max_new_tokens, about=about)

    for top_k in plan.top_k:
        best = found[:top_k][::-1]
        part = "questions" if top_k == plan.top_k[0] else f"top {top_k}"
        made = case(part, best, top_k=top_k, has_gold=not set(gold).isdisjoint(best))
        yield replace(made, document=corpus.document(gold[0], document_tokens)) if part == "questions" else made
    if plan.oracle:
        yield case("oracle", gold[:1])
    if int(name) < plan.orders:
        main = found[: plan.top_k[0]][::-1]
        for order, ids in enumerate(other_orders(main, random.Random(f"{plan.seed} order {name}")), 1):
            yield case(f"order {order}", ids)
    if int(name) < plan.unanswerable:
        without = [
            chunk for chunk in found if chunk not in gold and not contains(corpus.chunks[chunk].text, task.answers)
        ]
        if without:
            yield replace(case("refusal", without[: plan.top_k[0]][::-1]), answers=(REFUSAL,))


def other_orders(ids: Sequence[int], randomness: random.Random) -> list[tuple[int, ...]]:
    """Return up to `ORDERS` different orders, none of them the given one."""
    orders: dict[tuple[int, ...], None] = {}
    while len(orders) < min(ORDERS, math.factorial(len(ids)) - 1):
        order = tuple(randomness.sample(ids, len(ids)))
        if order != tuple(ids):
            orders[order] = None
    return list(orders)


def _unanswered(corpus: Corpus, plan: Plan) -> Iterator[Case]:
    """Yield the questions of the file that no passage answers."""
    for place, (_, task) in enumerate(sampled(corpus.contexts, plan.unanswerable, plan.seed, _is_unanswerable)):
        best = corpus.search(task.question)[: plan.top_k[0]][::-1]
        passages = tuple(corpus.chunks[chunk] for chunk in best)
        about = {"kind": task.kind}
        yield Case("refusal", f"given {place}", task.question, (REFUSAL,), passages, plan.max_new_tokens, about=about)


def _asking_fact(corpus: Corpus, plan: Plan, place: int, number: int, task: Task) -> Case:
    """Return the case of a planted fact."""
    best = corpus.search(task.question)[: plan.top_k[0]][::-1]
    has_gold = not set(corpus.gold(number, task.answers)).isdisjoint(best)
    passages = tuple(corpus.chunks[chunk] for chunk in best)
    about = {"kind": task.kind, "has_gold": has_gold}
    part = f"planted {task.kind.partition(' ')[2]}"
    return Case(part, f"{place}", task.question, task.answers, passages, plan.max_new_tokens, about=about)


def passkeys(corpus: Corpus, plan: Plan, *, samples: int, depths: Sequence[float] = DEPTHS) -> Iterator[Case]:
    """Yield fillers of every length with an identifier planted at every depth; lengths beyond the corpus are left out.

    Args:
        samples: fillers of each length; a filler is the same at all depths but for the planted chunk.
        depths: 0 is the first chunk, 1 the last.
    """
    clean = [
        chunk
        for number, context in enumerate(corpus.contexts)
        if not any(is_planted(task) for task in context.tasks)
        for chunk in corpus.of_context[number]
    ]
    for length in plan.lengths if samples else ():
        if sum(corpus.chunks[chunk].tokens for chunk in clean) < length:
            continue
        for sample in range(samples):
            randomness = random.Random(f"{plan.seed} passkey {length} {sample}")
            filler = _filler(corpus, clean, length, randomness)
            for depth in depths:
                yield _hidden(plan, filler, randomness, length=length, depth=depth, sample=sample)


def _filler(corpus: Corpus, clean: Sequence[int], length: int, randomness: random.Random) -> list[Passage]:
    """Return random chunks of at least *length* tokens."""
    filler: list[Passage] = []
    for chunk in randomness.sample(clean, len(clean)):
        filler.append(corpus.chunks[chunk])
        if sum(passage.tokens for passage in filler) >= length:
            break
    return filler


def _hidden(
    plan: Plan, filler: Sequence[Passage], randomness: random.Random, *, length: int, depth: float, sample: int
) -> Case:
    """Return the case of one identifier planted in a copy of the filler."""
    place = round(depth * (len(filler) - 1))
    before = filler[place]
    context = plant(Context(before.text, ""), randomness, "identifier")
    (task,) = context.tasks
    passages = [*filler[:place], replace(before, text=context.text), *filler[place + 1 :]]
    about = {"kind": "passkey", "length": length, "depth": depth}
    name = f"{length} {sample} {depth:g}"
    return Case("passkey", name, task.question, task.answers, tuple(passages), plan.max_new_tokens, about=about)


def _longs(corpus: Corpus, plan: Plan) -> Iterator[Case]:
    """Yield the questions with long answers, each with the best chunks of the main top_k."""
    asked = sampled(corpus.contexts, plan.long, plan.seed, lambda task: bool(task.evidence))
    for place, (number, task) in enumerate(asked):
        best = corpus.search(task.question)[: plan.top_k[0]][::-1]
        about = {
            "kind": task.kind,
            "article": corpus.contexts[number].article,
            "has_gold": not set(corpus.of_context[number]).isdisjoint(best),
        }
        passages = tuple(corpus.chunks[chunk] for chunk in best)
        new_tokens = WHOLE_FACTOR * plan.max_new_tokens
        yield Case(
            LONG, f"{place}", task.question, task.answers, passages, new_tokens, evidence=task.evidence, about=about
        )


def _wholes(corpus: Corpus, wholes: Sequence[Context], plan: Plan) -> Iterator[Case]:
    """Yield questions about whole documents, with all of their chunks in reading order."""
    asked = sampled(wholes, plan.whole, plan.seed, lambda task: task.kind == WHOLE)
    for place, (number, task) in enumerate(asked):
        passages = corpus.passages(wholes[number].text, wholes[number].heading)
        about = {"kind": WHOLE, "article": wholes[number].article}
        new_tokens = WHOLE_FACTOR * plan.max_new_tokens
        yield Case(WHOLE, f"{place}", task.question, task.answers, passages, new_tokens, about=about)
