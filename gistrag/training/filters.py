"""Which of a teacher's texts become training records: reading them, and dropping what their passage does not support.

The filters compare words with words, and Korean ones, without their particles, with the letters of the passage. They
drop what a passage does not say, but not every mistake that a small teacher makes with what it does say. A dropped text
is counted by its reason::

    unreadable     no question and answer in it          unclear       the question refers back to "the passage"
    unfinished     the last sentence is cut off          short         too few words
    repetitive     it says a thing twice                 unsupported   the passage does not say it
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from gistrag.qa import metrics
from gistrag.qa.dataset import LONG_KINDS
from gistrag.qa.korean import ENDED, stem
from gistrag.qa.phrases import HANGUL
from gistrag.qa.planted_facts import PLANTED
from gistrag.qa.stop_words import STOP_WORDS

KNOWN_F1 = 0.6
"""F1 from which a sentence that answers without the document counts as the answer in other words."""

WORDS_MIN, CONTENT_WORDS_MIN = 12, 8
"""Fewest words, and fewest different content words, of a long answer."""

KOREAN_WORDS_MIN = 6
"""The same of a Korean one, which has no articles, and writes particles and words together."""

ITEMS_MIN = 2
"""Fewest items of a list."""

LONG_COHESION = 0.6
"""Smallest share of neighboring content words of a sentence that must share a sentence of the passage."""

LONG_SUPPORT = 0.7
PAIR_SUPPORT = {"detail": 0.8, "theme": 0.5, "inference": 0.5}
"""Smallest share of an answer's content words that the passage must contain, besides all its numbers and names."""

SAME_QUESTION = 0.8
"""Share of words in common from which two questions about one source are the same."""

TEXT_CHARACTERS_MAX = 10_000
_LABEL = re.compile(
    r"(?<!\w)(?:(?P<q>q(?:uestion)?|질문|문제)|(?P<a>a(?:nswer)?|답변|정답|답))[ *\d]{0,4}[:\uff1a]", re.IGNORECASE
)


def parse(text: str) -> tuple[str, str] | None:
    r"""Return question and answer of a teacher's text, None if it has none.

    The text may be JSON, or lines that begin with Q: and A:, or 질문: and 답변:; of several pairs the first counts.

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
    labels = [(match.lastgroup, *match.span()) for match in _LABEL.finditer(text)]
    for (label, _, begin), (following, end, answer) in pairwise(labels):
        if (label, following) == ("q", "a"):
            rest = min((start for _, start, _ in labels if start > answer), default=len(text))
            first = text[answer:rest].strip(_DECORATION).split("\n\n")[0]
            return text[begin:end].strip(_DECORATION), first.strip(_DECORATION)
    return None


_DECORATION = " \t\n\r*-"


_WORD = re.compile(r"\w+(?:['’.,:-]\w+)*")
_INNER = re.compile(r"(?:(?<=[\w,;] )|(?<=\())\w[\w'’-]+")  # a word that begins no sentence
_LETTERS = 5  # first letters of a word that are compared: enough to tell words apart, whatever their endings
_FREE = """after all also although any because become before being between both during each either having here hers him
    however itself just many may might more most much must nor off one only other out over own same should since
    some such than then through too two under until up upon us used very whether while within without
    passage passages text author reader describe describes described discuss discusses discussed mention
    mentions mentioned explain explains state states say says tell tells talk talks highlight highlights provide
    provides give gives information overview summary main point points key fact facts following include includes
    including included important importance detail details"""
_KOREAN_FREE = """
    그 이 저 것 수 등 및 또 또는 그리고 그래서 그러나 하지만 따라서 때 때문 위해 위한 대한 대해 관한 관해
    통해 모든 각 매우 가장 더 다른 함께 다시 이후 이전 경우 있 없 글 본문 지문 문서 내용 저자
    설명 설명하 중요 중요한 정보 요점 사실 주제
"""
# Words that an answer may use although its passage does not: those that join statements, and those about passages.
_EMPTY = STOP_WORDS | frozenset(_FREE.split()) | frozenset(_KOREAN_FREE.split())
_PREDICATE = re.compile("[\uac00-\ud7a3](?:다|요|까|죠)$")  # a verb, whose forms have few letters in common


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case.

    >>> words("It's 3,500 m, isn't it?")
    ["it's", '3,500', 'm', "isn't", 'it']
    """
    return [word.lower() for word in _WORD.findall(text)]


def content_words(text: str) -> list[str]:
    """Return the words of a text without stop words and without words that speak of a passage."""
    return [word for word in words(text) if _EMPTY.isdisjoint((word, stem(word)))]


def root(word: str) -> str:
    """Return what two forms of a word have in common: its first letters, of a Korean one all but its particles.

    >>> root("weighed"), root("택시비를")
    ('weigh', '택시비')
    """
    return stem(word) if HANGUL.search(word) else word[:_LETTERS]


def support(answer: str, text: str) -> float:
    """Return the share of an answer's content words that *text* contains; 0 if it lacks a number or a name.

    Only the first letters of a word count, so that endings may differ. A Korean word counts without its particles,
    wherever its letters stand; its verbs count where they stand there, and are no fault elsewhere.

    >>> text = "a tower of 300 tons"
    >>> support("The tower weighs 300 tons", text), support("It weighs 301 tons", text)
    (0.75, 0.0)
    """
    present = _stems(text)
    names = [word.lower() for word in _INNER.findall(answer) if word[0].isupper()]
    missing = {name[:_LETTERS] for name in names if name not in _EMPTY} - present
    if missing or not set(_numbers(text)).issuperset(_numbers(answer)):
        return 0.0
    spaced = " ".join(words(text))
    held = [(word, root(word) in present or _is_held(word, spaced)) for word in content_words(answer)]
    counted = [is_held for word, is_held in held if is_held or not _PREDICATE.search(word)]
    return sum(counted) / len(counted) if counted else 0.0


def _is_held(word: str, text: str) -> bool:
    """Return whether the letters of a Korean word stand in *text*; a single one, as a word of its own."""
    letters = root(word)
    if not HANGUL.search(word):
        return False
    return letters in text.replace(" ", "") if len(letters) > 1 else bool(re.search(rf"(?<!\w){letters}{ENDED}", text))


def cohesion(sentence: str, text: str, about: str = "") -> float:
    """Return the share of neighboring content words that share a sentence of *text*, or stand in *about*.

    A text that combines words of a passage in a new way mostly says what the passage does not.

    >>> text = "The tower is red. The mill is old."
    >>> cohesion("A red tower", text), cohesion("An old tower", text)
    (1.0, 0.0)
    """
    sentences = [_stems(f"{about} {text[start:stop]}") for start, stop in _sentences(text)]
    said = [word for word in content_words(sentence) if not _PREDICATE.search(word)]
    pairs = list(pairwise(map(root, said)))
    return sum(any(there.issuperset(pair) for there in sentences) for pair in pairs) / len(pairs) if pairs else 0.0


def _stems(text: str) -> set[str]:
    return {root(part) for word in words(text) for part in (word, *re.split(r"\W", word))}


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


_SENTENCE_END = re.compile(
    r"(?<=\w\w[.!?])(?<!\bSt\.)(?<!\bDr\.)(?<!\bMr\.)(?<!\bNo\.)[\"'”)\]]*\s+(?=[\"'“(\[]?[A-Z0-9\uac00-\ud7a3])|\n+"
)
_ITEM = re.compile(r"^(?:\d+[.)]|[-*•])\s+")
_SENTENCE_CLOSED = re.compile(r"[.!?][\"'”)\]]*$")
_SAYS_NOTHING = re.compile(
    r"\bnot (?:\w+ )?(?:provide|mention|say|state|give|specify)|^(?:(?:Passage|Question|Answer)s?|질문|답변|본문|글):"
    r"|(?:나와|언급되어|명시되어) ?있지 않|언급되지 않|알 수 없"
)
_NGRAM = 4
_ALIKE = 0.6
_SENTENCE_CONTENT_WORDS_MIN = 3


def polish(text: str, passage: str, about: str = "") -> tuple[str, str]:
    """Return the beginning of a long answer that is kept, "" for none, and the reason why the rest is dropped.

    Sentences are kept up to the first that is unfinished, repetitive, or not supported by the passage.

    Args:
        text: the answer.
        passage: what it is about.
        about: headings of the passage; their words count as the passage's own.
    """
    kept: list[str] = []
    end, reason = 0, ""
    for start, stop in _sentences(text):
        sentence = text[start:stop].strip()
        if sentence.endswith(":") or not sentence:  # the line above a list is kept together with its first item
            continue
        if reason := _flaw(_ITEM.sub("", sentence), kept, passage, about):
            break
        kept.append(sentence)
        end = stop
    good = text[:end].strip()
    is_stump = len(kept) == 1 and bool(_ITEM.match(kept[0]))
    words_min, content_min = (
        (KOREAN_WORDS_MIN, KOREAN_WORDS_MIN) if HANGUL.search(good) else (WORDS_MIN, CONTENT_WORDS_MIN)
    )
    is_short = len(words(good)) < words_min or len(set(content_words(good))) < content_min
    return ("", reason or "short") if is_stump or is_short else (good, reason)


def polish_list(text: str, passage: str, about: str = "") -> tuple[str, str]:
    r"""Return the items of a list that are kept, a line each, "" where fewer than two are, and why others are dropped.

    Args:
        text: the answer, whose items begin with a number or a mark.
        passage, about: as in `polish`.

    >>> text = "Here:\n1. The mill is red.\n2. It has nine wheels.\n3. It is in Paris."
    >>> polish_list(text, "A red mill with nine wheels.")
    ('- The mill is red.\n- It has nine wheels.', 'unsupported')
    """
    items = [_ITEM.sub("", line).strip() for line in map(str.strip, text.splitlines()) if _ITEM.match(line)]
    kept: list[str] = []
    reason = ""
    for place, item in enumerate(items, 1):
        may_be_cut_off = place == len(items) and not _SENTENCE_CLOSED.search(item)
        if flaw := "unfinished" if may_be_cut_off else _item_flaw(item, kept, passage, about):
            reason = flaw
        else:
            kept.append(item)
    return ("", reason or "short") if len(kept) < ITEMS_MIN else ("\n".join(f"- {item}" for item in kept), reason)


def _item_flaw(item: str, before: Sequence[str], passage: str, about: str) -> str:
    """Return why an item that follows others is dropped, "" if it is kept."""
    new = set(content_words(item))
    if not new:
        return "short"
    if any(len(new & set(content_words(old))) >= _ALIKE * len(new) for old in before):
        return "repetitive"
    is_apart = len(new) > 1 and cohesion(item, passage, about) < LONG_COHESION
    return "unsupported" if is_apart or support(item, f"{about} {passage}") < LONG_SUPPORT else ""


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for match in _SENTENCE_END.finditer(text):
        yield start, match.end()
        start = match.end()
    yield start, len(text)


def _flaw(sentence: str, before: Sequence[str], passage: str, about: str) -> str:
    """Return why a sentence that follows others is dropped, "" if it is kept."""
    is_open = sentence.count("(") != sentence.count(")") or sentence.count('"') % 2 == 1
    if is_open or not _SENTENCE_CLOSED.search(sentence):
        return "unfinished"
    new = set(content_words(sentence))
    if len(new) < _SENTENCE_CONTENT_WORDS_MIN:
        return "short"
    earlier = [set(content_words(one)) for one in before]
    grams = Counter(_grams(sentence))
    if max(grams.values(), default=0) > 1 or any(len(new & old) >= _ALIKE * len(new) for old in earlier):
        return "repetitive"
    if support(sentence, f"{about} {passage}") < LONG_SUPPORT or cohesion(sentence, passage, about) < LONG_COHESION:
        return "unsupported"
    return "unsupported" if _SAYS_NOTHING.search(sentence) else ""


def _grams(text: str) -> Iterator[tuple[str, ...]]:
    all_words = words(text)
    return zip(*(all_words[start:] for start in range(_NGRAM)), strict=False)


_REFERS_TO_PASSAGE = re.compile(
    r"\b(?:passage|paragraph|the (?:text|author|question|answer))\b"
    r"|(?<!\w)(?:이|위|윗|해당|주어진|다음) ?(?:글|본문|지문|문서|단락)|(?<!\w)(?:본문|지문|저자|글쓴이)",
    re.IGNORECASE,
)

_FRAMES = re.compile(r"\b(?:q|a|question|answer|질문|답변|정답)(?: is)?[:\uff1a]", re.IGNORECASE)


def pair_flaw(kind: str, question: str, answer: str, passage: str) -> str:
    """Return why a question and its answer are dropped, "" if they are kept.

    Args:
        kind: detail, theme or inference.
        question: must be clear without the passage.
        answer: must be finished and supported by the passage.
        passage: the passage below its headings.
    """
    if _REFERS_TO_PASSAGE.search(question) or _FRAMES.search(answer):
        return "unclear"
    if kind != "detail" and not _SENTENCE_CLOSED.search(answer):
        return "unfinished"
    if max(Counter(_grams(answer)).values(), default=0) > 1:
        return "repetitive"
    return "unsupported" if support(answer, passage) < PAIR_SUPPORT[kind] else ""


def is_known(kind: str, given: str, answer: str) -> bool:
    """Return whether *given*, an answer without the document, is right.

    A detail is right word for word; the answers of other kinds are sentences, which may be worded differently.

    >>> is_known("theme", "It tells how a mill grinds wheat.", "It tells how the mill grinds the wheat.")
    True
    """
    is_alike = kind != "detail" and metrics.f1(given, [answer]) >= KNOWN_F1
    return is_alike or metrics.exact_match(given, [answer]) or metrics.contains(given, [answer])


class SeenQuestions:
    """The questions that were written already."""

    def __init__(self) -> None:
        self._asked: set[str] = set()
        self._of_source: dict[str, list[frozenset[str]]] = {}

    def is_new(self, record: Mapping[str, Any]) -> bool:
        """Return whether a question is new, and remember it.

        Tasks of long answers and questions for planted facts have few wordings, so their context tells them apart. Any
        other question must differ from all questions about its source in more than a word or two.
        """
        kind, context, source = record["kind"], record["context"], record["source"]
        asked = metrics.normalized(record["question"])
        is_about_context = kind in LONG_KINDS or kind.split(" ")[0] == PLANTED
        key = f"{asked} {context}" if is_about_context else asked
        new = frozenset(asked.split())
        others = [] if is_about_context else self._of_source.setdefault(source, [])
        if key in self._asked or any(len(new & other) >= SAME_QUESTION * len(new | other) for other in others):
            return False
        self._asked.add(key)
        others.append(new)
        return True
