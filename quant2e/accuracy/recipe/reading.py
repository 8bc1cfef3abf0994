"""Plain data into descriptions and back, by the type hints of these; and the JSON Schema that editors use.

What does not fit is an error with its place (a line, where the text had lines) and the nearest name.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar

from quant2e.documents.nearest import nearest
from quant2e.documents.yaml_text import Path
from quant2e.errors import FileFormatError

T = TypeVar("T")


class Places:
    """Says where in a file something is: the file, the line where it is known, the keys."""

    def __init__(self, source: str, lines: Mapping[Path, int] | None = None) -> None:
        self.source = source
        self.lines = lines or {}

    def error(self, path: Path, said: str) -> FileFormatError:
        """``recipe.yaml:3: rules[0].weight.bits: is 'four', and must be an integer``."""
        line = next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), None)
        place = f"{self.source}:{line}" if line is not None else self.source
        keys = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")
        return FileFormatError(f"{place}: {keys + ': ' if keys else ''}{said}")


def read(hint: Any, data: Any, places: Places, path: Path = ()) -> Any:
    """The value of that type that ``data`` describes. Raises `FileFormatError` with the place."""
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return _described(hint, data, places, path)
    if origin is Literal:
        if not any(type(data) is type(option) and data == option for option in of):
            known = [str(option) for option in of]
            near = nearest(str(data), known)
            raise places.error(path, f"is {_shown(data)}, and must be one of {', '.join(known)}{near}")
        return data
    if origin in (typing.Union, types.UnionType):
        return _one_of([option for option in of if option is not types.NoneType], data, places, path)
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise places.error(path, f"is {_shown(data)}, and must be a list")
        return tuple(read(of[0], item, places, (*path, index)) for index, item in enumerate(data))
    if hint is Any:
        return data
    return _plain(hint, data, places, path)


def _one_of(options: list[Any], data: Any, places: Places, path: Path) -> Any:
    if len(options) == 1:
        return read(options[0], data, places, path)
    kind = Mapping if isinstance(data, Mapping) else list if isinstance(data, list | tuple) else object
    fitting = [option for option in options if _kind(option) is kind]
    if len(fitting) == 1:
        return read(fitting[0], data, places, path)
    spelled = " or ".join(_spelled(option) for option in options)
    raise places.error(path, f"is {_shown(data)}, and must be {spelled}")


def _kind(hint: Any) -> Any:
    return Mapping if is_dataclass(hint) else list if typing.get_origin(hint) is tuple else object


def _spelled(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if is_dataclass(hint):
        return "a mapping"
    return "a list" if typing.get_origin(hint) is tuple else _NAMES[hint]


_NAMES = {str: "text", bool: "true or false", int: "an integer", float: "a number"}


def _plain(hint: Any, data: Any, places: Places, path: Path) -> Any:
    if hint is float and type(data) in (int, float):
        if not math.isfinite(data):
            raise places.error(path, f"is {data}, and must be a finite number")
        return float(data)
    if type(data) is not hint:
        raise places.error(path, f"is {_shown(data)}, and must be {_NAMES[hint]}")
    return data


def _described(hint: Any, data: Any, places: Places, path: Path) -> Any:
    if not isinstance(data, Mapping):
        raise places.error(path, f"is {_shown(data)}, and must be a mapping")
    hints = typing.get_type_hints(hint)
    own = {part.name: part for part in fields(hint) if part.init}
    for key in data:
        if key not in own:
            raise places.error((*path, key), f"there is no '{str(key)[:60]}' here{nearest(str(key), own)}")
    values = {key: read(hints[key], value, places, (*path, key)) for key, value in data.items()}
    for name, part in own.items():
        if name not in values and part.default is MISSING and part.default_factory is MISSING:
            raise places.error(path, f"has no '{name}'")
    try:
        return hint(**values)
    except ValueError as error:
        raise places.error(path, str(error)) from error


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else repr(value)[:60]


def plain_settings(value: Any) -> Any:
    """Data for YAML or JSON, without what is at its default; `read` is the inverse."""
    if is_dataclass(value):
        kept = {part.name: getattr(value, part.name) for part in fields(value)}
        usual = {part.name: part.default for part in fields(value)}
        return {name: plain_settings(item) for name, item in kept.items() if item != usual[name] or type(item) is bool}
    if isinstance(value, Mapping):
        return {key: plain_settings(item) for key, item in value.items()}
    return [plain_settings(item) for item in value] if isinstance(value, list | tuple) else value


def schema_of(hint: Any) -> dict[str, Any]:
    """JSON Schema (2020-12) of data that `read` takes for this type."""
    origin, of = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        own = [part for part in fields(hint) if part.init]
        required = [part.name for part in own if part.default is MISSING and part.default_factory is MISSING]
        made = {
            "type": "object",
            "description": " ".join((hint.__doc__ or "").split()),
            "additionalProperties": False,
            "properties": {part.name: schema_of(hints[part.name]) for part in own},
        }
        return {**made, "required": required} if required else made
    if origin is Literal:
        return {"enum": list(of)}
    if origin in (typing.Union, types.UnionType):
        options = [schema_of(option) for option in of if option is not types.NoneType]
        return options[0] if len(options) == 1 else {"anyOf": options}
    if origin is tuple:
        return {"type": "array", "items": schema_of(of[0])}
    return {} if hint is Any else {"type": _JSON[hint]}


_JSON = {str: "string", bool: "boolean", int: "integer", float: "number"}
