"""How the evidence of an answer is quoted: in one line, not too long, without characters that steer what shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gistrag.answering.wording import places, words
from gistrag.terminal import steers

if TYPE_CHECKING:
    from gistrag.answering.answer import Answer

QUOTE_CHARACTERS = 320


def quote(answer: Answer) -> str:
    """Return the evidence in one line; of a long one the part with the most words of the answer.

    A refusal quotes nothing, unless an answer was withheld that is probably wrong.
    """
    if not answer.evidence or (answer.verdict == "not found" and not answer.withheld):
        return ""
    text = harmless(answer.evidence.text)
    if len(text) <= QUOTE_CHARACTERS:
        return text
    found = places(words(answer.withheld or answer.text), text)
    reach = QUOTE_CHARACTERS // 2

    def words_from(begin: int) -> int:
        return len({text[start:end].lower() for start, end in found if begin <= start and end <= begin + reach})

    at = max((start for start, _ in found), key=words_from, default=0)
    begin = max(0, min(at - QUOTE_CHARACTERS // 3, len(text) - QUOTE_CHARACTERS))
    end = begin + QUOTE_CHARACTERS
    return ("…" if begin else "") + text[begin:end].strip() + ("…" if end < len(text) else "")


def harmless(text: str) -> str:
    r"""Return a text on one line, without characters that steer a terminal or turn the direction of what follows.

    >>> harmless("one\x1b[31m\n two")
    'one [31m two'
    """
    steering = (one for one in set(text) if steers(one))
    return " ".join(text.translate(dict.fromkeys(map(ord, steering), " ")).split())
