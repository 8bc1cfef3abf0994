"""Selections: which tensors reach an op that weighs or picks values, where one far from all others stands for "never".

    softmax(scores + mask)        a position that ``mask`` sets to -1e9 gets the weight 0

Quantized, such a value is clipped to the range of the data, or stretches it until the data is lost. Which tensors may
hold it follows from the graph: those from which a softmax, a maximum, a sort, a comparison or a choice by condition is
reached through sums, products with numbers, casts and data movement.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch._ops import OpOverload
from torch.fx import Graph, Node

from quant2e.graph.control_flow import has_bodies
from quant2e.graph.data_movement import MOVEMENTS
from quant2e.graph.dataflow import operand

Marks = Mapping[int, float]
"""Sign (-1, 1) → the smallest magnitude from which a value of that sign may stand for "never"."""

WEIGHED = 32.0
"""Behind a softmax: e**-32 is nothing."""

PICKED = 1000.0
"""Behind a comparison of values, where there is no such scale."""

_BELOW: Marks = {-1: PICKED}
_ABOVE: Marks = {1: PICKED}
_BOTH: Marks = {-1: PICKED, 1: PICKED}
_UNBOUNDED: Marks = {-1: math.inf, 1: math.inf}
"""What leaves the model or enters a body: whoever reads it may take an infinity for "never", and no more is known."""

_WEIGHS = frozenset({"softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "logsumexp"})
_PICKS: Mapping[str, Marks] = {
    **dict.fromkeys(("max", "amax", "maximum", "fmax", "argmax", "cummax"), _BELOW),
    **dict.fromkeys(("min", "amin", "minimum", "fmin", "argmin", "cummin"), _ABOVE),
    **dict.fromkeys(("topk", "sort", "argsort", "msort", "kthvalue", "aminmax"), _BOTH),
    **dict.fromkeys(("where", "masked_fill", "masked_select"), _BOTH),
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne", "less", "greater", "less_equal", "greater_equal"), _BOTH),
    **dict.fromkeys(("isinf", "isneginf", "isposinf", "isfinite", "isnan"), _BOTH),
}
_KEEPS = frozenset(
    {"add", "clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "fmax", "fmin", "where", "masked_fill"}
    | {"nan_to_num", "index_put", "_unsafe_index_put", "index_fill", "index_copy", "scatter", "masked_scatter"}
    | {"slice_scatter", "select_scatter", "copy"}
)
"""Ops whose result holds the sentinels of their operands, besides those that only move values."""

_REVERSED: Mapping[str, tuple[bool, bool]] = {"sub": (False, True), "rsub": (True, False), "neg": (True, False)}
"""Whether the first and the second operand enter with the other sign."""


def marks(graph: Graph) -> dict[Node, Marks]:
    """What the readers of each tensor may take for "never"; nodes without such readers are left out."""
    found: dict[Node, Marks] = {}
    for node in reversed(graph.nodes):
        for source, asked in asked_of(node, found.get(node, {})):
            found[source] = together(found.get(source, {}), asked)
    return found


def asked_of(node: Node, own: Marks) -> Iterator[tuple[Node, Marks]]:
    """The operands of ``node`` in which "never" would mean something, given what the readers of its result ask."""
    if node.op == "output" or has_bodies(node):
        yield from ((source, _UNBOUNDED) for source in node.all_input_nodes)
    elif node.op == "call_module" or node.target is operator.getitem:
        yield from ((source, own) for source in node.all_input_nodes if own)
    elif isinstance(node.target, OpOverload):
        yield from _asked_of_op(node, node.target, own)


def keeps(node: Node) -> bool:
    """Whether the result of ``node`` holds the sentinels of its operands."""
    if node.op == "call_module" or node.target is operator.getitem:
        return True
    name = _name(node.target) if isinstance(node.target, OpOverload) else ""
    return name in _KEEPS or name in _REVERSED or name in ("mul", "div") or node.target in MOVEMENTS


def _name(target: OpOverload) -> str:
    return str(target._schema.name).rpartition("::")[2].removesuffix("_")


def _asked_of_op(node: Node, target: OpOverload, own: Marks) -> Iterator[tuple[Node, Marks]]:
    name = _name(target)
    first = operand(node, 0)
    if name in _WEIGHS:
        yield from _to(first, {-1: WEIGHED})
    elif name == "scaled_dot_product_attention":
        yield from _to(operand(node, "attn_mask"), {-1: WEIGHED})
    elif name in ("mul", "div") and own:
        for source in node.all_input_nodes:
            factor = operand(node, 1)
            yield source, own if _positive(factor) else _flipped(own) if _number(factor) else _either(own)
    elif name in _REVERSED and own:
        for place, other in enumerate(_REVERSED[name]):
            yield from _to(operand(node, place), _flipped(own) if other else own)
    else:
        asked = together(_PICKS.get(name, {}), own if keeps(node) else {})
        if asked:
            yield from ((source, asked) for source in node.all_input_nodes)


def _to(source: Any, asked: Marks) -> Iterator[tuple[Node, Marks]]:
    if isinstance(source, Node):
        yield source, asked


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def together(a: Marks, b: Marks) -> Marks:
    """What either asks: the smaller magnitude of each sign."""
    return {sign: min(a.get(sign, math.inf), b.get(sign, math.inf)) for sign in (*a, *b)}


def _flipped(asked: Marks) -> Marks:
    return {-sign: least for sign, least in asked.items()}


def _either(asked: Marks) -> Marks:
    return together(asked, _flipped(asked))
