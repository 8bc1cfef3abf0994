"""Origins of nodes: module paths, source lines and the like, as plain text and never followed.

They are shown to people, printed into comments, and compared; a line of them is a line, and nothing in it ends a
comment or a docstring that it may be printed into.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from quant2e.documents.json_text import read_json
from quant2e.errors import FileFormatError

_LONGEST = 100_000
_BRACKETS = {"[": 1, "(": 1, "]": -1, ")": -1}


class Origins:
    """Reads the metadata of nodes; the same text is read once."""

    def __init__(self) -> None:
        self._traces: dict[str, str] = {}
        self._stacks: dict[str, dict[str, tuple[str, str]]] = {}

    def read(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        """What of a node's metadata is kept, in the form that torch.export gives it. Raises `FileFormatError`."""
        found: dict[str, Any] = {}
        if trace := metadata.get("stack_trace"):
            found["stack_trace"] = self._traces.get(trace) or self._traces.setdefault(trace, _lines(trace))
        if stack := metadata.get("nn_module_stack"):
            if stack not in self._stacks:
                self._stacks[stack] = _module_stack(stack)
            found["nn_module_stack"] = dict(self._stacks[stack])
        if sources := metadata.get("source_fn_stack"):
            found["source_fn_stack"] = [_source(entry) for entry in _line(sources).split(";")]
        if function := metadata.get("torch_fn"):
            found["torch_fn"] = tuple(_line(function).split(";"))
        if custom := metadata.get("custom"):
            found["custom"] = read_json(custom, "the custom metadata of a node")
        return found


def _lines(text: str) -> str:
    """Text of several lines, each of which is one."""
    if len(text) > _LONGEST:
        raise FileFormatError("the origin of a node is too long")
    for line in text.split("\n"):
        if not line.replace("\t", "").isprintable():
            raise FileFormatError(f"the origin of a node holds characters that no source line has: {line[:80]!r}")
    return text.replace('"""', "'''")


def _line(text: str) -> str:
    if not text.isprintable() or len(text) > _LONGEST:
        raise FileFormatError(f"the origin of a node holds characters that no name has: {text[:80]!r}")
    return text.replace('"""', "'''")


def _module_stack(text: str) -> dict[str, tuple[str, str]]:
    """``key,path,class`` of each module around a node, joined by semicolons; commas in brackets separate nothing."""
    found = {}
    for entry in _line(text).split(";"):
        parts, depth = [""], 0
        for letter in entry:
            depth += _BRACKETS.get(letter, 0)
            if letter == "," and depth == 0:
                parts.append("")
            else:
                parts[-1] += letter
        if len(parts) != 3:
            raise FileFormatError(f"the module stack of a node is not one: {entry[:80]!r}")
        found[parts[0]] = (parts[1], parts[2])
    return found


def _source(text: str) -> tuple[str, Any]:
    """A name and the module class or function it stands for: one of torch.nn, or else its text."""
    name, comma, source = text.partition(",")
    if not comma:
        raise FileFormatError(f"the source of a node is not one: {text[:80]!r}")
    return name, _sources().get(source, source)


@cache
def _sources() -> Mapping[str, Any]:
    """Module classes and functions of torch.nn by the names under which torch.export writes them."""
    found = [value for value in vars(nn).values() if isinstance(value, type) and issubclass(value, nn.Module)]
    found += [value for value in vars(torch.nn.functional).values() if callable(value)]
    named = [value for value in found if hasattr(value, "__module__") and hasattr(value, "__name__")]
    return {f"{value.__module__}.{value.__name__}": value for value in named}
