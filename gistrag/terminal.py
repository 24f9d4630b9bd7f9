"""Text from documents, models and file names, made safe to print.

A terminal obeys control characters: they set its title and clipboard, erase lines, and forge what seems to be a line of
our own. Everything a command prints goes through `visible` or `json_line`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
BREAKS = "\u2028\u2029"
_NOT_IN_JSON = re.compile(f"[\x7f-\x9f\ud800-\udfff{TURNS}{BREAKS}]")


def steers(character: str) -> bool:
    """Return whether a character steers a terminal, turns the direction of text, breaks a line, or is half of one."""
    return unicodedata.category(character) in ("Cc", "Cs") or character in TURNS or character in BREAKS


def visible(text: str, *, keep: str = "") -> str:
    r"""Return a text whose steering characters are spelled out, except those of *keep*.

    >>> visible("a\x1b[31m\nb\u202e"), visible("a\nb\r", keep="\n")
    ('a\\x1b[31m\\nb\\u202e', 'a\nb\\r')
    """
    steering = {ord(one): _spelled(one) for one in set(text) if one not in keep and steers(one)}
    return text.translate(steering) if steering else text


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()


def json_line(value: Any) -> str:
    r"""Return a value as one line of JSON that steers no terminal; what JSON has no form for becomes its text.

    >>> json_line({"a": "\x1b한\u202e"})
    '{"a": "\\u001b한\\u202e"}'
    """
    line = json.dumps(value, ensure_ascii=False, default=str)
    return _NOT_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", line)
