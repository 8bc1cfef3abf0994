"""Checks for isolated ops: quantized on some of their sides only, or without gain."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from quant2e.annotation.pattern import short_name
from quant2e.annotation.plan import DerivedFrom, Edge, Output, Plan
from quant2e.annotation.specs import ANNOTATION
from quant2e.graph.dataflow import operand
from quantizers.conformance.annotation_checks import JOINS, MOVING, Annotated, finding
from quantizers.conformance.report import Finding

WEIGHTED = frozenset(
    {*(f"conv{n}d" for n in (1, 2, 3)), *(f"conv_transpose{n}d" for n in (1, 2, 3)), "linear", "convolution"}
)
"""Ops with an activation, a weight, and perhaps a bias."""


def isolated_ops(a: Annotated, plan: Plan) -> Iterator[Finding]:
    """Findings about one graph."""
    for node, _ in a.notes():
        if node.op != "call_function":
            continue
        yield from _partly(a, plan, node)
        yield from _requantized(plan, node)
        if _only_moves(node) and Output(node.name) in plan and not _near_computation(a, plan, node):
            yield finding(
                "isolated", node, "it moves values that are quantized for it alone: no integer op is next to it"
            )


def _float_operands(a: Annotated, node: Node) -> list[Node]:
    found = []
    for source in node.all_input_nodes:
        tensor = a.tensor(source)
        if tensor is not None and tensor.is_floating_point():
            found.append(source)
    return found


def is_inner(source: Node) -> bool:
    """Whether a tensor stays inside one integer kernel: its op is annotated, and its result is not quantized."""
    note = source.meta.get(ANNOTATION)
    return note is not None and getattr(note, "output_qspec", None) is None and not _reads_nothing(note)


def _reads_nothing(note: Any) -> bool:
    inputs = getattr(note, "input_qspec_map", None) or {}
    return not inputs and not getattr(note, "_annotated", False)


def _spec(plan: Plan, source: Node, node: Node) -> Any:
    group = plan.group_of(Edge(source.name, node.name))
    if group is None:
        group = plan.group_of(Output(source.name))
    return None if group is None else plan.groups[group].spec


def _is_integer(spec: Any) -> bool:
    dtype = getattr(spec, "dtype", None)
    return isinstance(dtype, torch.dtype) and not dtype.is_floating_point


def _only_moves(node: Node) -> bool:
    """Whether it moves the values of one tensor. A join is a kernel of its own: backends begin a region with it."""
    return str(node.target) in MOVING and str(node.target) not in JOINS


def _partly(a: Annotated, plan: Plan, node: Node) -> Iterator[Finding]:
    if _only_moves(node):
        return
    activations, left = _operands(a, plan, node)
    if not left:
        return
    names = ", ".join(f"'{source.name}'" for source in left)
    if activations and not all(_is_shared(a, plan, source, node) for source in activations):
        yield finding(
            "isolated", node, f"{names} is float, and '{activations[0].name}' is quantized: the op computes in float"
        )
    elif not activations and _is_integer(_output_spec(plan, node)):
        yield finding("isolated", node, f"its result is quantized, and {names} is float: the op computes in float")


def _operands(a: Annotated, plan: Plan, node: Node) -> tuple[list[Node], list[Node]]:
    """The activations that a node reads as integers, and what it reads as floats."""
    operands = [source for source in _float_operands(a, node) if not is_inner(source) or a.is_constant(source)]
    if short_name(node.target) in WEIGHTED:
        operands = [source for source in operands if source is not operand(node, 2)]
    quantized = [source for source in operands if _is_integer(_spec(plan, source, node))]
    left = [source for source in operands if source not in quantized and _spec(plan, source, node) is None]
    return [source for source in quantized if not a.is_constant(source)], left


def _is_shared(a: Annotated, plan: Plan, source: Node, reader: Node) -> bool:
    """Whether an op that computes on integers reads the same ones: then the tensor is written once, not twice."""
    group = plan.group_of(Edge(source.name, reader.name))
    others = [user for user in source.users if user is not reader and ANNOTATION in user.meta]
    return group is not None and any(
        plan.group_of(Edge(source.name, user.name)) == group and not _operands(a, plan, user)[1] for user in others
    )


def _output_spec(plan: Plan, node: Node) -> Any:
    """The spec of the result, behind ops that are fused."""
    while True:
        group = plan.group_of(Output(node.name))
        if group is not None:
            return plan.groups[group].spec
        users = [user for user in node.users if ANNOTATION in user.meta]
        if len(node.users) != 1 or not users or not is_inner(node) or Edge(node.name, users[0].name) in plan:
            return None
        node = users[0]


def weight_only(a: Annotated, plan: Plan) -> Iterator[tuple[Node, bool]]:
    """Weighted ops with an integer weight, and whether their activation is quantized as well."""
    for node, _ in a.notes():
        if short_name(node.target) not in WEIGHTED:
            continue
        x, w = operand(node, 0), operand(node, 1)
        if isinstance(x, Node) and isinstance(w, Node) and _is_integer(_spec(plan, w, node)):
            yield node, is_inner(x) or _spec(plan, x, node) is not None


def _requantized(plan: Plan, node: Node) -> Iterator[Finding]:
    own = plan.group_of(Output(node.name))
    if own is None or isinstance(plan.groups[own].spec, DerivedFrom):
        return
    for user in node.users:
        other = plan.group_of(Edge(node.name, user.name))
        if other is None or other == own:
            continue
        specs = plan.groups[own].spec, plan.groups[other].spec
        if all(_is_integer(spec) and not getattr(spec, "is_dynamic", False) for spec in specs):
            yield finding(
                "requantized",
                node,
                f"its result is quantized by '{node.name}', and with other numbers for '{user.name}'",
            )


def _near_computation(a: Annotated, plan: Plan, start: Node) -> bool:
    """Whether integers come from, or go to, an op that computes with them."""
    seen, waiting = {start}, [start]
    while waiting:
        node = waiting.pop()
        behind = [user for user in node.users if _spec(plan, node, user) is not None and ANNOTATION in user.meta]
        before = [s for s in _float_operands(a, node) if _spec(plan, s, node) is not None and ANNOTATION in s.meta]
        for other in (*behind, *before):
            if not _only_moves(other):
                return True
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return False
