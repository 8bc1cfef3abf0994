"""Schemas of records: the type hints of a dataclass say what its record holds, and what does not fit is refused.

    {"name": "x", "scale": [0.5]}   =>   Described(name="x", scale=(0.5,))     of the dataclass Described

The inverse of `quant2e.report.plain_data`: floats that are not finite are written as their names.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar

import torch

from quant2e.documents.tensor_numbers import TensorNumbers
from quant2e.errors import FileFormatError

T = TypeVar("T")

LATER: Mapping[str, Any] = {"later": True}
"""Metadata of a field with a default that earlier versions did not have: their records are read without it."""

_Read = Callable[[Any], Any]
"""A value of JSON in, the value of a field out; raises `_Misfit`."""

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_NOT_FINITE = ("inf", "-inf", "nan")
_SHOWN = 60
"""Characters of a wrong value that an error shows."""


class _Misfit(Exception):  # noqa: N818  # never leaves this file
    """A value that its type does not allow; ``path``: where in the record it is, from the inside out."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.path: list[str] = []


def from_record(kind: type[T], data: Any, what: str, *, besides: Collection[str] = ()) -> T:
    """The dataclass ``kind`` from its record. ``what`` names the record in errors.

    ``besides``: keys that the record holds too, which are left to the caller. Any other key that is unknown, one that
    is missing (but for fields that are `LATER`), a value of another type, and what the dataclass itself refuses raise
    `FileFormatError`, which says where in the record it is.
    """
    try:
        return typing.cast("T", _described(kind, data, frozenset(besides)))
    except _Misfit as misfit:
        place = "".join(reversed(misfit.path)).lstrip(".")
        raise FileFormatError(f"{what} is damaged: {place or 'it'} {misfit}") from misfit.__cause__


def of_format(data: Any, readable: Iterable[int], what: str) -> int:
    """The format number of a record. Raises `FileFormatError` unless it is one of ``readable``."""
    if not isinstance(data, Mapping):
        raise FileFormatError(f"{what} is damaged: it is {_shown(data)}, and must be an object")
    found, known = data.get("format"), tuple(readable)
    if type(found) is not int or found not in known:
        formats = " and ".join(map(str, known))
        raise FileFormatError(f"{what} has format {_shown(found)}; this version reads format {formats}")
    return found


def _described(kind: Any, data: Any, besides: frozenset[str]) -> Any:
    if not isinstance(data, Mapping):
        raise _Misfit(f"is {_shown(data)}, and must be an object")
    readers = _fields(kind)
    if missing := [name for name in readers if name not in data and name not in _later(kind)]:
        raise _Misfit(f"has no {', '.join(missing)}")
    if unknown := [key for key in data if key not in readers and key not in besides]:
        raise _Misfit(f"has {_shown(unknown[0])}, which is no part of it")
    values = {}
    for name, read in readers.items():
        if name in data:
            values[name] = _at(f".{name}", read, data[name])
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:  # what a description says of itself
        raise _Misfit(f"cannot be: {error}") from error


def _at(place: str, read: _Read, value: Any) -> Any:
    try:
        return read(value)
    except _Misfit as misfit:
        misfit.path.append(place)
        raise


@cache
def _fields(kind: Any) -> Mapping[str, _Read]:
    hints = typing.get_type_hints(kind)
    own = [field for field in fields(kind) if field.init]
    return {field.name: _reader(hints[field.name]) for field in own}


@cache
def _later(kind: Any) -> frozenset[str]:
    return frozenset(field.name for field in fields(kind) if field.metadata == LATER)


def _reader(hint: Any) -> _Read:
    """What reads a value of this type."""
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin in (typing.Union, types.UnionType):
        return _union([_reader(option) for option in of])
    if (origin is tuple and of[1:] == (Ellipsis,)) or origin is Sequence:
        return _sequence(of[0], numbers=origin is Sequence)
    if origin is not None and issubclass(origin, Mapping) and of[0] is str:
        return _mapping(_reader(of[1]))
    assert isinstance(hint, type), hint
    assert is_dataclass(hint), hint
    return lambda data: _described(hint, data, frozenset())


def _exactly(kind: type[Any], name: str) -> _Read:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise _Misfit(f"is {_shown(value)}, and must be {name}")
        return value

    return read


def _number(value: Any) -> float:
    if type(value) in (int, float):
        try:
            return float(value)
        except OverflowError:
            raise _Misfit("is larger than a float holds") from None
    if value in _NOT_FINITE and type(value) is str:
        return float(value)
    raise _Misfit(f"is {_shown(value)}, and must be a number")


def _dtype(value: Any) -> torch.dtype:
    found = _DTYPES.get(value.removeprefix("torch.")) if type(value) is str else None
    if found is None:
        raise _Misfit(f"is {_shown(value)}, and must be the name of a dtype")
    return found


_PLAIN: Mapping[Any, _Read] = {
    str: _exactly(str, "text"),
    bool: _exactly(bool, "true or false"),
    int: _exactly(int, "an integer"),
    type(None): _exactly(type(None), "null"),
    float: _number,
    torch.dtype: _dtype,
}


def _union(options: list[_Read]) -> _Read:
    def read(value: Any) -> Any:
        refused: list[_Misfit] = []
        for option in options:
            try:
                return option(value)
            except _Misfit as misfit:
                refused.append(misfit)
        raise max(refused, key=lambda misfit: len(misfit.path))  # the option that came furthest

    return read


def _sequence(of: Any, *, numbers: bool) -> _Read:
    """What reads a list as a tuple. ``numbers``: or takes `TensorNumbers`, which no JSON holds, as they are."""
    read_one = _reader(of)
    same = of if of in (str, int, float) else None

    def read(value: Any) -> Any:
        if numbers and isinstance(value, TensorNumbers):
            return value
        if not isinstance(value, list | tuple):
            raise _Misfit(f"is {_shown(value)}, and must be a list")
        if same is not None and all(type(item) is same for item in value):  # a table has many thousand scales
            return tuple(value)
        return tuple(_at(f"[{index}]", read_one, item) for index, item in enumerate(value))

    return read


def _mapping(read_one: _Read) -> _Read:
    def read(value: Any) -> Any:
        if not isinstance(value, Mapping) or not all(type(key) is str for key in value):
            raise _Misfit(f"is {_shown(value)}, and must be an object")
        return {key: _at(f"[{key[:_SHOWN]!r}]", read_one, item) for key, item in value.items()}

    return read


def _shown(value: Any) -> str:
    """A wrong value in a message: short, and of what is nested only the kind."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str) or type(value) is float or value is None or isinstance(value, bool):
        text = repr(value)
        return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 64 else "an integer of more than 64 bits"
    return f"a {type(value).__name__}"
