"""JSON text, read strictly: no key twice, no NaN or infinity, no number that 64 bits or a float cannot hold."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from quant2e.errors import FileFormatError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_WIDEST = 20
"""Digits, and a sign, of an integer of 64 bits."""


def read_json(text: str | bytes, what: str) -> Any:
    """The data that ``text`` describes; ``what`` names it in errors. Raises `FileFormatError`."""
    try:
        # not json's own guess: it takes UTF-16 and a byte order mark
        decoded = bytes(text).decode("utf-8") if not isinstance(text, str) else text
        data = json.loads(
            decoded,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_integer,
            parse_float=_float,
        )
        if _SURROGATE.search(decoded):
            json.dumps(data, ensure_ascii=False).encode("utf-8")  # half of a character is no text
    except RecursionError as error:
        raise FileFormatError(f"{what} is nested too deeply") from error
    except ValueError as error:  # of json, of the codec, and of the functions below
        raise FileFormatError(f"{what} is not JSON: {error}") from error
    return data


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _integer(digits: str) -> int:
    if len(digits) > _WIDEST:
        raise ValueError(f"the integer {digits[:_WIDEST]}… has {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:_WIDEST]} is larger than a float holds")
    return value
