"""What counts as a document of a folder, and that nothing else is ever opened."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from support.make_files import make_pdf

from gistrag.documents import discovery, patterns
from gistrag.documents.discovery import FoundFile, Skipped, find, load
from gistrag.documents.patterns import require_patterns
from gistrag.errors import DocumentError, UsageError


def fill(root: Path, *names: str) -> None:
    """Write a file of its own name for each of *names*."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def paths(root: Path, **options: list[str]) -> list[str]:
    """Return the paths that are found."""
    return [file.path for file in find(root, **options)[0]]  # type: ignore[arg-type]


def one(root: Path) -> FoundFile:
    """Return the only document under *root*."""
    (file,), *_ = find(root)
    return file


def test_documents_are_found_sorted_with_their_hashes(tmp_path: Path) -> None:
    """All levels, by path, with size, time and hash."""
    fill(tmp_path, "b/c.md", "a.txt", "b.txt", "b/README", "x.png", "noname")

    found, skipped, _ = find(tmp_path)

    assert [file.path for file in found] == ["a.txt", "b.txt", "b/README", "b/c.md"]
    assert skipped == []
    status = (tmp_path / "a.txt").stat()
    sha256 = hashlib.sha256(b"a.txt").hexdigest()
    assert found[0] == FoundFile(path="a.txt", size=5, mtime_ns=status.st_mtime_ns, sha256=sha256)


def test_an_empty_folder_has_no_documents(tmp_path: Path) -> None:
    """Nothing there is no error."""
    assert find(tmp_path) == ([], [], {})


@pytest.mark.parametrize("name", ["missing", "file", "index", "a\0b"])
def test_what_is_no_folder_of_documents_is_refused(tmp_path: Path, name: str) -> None:
    """Missing, a file, an index or an impossible name: one line, and nothing is created."""
    fill(tmp_path, "file", "index/index.db")
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(UsageError, match=r"^expected a folder of documents.*; .*$"):
        find(tmp_path / name)

    assert before == sorted(tmp_path.rglob("*"))


def test_hidden_files_and_index_folders_are_left_out(tmp_path: Path) -> None:
    """What begins with a dot, and whatever lies in an index."""
    fill(tmp_path, ".git/a.md", ".cache/a.md", ".env.md", "sub/index/index.db", "sub/index/manifest.json", "sub/a.md")

    assert paths(tmp_path) == ["sub/a.md"]
    assert find(tmp_path)[1] == []


def test_gitignore_files_are_respected_at_every_level(tmp_path: Path) -> None:
    """A deeper file overrides a higher one; a broken line or byte counts for nothing."""
    fill(tmp_path, "a.log", "keep.log", "build/a.md", "sub/b.log", "sub/c.md", "sub/build/d.md", "sub/only/e.md")
    (tmp_path / ".gitignore").write_bytes(b"*.log\n!keep.log\n/build/\n!\n[z-a]\n\xff\n")
    (tmp_path / "sub/.gitignore").write_text("!b.log\nc.md\nonly\n")

    assert paths(tmp_path) == ["keep.log", "sub/b.log", "sub/build/d.md"]


HOSTILE = ["*a*a*a*b", "*a" * 30 + "*b", "a**b**", "**/a/**/a/**/b", "!" + "**/a/" * 20 + "b", "**/*a*a*a/" * 6 + "b"]
SLOWEST = ["*a*a*b", "**/a/**/b", "**/*a*b", "**/a/**/*a", "**/*a/**/b", "*a*a/**/b", "*/*/*/*/*/b", "**/a/*/*/b/**"]
LONGEST = [("a" * 250 + "/") * 16 + "c.md", "a/" * 2045 + "c.md", "aa/" * 1360 + "c.md", "a" * 250 + ".md"]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_pattern_with_many_wildcards_is_refused(tmp_path: Path, pattern: str) -> None:
    """Matching it would take time to the power of its wildcards, so one line names it and the limit."""
    with pytest.raises(UsageError, match=r"^exclude has a pattern of \d+ wildcards, .*limit is 3, .*simpler"):
        find(tmp_path, exclude=[pattern])


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_folder_whose_gitignore_has_a_pattern_with_many_wildcards_is_skipped(tmp_path: Path, pattern: str) -> None:
    """The search neither matches the pattern nor goes on without it."""
    fill(tmp_path, "a.md", "sub/" + "a" * 250 + ".md")
    (tmp_path / "sub/.gitignore").write_text(f"*.log\n{pattern}\n")

    found, skipped, _ = find(tmp_path)

    assert [file.path for file in found] == ["a.md"]
    assert [file.path for file in skipped] == ["sub"]
    assert skipped[0].reason.startswith("its .gitignore has a pattern of ")


@pytest.mark.parametrize("pattern", SLOWEST)
def test_a_pattern_within_the_limit_takes_no_time(pattern: str) -> None:
    """The slowest patterns that are accepted take about 50 ms on the longest paths; a busy machine gets a second."""
    spec = patterns.compiled("exclude", [pattern])

    for path in LONGEST:
        started_s = time.process_time()
        spec.match_file(path)
        assert time.process_time() - started_s < 1


def test_a_gitignore_may_hold_few_slow_patterns(tmp_path: Path) -> None:
    """Each of them is fast enough alone, but not ten thousand for each file."""
    fill(tmp_path, "a.md", "sub/b.md")
    (tmp_path / "sub/.gitignore").write_text("**/a/**/b\n" * 101)

    assert [(file.path, file.reason) for file in find(tmp_path)[1]] == [
        ("sub", "its .gitignore has 101 patterns of 3 wildcards or 2 **; the limit is 100")
    ]


def test_a_comment_and_an_escaped_asterisk_are_no_wildcards(tmp_path: Path) -> None:
    r"""A line of asterisks behind ``#`` and a name with ``\*`` are accepted, as in git."""
    fill(tmp_path, "a.md", "****.md")
    (tmp_path / ".gitignore").write_text("# **** tools ****\n\\*\\*\\*\\*.md\n")

    assert paths(tmp_path) == ["a.md"]


def test_a_folder_whose_gitignore_is_a_bomb_is_left_out_with_a_reason(tmp_path: Path) -> None:
    """Without its rules the search could let in what they keep out."""
    fill(tmp_path, "a.md", "sub/secret.md")
    (tmp_path / "sub/.gitignore").write_text("x\n" * 20_000 + "secret.md\n")

    found, skipped, _ = find(tmp_path)

    assert [file.path for file in found] == ["a.md"]
    assert [file.path for file in skipped] == ["sub"]
    assert skipped[0].reason.startswith("its .gitignore is too long: 40,010 bytes; the limit is")


def test_a_gitignore_bomb_at_the_top_stops_the_search(tmp_path: Path) -> None:
    """To go on with nothing found would remove every document from the index."""
    fill(tmp_path, "a.md")
    (tmp_path / ".gitignore").write_text("x\n" * 20_000)

    with pytest.raises(UsageError, match=r"^cannot search .* for documents: its \.gitignore is too long: 40,000 bytes"):
        find(tmp_path)


def test_a_bracket_within_brackets_in_a_gitignore_is_no_trouble(tmp_path: Path) -> None:
    """``[[:alpha:]]`` brings no warning from the regular expressions underneath."""
    fill(tmp_path, "a.md")
    (tmp_path / ".gitignore").write_text("[[:alpha:]]x\n")

    assert paths(tmp_path) == ["a.md"]


def test_patterns_can_be_checked_alone() -> None:
    """What `find` would refuse is refused before anything is made."""
    require_patterns(["*.md"], ["drafts/"])

    with pytest.raises(UsageError, match="include expects gitignore-style patterns"):
        require_patterns(["!"], [])


def test_include_and_exclude_are_patterns(tmp_path: Path) -> None:
    """Include narrows, exclude removes, folders at once."""
    fill(tmp_path, "a.md", "b.txt", "docs/c.md", "docs/d.txt", "docs/old/e.md")

    assert paths(tmp_path, include=["docs/**"]) == ["docs/c.md", "docs/d.txt", "docs/old/e.md"]
    assert paths(tmp_path, include=["*.md"], exclude=["old/"]) == ["a.md", "docs/c.md"]
    with pytest.raises(UsageError, match="exclude expects gitignore-style patterns"):
        find(tmp_path, exclude=["!"])


def test_include_lets_in_an_unknown_suffix_by_name_only(tmp_path: Path) -> None:
    """``*.dat`` names files, ``data/**`` does not."""
    fill(tmp_path, "data/a.dat", "data/b.md")

    assert paths(tmp_path) == ["data/b.md"]
    assert paths(tmp_path, include=["data/**"]) == ["data/b.md"]
    assert paths(tmp_path, include=["*.dat"]) == ["data/a.dat"]
    assert load(tmp_path, find(tmp_path, include=["data/a.dat"])[0][0]).text == "data/a.dat"


def test_office_files_without_a_reader_are_reported(tmp_path: Path) -> None:
    """A document that cannot be read is not left out in silence."""
    fill(tmp_path, "slides.ppt")

    assert (
        Skipped(path="slides.ppt", sha256="", reason="no reader for .ppt files; save it as pdf, docx or html")
        in find(tmp_path)[1]
    )


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Links to files and folders, inside, outside, in circles or into nothing, are reported and left alone."""
    root = tmp_path / "root"
    fill(root, "a.md", "sub/b.md")
    fill(tmp_path, "secret.md")
    for name, target in {
        "inside.md": "a.md",
        "outside.md": "../secret.md",
        "circle.md": "circle.md",
        "dangling.md": "nothing",
        "sub/up": "..",
        "out": "..",
    }.items():
        (root / name).symlink_to(target)

    found, skipped, _ = find(root)

    assert [file.path for file in found] == ["a.md", "sub/b.md"]
    expected = ["circle.md", "dangling.md", "inside.md", "out", "outside.md", "sub/up"]
    assert [file.path for file in skipped] == expected
    assert {file.reason for file in skipped} == {"a symbolic link; links are not followed"}


def test_what_is_no_ordinary_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FIFO does not hang the search, a socket does not break it, even with a document's name."""
    os.mkfifo(tmp_path / "pipe.md")
    os.mkfifo(tmp_path / ".gitignore")
    monkeypatch.chdir(tmp_path)  # a socket's address must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.md")
        found, skipped, _ = find(tmp_path)

    assert found == []
    assert [(file.path, file.reason) for file in skipped] == [
        ("pipe.md", "not a regular file"),
        ("socket.md", "not a regular file"),
    ]
    with pytest.raises(DocumentError, match="not a regular file"):
        load(tmp_path, FoundFile(path="pipe.md", size=0, mtime_ns=0, sha256=""))


def test_a_name_that_is_not_utf8_is_reported(tmp_path: Path) -> None:
    """Such a name cannot be stored; it is shown with its bytes spelt out."""
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.md")).write_text("text")
        (tmp_path / os.fsdecode(b"d\xe9")).mkdir()
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")

    found, skipped, _ = find(tmp_path)

    assert found == []
    assert [file.path for file in skipped] == ["caf\\xe9.md", "d\\xe9/"]


def test_odd_but_valid_names_are_found(tmp_path: Path) -> None:
    """Spaces, line ends, brackets, emoji and a dash in front are only characters."""
    names = ["-rf.md", "a b.md", "line\nend.md", "[x]*.md", "日本 🎉.md", "back\\slash.md"]
    fill(tmp_path, *names)

    found, *_ = find(tmp_path)

    assert sorted(names) == [file.path for file in found]
    assert sorted(names) == [load(tmp_path, file).text for file in found]


def test_unreadable_files_and_folders_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be opened costs its reason, the others are found."""
    fill(tmp_path, "a.md", "b.md", "sub/c.md")
    real = os.open

    def refuse(path: str | Path, *rest: Any, **more: Any) -> int:
        if Path(path).name in ("b.md", "sub"):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    found, skipped, _ = find(tmp_path)

    assert [file.path for file in found] == ["a.md"]
    assert [file.path for file in skipped] == ["b.md", "sub"]
    assert {file.reason for file in skipped} == {"unreadable: Permission denied"}


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    """The size alone decides; a hole of 1 GiB takes no time."""
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(2**30)

    assert [file.reason for file in find(tmp_path)[1]] == ["too large: 1,073,741,824 bytes; the limit is 268,435,456"]


def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    """Size and time as known give the known hash; any difference gives a new one."""
    fill(tmp_path, "a.md")
    file = one(tmp_path)

    known = {"a.md": (file.size, file.mtime_ns, "remembered")}
    touched = {"a.md": (file.size, file.mtime_ns - 1, "remembered")}

    assert find(tmp_path, known=known)[0][0].sha256 == "remembered"
    assert file.sha256 == find(tmp_path, known=touched)[0][0].sha256


def test_a_document_is_what_its_file_says(tmp_path: Path) -> None:
    """Kind, text and pages come from the reader; hash, size and time from the file."""
    (tmp_path / "a.pdf").write_bytes(make_pdf(["one"], ["two"]))
    file = one(tmp_path)

    document = load(tmp_path, file)

    assert document.kind == "pdf"
    assert document.text == "one\n\ntwo"
    assert document.pages == (0, 5)
    assert document.path == file.path
    assert document.sha256 == file.sha256
    assert document.size == file.size
    assert document.mtime_ns == file.mtime_ns


def test_a_document_changed_since_it_was_found_is_loaded_as_it_is_now(tmp_path: Path) -> None:
    """Text and hash always belong together."""
    fill(tmp_path, "a.md")
    file = one(tmp_path)
    (tmp_path / "a.md").write_text("newer")

    document = load(tmp_path, file)

    assert document.text == "newer"
    assert document.sha256 == hashlib.sha256(b"newer").hexdigest()


@pytest.mark.parametrize(("changes", "settles"), [(1, True), (9, False)])
def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: int, settles: bool
) -> None:
    """It is read once more, then skipped."""
    fill(tmp_path, "a.md")
    left = [changes]
    real = discovery._blocks

    def meddle(descriptor: int) -> list[bytes]:
        data = list(real(descriptor))
        if left[0]:
            left[0] -= 1
            (tmp_path / "a.md").write_text("x" * (100 - left[0]))
        return data

    monkeypatch.setattr(discovery, "_blocks", meddle)
    found, skipped, _ = find(tmp_path)

    assert settles == bool(found)
    assert settles == (not skipped)
    assert settles or skipped[0].reason.startswith("changing")


def test_a_document_gone_since_it_was_found_has_a_reason(tmp_path: Path) -> None:
    """No crash, one line."""
    fill(tmp_path, "a.md")
    file = one(tmp_path)
    (tmp_path / "a.md").unlink()

    with pytest.raises(DocumentError, match="unreadable: No such file"):
        load(tmp_path, file)


def test_a_folder_that_became_a_link_out_is_not_entered(tmp_path: Path) -> None:
    """Nothing outside the folder is read, even when it changes under our feet."""
    root = tmp_path / "root"
    fill(root, "sub/a.md")
    fill(tmp_path, "other/a.md")
    file = one(root)
    (root / "sub").rename(tmp_path / "moved")
    (root / "sub").symlink_to(tmp_path / "other")

    with pytest.raises(DocumentError, match="unreadable: Not a directory"):
        load(root, file)


def test_a_folder_that_becomes_a_link_during_the_search_is_not_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between listing a folder and entering it somebody may put a link in its place."""
    root = tmp_path / "root"
    fill(root, "a.md", "sub/b.md")
    fill(tmp_path, "other/secret.md")
    real = discovery._Search.take

    def meddle(*given: Any) -> None:
        if not (root / "sub").is_symlink():
            (root / "sub").rename(tmp_path / "moved")
            (root / "sub").symlink_to(tmp_path / "other")
        real(*given)

    monkeypatch.setattr(discovery._Search, "take", meddle)
    found, skipped, _ = find(root)

    assert [file.path for file in found] == ["a.md"]
    assert [(file.path, file.reason) for file in skipped] == [("sub", "unreadable: Not a directory")]


def test_a_change_that_hides_its_time_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same size, same time of change, other bytes while they are read: still a change."""
    fill(tmp_path, "a.md")
    status = (tmp_path / "a.md").stat()
    real = discovery._blocks

    def meddle(descriptor: int) -> list[bytes]:
        data = list(real(descriptor))
        (tmp_path / "a.md").write_text("b.md")
        os.utime(tmp_path / "a.md", ns=(status.st_atime_ns, status.st_mtime_ns))
        return data

    monkeypatch.setattr(discovery, "_blocks", meddle)

    assert [one.reason for one in find(tmp_path)[1]] == [
        "changing while it is read; build again when no program writes to it"
    ]


def test_duplicates_are_two_documents(tmp_path: Path) -> None:
    """The same bytes under two names have one hash and two paths."""
    for name in ("a.md", "b.md"):
        (tmp_path / name).write_text("same")

    found, *_ = find(tmp_path)

    assert [file.path for file in found] == ["a.md", "b.md"]
    assert len({file.sha256 for file in found}) == 1


def test_a_deep_folder_is_no_problem(tmp_path: Path) -> None:
    """Depth costs no recursion."""
    deep = tmp_path.joinpath(*["d"] * 500)
    deep.mkdir(parents=True)
    (deep / "a.md").write_text("down here")

    assert load(tmp_path, one(tmp_path)).text == "down here"


def test_a_path_without_end_is_reported(tmp_path: Path) -> None:
    """A folder so deep that its path is longer than a system takes is left out, what is above it is found."""
    names, folder = ["d" * 250] * 18, os.open(tmp_path, os.O_RDONLY)
    fill(tmp_path, "a.md")
    for name in names:
        os.mkdir(name, dir_fd=folder)
        folder, above = os.open(name, os.O_RDONLY, dir_fd=folder), folder
        os.close(above)
    os.close(folder)

    found, skipped, _ = find(tmp_path)

    assert [file.path for file in found] == ["a.md"]
    assert len(skipped) == 1
    assert skipped[0].reason == "its path has 4,267 characters; the limit is 4,096"


WELL_KNOWN = "png JPG zip md txt py pdf doc ppt xls odp mp3 tar.gz html csv json docx ipynb exe dll"


def test_files_that_no_reader_knows_are_counted_by_suffix(tmp_path: Path) -> None:
    """Of a folder of 60 suffixes every file is found, skipped with a reason, or counted; the most frequent first."""
    suffixes = [*(f"x{number}" for number in range(40)), *WELL_KNOWN.split()]
    fill(tmp_path, *(f"{folder}a.{suffix}" for suffix in suffixes for folder in ("", "deep/")))
    fill(tmp_path, "b.png", "no-suffix", "Dr. No is here", f"a.{'y' * 200}")

    found, skipped, left_out = find(tmp_path)

    assert len(found) + len(skipped) + sum(left_out.values()) == 2 * 60 + 4
    assert list(left_out.items())[:4] == [("", 3), (".png", 3), (".dll", 2), (".exe", 2)]
    assert {".jpg", ".gz", ".x39"} <= left_out.keys()


def test_what_was_ruled_out_is_not_counted(tmp_path: Path) -> None:
    """Hidden files, and those that patterns rule out, were left out by somebody who knows."""
    fill(tmp_path, ".hidden.png", "drafts/a.png", "b.png", "c.zip")
    (tmp_path / ".gitignore").write_text("*.zip\n")

    assert find(tmp_path, exclude=["drafts/"]).left_out == {".png": 1}
    assert find(tmp_path, include=["*.md"]).left_out == {}
