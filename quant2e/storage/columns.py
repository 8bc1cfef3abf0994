"""Columns: many records with the same keys as one list for each key, in which a value that comes often stands once.

[{"kind": "static", "macs": 1}, {"kind": "static", "macs": 2}, {"kind": "static", "macs": 3}]
=>   {"kind": {"values": ["static"], "index": [0, 0, 0]}, "macs": [1, 2, 3]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quant2e.errors import FileFormatError

_WORTH = 2
"""How often the values of a column come, on average, for each of them to stand once."""


def to_columns(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Records of plain data, all with the keys of the first, as columns."""
    return {key: _column([record[key] for record in records]) for key in (records[0] if records else ())}


def _column(values: list[Any]) -> Any:
    places: dict[str, int] = {}
    distinct: list[Any] = []
    index = []
    for value in values:
        text = json.dumps(value, sort_keys=True)
        if text not in places:
            places[text] = len(distinct)
            distinct.append(value)
        index.append(places[text])
    return {"values": distinct, "index": index} if _WORTH * len(distinct) <= len(values) else values


def from_columns(columns: Any, what: str, most: int) -> list[dict[str, Any]]:
    """The records that `to_columns` was given, at most so many. Raises `FileFormatError`, which calls them ``what``."""
    if not isinstance(columns, dict):
        raise FileFormatError(f"{what} are not written as columns")
    found = {key: _values(column, what) for key, column in columns.items()}
    counts = {len(values) for values in found.values()}
    if len(counts) > 1:
        raise FileFormatError(f"{what} are damaged: their columns differ in length")
    if max(counts, default=0) > most:  # a row of two bytes in the file takes hundreds here
        raise FileFormatError(f"{what} are damaged: they are {max(counts)}, and the graph is smaller than that")
    return [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]


def _values(column: Any, what: str) -> list[Any]:
    if isinstance(column, list):
        return column
    if not isinstance(column, dict) or column.keys() != {"values", "index"}:
        raise FileFormatError(f"{what} are damaged: a column is neither a list nor a list of places")
    distinct, index = column["values"], column["index"]
    plain = isinstance(distinct, list) and isinstance(index, list)
    if not plain or not all(type(place) is int and 0 <= place < len(distinct) for place in index):
        raise FileFormatError(f"{what} are damaged: a place is none in its column")
    return [distinct[place] for place in index]
