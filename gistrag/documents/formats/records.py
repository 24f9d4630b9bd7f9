"""Tables and JSON as ``name: value`` lines, so that each piece of a table keeps the names of its values."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from gistrag.documents.markup import Block, join
from gistrag.documents.text import Text, decode, one_line, require_length


def read_table(data: bytes) -> Text:
    r"""Return each row of a csv or tsv as ``header: value`` lines, rows a blank line apart.

    A file that is no such table, or grows too long this way, stays as it is.

    >>> read_table(b"name,born\nAda,1815\nAlan,1912").text
    'name: Ada\nborn: 1815\n\nname: Alan\nborn: 1912'
    """
    raw = decode(data)
    first = raw.lstrip("\n").partition("\n")[0]
    delimiter = max(",\t;|", key=first.count)
    rows = csv.reader(io.StringIO(raw, newline=""), delimiter=delimiter)
    return Text(text=_records_or(raw, _table_records(rows)), kind="table")


def _table_records(rows: Iterable[list[str]]) -> Iterator[str]:
    header: list[str] = []
    for row in rows:
        cells = [one_line(cell) for cell in row]
        if header and any(cells):
            further = (f"column {number}" for number in range(len(header) + 1, len(cells) + 1))
            names = itertools.chain(header, further)  # a header can be far longer than its rows
            yield _lines(f"{name}: {cell}" for name, cell in zip(names, cells, strict=False) if cell)
        elif any(cells):
            header = [cell or f"column {number}" for number, cell in enumerate(cells, 1)]


def read_json(data: bytes) -> Text:
    r"""Return ``path: value`` lines; the items of a list on top are a blank line apart.

    JSON with comments, and what grows too long this way, stays as it is. Numbers keep the digits they came with.

    >>> read_json(b'{"a": {"b": [1.10, 2]}, "c": null}').text
    'a.b: 1.10, 2\nc: null'
    """
    raw = decode(data)
    return Text(text=_records_or(raw, (record for value in _load(raw) for record in _json_records(value))), kind="json")


def read_jsonl(data: bytes) -> Text:
    """Return the record of each line as `read_json` does, a blank line apart; a broken line stays as it is."""
    raw = decode(data)
    lines = (line for line in raw.split("\n") if line.strip())
    return Text(text=_records_or(raw, (_records_or(line, _line_records(line)) for line in lines)), kind="json")


def _line_records(line: str) -> Iterator[str]:
    for value in _load(line):
        yield _lines(_flat(value, ""))


class _Object(list[tuple[str, Any]]):
    """The pairs of a JSON object, in order, repeated names kept."""


def _load(raw: str) -> Iterator[Any]:
    """Yield the one value of *raw*; lazily, so that what it raises is raised to whoever reads the records."""
    yield json.loads(raw, object_pairs_hook=_Object, parse_float=str, parse_int=str, parse_constant=str)


def _json_records(value: Any) -> Iterator[str]:
    if isinstance(value, list) and not isinstance(value, _Object) and any(isinstance(one, list) for one in value):
        for one in value:
            yield _lines(_flat(one, ""))
    else:
        yield _lines(_flat(value, ""))


def _flat(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, _Object) and value:
        for name, inner in value:
            yield from _flat(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(isinstance(inner, list) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{path}[{number}]")
    else:
        yield f"{path}: {_scalar(value)}" if path else _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, _Object):
        return "{}"
    if isinstance(value, list):
        return ", ".join(map(_scalar, value))
    return value if isinstance(value, str) else json.dumps(value)


def _lines(lines: Iterable[str]) -> str:
    """Return *lines* as one text, counted as they come: a long name on many short values makes far more than it was."""
    out: list[str] = []
    chars = 0
    for line in lines:
        out.append(line)
        chars += len(line) + 1
        require_length(chars)
    return "\n".join(out)


def _records_or(raw: str, records: Iterable[str]) -> str:
    """Return the records a blank line apart, or *raw* where they cannot be told or do not fit."""
    try:
        return join(Block(record) for record in records) or raw
    except (ValueError, RecursionError, csv.Error):  # DocumentError is a ValueError
        return raw
