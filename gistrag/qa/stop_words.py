"""Words that any text uses, which tell nothing about what it is about.

A chunk with one of them would enter the list of BM25, although BM25 gives it next to no score, and a rank is a rank.
"""

from __future__ import annotations

_LISTED = """
    a about an and are as at be been but by can could did do does for from had has have he her his how i if in
    into is it its me my no not of on or our she so that the their them there these they this those to was we
    were what when where which who whom whose why will with would you your
"""
STOP_WORDS = frozenset(_LISTED.split())
