"""Report of a native program: which ops run in which region, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from lowering.inductor.kernels.engines import KernelChoice
from lowering.native.regions import WrittenRegion
from lowering.program import LoweringReport, Table
from lowering.verify import Verification
from quant2e.errors import where
from quant2e.graph.dataflow import operands
from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeRegion:
    """One call of ``quant2e.int8_region``. ``ops``: of the model, that it computes; ``steps``: of its plan.

    ``arena``: bytes that one sample needs for what lies between; ``constants``: bytes of packed weights and the rest.
    """

    ops: tuple[str, ...]
    steps: int
    arena: int
    constants: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeOp:
    """An op with a quantized operand or result. ``region``: its number, or -1; then ``reason`` says why."""

    name: str
    target: str
    region: int
    reason: str
    place: str


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class NativeReport(LoweringReport):
    """What runs each op of a native program. ``instruction_set``: that the kernels were built for; empty where there is
    no C++ compiler, and every op runs in float.
    """

    instruction_set: str
    regions: tuple[NativeRegion, ...]
    ops: tuple[NativeOp, ...]
    engines: Mapping[str, KernelChoice] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    verification: Verification | None = None

    @property
    def leftovers(self) -> tuple[NativeOp, ...]:
        """Ops outside of all regions, each with its reason."""
        return tuple(op for op in self.ops if op.region < 0)

    @property
    def headline(self) -> str:
        inside = len(self.ops) - len(self.leftovers)
        size = sum(region.constants for region in self.regions) / 2**20
        kernels = f"{self.instruction_set} kernels" if self.instruction_set else "no kernels: there is no C++ compiler"
        return (
            f"{inside} of {len(self.ops)} ops with quantized operands run in {len(self.regions)} int8 region(s), "
            f"{size:.1f} MiB packed; {kernels}"
        )

    def table(self) -> Table:
        rows = [(op.name, "" if op.region < 0 else op.region, op.reason, op.place) for op in self.ops]
        return ("op", "region", "why in none", "where"), rows

    def __str__(self) -> str:
        lines = [self.headline]
        lines += [
            f"  region {number}: {len(region.ops)} ops, {region.steps} steps, {region.arena >> 10} KiB between them"
            for number, region in enumerate(self.regions)
        ]
        lines += [f"  eager  {op.name}: {op.reason}" for op in self.leftovers]
        lines += [f"  note: {note}" for note in self.notes]
        if self.verification is not None:
            lines.append(f"  against the Q/DQ graph: {self.verification}")
        return "\n".join(lines)


def native_regions(regions: Sequence[WrittenRegion]) -> tuple[NativeRegion, ...]:
    """What a report says about each region."""
    return tuple(
        NativeRegion(
            ops=tuple(dict.fromkeys(node.name for unit in region.units for node in unit.nodes if _is_op(node))),
            steps=region.steps,
            arena=region.plan.arena,
            constants=region.plan.constants.numel(),
        )
        for region in regions
    )


def native_ops(gm: GraphModule, regions: Sequence[NativeRegion], refused: Mapping[str, str]) -> tuple[NativeOp, ...]:
    """Each op of ``gm``, the graph before it was rewritten, that reads integers by way of a dequantize op."""
    inside = {name: number for number, region in enumerate(regions) for name in region.ops}
    found = []
    for node in gm.graph.nodes:
        if not _is_op(node) or not any(read.target in DEQUANTIZE for read in node.all_input_nodes):
            continue
        region = inside.get(node.name, -1)
        reason = "" if region >= 0 else refused.get(node.name, "no step of a region computes this op")
        found.append(NativeOp(name=node.name, target=str(node.target), region=region, reason=reason, place=where(node)))
    return tuple(found)


def _is_op(node: Node) -> bool:
    return node.op == "call_function" and node.target not in QUANTIZE | DEQUANTIZE and bool(operands(node))
