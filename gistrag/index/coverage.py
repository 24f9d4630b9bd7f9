"""Whether reader and embedder know the scripts of the documents, from a sample of what a build reads.

A tokenizer cuts a language that its model was not trained on into bytes, so tokens a character tell. Of the two readers
of the catalog, one knows English, one 140 languages::

                     English   German   Vietnamese   Russian   Arabic   Hindi   Hangul   Kana   Han
    SmolLM2-135M     0.25      0.45     0.95         0.91      1.12     1.51    2.82     1.84   2.00
    Gemma 3 270M     0.24      0.25     0.34         0.26      0.40     0.41    0.84     0.81   0.66

An embedder with a vocabulary of words reads a word outside of it as unknown: all-MiniLM-L6-v2 one in four of Korean,
every one of Chinese, none of English. (Words of a script alone, from documents of the tests and a translated sentence.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

from gistrag.model.suggestions import suggested
from gistrag.settings import MULTILINGUAL_EMBEDDER

SAMPLE_CHARACTERS = 4000
"""Letters of each script that are looked at."""
LEAST_CHARACTERS, LEAST_SHARE = 200, 0.05
"""A script with fewer letters, or a smaller share of them, is not spoken of."""
TOKENS_MAX, TOKENS_MAX_OF_SYLLABLES = 0.6, 1.5
"""Tokens a character from which a reader does not know an alphabet, or a script of syllables or words."""
UNKNOWN_MAX = 0.1
"""Share of unknown words from which an embedder does not know a script."""

_SCRIPTS = {
    "Latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
    "Hangul": "\uac00-\ud7a3",
    "Kana": "\u3040-\u30ff",
    "Han": "\u4e00-\u9fff",
    "Cyrillic": "\u0400-\u04ff",
    "Greek": "\u0370-\u03ff",
    "Arabic": "\u0600-\u06ff",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
}
_SYLLABLES = frozenset({"Hangul", "Kana", "Han"})
_RUN = re.compile("|".join(f"(?P<{name}>[{letters}]+)" for name, letters in _SCRIPTS.items()))


class Sample:
    """Words of the documents that a build reads, by script."""

    def __init__(self) -> None:
        self._words: dict[str, list[str]] = {}
        self._letters: Counter[str] = Counter()

    def add(self, text: str) -> None:
        """Look at the beginning of a text, until every script that stands there has enough words."""
        for match in _RUN.finditer(text[:SAMPLE_CHARACTERS]):
            script = str(match.lastgroup)
            if self._letters[script] < SAMPLE_CHARACTERS:
                self._words.setdefault(script, []).append(match[0])
            self._letters[script] += len(match[0])

    def verdicts(self, model: str, tokenizer: Tokenizer, unknown_share: Callable[[Sequence[str]], float]) -> list[str]:
        """Return a sentence for each script that suffers, the most frequent first: how, and which reader knows it.

        Args:
            model: name of the reader; tokenizer: its own.
            unknown_share: returns the share of words that the embedder does not know.
        """
        total = self._letters.total()
        said = []
        for script, letters in self._letters.most_common():
            if letters >= max(LEAST_CHARACTERS, LEAST_SHARE * total):
                words = self._words[script]
                tokens = len(tokenizer.encode(" ".join(words), add_special_tokens=False).ids) / sum(map(len, words))
                said += _verdict(model, script, letters / total, tokens, unknown_share(words))
        return said


def _verdict(model: str, script: str, share: float, tokens: float, unknown: float) -> list[str]:
    """Return what suffers in texts of a script, nothing where all is well."""
    parts = []
    if tokens > (TOKENS_MAX_OF_SYLLABLES if script in _SYLLABLES else TOKENS_MAX):
        parts.append(
            f"{model} takes {tokens:.1f} tokens a character for it (0.25 for English), so answers are slow and cannot "
            f"be relied on; choose --model {suggested(model)}, see `gistrag models`"
        )
    if unknown > UNKNOWN_MAX:
        parts.append(
            f"the embedder does not know {unknown:.0%} of its words, so a search misses passages "
            f"that use other words than the question; choose --embedder {MULTILINGUAL_EMBEDDER}"
        )
    return [f"{script}, {share:.0%} of the letters: {'; and '.join(parts)}"] if parts else []
