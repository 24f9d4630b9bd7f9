"""Fingerprints: all that a file depends on, by name, so that files of different origin are never mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from gistrag.errors import FingerprintMismatchError


def digest(parts: Mapping[str, str]) -> str:
    """Return the hex sha256 of a fingerprint, whatever the order of its parts.

    >>> digest({"a": "1", "b": "2"}) == digest({"b": "2", "a": "1"})
    True
    """
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()


def require_same(stored: Mapping[str, str], current: Mapping[str, str], *, where: str, remedy: str) -> None:
    """Return if two fingerprints agree.

    Raises:
        FingerprintMismatchError: names the first part that differs, both values, and *remedy*.
    """
    for name in sorted({*stored, *current}):
        if stored.get(name) != current.get(name):
            raise FingerprintMismatchError(
                f"{where} was made with {name} {stored.get(name)!r}, this one has {current.get(name)!r}; {remedy}"
            )
