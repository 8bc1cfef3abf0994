"""Delegation report: what a partitioner took of a graph, and what it left to kernels and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from lowering.control_flow import ops_inside
from lowering.export import op_name
from lowering.program import LoweringReport, Table
from lowering.verify import Verification
from quant2e.errors import where

NO_RULE = "no partitioner has a rule for this op"
INSIDE = "in a body of control flow, where partitioners do not look"


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One delegate: the backend that runs it and the ops in it, with how often each occurs."""

    backend: str
    ops: Mapping[str, int]

    def __str__(self) -> str:
        ops = ", ".join(f"{count} × {op}" if count > 1 else op for op, count in self.ops.items())
        return f"{self.backend}: {ops}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftover:
    """An op that a kernel runs, outside of any delegate."""

    op: str
    place: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ExecuTorchReport(LoweringReport):
    """What runs a method of a program, or a program.

    ``partitions``: the delegates, in order. ``leftovers``: every other op, and why no delegate has it.
    ``rewrites``: how often each rewrite applied before partitioning. ``notes``: what the target does differently
    from the graph. ``size``: bytes of the program. ``verification``: the program against its Q/DQ graph; None when
    that was not asked for. ``per_row``: the program against the graph with a scale per row, where activations are
    quantized at run time. ``methods``: of a program with several methods, the report of each; the other fields then sum
    them up, and ``verification`` is the worst.
    """

    partitions: tuple[Partition, ...]
    leftovers: tuple[Leftover, ...]
    rewrites: Mapping[str, int]
    notes: tuple[str, ...] = ()
    size: int = 0
    verification: Verification | None = None
    per_row: Verification | None = None
    methods: Mapping[str, ExecuTorchReport] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        methods = f"{len(self.methods)} methods: " if self.methods else ""
        delegated = f"{len(self.partitions)} delegate(s) with {self.delegated_ops} op(s)"
        return f"{methods}{delegated}, {len(self.leftovers)} op(s) left to kernels, {self.size / 1e6:.2f} MB"

    def table(self) -> Table:
        rows = [(p.backend, count, op, "") for p in self.partitions for op, count in p.ops.items()]
        left = Counter((leftover.op, leftover.reason) for leftover in self.leftovers)
        rows += [("kernel", count, op, reason) for (op, reason), count in left.most_common()]
        return ("runs in", "count", "op", "why not delegated"), rows

    @property
    def delegated_ops(self) -> int:
        """How many ops run inside delegates."""
        return sum(sum(partition.ops.values()) for partition in self.partitions)

    def __str__(self) -> str:
        lines = [self.headline]
        if self.methods:
            return "\n".join([*lines, *(f"method '{name}': {report}" for name, report in self.methods.items())])
        lines += [f"  delegate {i}: {partition}" for i, partition in enumerate(self.partitions)]
        grouped = Counter((leftover.op, leftover.reason) for leftover in self.leftovers)
        lines += [f"  left: {count} × {op}: {reason}" for (op, reason), count in grouped.most_common()]
        lines += [f"  rewritten: {count} × {name}" for name, count in self.rewrites.items()]
        lines += [f"  note: {note}" for note in self.notes]
        if self.verification is not None:
            lines.append(f"  against the Q/DQ graph: {self.verification}")
        if self.per_row is not None:
            lines.append(f"  against the graph with a scale per row: {self.per_row}")
        return "\n".join(lines)


class Rejections(logging.Handler):
    """Collects the reasons that partitioners give, through their loggers, for not taking a node."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.reasons: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the last reason per node: names are given anew when the graph is decomposed, before partitioning."""
        node, reason = getattr(record.msg, "node", None), getattr(record.msg, "reason", None)
        if isinstance(node, Node) and isinstance(reason, str):
            self.reasons[node.name] = reason

    @contextmanager
    def listening(self, logger_name: str) -> Iterator[Rejections]:
        """Listen to a logger and those below it; everything is as before on exit."""
        logger = logging.getLogger(logger_name)
        level, propagate = logger.level, logger.propagate
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(self)
        try:
            yield self
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = propagate


def report_on(module: GraphModule, reasons: Mapping[str, str], rewrites: Mapping[str, int]) -> ExecuTorchReport:
    """Read the delegates and the leftover ops from a partitioned graph."""
    partitions, leftovers = [], []
    for node in module.graph.nodes:
        if node.op != "call_function" or op_name(node) == "getitem":
            continue
        if op_name(node) == "executorch_call_delegate":
            partitions.append(_partition(module, node))
        else:
            leftovers.append(Leftover(op=op_name(node), place=where(node), reason=reasons.get(node.name, NO_RULE)))
    leftovers += [
        Leftover(op=op_name(node), place=where(node), reason=INSIDE)
        for _, node in ops_inside(module)
        if op_name(node) != "getitem"
    ]
    return ExecuTorchReport(partitions=tuple(partitions), leftovers=tuple(leftovers), rewrites=dict(rewrites))


def report_on_program(methods: Mapping[str, ExecuTorchReport]) -> ExecuTorchReport:
    """The report of the only method, or one that sums up those of several."""
    reports = list(methods.values())
    if len(reports) == 1:
        return reports[0]
    return ExecuTorchReport(
        partitions=tuple(partition for report in reports for partition in report.partitions),
        leftovers=tuple(leftover for report in reports for leftover in report.leftovers),
        rewrites=dict(sum((Counter(report.rewrites) for report in reports), Counter())),
        notes=tuple(dict.fromkeys(note for report in reports for note in report.notes)),
        size=max(report.size for report in reports),  # each says how large the file is
        verification=_worst(report.verification for report in reports),
        per_row=_worst(report.per_row for report in reports),
        methods=dict(methods),
    )


def _worst(found: Iterable[Verification | None]) -> Verification | None:
    return min((one for one in found if one is not None), key=lambda one: one.sqnr_db, default=None)


def _partition(module: GraphModule, call: Node) -> Partition:
    handle = call.args[0]
    assert isinstance(handle, Node)
    lowered = getattr(module, str(handle.target))
    graph = lowered.original_module.graph_module.graph
    ops = Counter(op_name(n) for n in graph.nodes if n.op == "call_function" and op_name(n) != "getitem")
    return Partition(backend=str(lowered.backend_id), ops=dict(ops.most_common()))
