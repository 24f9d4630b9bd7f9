"""Fingerprints tell files of different origin apart, and say what differs."""

from __future__ import annotations

import pytest

from gistrag.errors import FingerprintMismatchError
from gistrag.storage.fingerprint import digest, require_same


def test_every_part_counts() -> None:
    """Another name or another value makes another digest."""
    digests = {digest(parts) for parts in ({}, {"a": "1"}, {"a": "2"}, {"b": "1"}, {"a": "1", "b": "1"})}

    assert len(digests) == 5


def test_equal_fingerprints_pass() -> None:
    """The order of the parts does not matter."""
    require_same({"a": "1", "b": "2"}, {"b": "2", "a": "1"}, where="the index", remedy="build it again")


@pytest.mark.parametrize("current", [{"model": "b"}, {"model": "b", "rate": "4"}])
def test_the_first_difference_is_named(current: dict[str, str]) -> None:
    """The message holds where, both values and the remedy."""
    said = "the index was made with model 'a', this one has 'b'; build it again"

    with pytest.raises(FingerprintMismatchError, match=said):
        require_same({"model": "a"}, current, where="the index", remedy="build it again")
