"""API keys, and the indexes that each one opens."""

from __future__ import annotations

from pathlib import Path

import pytest

from gistrag.errors import UsageError
from gistrag.server.auth import Access, Opened, digest, key_file, read_keys
from gistrag.server.protocol import APIError

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
INDEXES = ("manual", "notes")


def test_a_key_opens_its_indexes_and_no_others() -> None:
    """Comments and empty lines are ignored; * opens all indexes."""
    keys = read_keys(f"# who\n\n{ALICE} manual  # the first\n{BOB} *\n", INDEXES, where="here")

    access = Access(indexes=frozenset(INDEXES), keys=keys)
    assert access.opened_by(f"Bearer {ALICE}") == Opened(frozenset({"manual"}), digest(ALICE).hex())
    assert access.opened_by(f"bearer  {BOB} ") == Opened({"manual", "notes"}, digest(BOB).hex(), may_build=True)


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", f"Basic {ALICE}", ALICE, "Bearer nonsense", "Bearer \xff"])
def test_without_a_key_nothing_opens(header: str) -> None:
    """A header without one of the keys is refused."""
    access = Access(indexes=frozenset(INDEXES), keys=read_keys(f"{ALICE} *", INDEXES, where="here"))

    with pytest.raises(APIError) as refused:
        access.opened_by(header)
    assert refused.value.status == 401
    assert refused.value.code == "invalid_api_key"


def test_without_keys_everything_opens() -> None:
    """A server without keys ignores the header."""
    assert Access(indexes=frozenset({"manual"})).opened_by("Bearer whatever") == Opened({"manual"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("short *", "line 1 of here: expected a key of 16 characters or more, 8 of them different, got 5 and 5; use a"),
        ("aaaaaaaaaaaaaaaaaaaa *", "8 of them different, got 20 and 1; use a random one"),
        (f"\n{ALICE}", "line 2 of here: expected names of indexes after the key, .* this server has manual, notes"),
        (f"{ALICE} diary", "got diary; this server has"),
        (f"{ALICE} manual\n{ALICE} notes", "line 2 of here: this key is already on an earlier line"),
    ],
)
def test_key_files_that_are_wrong(text: str, message: str) -> None:
    """The error names the line, but not the key."""
    with pytest.raises(UsageError, match=message) as refused:
        read_keys(text, INDEXES, where="here")
    assert ALICE not in str(refused.value)


def test_a_key_file_is_private(tmp_path: Path) -> None:
    """A missing file, one that everybody can read, and one without keys are refused."""
    path = tmp_path / "keys.txt"
    with pytest.raises(UsageError, match=r"expected a key file at .*, found FileNotFoundError"):
        key_file(path, INDEXES)
    path.write_text(f"{ALICE} notes\n", "utf-8")
    path.chmod(0o644)
    with pytest.raises(UsageError, match="has mode 0644; run chmod 600"):
        key_file(path, INDEXES)
    path.chmod(0o600)

    assert key_file(path, INDEXES) == {digest(ALICE): frozenset({"notes"})}
    path.write_text("# nobody yet\n", "utf-8")
    with pytest.raises(UsageError, match="expected a line with a key and its indexes"):
        key_file(path, INDEXES)
