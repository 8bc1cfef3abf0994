"""First difference: the op at which a lowered program and its graph part, found by lowering shorter graphs.

    graph up to op k, with what the rest reads as outputs  ─▶ lowered, run, compared        k found by halving

What is wrong at an op is wrong in what follows from it, so the comparisons are a row of passes and then a row of
failures, and the graph is lowered about log₂(ops) times.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from lowering.choices import Lower, compare_as_chosen
from lowering.parts import returning
from lowering.verify import Verification
from quant2e.errors import LoweringError, where
from quant2e.graph.captured.calls import Call
from quant2e.graph.constants import Constants
from quant2e.graph.effects import is_random
from quant2e.graph.fake_values import is_float, node_tensor
from quant2e.graph.qdq_ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE

_QDQ = QUANTIZE | DEQUANTIZE | CHOOSE_QPARAMS


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstDifference:
    """Up to ``op`` they differ by ``found``, up to ``before``, if any, they agree."""

    op: Node
    before: Node | None
    found: Verification

    def __str__(self) -> str:
        agrees = f", and up to '{self.before.name}' it agrees" if self.before is not None else ""
        behind = "".join(f", with '{node.name}' behind it" for node in _behind(self.op))
        return (
            f"they part at {where(self.op)}{behind}: lowered up to there, the graph differs by "
            f"{self.found.max_steps:.3g} step(s) (SQNR {self.found.sqnr_db:.1f} dB){agrees}"
        )


def way_out(op: Node) -> str | None:
    """How to leave an op in float, if it is quantized."""
    last = [op, *_behind(op)][-1]
    becomes_integers = any(user.target in QUANTIZE for user in last.users)
    operands = [node for node in op.all_input_nodes if is_float(node)]
    reads_integers = len(operands) > 1 and all(node.target in DEQUANTIZE for node in operands[:2])
    if not becomes_integers and not reads_integers:
        return None
    return f"Leave it in float, by quantizer.set_node({op.name!r}, None), and quantize and lower again"


def first_difference(graph: GraphModule, batches: Sequence[Call], lower: Lower) -> FirstDifference | None:
    """The first op up to which the lowered graph differs; None where none of the shorter graphs does."""
    ops = _ops(graph)
    verdicts: dict[int, tuple[Verification, Node] | None] = {}

    def differs(place: int) -> bool:
        verdicts[place] = _difference(graph, ops[place], batches, lower)
        return verdicts[place] is not None

    low, high = -1, len(ops)  # up to low it agrees, up to high it differs
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if differs(middle) else (middle, high)
    verdict = verdicts.get(high)
    if verdict is None:
        return None
    found, value = verdict
    return FirstDifference(op=value, before=ops[low] if low >= 0 else None, found=found)


def _difference(
    graph: GraphModule, last: Node, batches: Sequence[Call], lower: Lower
) -> tuple[Verification, Node] | None:
    """How the graph up to an op differs from its program, and which of its values does.

    None where it does not, and where it cannot be lowered alone.
    """
    part, values = up_to(graph, last)
    if not values:
        return None
    try:
        found = compare_as_chosen(lower(part), part, part, batches, lower)
    except LoweringError:
        return None
    if found.passed:
        return None
    wrong = next(value for value, output in zip(values, found.outputs, strict=True) if not output.within(found.bound))
    return found, _computed(wrong)


def _ops(graph: GraphModule) -> list[Node]:
    """Where the graph may be cut: the ops that compute on data, each with the functions of one operand behind it."""
    constant = Constants(graph.graph)
    return [node for node in graph.graph.nodes if _computes(node) and node not in constant and not _goes_on(node)]


def _computes(node: Node) -> bool:
    if node.op != "call_function" or node.target in _QDQ or node.target is operator.getitem or is_random(node):
        return False
    return not isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


def _goes_on(node: Node) -> bool:
    """Whether the node's only reader is a function of each of its values, which targets fuse with it."""
    if len(node.users) != 1:
        return False
    (user,) = node.users
    pointwise = isinstance(user.target, OpOverload) and torch.Tag.pointwise in user.target.tags
    return pointwise and user.target not in _QDQ and user.all_input_nodes == [node]


def _computed(value: Node) -> Node:
    """The op whose result a value is, through its quantize and dequantize, and the functions that were not cut off."""
    while value.target in _QDQ or value.target is operator.getitem:
        (value, *_) = value.all_input_nodes
    while len(value.all_input_nodes) == 1:
        (before,) = value.all_input_nodes
        if not _computes(before) or not _goes_on(before):
            break
        value = before
    return value


def _behind(op: Node) -> Iterator[Node]:
    """The functions of one operand behind an op, which a cut does not separate from it."""
    while _goes_on(op):
        (op,) = op.users
        yield op


def up_to(graph: GraphModule, last: Node) -> tuple[GraphModule, list[Node]]:
    """A copy of the graph that ends after ``last``, with each value that the rest reads as an output.

    Returns the values' nodes in ``graph``, too. What the rest reads as integers is returned dequantized, and what it
    quantizes first, as it is then.
    """
    kept: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "output":
            break
        kept.add(node)
        if node is last:
            break
    values = list(_values(graph, kept))
    return returning(graph, values, kept), values


def _values(graph: GraphModule, kept: set[Node]) -> Iterator[Node]:
    """Tensors that nodes outside of ``kept`` read; it grows by their quantize and dequantize."""
    constant = Constants(graph.graph)
    for node in graph.graph.nodes:
        outside = [user for user in node.users if user not in kept]
        if node not in kept or not outside or node in constant or node.op in ("get_attr", "placeholder"):
            continue
        if node.target in QUANTIZE or node.target in CHOOSE_QPARAMS or node_tensor(node) is None:
            # integers, parameters, several results: what is made of them next
            kept.update(user for user in outside if user.target in DEQUANTIZE or user.target is operator.getitem)
            outside = [user for user in outside if user not in kept]
            if not outside or node_tensor(node) is None or node.target in CHOOSE_QPARAMS:
                continue
        elif all(user.target in QUANTIZE and _static(user) for user in outside):
            kept.update(outside)
            continue
        yield node


def _static(quantize: Node) -> bool:
    return len(quantize.all_input_nodes) == 1 or all(node.op == "get_attr" for node in quantize.all_input_nodes[1:])
