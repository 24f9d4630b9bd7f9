"""Keyword search where words are not written apart, or end in particles: by pairs of neighbouring letters.

SQLite's tokenizer takes a Chinese sentence for one word, and the Korean 택시비를 for another word than
택시비. So each chunk also has the pairs of letters of its Chinese, Japanese and Korean words, in a table of their own:
택시비를 has 택시, 시비 and 비를, and a question about 택시비 looks for two of them. The last letter stands there
alone too, so that a word of one letter can be looked for. What is written in other letters inside such a word, as USB
in USB를, is a word by itself.

Every chunk has a row, an empty one where no such word is in it: a chunk without a row was put by a version that had no
such table, and the next build adds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from gistrag.index import schema
from gistrag.index.database import Database

_LETTERS = (  # Hangul, kana, Han with its iteration marks
    r"\u1100-\u11ff\u3005-\u3007\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f"
    r"\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_RUN = re.compile(f"[{_LETTERS}]+")
_PART = re.compile(f"[{_LETTERS}]+|[^\\W{_LETTERS}]+")
_WORD = re.compile(r"\w+")
_BATCH = 1000


def has_pairs(word: str) -> bool:
    """Return whether a word has letters of Chinese, Japanese or Korean."""
    return bool(_RUN.search(word))


def pairs_of(text: str) -> list[str]:
    """Return what the table holds of a text, in its order.

    >>> pairs_of("USB를 빌린다, at home")
    ['usb', '를', '빌린', '린다', '다']
    """
    words = (word for word in _WORD.findall(text.lower()) if has_pairs(word))
    return [pair for word in words for part in _PART.findall(word) for pair in _pairs(part)]


def _pairs(part: str) -> list[str]:
    if not has_pairs(part):
        return [part]
    return [*(part[i : i + 2] for i in range(len(part) - 1)), part[-1]]


def match_of(words: Iterable[str]) -> str:
    """Return the expression of FTS5 that finds any of *words* in the table; those of other letters as they are."""
    terms = dict.fromkeys(term for word in words for term in _terms(word))
    return " OR ".join(terms) or '""'


def _terms(word: str) -> Iterator[str]:
    parts = _PART.findall(word) if has_pairs(word) else [word]
    for part in parts:
        if not has_pairs(part):
            yield quoted(part)
        elif len(part) > 1:
            yield from (quoted(part[i : i + 2]) for i in range(len(part) - 1))
        elif len(parts) == 1:  # otherwise a particle behind a number or a name
            yield quoted(part) + "*"


def quoted(word: str) -> str:
    """Return a word as FTS5 takes it literally."""
    return '"' + word.replace('"', '""') + '"'


class Pairs:
    """The table of an index."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def are_stored(self) -> bool:
        """Whether the index has the table; one that was made before there was any has it after the next build."""
        return bool(self._database.execute(schema.HAS_PAIRS))

    def serve(self, words: Sequence[str]) -> bool:
        """Return whether any of *words* is looked for in the table."""
        return any(map(has_pairs, words)) and self.are_stored

    # Writing

    def prepare(self, *, verify: bool = False) -> None:
        """Let every chunk have its row; *verify* makes those anew that are of another text."""
        with self._database.writing():
            for statement in schema.CREATE_PAIRS:
                self._database.execute(statement)
            for chunk_id in self.differing() if verify else ():
                self._database.execute("DELETE FROM pairs WHERE rowid = ?", (chunk_id,))
            while rows := self._database.execute(schema.WITHOUT_PAIRS, (_BATCH,)):
                for chunk_id, heading, text in rows:
                    self.put(chunk_id, heading, text)

    def put(self, chunk_id: int, heading: str, text: str) -> None:
        """Store the pairs of a chunk; *heading* is its path as JSON."""
        self._database.execute("INSERT INTO pairs (rowid, text) VALUES (?, ?)", (chunk_id, _row(heading, text)))

    def forget(self) -> None:
        """Index the pairs anew, since FTS5 keeps those of deleted rows until it happens to merge."""
        if self.are_stored:
            self._database.execute("INSERT INTO pairs (pairs) VALUES ('rebuild')")

    # Checking

    def differing(self) -> list[int]:
        """Return the ids of chunks whose row is missing, or is of another text."""
        if not self.are_stored:
            return []
        rows = self._database.execute(schema.PAIRS_OF_CHUNKS)
        return [chunk_id for chunk_id, heading, text, stored in rows if stored != _row(heading, text)]


def _row(heading: str, text: str) -> str:
    return " ".join(pairs_of(f"{heading}\n{text}"))
