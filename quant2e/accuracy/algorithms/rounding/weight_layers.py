"""Weight layers: the products of a prepared graph whose weight is quantized, each as a product of matrices.

    y[n, g, r] = Σ_c w[g, r, c] x[n, g, c]

    linear        w [out, in]                g = 1, r = out, c = in, n: every vector along the last dimension
    matmul        w [in, out]                the same, turned
    convolution   w [out, in / groups, *k]   r = out / groups, c = in / groups · k, n: every place of every image

Rounding a weight is a question about such rows, whatever the op: the error of row (g, r) depends on that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.errors import Quant2eError, where
from quant2e.graph.constants import evaluate
from quant2e.graph.control_flow import graphs_of
from quant2e.graph.dataflow import operand
from quant2e.observers.base import is_observer_call, observed
from quant2e.observers.encodings import PerChannelEncoding, PerGroupEncoding, PerTensorEncoding, encode
from quant2e.observers.given import StaticEncoding, parameters_along
from quant2e.passes.fold_batch_norm import TRANSPOSED
from quant2e.passes.train_batch_norm import FUSED

aten = torch.ops.aten

_PRODUCTS = {
    aten.linear.default: ("input", "weight"),
    aten.matmul.default: ("self", "other"),
    aten.mm.default: ("self", "mat2"),
    aten.addmm.default: ("mat1", "mat2"),
}
_CONVOLUTIONS = frozenset(
    {
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.conv1d.padding,
        aten.conv2d.padding,
        aten.conv3d.padding,
        aten.convolution.default,
    }
)
_TABLES = frozenset({aten.embedding.default, aten.embedding_bag.padding_idx, aten._embedding_bag.default})


@dataclass(frozen=True, slots=True, eq=False)
class Use:
    """One op that reads a weight. ``op``, ``x``, ``point``: nodes of the simulated graph, the op, its input, and the
    point between weight and op.
    """

    op: Node
    x: Node
    point: Node

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for other products."""
        return int(operand(self.op, "groups")) if self.op.target in _CONVOLUTIONS else 1

    def rows(self, w: Tensor) -> Tensor:
        """A weight as ``[groups, rows, columns]``."""
        if self.op.target in _CONVOLUTIONS:
            return w.reshape(self.groups, w.shape[0] // self.groups, -1)
        return (w if self.op.target is aten.linear.default else w.t()).unsqueeze(0)

    def weight(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `rows`."""
        if self.op.target in _CONVOLUTIONS or self.op.target is aten.linear.default:
            return rows.reshape(tuple(shape))
        return rows.squeeze(0).t().contiguous()

    def samples(self, x: Tensor) -> Iterator[Tensor]:
        """The input as ``[samples, groups, columns]``; of a convolution, image by image, since they are unfolded."""
        if self.op.target not in _CONVOLUTIONS:
            yield x.reshape(-1, 1, x.shape[-1])
            return
        kernel = tuple(operand(self.op, 1).meta["val"].shape[2:])
        for image in x if x.dim() == len(kernel) + 2 else x.unsqueeze(0):
            yield self._unfolded(image.unsqueeze(0), kernel)

    def channel_power(self, y: Tensor) -> Tensor:
        """Sums of squares of a result over the channels of each group: ``[samples, groups]``, as `samples` has them."""
        if self.op.target not in _CONVOLUTIONS:
            return y.float().square().sum(-1).reshape(-1, 1)
        places = operand(self.op, 1).meta["val"].dim() - 2
        images = y if y.dim() == places + 2 else y.unsqueeze(0)
        each = images.float().square().reshape(images.shape[0], self.groups, -1, *images.shape[2:]).sum(2)
        return each.movedim(1, -1).reshape(-1, self.groups)

    def images(self, x: Tensor) -> int:
        """How many pieces `samples` gives an input in."""
        if self.op.target not in _CONVOLUTIONS:
            return 1
        return x.shape[0] if x.dim() == operand(self.op, 1).meta["val"].dim() else 1

    def _unfolded(self, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
        dims = len(kernel)
        stride, dilation = (_each(operand(self.op, name), dims) for name in ("stride", "dilation"))
        x = functional.pad(x, _padding(operand(self.op, "padding"), kernel, dilation))
        for axis in range(dims):
            x = x.unfold(2 + axis, dilation[axis] * (kernel[axis] - 1) + 1, stride[axis])
            x = x[..., :: dilation[axis]]
        channels, places = x.shape[1], x.shape[2 : 2 + dims]
        x = x.movedim(1, 1 + dims).reshape(math.prod(places), channels, -1)
        return x.reshape(x.shape[0], self.groups, -1)

    def bias(self) -> Any:
        """The operand that is added to the product: a node, or None."""
        return operand(self.op, "self" if self.op.target is aten.addmm.default else "bias")


def _each(value: Any, dims: int) -> list[int]:
    items = list(value) if isinstance(value, list | tuple) else [value]
    return items * dims if len(items) == 1 else items


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """In the order of ``functional.pad``: the last axis first, in front and behind."""
    made: list[int] = []
    each = [0] * len(kernel) if isinstance(padding, str) else _each(padding, len(kernel))
    for size, step, own in reversed(list(zip(kernel, dilation, each, strict=True))):
        total = step * (size - 1) if padding == "same" else 2 * own
        made += [total // 2, total - total // 2]
    return made


@dataclass(slots=True, eq=False)
class QuantizedWeight:
    """A constant weight with an encoding of its own, and the products that read it: one, or several that are tied.

    ``calls``: of its observers, in the prepared graph. ``value``: the float weight. ``reason``: why it cannot be
    rounded otherwise than to nearest; empty where it can.
    """

    value: Tensor
    encoding: StaticEncoding
    calls: list[Node] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    reason: str = ""

    @property
    def place(self) -> str:
        """Where it is, for lines of a report."""
        first = self.uses[0].op if self.uses else observed(self.calls[0])
        return f"the weight of {where(first)}" if self.uses else f"'{first.name}'"

    @property
    def numbers(self) -> str:
        """The numbers of the encoding, in short: ``4 bits, groups of 32``."""
        levels = self.encoding.quant_max - self.encoding.quant_min + 1
        per = {PerTensorEncoding: "per tensor", PerChannelEncoding: "per channel"}.get(type(self.encoding))
        per = f"groups of {self.encoding.group_size}" if isinstance(self.encoding, PerGroupEncoding) else per
        return f"{(levels - 1).bit_length()} bits, {per}"

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points for each value, as `Use.rows` of the first use lays them out, float32."""
        scale, zero = (each.broadcast_to(self.value.shape) for each in parameters_along(self.encoding, self.value))
        return self.uses[0].rows(scale), self.uses[0].rows(zero).to(torch.float32)

    def nearest(self, rows: Tensor, grid: tuple[Tensor, Tensor]) -> Tensor:
        """The nearest integers to ``rows``, of the shape of ``grid`` or its broadcast, as float32; ties to even."""
        scale, zero = grid
        steps = torch.round(rows * (1.0 / scale)) + zero
        return steps.clamp_(self.encoding.quant_min, self.encoding.quant_max)


def quantized_weights(prepared: GraphModule, simulated: SimulatedGraph) -> list[QuantizedWeight]:
    """The quantized weights of ``prepared``, of which ``simulated`` was made, in the order in which they are used.

    Tensors that several observers with equal encodings look at are one weight.
    """
    order = {node: place for place, node in enumerate(simulated.graph.graph.nodes)}
    points: dict[str, list[Node]] = {}
    for point, call in simulated.observed.items():
        points.setdefault(call, []).append(point)
    found: dict[Any, QuantizedWeight] = {}
    for call in prepared.graph.nodes:
        if not is_observer_call(call) or call.name not in points:
            continue
        if simulated.constant(points[call.name][0]) is None:
            continue
        value, encoding = evaluate(prepared, call.all_input_nodes[0]), encode(prepared.get_submodule(str(call.target)))
        if not isinstance(encoding, PerTensorEncoding | PerChannelEncoding | PerGroupEncoding):
            continue
        if encoding.dtype.itemsize > 2 or not isinstance(value, Tensor):
            continue  # the integers of a bias are those of its accumulator
        key = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, repr(encoding))
        weight = found.setdefault(key, QuantizedWeight(value.detach(), encoding))
        weight.calls.append(call)
        for point in points[call.name]:
            for reader in point.users:
                _add_use(weight, reader, point)
    for weight in found.values():
        weight.uses.sort(key=lambda use: order[use.op])
        weight.reason = weight.reason or _mixed(weight)
    first = {id(w): min((order[use.op] for use in w.uses), default=len(order)) for w in found.values()}
    return sorted(found.values(), key=lambda weight: first[id(weight)])


def _add_use(weight: QuantizedWeight, reader: Node, point: Node) -> None:
    target: Any = reader.target
    names = ("input", "weight") if target in _CONVOLUTIONS else _PRODUCTS.get(target)
    if names is None:
        weight.reason = f"it is read by {where(reader)}"
        if target in _TABLES:
            weight.reason = "each of its rows is looked up alone, so the nearest integers are the best"
        elif target in TRANSPOSED:
            weight.reason = f"{where(reader)} is a transposed convolution"
        return
    x, w = (operand(reader, name) for name in names)
    if w is not point or not isinstance(x, Node) or x is point:
        weight.reason = f"it is not the second operand of {where(reader)}"
    elif operand(reader, "transposed"):
        weight.reason = f"{where(reader)} is a transposed convolution"
    elif weight.value.dim() != 2 and reader.target in _PRODUCTS:
        weight.reason = f"it is no matrix in {where(reader)}"
    elif reader.target is aten.addmm.default and not _plain_sum(reader):
        weight.reason = f"{where(reader)} adds something else than a bias"
    else:
        weight.uses.append(Use(reader, x, point))


def _plain_sum(addmm: Node) -> bool:
    bias = operand(addmm, "self").meta.get("val")
    plain = (operand(addmm, "beta"), operand(addmm, "alpha")) == (1, 1)
    return plain and isinstance(bias, Tensor) and bias.dim() == 1


def _mixed(weight: QuantizedWeight) -> str:
    kinds = {(use.op.target in _CONVOLUTIONS, use.op.target is aten.linear.default, use.groups) for use in weight.uses}
    if len(kinds) > 1:
        return f"the products that read it lay it out in {len(kinds)} ways"
    zero = torch.as_tensor(weight.encoding.zero_point)
    return "its zero points are no integers" if zero.is_floating_point() else ""


def simulated_weights(prepared: GraphModule) -> SimulatedGraph | None:
    """``prepared`` with points; None where all that is quantized lies in bodies of control flow."""
    outside = any(is_observer_call(node) for node in prepared.graph.nodes)
    return SimulatedGraph(prepared) if outside else None


def weights_in_bodies(prepared: GraphModule) -> list[str]:
    """Paths of bodies of control flow with observers in them: their weights count with the body."""
    inside = list(graphs_of(prepared))[1:]
    return [path for path, body in inside if any(is_observer_call(node) for node in body.graph.nodes)]


def check_calibrated(prepared: Any, name: str) -> None:
    """Raise `Quant2eError` for something that is no prepared graph, or one that is being trained."""
    if not isinstance(prepared, GraphModule) or not any(
        is_observer_call(node) for _, graph in graphs_of(prepared) for node in graph.graph.nodes
    ):
        raise Quant2eError(f"{name} takes a graph that prepare_pt2e returned, calibrated, not {_kind(prepared)}")
    if FUSED in prepared.meta:
        raise Quant2eError(f"{name} is for calibrated graphs: this one was prepared for training, which rounds as well")


def _kind(value: Any) -> str:
    return "one without observers" if isinstance(value, GraphModule) else f"a {type(value).__name__}"
