"""The record inside a ``.pt2`` file, small: a table of a model may have a scale for each of 30,000 rows.

    a list of numbers that are all float32     <=>  {"float32": base64 of the little-endian values}
    a list of equal integers                   <=>  {"integer": the value, "count": how many}

Only the per-channel lists of a record of encodings are packed; everything else stays JSON that people can read.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np

from quant2e.errors import FileFormatError

_PACKED = ("scale", "zero_point")
_SHORT = 8
"""Lists up to this length stay as they are."""

_MOST = 1 << 28
"""More parameters than any tensor has channels: a larger count is a damaged file."""


def pack_encodings(encodings: Mapping[str, Any]) -> dict[str, Any]:
    """``encodings``, as `Encodings.as_dict` gives it, with its long lists packed."""
    groups = [{k: _pack(list(v)) if k in _PACKED else v for k, v in group.items()} for group in encodings["groups"]]
    return {**encodings, "groups": groups}


def unpack_encodings(encodings: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `pack_encodings`. Raises `FileFormatError` for a list that is damaged."""
    groups = [{k: _unpack(v) if k in _PACKED else v for k, v in group.items()} for group in encodings["groups"]]
    return {**encodings, "groups": groups}


def _pack(values: list[Any]) -> Any:
    if len(values) <= _SHORT:
        return values
    if all(type(value) is int and value == values[0] for value in values):
        return {"integer": values[0], "count": len(values)}
    if all(type(value) is float for value in values):
        packed = np.array(values, dtype="<f4")
        if _decimals(packed) == values:
            return {"float32": base64.b64encode(packed.tobytes()).decode()}
    return values


def _unpack(values: Any) -> list[Any]:
    if isinstance(values, list):
        return values
    try:
        if "float32" in values:
            return _decimals(np.frombuffer(base64.b64decode(values["float32"], validate=True), dtype="<f4"))
        value, count = int(values["integer"]), int(values["count"])
    except (TypeError, KeyError, ValueError, binascii.Error) as error:
        raise FileFormatError(f"a list of numbers is damaged: {error}") from error
    if not 0 <= count <= _MOST:
        raise FileFormatError(f"a list of numbers is damaged: it holds {count}")
    return [value] * count


def _decimals(values: np.ndarray[Any, np.dtype[np.float32]]) -> list[float]:
    """The shortest decimals that give each float32 back."""
    return [float(str(value)) for value in values]
