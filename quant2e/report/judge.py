"""Judging: a verdict for every float op, from the annotations and the plan that a quantizer's turn left."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule, Node

from quant2e.annotation.plan import Edge, Output, Plan
from quant2e.annotation.specs import ANNOTATION
from quant2e.graph.edit import PART_OF, folded_ops
from quant2e.graph.fake_values import node_tensor
from quant2e.report.float_ops import FloatOp
from quant2e.report.macs import count_macs
from quant2e.report.verdict import DYNAMIC, FLOAT, FOLDED, STATIC, WEIGHT_ONLY, Verdict


@dataclass(frozen=True, slots=True)
class _Operands:
    """How one node's float operands are treated by a plan."""

    activations: tuple[bool, ...]
    constants: tuple[bool, ...]
    dynamic: bool


def judge(
    ops: Iterable[FloatOp],
    gm: GraphModule,
    plan: Plan,
    constants: frozenset[Node],
    explain: Callable[[Node], str],
) -> tuple[Verdict, ...]:
    """Verdicts of ``ops`` on the annotated graph ``gm``, before observers are inserted.

    ``constants``: nodes that depend on parameters only. ``explain``: why the quantizer left a node float.
    """
    nodes = {node.name: node for node in gm.graph.nodes}
    folded = {name: node.name for node in gm.graph.nodes for name in folded_ops(node)}
    products: dict[str, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        if count_macs(node) and (whole := node.meta.get(PART_OF)) is not None:
            products[whole].append(node)
    ignored = {item.point: item.reason for item in plan.ignored}
    made: dict[str, Verdict] = {}
    for op in ops:
        node = nodes.get(op.name)
        if node is None and op.name in products:
            parts = (replace(op, name=p.name, macs=count_macs(p)) for p in products[op.name])
            judged = [_judge_node(part, nodes[part.name], plan, constants, made, explain, ignored) for part in parts]
            made |= {verdict.op.name: verdict for verdict in _as_one(op, judged)}
            continue
        if node is None:
            into = folded.get(op.name)
            reason = f"into {into}" if into else "rewritten before annotation"
            made[op.name] = Verdict(op, FOLDED, reason)
            continue
        made[op.name] = _judge_node(op, node, plan, constants, made, explain, ignored)
    return tuple(made.values())


def _as_one(op: FloatOp, products: Sequence[Verdict]) -> list[Verdict]:
    """Verdicts of an op of which many products were made: one if they agree, else one for each kind and float reason.

    The one with the most work has the op's name, the others that of their first product. Products of constants are no
    work.
    """
    alike: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for verdict in products:
        if verdict.kind != FOLDED:
            alike[verdict.kind, "" if verdict.quantized else verdict.reason].append(verdict)
    if not alike:
        return [Verdict(op, FOLDED, products[0].reason)]
    groups = sorted(alike.values(), key=lambda group: -sum(v.op.macs for v in group))
    macs = [sum(v.op.macs for v in group) for group in groups]
    macs[0] = op.macs - sum(macs[1:])
    names = [op.name, *(group[0].op.name for group in groups[1:])]
    total, made = sum(map(len, groups)), []
    for name, work, group in zip(names, macs, groups, strict=True):
        reasons = ", ".join(dict.fromkeys(v.reason for v in group))
        share = f"{len(group)} of {total}" if len(groups) > 1 else f"{total}"
        reason = f"{reasons} ({share} products of '{op.name}')" if total > 1 else reasons
        made.append(Verdict(replace(op, name=name, macs=work), group[0].kind, reason))
    return made


_LONGEST = 240
"""Characters of a reason; what a quantizer says of the rest is in its ``explain``."""


def _one_line(reason: str) -> str:
    words = " ".join(reason.split())
    return words if len(words) <= _LONGEST else words[: _LONGEST - 2].rstrip() + " …"


def _operands(node: Node, plan: Plan, constants: frozenset[Node]) -> _Operands:
    activations: list[bool] = []
    fixed: list[bool] = []
    dynamic = False
    for src in node.all_input_nodes:
        tensor = node_tensor(src)
        if tensor is None or not tensor.is_floating_point():
            continue
        group = plan.group_of(Edge(src.name, node.name))
        if group is None:
            group = plan.group_of(Output(src.name))
        (fixed if src in constants else activations).append(group is not None)
        dynamic |= group is not None and bool(getattr(plan.groups[group].spec, "is_dynamic", False))
    return _Operands(tuple(activations), tuple(fixed), dynamic)


def _judge_node(
    op: FloatOp,
    node: Node,
    plan: Plan,
    constants: frozenset[Node],
    made: Mapping[str, Verdict],
    explain: Callable[[Node], str],
    ignored: Mapping[Any, str],
) -> Verdict:
    if node in constants:
        return Verdict(op, FOLDED, "a constant, computed from parameters")
    note = node.meta.get(ANNOTATION)
    whole = made.get(node.all_input_nodes[0].name) if node.target is operator.getitem else None
    if whole is not None and (note is not None or whole.kind == FLOAT):
        return Verdict(op, whole.kind, whole.reason)
    if note is None:
        return Verdict(op, FLOAT, _one_line(explain(node)))
    rule = getattr(note, "rule", "") or "annotated"
    operands = _operands(node, plan, constants)
    if operands.dynamic:
        return Verdict(op, DYNAMIC, rule)
    if operands.activations and all(operands.activations):
        partly = "" if all(operands.constants[:1]) or not operands.constants else ", weight float"
        return Verdict(op, STATIC, rule + partly)
    fused = _fused_into(node, made)
    # A pattern may begin with an op that only moves its input: pad and convolution.
    begun = fused is not None and fused.kind == STATIC and fused.reason == rule
    if not any(operands.activations) and any(operands.constants) and not begun:
        return Verdict(op, WEIGHT_ONLY, rule)
    if fused is not None:
        return Verdict(op, fused.kind, rule if rule != "annotated" else f"fused with {fused.op.name}")
    if any(operands.activations):
        return Verdict(op, STATIC, f"{rule}, some operands float")
    reasons = {
        r
        for p, r in ignored.items()
        if p in (*(Edge(s.name, node.name) for s in node.all_input_nodes), Output(node.name))
    }
    if Output(node.name) in plan and not operands.activations:
        return Verdict(op, STATIC, f"{rule}, output only")
    return Verdict(
        op, FLOAT, f"{rule}, but no operand is quantized" + (f": {', '.join(sorted(reasons))}" if reasons else "")
    )


def _fused_into(node: Node, made: Mapping[str, Verdict]) -> Verdict | None:
    """The verdict of a producer that this op, as the tail of the same pattern, is computed with."""
    for src in node.all_input_nodes:
        verdict = made.get(src.name)
        if verdict is not None and verdict.quantized and len(src.users) == 1 and ANNOTATION in src.meta:
            return verdict
    return None
