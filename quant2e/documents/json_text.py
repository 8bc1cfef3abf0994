"""JSON text, read strictly: no key twice, no NaN, no number that 64 bits or a float cannot hold, no endless nesting."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from quant2e.errors import FileFormatError

MOST_LEVELS = 200
"""How deep lists and objects may be nested: enough for twenty branches of a program inside each other."""

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_FEW, _CHARACTERS = 5_000, 8
"""So many lists and objects may be in any text, and one for each so many characters: an empty one takes 20 times as
much memory as its text."""

_WIDEST = 20
"""Digits, and a sign, of an integer of 64 bits."""


def read_json(text: str | bytes | memoryview, what: str) -> Any:
    """The data that ``text`` describes; ``what`` names it in errors. Raises `FileFormatError`."""
    try:
        # not json's own guess: it takes UTF-16 and a byte order mark
        decoded = bytes(text).decode("utf-8") if not isinstance(text, str) else text
        levels, containers = _nesting(decoded)
        if levels > MOST_LEVELS:  # before json recurses: the limit of the process may be beyond its stack
            raise FileFormatError(f"{what} is nested too deeply: more than {MOST_LEVELS} levels")
        if containers > _FEW + len(decoded) // _CHARACTERS:
            raise FileFormatError(f"{what} holds {containers} lists and objects, with next to nothing in them")
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
    except FileFormatError:
        raise
    except ValueError as error:  # of json, of the codec, and of the functions below
        raise FileFormatError(f"{what} is not JSON: {error}") from error
    return data


def _nesting(text: str) -> tuple[int, int]:
    """The depth of the deepest list or object outside of strings, and how many of them there are."""
    marks = np.frombuffer(_STRING.sub(b"", text.encode("utf-8", "surrogatepass")), dtype=np.uint8)
    opened = (marks == ord("[")) | (marks == ord("{"))
    closed = (marks == ord("]")) | (marks == ord("}"))
    steps = opened.astype(np.int8) - closed.astype(np.int8)
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0)), int(opened.sum())


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
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
