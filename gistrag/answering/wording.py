"""Words and numbers of an answer, and whether they stand in a text.

Words are compared without case, and a text has a word that it has in a longer form: *depart* in *departed*, *15일* in
*15일입니다*. A Korean word is compared without its particles. Numbers are compared whole, with thousands separators
left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache

from gistrag.qa.korean import stem
from gistrag.qa.phrases import HANGUL
from gistrag.qa.stop_words import STOP_WORDS

_WORD = re.compile(r"\d+(?:[.,:]\d+)*|[^\W\d_]+(?:['’][^\W\d_]+)?")
_NAME = re.compile(r"[A-Z][\w'’-]*")
_PHRASE = 5
"""Words of an answer that is no sentence yet, at most: its first word has a capital only where it is a name."""
_MARKS = (".", "!", "?")
_STEM = 4
"""Letters of a word that count, at least; a text has the word if it has a word that begins with all but the last 2."""


def words(text: str) -> list[str]:
    """Return the words and numbers of a text that say something, each once; all of them if none does.

    >>> words("The pump takes 1,200 litres, the small pump 80.")
    ['pump', 'takes', '1200', 'litres', 'small', '80']
    """
    found = list(dict.fromkeys(_tokens(text)))
    return [word for word in found if word not in STOP_WORDS] or found


def share_of_words(wanted: Sequence[str], text: str) -> float:
    """Return the share of words that stand in a text, 0 to 1.

    >>> share_of_words(words("How did it depart?"), "It departed at noon.")
    1.0
    """
    present = set(_tokens(text))
    return sum(_has(present, word) for word in wanted) / len(wanted) if wanted else 0.0


def places(wanted: Sequence[str], text: str) -> list[tuple[int, int]]:
    """Return the start and end of every word of a text that is wanted, see `words`.

    >>> places(["depart"], "It departed at noon.")
    [(3, 11)]
    """
    found = ((match.span(), frozenset(_tokens(match[0]))) for match in _WORD.finditer(text))
    return [span for span, present in found if present and any(_has(present, word) for word in wanted)]


def stands_in(phrase: str, text: str) -> bool:
    """Return whether a phrase stands in a text word for word, whatever the punctuation and the case.

    A Korean phrase may end with another particle.

    >>> stands_in("at noon", "It departed: at Noon."), stands_in("9 km", "It is 19 km")
    (True, False)
    """
    *before, last = _tokens(phrase) or ("",)
    inner, outer = " ".join([*before, stem(last, letters_min=1 if before else 2)]), " ".join(_tokens(text))
    return bool(inner) and bool(re.search(rf"(?<!\S){re.escape(inner)}", outer))


def unsupported(answer: str, texts: Iterable[str]) -> tuple[str, ...]:
    """Return the numbers and names of an answer that stand in none of the texts.

    >>> unsupported("It was Anna Lee in 1990.", ["Anna Low came in 1991."])
    ('Lee', '1990')
    """
    present = {word for text in texts for word in _tokens(text)}
    found = [match[0] for match in _WORD.finditer(answer) if match[0][0].isdigit() or _is_name(answer, match)]
    return tuple(dict.fromkeys(word for word in found if not _has(present, _plain(_folded(word)))))


def _is_name(answer: str, match: re.Match[str]) -> bool:
    """Return whether a word is written as a name is, and does not merely begin a sentence."""
    before = answer[: match.start()].rstrip()
    is_sentence = len(answer.split()) > _PHRASE or answer.rstrip()[-1:] in _MARKS
    begins = is_sentence if not before else before[-1] in (*_MARKS, ":")
    return bool(_NAME.fullmatch(match[0])) and match[0].lower() not in STOP_WORDS and not begins


def _has(present: AbstractSet[str], word: str) -> bool:
    if word in present:
        return True
    if word[0].isdigit():
        return False
    if not word.isascii() and HANGUL.match(word[-1]):
        return _has_korean(present, word)
    stem = word[: max(_STEM, len(word) - 2)] if word.isascii() else word
    return len(stem) >= (_STEM if word.isascii() else 1) and any(one.startswith(stem) for one in present)


def _has_korean(present: AbstractSet[str], word: str) -> bool:
    """Return whether there is a Korean word with other particles; one of a single letter has to be that letter."""
    short = stem(word, letters_min=1)
    if len(short) == 1:
        return any(stem(one, letters_min=1) == short for one in present)
    short = stem(word)
    return any(one.startswith(short) for one in present)


def alike(one: str, other: str) -> bool:
    """Return whether two answers have the same words, whatever the particles.

    >>> alike("20일입니다.", "20일"), alike("20 days", "25 days")
    (True, False)
    """
    first, second = ([stem(word, letters_min=1) for word in words(text)] for text in (one, other))
    return first == second


@lru_cache(maxsize=1024)
def _tokens(text: str) -> tuple[str, ...]:
    """Return all words and numbers of a text, in order; the sentences of a passage are asked about again and again."""
    return tuple(_plain(match[0]) for match in _WORD.finditer(_folded(text)))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def _plain(word: str) -> str:
    """Return a number without thousands separators, a word without its possessive ending."""
    if not word[0].isdigit():
        return word.replace("’", "'").removesuffix("'s")
    return re.sub(r",(?=\d{3}(?:\D|$))", "", word)
