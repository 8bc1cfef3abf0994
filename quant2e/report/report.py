"""The report: a verdict for every float op, and what quantization cost.

One verdict per float op of the captured graph: quantized, and by which rule; or float, and why. Nothing is left out,
and what did not happen (ignored annotations, flushed tensors, masked values) is listed as notes.
"""

from __future__ import annotations

import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quant2e.annotation.plan import Edge, Output, Plan
from quant2e.annotation.specs import ANNOTATION
from quant2e.documents.schema import LATER, from_record
from quant2e.graph.control_flow import prefixed
from quant2e.graph.edit import PART_OF, folded_ops
from quant2e.graph.fake_values import node_tensor
from quant2e.report.algorithm_step import AlgorithmStep, lines_of_steps
from quant2e.report.float_ops import FloatOp
from quant2e.report.html import html_table
from quant2e.report.macs import count_macs
from quant2e.report.plain_data import plain_data
from quant2e.report.summary import NOTES_SHOWN, summary

STATIC, DYNAMIC, WEIGHT_ONLY, FLOAT, FOLDED = "static", "dynamic", "weight-only", "float", "folded"
KINDS = (STATIC, DYNAMIC, WEIGHT_ONLY, FLOAT, FOLDED)
"""Verdicts. ``folded``: the op is gone, its effect is part of another one."""


_INTO = re.compile(r"into (\w+)(, .*)?")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One float op and what became of it (see `KINDS`). ``reason``: the rule that quantized it, or why it is float."""

    op: FloatOp
    kind: str
    reason: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"'{self.kind[:80]}' is no verdict: {', '.join(KINDS)}")

    @property
    def folded_into(self) -> str:
        """The name of the op that it is part of; empty when it is part of none."""
        into = _INTO.fullmatch(self.reason) if self.kind == FOLDED else None
        return into[1] if into else ""

    @property
    def quantized(self) -> bool:
        """Whether the op computes on quantized activations (static or dynamic) or a quantized weight."""
        return self.kind in (STATIC, DYNAMIC, WEIGHT_ONLY)


@dataclass(frozen=True, slots=True)
class ChosenRange:
    """The range that calibration chose for one tensor, by the ops that read it.

    ``method``, ``percentile``: how it was found (see `quant2e.select_ranges`). ``sqnr_db``: SQNR in dB of what those
    ops make of the tensor, with it alone quantized.
    """

    tensor: str
    method: str
    percentile: float
    sqnr_db: float

    def __str__(self) -> str:
        return f"{self.tensor}: what is computed from it keeps {self.sqnr_db:.1f} dB with the best range, {self.method}"


BAD_SQNR_DB = 20.0
"""SQNR of the output, or of what is computed from one tensor, below which a report says that it is bad."""


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """Verdicts, sizes and accuracy of one quantization. ``str(report)`` is all of it, ``repr(report)`` a summary.

    ``float_bytes``/``quantized_bytes``: tensors that the float and the quantized graph hold. ``sqnr_db``: signal to
    quantization noise of the output against float, in dB, on ``sqnr_source``; None when it was not measured.
    ``losses``: tensors whose values integers turn into zero or clip, and what helps, the worst first; then biases that
    move by more than one step of the result. ``ranges``: tensors for which several ranges were compared, those that
    lose most first. ``worst_places``: where the error of a bad output comes from, and what to do about it, a sentence
    each. ``algorithms``: the algorithms that were to mend accuracy, in the order in which they ran, and what became of
    each.
    """

    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()
    float_bytes: int = 0
    quantized_bytes: int | None = None
    sqnr_db: float | None = None
    sqnr_source: str = ""
    losses: tuple[str, ...] = field(default=(), metadata=LATER)
    ranges: tuple[ChosenRange, ...] = field(default=(), metadata=LATER)
    worst_places: tuple[str, ...] = field(default=(), metadata=LATER)
    algorithms: tuple[AlgorithmStep, ...] = field(default=(), metadata=LATER)

    @property
    def int8_mac_share(self) -> float:
        """Share of the multiply-accumulates that run on quantized activations and weights; 0 when there are none."""
        total = sum(v.op.macs for v in self.verdicts)
        return sum(v.op.macs for v in self.verdicts if v.kind in (STATIC, DYNAMIC)) / total if total else 0.0

    @property
    def quantized_ops(self) -> int:
        """How many float ops were quantized."""
        return sum(v.quantized for v in self.verdicts)

    def of(self, name: str) -> Verdict:
        """The verdict of the op of that node name. Raises KeyError when the captured graph had no such float op."""
        for verdict in self.verdicts:
            if verdict.op.name == name:
                return verdict
        raise KeyError(name)

    def with_float(self, reasons: Mapping[str, str]) -> Report:
        """A copy in which the quantized ops that ``reasons`` names are float, for the reason that it gives."""
        verdicts = tuple(
            replace(v, kind=FLOAT, reason=reasons[v.op.name]) if v.quantized and v.op.name in reasons else v
            for v in self.verdicts
        )
        return replace(self, verdicts=verdicts)

    def with_notes(self, notes: Iterable[str]) -> Report:
        """A copy with further notes, each once."""
        return replace(self, notes=tuple(dict.fromkeys((*self.notes, *notes))))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; `from_dict` is its inverse."""
        return {**plain_data(self), "int8_mac_share": self.int8_mac_share}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `as_dict` described. Raises `FileFormatError` for anything else."""
        return from_record(cls, data, "the report", besides=("int8_mac_share",))

    def summary(self, title: str) -> str:
        """``title`` with the counts of verdicts, then shares, sizes, accuracy and the first notes, a line each."""
        first, *others = self._headline()
        return summary([f"{title}: {first}", *others, *self._bad_ranges()[:NOTES_SHOWN]], (*self.losses, *self.notes))

    def html(self, title: str) -> str:
        """`summary`, and below it a table of the verdicts."""
        rows = [(v.op.name, v.kind, v.reason, v.op.module, v.op.macs) for v in self.verdicts]
        return html_table(("op", "verdict", "reason", "module", "multiply-accumulates"), rows, self.summary(title))

    def __repr__(self) -> str:
        return self.summary("Report")

    def _repr_html_(self) -> str:
        return self.html("Report")

    def _headline(self) -> list[str]:
        counts = Counter(v.kind for v in self.verdicts)
        lines = self._warning()
        lines += [f"{len(self.verdicts)} float ops: " + ", ".join(f"{counts[k]} {k}" for k in KINDS if counts[k])]
        lines.append(f"multiply-accumulates on int8: {self.int8_mac_share:.1%}")
        if self.quantized_bytes is not None:
            ratio = self.quantized_bytes / self.float_bytes if self.float_bytes else 1.0
            lines.append(f"tensors: {self.float_bytes:,} -> {self.quantized_bytes:,} bytes ({ratio:.3f} x)")
        if self.sqnr_db is not None:
            lines.append(f"SQNR against float: {self.sqnr_db:.1f} dB on {self.sqnr_source}")
        return [*lines, *lines_of_steps(self.algorithms)]

    def _warning(self) -> list[str]:
        """What comes first where the output is bad: how bad, and where it comes from."""
        if self.sqnr_db is None or self.sqnr_db >= BAD_SQNR_DB:
            return []
        noise = min(10.0 ** (-self.sqnr_db / 10.0), 1.0)
        where = ", and most of it appears at" if self.worst_places else ""
        first = f"the output is bad: {noise:.0%} of its power is noise (SQNR {self.sqnr_db:.1f} dB){where}"
        return [first, *self.worst_places]

    def _bad_ranges(self) -> list[str]:
        return [f"range: {one}" for one in self.ranges if one.sqnr_db < BAD_SQNR_DB]

    def __str__(self) -> str:
        lines = [*self._headline(), *(f"loss: {loss}" for loss in self.losses), *self._bad_ranges()]
        lines += [f"{step.name}: {change}" for step in self.algorithms for change in step.changes]
        width = max((len(v.op.name) for v in self.verdicts), default=0)
        for v in self.verdicts:
            place = f"  [{v.op.module}]" if v.op.module else ""
            lines.append(f"  {v.op.name:<{width}}  {v.kind:<11}  {v.reason}{place}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def with_body(report: Report, path: str, body: Report) -> Report:
    """``report`` with what happened in the body of control flow at ``path``: verdicts by name, losses and notes."""
    verdicts = {v.op.name: v for v in report.verdicts}
    for v in body.verdicts:
        name = prefixed(path, v.op.name)
        verdicts[name] = replace(v, op=replace(v.op, name=name))
    losses = (*report.losses, *(f"{path}: {loss}" for loss in body.losses))
    merged = replace(report, verdicts=tuple(verdicts.values()), losses=tuple(dict.fromkeys(losses)))
    return merged.with_notes(f"{path}: {note}" for note in body.notes)


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
            parts = (FloatOp(p.name, op.target, op.module, op.source, count_macs(p)) for p in products[op.name])
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


def tensor_bytes(gm: GraphModule) -> int:
    """Bytes of all parameters and buffers of a module, each storage once."""
    seen: dict[tuple[int, int], int] = {}
    tensors: list[torch.Tensor] = [*gm.parameters(), *gm.buffers()]
    for tensor in tensors:
        seen[(tensor.data_ptr(), tensor.numel())] = tensor.numel() * tensor.element_size()
    return sum(seen.values())
