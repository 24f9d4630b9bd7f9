"""The headings of a Markdown text: ATX and setext, outside of code fences and front matter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Title:
    """A heading line: its start and end, and the path of titles from the outermost to this one."""

    start: int
    end: int
    path: tuple[str, ...]


def titles_in(text: str) -> list[Title]:
    r"""Return the headings of a Markdown text, in order, without those in code fences and front matter.

    >>> [title.path for title in titles_in("# A\n```\n# no\n```\n## B\n# C #")]
    [('A',), ('A', 'B'), ('C',)]
    """
    found: list[Title] = []
    open_titles: list[tuple[int, str]] = []
    for start, end, level, title in _heading_lines(text):
        while open_titles and open_titles[-1][0] >= level:
            open_titles.pop()
        open_titles.append((level, title))
        found.append(Title(start, end, tuple(name for _, name in open_titles)))
    return found


def heading_at(text: str, heading: Sequence[str], offset: int) -> tuple[str, ...]:
    r"""Return the heading path above a place in a chunk, which may hold more headings than its own.

    Args:
        text: of the chunk; heading: its path, as `Chunk.heading` has it; without one the chunk is no Markdown.
        offset: of the place in the text.

    >>> heading_at("## Leave\n25 days.\n\n## Pay\nMonthly.", ("Handbook", "Leave"), 25)
    ('Handbook', 'Pay')
    """
    open_titles = [(level, title) for level, title in enumerate(heading, 1)]
    below = 0  # end of the headings with which the chunk begins, which are the last of its path
    for start, end, level, title in _heading_lines(text) if heading else ():
        if start > offset:
            break
        if not text[below:start].strip() and title in heading:
            open_titles = [*((min(one, level - 1), name) for one, name in open_titles[: heading.index(title)])]
            below = end
        while open_titles and open_titles[-1][0] >= level:
            open_titles.pop()
        open_titles.append((level, title))
    return tuple(title for _, title in open_titles)


TITLE_CHARACTERS = 200

_LINE = re.compile(
    r"^(?:(?P<fence> {0,3}(?:`{3,}(?=[^`\n]*$)|~{3,})).*"
    r"|(?P<marks>#{1,6})[ \t]+(?P<title>\S.*)"
    r"|(?P<over>(?![-+*>|#=`~\s]).*)\n(?P<under>=+|-{2,})[ \t]*)$",
    re.MULTILINE,
)


def _heading_lines(text: str) -> Iterator[tuple[int, int, int, str]]:
    """Yield (start, end, level, title) of every heading line."""
    front = re.match(r"---\n(?:.*\n)*?---\n", text)
    fence = ""
    for match in _LINE.finditer(text, front.end() if front else 0):
        mark = (match["fence"] or "").strip()
        end = match.start() + len(match[0].rstrip())
        if fence:
            fence = "" if mark.startswith(fence) and match[0].strip() == mark else fence
        elif mark:
            fence = mark
        elif len(match["over"] or match["title"] or "") > TITLE_CHARACTERS:
            continue  # a paragraph that looks like a heading; the heading path of every chunk would repeat it
        elif match["over"]:
            yield match.start(), end, 1 if match["under"][0] == "=" else 2, match["over"].strip()
        elif match["marks"]:
            yield match.start(), end, len(match["marks"]), _bare(match["title"])


def _bare(title: str) -> str:
    """Return an ATX title without its closing marks."""
    words, _, last = title.strip().rpartition(" ")
    return words.strip() if words and not last.strip("#") else title.strip()
