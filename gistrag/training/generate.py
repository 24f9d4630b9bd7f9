"""Writing questions and answers about passages: what is asked of a teacher, and which of its texts are kept.

::

    passages ─ request ─→ teacher ─→ text ─ parse or polish ─→ filters ─→ records, a line each
                                                                  │
                                                                  └─→ counted: unanswered, unreadable, unclear,
                                                                      unfinished, short, repetitive, unsupported,
                                                                      duplicate, known

Questions are of three kinds: a *detail*, the *theme*, an *inference*. *long* is a summary, an explanation or a list,
and *probe* a made-up fact planted into the passage, for which no teacher is needed. The filters hold words against
words: they keep out what a passage does not say, not every mistake a small teacher makes with what it does say.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal

import tokenizers

from gistrag.documents.chunking import Chunker
from gistrag.documents.discovery import Skipped, find, load
from gistrag.errors import DocumentError, IndexLockedError, UsageError
from gistrag.model.prompt import INSTRUCTION
from gistrag.progress import NoProgress, Progress
from gistrag.qa import metrics
from gistrag.qa.dataset import Context, read_contexts, split_by_article
from gistrag.qa.planted_facts import PLANTED, plant
from gistrag.storage.files import write_all
from gistrag.training.teacher import Request, Teacher

Kind = Literal["detail", "theme", "inference", "long", "probe"]
Record = dict[str, Any]
_Job = tuple["Passage", str]

BATCH = 16
"""Texts asked for at a time; a run that is killed repeats at most so many."""

NEW_TOKENS = 96
CLOSED_BOOK_TOKENS = 64
KNOWN_F1 = 0.6
"""From so much agreement an answer in a sentence, given without the document, is the answer in other words."""
WORDS_MIN, CONTENT_WORDS_MIN = 12, 8
"""The shortest long answer, in words and in different words that say something."""

LONG_COHESION = 0.6
"""Share of neighbouring words of a sentence that must stand together in a sentence of the passage."""

LONG_SUPPORT = 0.7
PAIR_SUPPORT = {"detail": 0.8, "theme": 0.5, "inference": 0.5}
"""Share of an answer's content words that the passage must hold; its numbers and names must be there all."""

SAME_QUESTION = 0.8
"""Share of words in common from which two questions about one source are the same."""


# Passages


@dataclass(frozen=True)
class Passage:
    """What one question is about: ``text`` is the characters from start to end of its source."""

    text: str
    source: str
    start: int
    end: int
    heading: tuple[str, ...] = ()

    def key(self, kind: str) -> str:
        """Return a short name for one kind of question about this passage, always the same."""
        parts = (kind, self.source, self.start, self.end, self.text)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def passages_of_folder(
    folder: str | Path, tokenizer: tokenizers.Tokenizer, *, window: int
) -> tuple[list[Passage], list[Skipped]]:
    """Return the documents of *folder* in passages of at most *window* tokens, and what could not be read.

    Raises:
        UsageError: no such folder, or nothing in it that can be read.
    """
    found, skipped = find(folder)
    chunker = Chunker(tokenizer, chunk_tokens=window)
    passages: list[Passage] = []
    for file in found:
        try:
            chunks = chunker.split(load(folder, file))
        except DocumentError as error:
            skipped.append(Skipped(path=file.path, sha256=file.sha256, reason=str(error)))
            continue
        passages += [Passage(chunk.text, file.path, chunk.start, chunk.end, chunk.heading) for chunk in chunks]
    if not passages:
        reasons = "".join(f"; {row.path}: {row.reason}" for row in skipped[:1])
        raise UsageError(f"expected documents to read in {folder}, found none{reasons}; check the folder")
    return passages, skipped


def passages_of_file(path: Path, *, training_only: bool = False) -> tuple[list[Passage], int]:
    """Return the contexts of a question file, see `gistrag.qa.dataset`, each a passage, and how many lines are none.

    Args:
        training_only: leave out the articles that are held out for evaluation.
    """
    contexts, dropped = read_contexts(path)
    if training_only:
        contexts, _ = split_by_article(contexts)
    return [Passage(one.text, one.article, 0, len(one.text), one.heading) for one in contexts], dropped


def choose(passages: Sequence[Passage], limit: int | None, *, seed: int) -> list[Passage]:
    """Return at most *limit* passages drawn by the seed; a higher limit adds to those of a lower one."""
    if limit is None or limit >= len(passages):
        return list(passages)
    numbers = list(range(len(passages)))
    random.Random(seed).shuffle(numbers)
    return [passages[number] for number in sorted(numbers[:limit])]


# What is asked

DETAILS = (
    "a person, a group or an organisation it names",
    "a date, a year or a number it gives",
    "a place it names",
    "a thing or a term it names",
    "what something is for, or why it was done",
)
TASKS = {
    "detail": "Write a question about {detail}, and the answer.",
    "theme": "Write a question about the main idea of the passage, and the answer.",
    "inference": "Write a question that asks for a reason or a consequence, and the answer.",
}
FORM = " Begin with Q: and A:"
RULES = {
    "detail": "The answer is a few words copied from the passage.",
    "theme": "The answer is one or two sentences that hold for the passage as a whole.",
    "inference": "The answer is one or two sentences, and takes two facts of the passage put together.",
}
STANDING = "The question names what it is about, so that it can be understood by someone without the passage."
LONG = (
    "Summarise the passage in two sentences.",
    "What are the most important facts in the passage?",
    "Explain in simple words what the passage says.",
    "What is the passage about, and why does it matter?",
    "Give a short summary of the passage.",
    "List the main points of the passage.",
    "Describe what the passage tells us.",
    "What does the passage say, and which details does it give?",
    "Explain the passage to a newcomer.",
    "Write a short paragraph about the topic of the passage.",
    "Tell me what the passage says, with its names and numbers.",
    "Give me the key facts of the passage as a list.",
)


def request(kind: str, passage: Passage, randomness: random.Random) -> Request:
    """Return what a teacher is asked for one record."""
    if kind == "long":
        return Request(randomness.choice(LONG), passage.text, passage.heading)
    task = TASKS[kind].format(detail=randomness.choice(DETAILS)) + FORM
    return Request(task, passage.text, passage.heading, rules=f"{RULES[kind]} {STANDING}", begin="Q:")


# What comes back

TEXT_CHARACTERS_MAX = 10_000
_LABEL = re.compile(r"(?<!\w)(?P<letter>q|a)(?:uestion|nswer)?[ *\d]{0,4}:", re.IGNORECASE)


def parse(text: str) -> tuple[str, str] | None:
    r"""Return question and answer of a teacher's text, JSON or lines that begin with Q: and A:, None for neither.

    >>> parse("Sure!\n**Q:** Who runs it?\n**A:** Adela Novak")
    ('Who runs it?', 'Adela Novak')
    >>> parse('```json\n[{"question": "Who is it?", "answer": "She."}]\n```')
    ('Who is it?', 'She.')
    """
    text = text[:TEXT_CHARACTERS_MAX]
    pair = _parsed_json(text) or _parsed_lines(text)
    return pair if pair and all(pair) and len(pair[0].split()) > 1 else None


def _parsed_json(text: str) -> tuple[str, str] | None:
    begin, end = text.find("{"), text.find("}") + 1
    try:
        values = json.loads(text[begin:end])
        return str(values["question"]).strip(), str(values["answer"]).strip()
    except (ValueError, LookupError, TypeError):
        return None


def _parsed_lines(text: str) -> tuple[str, str] | None:
    labels = [(match["letter"].lower(), *match.span()) for match in _LABEL.finditer(text)]
    for (letter, _, begin), (following, end, answer) in pairwise(labels):
        if (letter, following) == ("q", "a"):
            rest = min((start for _, start, _ in labels if start > answer), default=len(text))
            said = text[answer:rest].strip(_DECORATION).split("\n\n")[0]
            return text[begin:end].strip(_DECORATION), said.strip(_DECORATION)
    return None


_DECORATION = " \t\n\r*-"


# Filters

_WORD = re.compile(r"\w+(?:['’.,:-]\w+)*")
_INNER = re.compile(r"(?:(?<=[\w,;] )|(?<=\())\w[\w'’-]+")  # a word that begins no sentence
_LETTERS = 5  # of a word that count: enough to tell words apart, few enough to forgive an ending
_COMMON = """a about after all also although an and any are as at be because become been before being between both
    but by can could did do does during each either for from had has have having he her here hers him his how
    however i if in into is it its itself just many may me might more most much must my no nor not of off on one
    only or other our out over own same she should since so some such than that the their them then there these
    they this those through to too two under until up upon us used very was we were what when where whether
    which while who whom whose why will with within without would you your"""
_ABOUT = """passage passages text author reader describe describes described discuss discusses discussed mention
    mentions mentioned explain explains state states say says tell tells talk talks highlight highlights provide
    provides give gives information overview summary main point points key fact facts following include includes
    including included important importance detail details"""
# words that any text may use, and words with which a passage is spoken of, which it need not hold
_EMPTY = frozenset(f"{_COMMON} {_ABOUT}".split())


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case.

    >>> words("It's 3,500 m, isn't it?")
    ["it's", '3,500', 'm', "isn't", 'it']
    """
    return [word.lower() for word in _WORD.findall(text)]


def content_words(text: str) -> list[str]:
    """Return the words of a text that say something."""
    return [word for word in words(text) if word not in _EMPTY]


def support(answer: str, text: str) -> float:
    """Return the share of an answer's content words that *text* holds, endings aside; 0 if it lacks a number or a name.

    >>> text = "a tower of 300 tons"
    >>> support("The tower weighs 300 tons", text), support("It weighs 301 tons", text)
    (0.75, 0.0)
    """
    present = _stems(text)
    names = [word.lower() for word in _INNER.findall(answer) if word[0].isupper()]
    missing = {name[:_LETTERS] for name in names if name not in _EMPTY} - present
    if missing or not set(_numbers(text)).issuperset(_numbers(answer)):
        return 0.0
    content = content_words(answer)
    return sum(word[:_LETTERS] in present for word in content) / len(content) if content else 0.0


def cohesion(sentence: str, text: str, about: str = "") -> float:
    """Return the share of neighbouring content words that stand together in a sentence of *text*, or in *about*.

    Words of a passage that are put together anew mostly say what it does not.

    >>> text = "The tower is red. The mill is old."
    >>> cohesion("A red tower", text), cohesion("An old tower", text)
    (1.0, 0.0)
    """
    sentences = [_stems(f"{about} {text[start:stop]}") for start, stop in _sentences(text)]
    pairs = list(pairwise(word[:_LETTERS] for word in content_words(sentence)))
    return sum(any(there.issuperset(pair) for there in sentences) for pair in pairs) / len(pairs) if pairs else 0.0


def _stems(text: str) -> set[str]:
    return {part[:_LETTERS] for word in words(text) for part in (word, *re.split(r"\W", word))}


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


_SENTENCE_END = re.compile(
    r"(?<=\w\w[.!?])(?<!\bSt\.)(?<!\bDr\.)(?<!\bMr\.)(?<!\bNo\.)[\"'”)\]]*\s+(?=[\"'“(\[]?[A-Z0-9])|\n+"
)
_ITEM = re.compile(r"^(?:\d+[.)]|[-*•])\s+")
_SENTENCE_CLOSED = re.compile(r"[.!?][\"'”)\]]*$")
_TELLS_NOTHING = re.compile(
    r"\bnot (?:\w+ )?(?:provide|mention|say|state|give|specify)|^(?:Passage|Question|Answer)s?:"
)
_NGRAM = 4
_ALIKE = 0.6
_SAYS_SOMETHING = 3  # content words


def polish(text: str, passage: str, about: str = "") -> tuple[str, str]:
    """Return the beginning of a long answer that is worth keeping, "" for none, and why the rest is not kept.

    It goes on sentence by sentence as long as each is finished, new, and held by the passage.

    Args:
        about: what the passage is about, which it need not say itself.
    """
    kept: list[str] = []
    end, reason = 0, ""
    for start, stop in _sentences(text):
        sentence = text[start:stop].strip()
        if sentence.endswith(":") or not sentence:  # what a list begins with; it is kept where an item is
            continue
        if reason := _flaw(_ITEM.sub("", sentence), kept, passage, about):
            break
        kept.append(sentence)
        end = stop
    good = text[:end].strip()
    is_stump = len(kept) == 1 and bool(_ITEM.match(kept[0]))
    is_short = len(words(good)) < WORDS_MIN or len(set(content_words(good))) < CONTENT_WORDS_MIN
    return ("", reason or "short") if is_stump or is_short else (good, reason)


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for match in _SENTENCE_END.finditer(text):
        yield start, match.end()
        start = match.end()
    yield start, len(text)


def _flaw(sentence: str, before: Sequence[str], passage: str, about: str) -> str:
    """Return what is wrong with a sentence that follows others, "" for nothing."""
    is_open = sentence.count("(") != sentence.count(")") or sentence.count('"') % 2 == 1
    if is_open or not _SENTENCE_CLOSED.search(sentence):
        return "unfinished"
    new = set(content_words(sentence))
    if len(new) < _SAYS_SOMETHING:
        return "short"
    said = [set(content_words(one)) for one in before]
    grams = Counter(_grams(sentence))
    if max(grams.values(), default=0) > 1 or any(len(new & old) >= _ALIKE * len(new) for old in said):
        return "repetitive"
    if support(sentence, f"{about} {passage}") < LONG_SUPPORT or cohesion(sentence, passage, about) < LONG_COHESION:
        return "unsupported"
    return "unsupported" if _TELLS_NOTHING.search(sentence) else ""


def _grams(text: str) -> Iterator[tuple[str, ...]]:
    told = words(text)
    return zip(*(told[start:] for start in range(_NGRAM)), strict=False)


_LEANS = re.compile(r"\b(?:passage|paragraph|the (?:text|author|question|answer))\b", re.IGNORECASE)

_FRAMES = re.compile(r"\b(?:q|a|question|answer)(?: is)?:", re.IGNORECASE)


def pair_flaw(kind: str, question: str, answer: str, passage: str) -> str:
    """Return what is wrong with a question and its answer, "" for nothing.

    Args:
        passage: with what stands above it.
    """
    if _LEANS.search(question) or _FRAMES.search(answer):
        return "unclear"
    if kind != "detail" and not _SENTENCE_CLOSED.search(answer):
        return "unfinished"
    if max(Counter(_grams(answer)).values(), default=0) > 1:
        return "repetitive"
    return "unsupported" if support(answer, passage) < PAIR_SUPPORT[kind] else ""


def is_known(kind: str, said: str, answer: str) -> bool:
    """Return whether an answer given without the document is right; a detail is a few words, others are sentences.

    >>> is_known("theme", "It tells how a mill grinds wheat.", "It tells how the mill grinds the wheat.")
    True
    """
    is_alike = kind != "detail" and metrics.f1(said, [answer]) >= KNOWN_F1
    return is_alike or metrics.exact_match(said, [answer]) or metrics.contains(said, [answer])


class Questions:
    """The questions there are already."""

    def __init__(self) -> None:
        self._asked: set[str] = set()
        self._of_source: dict[str, list[frozenset[str]]] = {}

    def is_new(self, record: Record) -> bool:
        """Return whether a question was not there yet, and take it in.

        Tasks and planted facts have few wordings, so they are told apart by what they are about. A question that stands
        for itself must differ from every other in more than a word or two.
        """
        kind, context, source = record["kind"], record["context"], record["source"]
        asked = metrics.normalized(record["question"])
        is_about_context = kind == "long" or kind.split(" ")[0] == PLANTED
        key = f"{asked} {context}" if is_about_context else asked
        told = frozenset(asked.split())
        others = [] if is_about_context else self._of_source.setdefault(source, [])
        if key in self._asked or any(len(told & other) >= SAME_QUESTION * len(told | other) for other in others):
            return False
        self._asked.add(key)
        others.append(told)
        return True


# Writing


def planted(passage: Passage, randomness: random.Random) -> Record:
    """Return the record of a made-up fact planted into a passage."""
    context = plant(Context(passage.text, passage.source, (), passage.heading), randomness)
    (task,) = context.tasks
    return {**_record(passage, task.kind, task.question, task.answers[0]), "context": context.text}


def judged(passage: Passage, kind: str, task: str, text: str) -> tuple[Record | None, str]:
    """Return the record that a teacher's text makes, or None and why it makes none."""
    about = " ".join(passage.heading)
    if kind == "long":
        answer, reason = polish(text, passage.text, about)
        return (_record(passage, kind, task, answer), "") if answer else (None, reason)
    pair = parse(text)
    if pair is None:
        return None, "unreadable"
    reason = pair_flaw(kind, *pair, f"{about} {passage.text}")
    return (None, reason) if reason else (_record(passage, kind, *pair), "")


def _record(passage: Passage, kind: str, question: str, answer: str) -> Record:
    return {
        "instruction": INSTRUCTION,
        "context": passage.text,
        "gist_span": [passage.start, passage.end],
        "question": question,
        "answer": answer,
        "kind": kind,
        "source": passage.source,
        "heading": list(passage.heading),
    }


@dataclass
class Report:
    """What a run did: records written by kind, texts dropped by reason, and how many were done before."""

    written: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    done_before: int = 0


class Ledger:
    """A file of records that grows, and beside it, as ``<name>.state``, what is done with.

    Both are only ever added to, so a run may end at any moment: a half-written last line is cut off, and what was
    written but not yet noted as done is made again and then found to be a duplicate.

    Attributes:
        questions: those in the file.
    """

    def __init__(self, records: IO[bytes], notes: IO[bytes]) -> None:
        self._records, self._notes = records, notes
        self._done = {key for keys in _values(notes) if isinstance(keys, list) for key in keys}
        self.questions = Questions()
        for record in _values(records):
            with suppress(LookupError, TypeError, AttributeError):  # a line somebody else put there
                self.questions.is_new(record)

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Ledger]:
        """Hold the ledger at *path*, which nobody else may write meanwhile.

        Raises:
            UsageError: a file that was not begun here, or no place to write.
            IndexLockedError: somebody else is writing.
        """
        state = path.with_name(f"{path.name}.state")
        is_there = path.is_file()
        if is_there and path.stat().st_size and not state.exists():
            raise UsageError(f"{path} was not begun by gistrag synthesize; give another --output, or move it away")
        with _opened(path) as records, _opened(state) as notes:
            _lock(records, path)
            if not is_there:
                notes.truncate(0)
            yield cls(records, notes)

    def has(self, key: str) -> bool:
        """Return whether this is done with."""
        return key in self._done

    def put(self, records: Sequence[Record], done: Sequence[str]) -> None:
        """Add records, and note what is done with."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_all(self._records.fileno(), lines.encode())
        write_all(self._notes.fileno(), (json.dumps(list(done)) + "\n").encode())
        self._done.update(done)


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("ab+", buffering=0)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UsageError(f"cannot write {path}: {error.strerror}; give another --output") from None


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise IndexLockedError(f"{path} is being written by another process; wait until it ends, or stop it") from None


def _values(file: IO[bytes]) -> list[Any]:
    """Return what the lines of a file hold, after cutting off a last one that was not written to its end."""
    file.seek(0)
    data = file.read()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        file.truncate(whole)
    values = []
    for line in data[:whole].splitlines():
        with suppress(ValueError):
            values.append(json.loads(line))
    return values


class Synthesis:
    """One run: what writes, what judges, and where it goes.

    Args:
        teacher: writes; None where only facts are planted.
        judge: answers without the document; a question it gets right is dropped. None where there are no questions.
        seed: of phrasings and planted facts; the same seed asks the same.

    Attributes:
        report: what was done so far.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        teacher: Teacher | None,
        judge: Teacher | None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.report = Report()
        self._ledger, self._teacher, self._judge, self._seed = ledger, teacher, judge, seed
        self._progress = progress or NoProgress()

    def run(self, passages: Sequence[Passage], kinds: Sequence[str]) -> Report:
        """Write what is not yet done of every kind about every passage, and return what was done."""
        jobs = [(passage, kind) for passage in passages for kind in kinds]
        ahead = [(passage, kind) for passage, kind in jobs if not self._ledger.has(passage.key(kind))]
        self.report.done_before = len(jobs) - len(ahead)
        self._progress.plan(chunks=len(ahead), tokens=0, gist_bytes=0)
        for start in range(0, len(ahead), BATCH):
            batch = ahead[start : start + BATCH]
            self._write(batch)
            self._progress.advance(chunks=len(batch), tokens=0)
        return self.report

    def _write(self, jobs: Sequence[_Job]) -> None:
        facts = [job for job in jobs if job[1] == PLANTED]
        records = [planted(passage, self._randomness(passage, kind)) for passage, kind in facts]
        put = {job: request(*job[::-1], self._randomness(*job)) for job in jobs if job[1] != PLANTED}
        asked = [job for job in put if self._teacher and self._teacher.fits(put[job], max_new_tokens=NEW_TOKENS)]
        self.report.dropped["too long"] += len(put) - len(asked)
        requests = [put[job] for job in asked]
        texts = self._teacher.write(requests, max_new_tokens=NEW_TOKENS) if self._teacher and asked else []
        done = [*facts, *(job for job in put if job not in asked)]
        for job, text in zip(asked, texts, strict=True):
            if text is None:
                self.report.dropped["unanswered"] += 1  # and not done: the next run asks again
                continue
            done.append(job)
            record, reason = judged(*job, put[job].task, text)
            if record is None:
                self.report.dropped[reason] += 1
            else:
                records.append(record)
        kept = self._unknown(self._new(records))
        self._ledger.put(kept, [passage.key(kind) for passage, kind in done])
        self.report.written.update(record["kind"] for record in kept)

    def _randomness(self, passage: Passage, kind: str) -> random.Random:
        return random.Random(f"{self._seed} {passage.key(kind)}")

    def _new(self, records: Sequence[Record]) -> list[Record]:
        new = [record for record in records if self._ledger.questions.is_new(record)]
        self.report.dropped["duplicate"] += len(records) - len(new)
        return new

    def _unknown(self, records: Sequence[Record]) -> list[Record]:
        """Return the records whose question cannot be answered without the document."""
        asked = [record for record in records if record["kind"] in TASKS]
        if not asked or self._judge is None:
            return list(records)
        said = self._judge.write([Request(record["question"]) for record in asked], max_new_tokens=CLOSED_BOOK_TOKENS)
        known = [
            record
            for record, text in zip(asked, said, strict=True)
            if is_known(record["kind"], text or "", record["answer"])
        ]
        self.report.dropped["known"] += len(known)
        return [record for record in records if record not in known]
