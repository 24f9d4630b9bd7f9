"""What is known of a document besides its text: `FIELDS`, each a line of text, and dates as ISO 8601.

A date is ``2026-01-05``, or ``2026-01-05T14:30:00+09:00`` where the format holds a time, in the time zone in which it
was written. What is no real date is left out rather than guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import date, datetime
from email.utils import parsedate_to_datetime
from pathlib import PurePosixPath
from types import MappingProxyType

from gistrag.documents.text import clean, one_line

FIELDS = ("date", "from", "to", "subject", "title", "author", "encoding")
VALUE_CHARS_MAX = 500
NOTHING: Mapping[str, str] = MappingProxyType({})
_YEARS = range(1000, 3000)
_NUMBERS = re.compile(r"(\d{4})\s*[-./년]\s*(\d{1,2})\s*[-./월]\s*(\d{1,2})(?!\d)\s*일?\s*(?:$|[^\d\s])")
_ASKED = re.compile(r"\d{4}(-\d\d(-\d\d(T\d\d:\d\d(:\d\d)?)?)?)?", re.ASCII)
_NAMED = re.compile(r"(\d{4})([-._]?)(\d{2})\2(\d{2})(?!\d)")


def known(values: Mapping[str, str | None]) -> dict[str, str]:
    r"""Return those of the values that say something, each on one line; of dates only real ones, see `iso_date`.

    >>> known({"title": " A\n B ", "author": "", "date": "2026-02-31", "from": None})
    {'title': 'A B'}
    """
    found = {name: one_line(clean(value or ""))[:VALUE_CHARS_MAX].rstrip() for name, value in values.items()}
    if "date" in found:
        found["date"] = iso_date(found["date"])
    return {name: value for name, value in found.items() if value}


def iso_date(text: str) -> str:
    """Return a date as ISO 8601, ``""`` for what is none: an ISO date, that of a mail, or year, month and day.

    >>> iso_date("Mon, 5 Jan 2026 14:30:00 +0900"), iso_date("2026. 1. 5."), iso_date("2026년 1월 5일")
    ('2026-01-05T14:30:00+09:00', '2026-01-05', '2026-01-05')
    >>> iso_date("2026-01-05T08:00:00Z"), iso_date("2026-02-31"), iso_date("soon")
    ('2026-01-05T08:00:00+00:00', '', '')
    """
    text = text.strip()[:VALUE_CHARS_MAX]
    if not text.isdecimal():
        for parse in (date.fromisoformat, datetime.fromisoformat, parsedate_to_datetime):
            try:
                found = parse(text)
            except (ValueError, TypeError, IndexError, OverflowError):
                continue
            return found.isoformat() if found.year in _YEARS else ""
    return _day(match.groups()) if (match := _NUMBERS.match(text)) else ""


def date_in_name(path: str) -> dict[str, str]:
    """Return the date with which the name of a file begins, as it does for minutes and diaries.

    >>> date_in_name("notes/2026-01-05 kickoff.md"), date_in_name("20260105_회의록.txt"), date_in_name("20269999.md")
    ({'date': '2026-01-05'}, {'date': '2026-01-05'}, {})
    """
    match = _NAMED.match(PurePosixPath(path).name)
    day = _day((match[1], match[3], match[4])) if match else ""
    return {"date": day} if day else {}


def is_date(text: str) -> bool:
    """Return whether this is a year, a month, a day or a minute that a filter can name.

    >>> is_date("2026"), is_date("2026-02"), is_date("2026-02-29"), is_date("2028-02-29T14:30"), is_date("2026-2")
    (True, True, False, True, False)
    """
    if not _ASKED.fullmatch(text):
        return False
    try:
        datetime.fromisoformat(text + "0000-01-01T00:00:00"[len(text) :])
    except ValueError:
        return False
    return True


def _day(numbers: Iterable[str]) -> str:
    """Return year, month and day as ISO 8601, ``""`` where there is no such day."""
    try:
        day = date(*map(int, numbers))
    except ValueError:
        return ""
    return day.isoformat() if day.year in _YEARS else ""
