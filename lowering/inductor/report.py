"""Kernel report: which quantized ops became int8 kernels, read off the graph that Inductor generates code for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from lowering.control_flow import INSIDE, notes_on_branches, ops_inside
from lowering.inductor.kernels.engines import WEIGHT_ONLY, KernelChoice
from lowering.inductor.kernels.weight_only import FLOAT_ROWS, INT8_ROWS
from lowering.inductor.rewrites.graph import TAG
from lowering.inductor.rewrites.weights import ACTIVATION_DQ, CONVOLUTION, LINEAR, activation_of, weight_of
from lowering.program import LoweringReport, Table
from lowering.verify import Verification
from quant2e.errors import where
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operands
from quant2e.graph.qdq_ops import DEQUANTIZE, qd

aten = torch.ops.aten

_POOL = frozenset({aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default})
_LOOKUP = frozenset({aten.embedding.default, aten.embedding_bag.padding_idx})
_POOL_KERNEL = "quantized.max_pool2d"
COMPUTED = CONVOLUTION | LINEAR | _POOL | _LOOKUP
REGION = "quant2e.int8_region"
"""What computes the ops of an int8 region, in reports."""

_CALLED = {
    "onednn.qconv_pointwise": "qconv",
    "onednn.qlinear_pointwise": "qlinear",
    "quant2e.convolution_sum": "qconv_binary",
}
"""oneDNN's ops → their names in reports."""
_WEIGHT_ONLY = "weight-only"
_LOOKUPS = frozenset(str(target) for target in _LOOKUP)
_PRODUCTS = frozenset(str(target) for target in CONVOLUTION | LINEAR)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoweredOp:
    """One op with a quantized operand. ``kernel``: what runs it, ``reason``: why not an int8 kernel, else empty.

    ``post_op``: the activation that an int8 kernel computes as well, by its name for it; empty without.
    ``weight_bytes``, ``float_bytes``: of a weight-only product, what a call reads of its weight, and would in float.
    """

    name: str
    target: str
    kernel: str
    reason: str
    place: str
    post_op: str = ""
    weight_bytes: int = 0
    float_bytes: int = 0

    @property
    def int8(self) -> bool:
        """Whether the op computes on integers."""
        return not self.reason

    @property
    def weight_only(self) -> bool:
        """Whether only its weight is quantized, so that no int8 kernel is what it is for."""
        return self.reason.startswith(_WEIGHT_ONLY)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class InductorReport(LoweringReport):
    """What Inductor made of each op that has a quantized operand, in graph order.

    ``notes`` concern the whole graph. ``engines``: by op name, what was chosen to compute it, and the times measured.
    ``verification``: the program against its Q/DQ graph; None when that was not asked for.
    """

    ops: tuple[LoweredOp, ...]
    notes: tuple[str, ...] = ()
    engines: Mapping[str, KernelChoice] = field(default_factory=dict)
    verification: Verification | None = None

    @property
    def int8(self) -> tuple[LoweredOp, ...]:
        """Ops that compute on integers."""
        return tuple(op for op in self.ops if op.int8)

    @property
    def leftovers(self) -> tuple[LoweredOp, ...]:
        """Ops that dequantize and compute in float, each with its reason."""
        return tuple(op for op in self.ops if not op.int8)

    def of(self, name: str) -> LoweredOp:
        """The entry of the op of that node name. Raises KeyError when there is none."""
        for op in self.ops:
            if op.name == name:
                return op
        raise KeyError(name)

    @property
    def headline(self) -> str:
        weight_only = [op for op in self.ops if op.weight_only]
        others = [op for op in self.ops if not op.weight_only and op.target not in _LOOKUPS]
        parts = []
        if others or not weight_only:
            count = len(self.ops) - len(weight_only)
            parts.append(f"{len(self.int8)} of {count} ops with quantized operands run as int8 kernels")
        if weight_only:
            read, in_float = (sum(getattr(op, name) for op in weight_only) for name in ("weight_bytes", "float_bytes"))
            as_integers = sum(op.kernel != "float" for op in weight_only)
            parts.append(
                f"{as_integers} of {len(weight_only)} weight-only products read their weights as integers: "
                f"{read:,} bytes of weights a call, {in_float:,} in float"
            )
        return "; ".join(parts)

    def table(self) -> Table:
        return ("op", "kernel", "why not int8", "where"), [(op.name, op.kernel, op.reason, op.place) for op in self.ops]

    def __str__(self) -> str:
        lines = [self.headline]
        lines += [f"  int8   {op.name}: {op.kernel}{op.post_op and f' with {op.post_op}'}" for op in self.int8]
        lines += [f"  {'float ' if op.kernel == 'float' else 'weight'} {op.name}: {op.reason}" for op in self.leftovers]
        lines += [f"  note: {note}" for note in self.notes]
        if self.verification is not None:
            lines.append(f"  against the Q/DQ graph: {self.verification}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A node of the final graph that computes on integers. ``tag``: the op of our graph that it ended up as.

    ``post_op``: the activation that it computes as well; empty without.
    """

    name: str
    tag: str
    post_op: str = ""


def int8_kernels(graph: Graph) -> list[Kernel]:
    """Integer kernels in the graph that Inductor generates code for: oneDNN's, integer pools."""
    found = []
    for node in graph.nodes:
        name = _kernel_name(node)
        if name:
            found.append(Kernel(name, str((node.meta.get("custom") or {}).get(TAG, "")), _post_op(node)))
    return found


def _kernel_name(node: Node) -> str:
    if node.op != "call_function":
        return ""
    # Patterns with a lowering of their own leave a partial of a function named after what they matched.
    made = getattr(getattr(node.target, "func", None), "__name__", "")
    if made in ("qconv", "qconv_binary", "qlinear", "qlinear_binary"):
        return f"onednn.{made}"
    if made == "qmaxpool2d":
        return _POOL_KERNEL
    called = _CALLED.get(str(node.target).rpartition(".")[0])
    return f"onednn.{called}" if called else ""


def _post_op(node: Node) -> str:
    """The activation of a kernel, under each of the names that its argument has."""
    named = operands(node) if isinstance(node.target, torch._ops.OpOverload) else node.kwargs
    names = (named.get(key) for key in ("postop_name", "unary_op_name", "attr", "post_op_name"))
    return next((name for name in names if isinstance(name, str) and name != "none"), "")


def _behind(node: Node | None, stop: frozenset[Any]) -> Node | None:
    while isinstance(node, Node) and node.target not in stop and node.op == "call_function":
        operand = node.args[0] if node.args else None
        if isinstance(operand, list | tuple):
            operand = operand[0] if operand else None
        if len(node.all_input_nodes) != 1:
            return node
        node = operand if isinstance(operand, Node) else None
    return node


def _dequantized(node: Node | None) -> Node | None:
    found = _behind(node, frozenset(DEQUANTIZE))
    return found if found is not None and found.target in DEQUANTIZE else None


def _upstream(node: Node, wanted: frozenset[Any]) -> Iterator[Node]:
    """Ops of ``wanted`` that ``node`` may have been fused with, nearest first: against the flow, up to a dequantize."""
    queue, seen = deque([node]), {node}
    while queue:
        value = queue.popleft()
        if value.target in wanted:
            yield value
            continue
        for operand in value.all_input_nodes:
            if operand not in seen and operand.target not in DEQUANTIZE and operand.op == "call_function":
                seen.add(operand)
                queue.append(operand)


def _assign(gm: GraphModule, kernels: Sequence[Kernel]) -> dict[str, Kernel]:
    """Kernel of each op by name. A fused kernel carries the tag of the last op it took in."""
    nodes = {node.name: node for node in gm.graph.nodes}
    fused: dict[str, Kernel] = {}
    later: list[tuple[Kernel, Node]] = []
    for kernel in kernels:
        node = nodes.get(kernel.tag)
        if node is None:
            continue
        if node.target in COMPUTED:
            fused[node.name] = kernel
        else:
            later.append((kernel, node))
    for kernel, node in later:
        wanted = _POOL if kernel.name == _POOL_KERNEL else CONVOLUTION if "qconv" in kernel.name else LINEAR
        candidate = next((found for found in _upstream(node, wanted) if found.name not in fused), None)
        if candidate is not None:
            fused[candidate.name] = kernel
    return fused


_FINER = {
    qd.dequantize_per_token.default: "one activation scale per token",
    qd.dequantize_per_channel.default: "one activation scale per image",
}


def _reason(gm: GraphModule, node: Node, refused: Mapping[str, str], by_rows: bool) -> str:
    if node.name in refused:
        return refused[node.name]
    if node.target in _POOL:
        return "pools in float: Inductor pools integers only where the result is quantized again with the same scale"
    if node.target in _LOOKUP:
        return "gathers integer rows, then dequantizes them: the result is float"
    weight, activation = _dequantized(weight_of(node)), _dequantized(activation_of(node))
    if weight is None:
        return "the weight is float"
    if activation is None:
        if by_rows:
            return f"{_WEIGHT_ONLY}: float rows, and a weight that is read as the integers it is stored as"
        return f"{_WEIGHT_ONLY}: the activation is float, and so is the copy of the weight that the program holds"
    if weight.target is qd.dequantize_per_tensor.default and tensor_at(gm, operands(weight)["input"]) is None:
        return "both operands are activations: there is no int8 kernel for their product"
    if weight.target is qd.dequantize_per_channel_group.default:
        return "groups of weights with a scale each: there is no int8 kernel for them"
    if activation.target in _FINER:
        return f"{_FINER[activation.target]}: int8 kernels take one scale per tensor"
    return "no int8 kernel was called for it"


def build_report(
    gm: GraphModule,
    kernels: Sequence[Kernel],
    refused: Mapping[str, str],
    choices: Mapping[str, KernelChoice],
    float_bytes: int,
) -> InductorReport:
    """Report on ``gm``, the tagged copy before any rewrite, given what Inductor generated for it.

    ``choices``: the engine of each product. ``float_bytes``: what float copies of weights take.
    """
    refused = {
        **{
            n: c.reason if not c.seconds else f"float is faster here: {c.reason}"
            for n, c in choices.items()
            if c.engine == "float"
        },
        **refused,
    }
    fused = _assign(gm, kernels)
    ops = []
    for node in gm.graph.nodes:
        if node.target not in COMPUTED:
            continue
        operand_nodes = [weight_of(node), activation_of(node)] if node.target not in _LOOKUP | _POOL else [node.args[0]]
        if not any(_dequantized(operand) for operand in operand_nodes):
            continue
        kernel = fused.get(node.name)
        by_rows = node.name in choices and choices[node.name].engine == WEIGHT_ONLY
        read, in_float = _weight_bytes(node, choices[node.name] if by_rows else None)
        if by_rows and choices[node.name].product.int8_rows:
            kernel = Kernel(f"quant2e.{INT8_ROWS}", node.name)
        reason = "" if kernel else _reason(gm, node, refused, by_rows)
        ops.append(
            LoweredOp(
                name=node.name,
                target=str(node.target),
                kernel=kernel.name if kernel else f"quant2e.{FLOAT_ROWS}" if by_rows else "float",
                reason=reason,
                place=where(node),
                post_op=kernel.post_op if kernel else "",
                weight_bytes=0 if kernel else read,
                float_bytes=0 if kernel else in_float,
            )
        )
    ops += _inside(gm)
    notes = [
        *_speed(choices, ops),
        *notes_on_branches(gm),
        *_notes(gm, len({k.tag or k.name for k in kernels}), len(fused)),
    ]
    if float_bytes:
        notes.append(f"float copies of weights, for ops computed in float, take {float_bytes / 2**20:.1f} MiB")
    return InductorReport(ops=tuple(ops), notes=tuple(notes), engines=choices)


def _weight_bytes(node: Node, by_rows: KernelChoice | None) -> tuple[int, int]:
    """What a weight-only product reads of its weight in a call, and would in float; 0 for any other op."""
    if node.target in _LOOKUP | _POOL or _dequantized(activation_of(node)) is not None:
        return 0, 0
    dequantize = _dequantized(weight_of(node))
    value = None if dequantize is None else dequantize.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0, 0
    count = int(value.numel())
    if by_rows is None:
        return 4 * count, 4 * count
    product = by_rows.product
    return count * product.bits // 8 + product.group_bytes * (count // (product.group or count)), 4 * count


def _inside(gm: GraphModule) -> Iterator[LoweredOp]:
    """Ops with quantized operands in bodies of control flow."""
    for path, node in ops_inside(gm):
        if any(_dequantized(operand) for operand in node.all_input_nodes) and node.target in COMPUTED:
            yield LoweredOp(
                name=f"{path}.{node.name}", target=str(node.target), kernel="float", reason=INSIDE, place=where(node)
            )


def _speed(choices: Mapping[str, KernelChoice], ops: Sequence[LoweredOp]) -> Iterator[str]:
    """What the times of the products say about the whole program beside a float one."""
    alone = {name for name, choice in choices.items() if choice.product.float_rows}
    computes = [
        op for op in ops if op.target in _PRODUCTS and op.name not in alone and not op.reason.startswith(_WEIGHT_ONLY)
    ]
    if computes and not any(op.int8 for op in computes):
        yield (
            "slower than float: no product runs on integers here, so the program does the float model's work and "
            "quantizes beside it; the float model is the faster one on this machine"
        )
        return
    measured = [choice.seconds for choice in choices.values() if "float" in choice.seconds]
    taken = sum(choice.seconds[choice.engine] for choice in choices.values() if "float" in choice.seconds)
    in_float = sum(seconds["float"] for seconds in measured)
    if taken > in_float:
        yield (
            f"slower than float, by the times of its products: {taken * 1e6:.0f} microseconds, and "
            f"{in_float * 1e6:.0f} in float"
        )
    if unknown := sum(not choice.seconds for choice in choices.values()):
        yield f"{unknown} product(s) were given to an engine by the caller: not timed, and perhaps slower than float"


def _notes(gm: GraphModule, kernels: int, assigned: int) -> tuple[str, ...]:
    notes = []
    if any(node.target in ACTIVATION_DQ and _signed_activation(gm, node) for node in gm.graph.nodes):
        notes.append(
            "activations are signed (int8), and oneDNN is made for unsigned ones: they are computed as uint8, moved "
            "by 128, with the same numbers"
        )
    if kernels > assigned:
        notes.append(f"{kernels - assigned} further int8 kernel(s) could not be traced back to one op")
    return tuple(notes)


def _signed_activation(gm: GraphModule, node: Node) -> bool:
    args = operands(node)
    return args["dtype"] is torch.int8 and tensor_at(gm, args["input"]) is None
