"""Convolutions and linear layers with int8 operands, as units of a region.

q(dq(x) * dq(w) + b [+ r])        =>        a step: sums of bytes, scale, bias, what is added, activation, bytes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.native.kernels.plan import StepKind
from lowering.native.units.arithmetic import sums_fit
from lowering.native.units.packed import add_numbers, border_of, packed_steps
from lowering.native.units.unit import CLAMPS, Emitter, Ending, Unit, ending_of, finish
from lowering.native.units.values import (
    Integers,
    Weight,
    image_of,
    integers_of,
    pair,
    quantizes,
    stored,
    transposed_weight_at,
    weight_at,
)
from lowering.native.units.windows import POINT, ResultPart, plain_window, transposed_parts
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operands

aten = torch.ops.aten

_TRANSPOSED = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input})
_CONVOLUTION = frozenset(
    {
        aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.convolution.default,
        *_TRANSPOSED,
    }
)  # fmt: skip
PRODUCTS = _CONVOLUTION | {aten.linear.default}
"""Ops that read bytes, and a constant weight."""
_IMAGE = 4
"""Dimensions."""
_MOST_TAPS = 1024
_MOST_PARTS = 1024
"""Steps of a transposed convolution."""
_SMALL = 2.0**30
"""Sums multiplied by their scale stay below this, where results are rounded without a clamp before."""


def product_unit(gm: GraphModule, node: Node, taken: set[Node]) -> Unit | str | None:
    """The unit of a convolution or linear layer; why there is none; None for other ops."""
    if node.target not in PRODUCTS:
        return None
    given = operands(node)
    turned = node.target in _TRANSPOSED or bool(given.get("transposed"))
    groups = int(given.get("groups", 1))
    source = stored(given["input"])
    weight = transposed_weight_at(gm, given["weight"], groups) if turned else weight_at(gm, given["weight"])
    if source is None or weight is None:
        return "its operands are not bytes with a constant scale, and a constant symmetric int8 weight"
    bias = tensor_at(gm, given["bias"])
    if image_of(source) is None or image_of(node) is None or (given["bias"] is not None and bias is None):
        return "sizes other than the first vary, or it has more than two dimensions of space"
    parts = _parts(node, given, source, weight, turned=turned)
    if isinstance(parts, str):
        return parts
    integers = integers_of(source)
    if integers is None or not sums_fit(weight.integers, integers):
        return "its sums may leave 32 bits"
    ending = ending_of(node, taken)
    dequantizes = tuple(n for n in (given["input"], given["weight"]) if isinstance(n, Node))
    return Unit(
        nodes=(*dequantizes, node, *ending.nodes),
        reads=(source, *ending.reads),
        writes=ending.writes,
        emit=_Product(source, weight, bias, parts, groups, ending).emit,
        products=True,
    )


def _parts(
    node: Node, given: dict[str, Any], source: Node, weight: Weight, *, turned: bool
) -> tuple[ResultPart, ...] | str:
    """What each step of a product reads and writes, or why there are none."""
    x, y = image_of(source), image_of(node)
    assert x is not None, "it was looked at before"
    assert y is not None, "it was looked at before"
    images = len(source.meta["val"].shape) == _IMAGE
    if node.target is aten.linear.default:
        return (ResultPart(window=POINT),) if not images else "a linear layer on four dimensions"
    if not images or weight.integers.dim() != _IMAGE:
        return "it has other than two dimensions of space"
    _, _, *kernel = weight.integers.shape
    stride, dilation, padding = pair(given["stride"]), pair(given["dilation"]), given["padding"]
    if padding == "valid":
        padding = [0, 0]
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    if kernel[0] * kernel[1] > _MOST_TAPS:
        return f"a kernel of {kernel[0]} x {kernel[1]}"
    sizes = ((kernel[0], kernel[1]), stride, pair(padding), dilation, x[:2], y[:2])
    if not turned:
        return (ResultPart(window=plain_window(*sizes)),)
    if stride[0] * stride[1] > _MOST_PARTS:
        return f"a transposed convolution of stride {stride[0]} x {stride[1]}"
    return transposed_parts(*sizes)


@dataclass(frozen=True, slots=True)
class _Product:
    source: Node
    weight: Weight
    bias: Tensor | None
    parts: tuple[ResultPart, ...]
    groups: int
    ending: Ending

    def emit(self, emitter: Emitter) -> None:
        """Pack, and add the steps."""
        x = integers_of(self.source)
        assert x is not None, "it was looked at before"
        packed = packed_steps(emitter.constants, self.weight.integers, x, self.parts, self.groups)
        scale, bias, fast = self._numbers(x, depthwise=any(one.step.kind is StepKind.DEPTHWISE for one in packed))
        add_numbers(emitter.constants, packed, scale, bias)
        place = emitter.border(self.source, border_of(packed))
        first, *others = (one.step for one in packed)
        for step in (first, *others):
            step.x = place
        finish(emitter, first, self.ending, fast=fast, parts=others)

    def _numbers(self, x: Integers, *, depthwise: bool) -> tuple[Tensor, Tensor, bool]:
        """Scale and bias of each output; whether they are divided by the scale of the result.

        They are where a clamp ends it. Bytes that are added are then, too, and their zero point is in the bias, unless
        the kernel is a ``depthwise`` one.
        """
        scale = self.weight.scale.double() * x.scale
        bias = torch.zeros_like(scale) if self.bias is None else self.bias.detach().double()
        end = self.ending
        y = None if end.integers is None else integers_of(end.integers)
        added = None if end.added is None or not quantizes(end.added) else integers_of(end.added)
        alone = end.added is None or (added is not None and not depthwise)
        if y is None or end.floats is not None or not alone or end.activation.kind not in CLAMPS:
            return scale, bias, False
        most = self.weight.integers.flatten(1).to(torch.int32).abs().sum(1, dtype=torch.int64) * 255 * scale / y.scale
        more = bias / y.scale if added is None else bias / y.scale - added.zero * added.scale / y.scale
        if bool((most + more.abs() >= _SMALL).any()) or (added is not None and 255 * added.scale / y.scale >= _SMALL):
            return scale, bias, False
        return scale / y.scale, more, True
