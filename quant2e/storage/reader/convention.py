"""Calling convention of a program: names and nesting of its inputs and outputs, and what has to hold for the inputs.

Torch keeps the conditions in three places: the values of the placeholders, the ranges of the sizes that vary, and the
guards found while tracing. It makes Python functions of the last two; here all three become conditions in a grammar.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import SymInt, Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from quant2e.errors import CaptureError, FileFormatError
from quant2e.graph.captured.conditions import ConditionError, guard_text
from quant2e.graph.captured.inputs import Inputs, leaf_paths, value_conditions
from quant2e.storage.reader.schema import is_identifier
from quant2e.storage.reader.structure import read_structure

ALWAYS = 2
"""A lower bound that torch takes for granted: it treats sizes of 0 and 1 apart."""


@dataclass(frozen=True, slots=True)
class CallConvention:
    """``names``: arguments, in order, flattened by ``inputs``; ``outputs``: the nesting of what is returned."""

    names: tuple[str, ...]
    inputs: pytree.TreeSpec
    outputs: pytree.TreeSpec


def read_convention(entries: Sequence[Mapping[str, Any]]) -> CallConvention:
    """The convention of a program from its list of module calls, the first of which is that of the program itself."""
    signature = entries[0].get("signature") if entries else None
    if signature is None or entries[0]["fqn"] != "":
        raise FileFormatError("it does not say how it is called")
    inputs, outputs = read_structure(signature["in_spec"]), read_structure(signature["out_spec"])
    sides = inputs.children() if inputs.type is tuple else []
    if [side.type for side in sides] != [tuple, dict]:
        raise FileFormatError("its inputs are not positional and keyword inputs")
    keywords = list(sides[1].context)
    names = signature.get("forward_arg_names") or [f"arg_{i}" for i in range(sides[0].num_children)] + keywords
    plain = all(isinstance(name, str) and is_identifier(name) and name != "self" for name in (*names, *keywords))
    if not plain or len(names) != sides[0].num_children + len(keywords) or len(set(names)) != len(names):
        raise FileFormatError(f"its arguments do not have plain names: {', '.join(map(str, names))[:200]}")
    return CallConvention(tuple(names), inputs, outputs)


def stored_inputs(
    convention: CallConvention,
    placeholders: Sequence[Node],
    ranges: Mapping[str, tuple[int | None, int | None]],
    guards: Sequence[str],
) -> Inputs:
    """What the program may be called with. Raises `FileFormatError` for a condition that cannot be checked."""
    if convention.inputs.num_leaves != len(placeholders):
        raise FileFormatError(
            f"its inputs are nested as {convention.inputs.num_leaves}, and its graph has {len(placeholders)}"
        )
    paths = leaf_paths(convention.names, convention.inputs)
    try:
        found = [
            *value_conditions(placeholders, paths),
            *_range_conditions(placeholders, paths, ranges),
            *(guard_text(guard, convention.names, paths) for guard in guards),
        ]
        return Inputs(convention.names, convention.inputs, tuple(dict.fromkeys(found)))
    except (ConditionError, CaptureError) as error:
        raise FileFormatError(f"its inputs have a condition that cannot be checked: {error}") from error


def _range_conditions(
    placeholders: Sequence[Node], paths: Sequence[str], ranges: Mapping[str, tuple[int | None, int | None]]
) -> Iterator[str]:
    """Bounds of the sizes that vary, and which of them are equal or follow from each other."""
    sources: dict[Any, str] = {}
    derived: list[tuple[str, Any]] = []
    for source, formula in _varying(placeholders, paths):
        if str(formula) not in ranges:
            continue
        if len(formula.free_symbols) == 1:
            derived.append((source, formula))
        if formula in sources:
            yield f"{source} == {sources[formula]}"
            continue
        sources[formula] = source
        low, high = ranges[str(formula)]
        if low is not None and low > ALWAYS:
            yield f"{source} >= {low}"
        if high is not None:
            yield f"{source} <= {high}"
    yield from _relations(derived, sources)


def _varying(placeholders: Sequence[Node], paths: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Sizes of inputs, and inputs that are sizes, that are formulas: how they are reached, and the formula."""
    for node, path in zip(placeholders, paths, strict=True):
        value = node.meta.get("val")
        if isinstance(value, SymInt):
            yield path, value.node.expr
        elif isinstance(value, Tensor):
            sizes: tuple[Any, ...] = tuple(value.shape)
            yield from (
                (f"{path}.size()[{i}]", size.node.expr) for i, size in enumerate(sizes) if type(size) is not int
            )


def _relations(derived: Sequence[tuple[str, Any]], sources: Mapping[Any, str]) -> Iterator[str]:
    """Sizes that follow from a symbol which is no size itself: ``2*s`` and ``2*s + 1`` are one apart."""
    from torch.utils._sympy.functions import sympy
    from torch.utils._sympy.printers import PythonPrinter
    from torch.utils._sympy.solve import try_solve

    known: dict[Any, Any] = {}
    names = [f"source_{index}" for index in range(len(derived))]
    for name, (_, formula) in zip(names, derived, strict=True):
        (symbol,) = formula.free_symbols
        if symbol in sources:
            continue
        own = sympy.Symbol(name)
        if symbol in known:
            relation = PythonPrinter().doprint(sympy.Eq(formula.subs(known), own))
            yield re.sub(r"source_(\d+)", lambda match: derived[int(match[1])][0], relation)
        elif (solution := try_solve(sympy.Eq(formula, own), symbol)) is not None:
            known[symbol] = solution[1]
