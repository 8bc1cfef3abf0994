"""Convolutions and linear layers with int8 operands, as units of a region.

q(dq(x) * dq(w) + b [+ r])        =>        a step: sums of bytes, scale, bias, what is added, activation, bytes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowering.native.kernels.op import instruction_set
from lowering.native.kernels.pack import LANES, STRIP, depthwise_rows, pack_convolution, pack_depthwise, per_output
from lowering.native.kernels.plan import Arithmetic, Constants, Kind, Step
from lowering.native.units.arithmetic import arithmetic_of, sums_fit
from lowering.native.units.unit import CLAMPS, Emitter, Ending, Unit, ending_of, finish
from lowering.native.units.values import Integers, Weight, image_of, integers_of, is_quantize, pair, stored, weight_at
from quant2e.graph.attributes import tensor_at
from quant2e.graph.dataflow import operands

aten = torch.ops.aten

_CONVOLUTION = frozenset({aten.conv2d.default, aten.conv2d.padding, aten.convolution.default})
_MOST_DEPTHWISE_ROWS = 8
_MOST_REACH = 40
"""Columns that the depthwise kernel interleaves at a time hold at least one output whose kernel spans so many."""
_MOST_TAPS = 1024
_SMALL = 2.0**30
"""Sums multiplied by their scale stay below this, where results are rounded without a clamp before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A convolution's geometry, height first. ``after``: pixels beyond the bottom and the right edge that it reads."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int]
    dilation: tuple[int, int]
    after: tuple[int, int]

    @property
    def border(self) -> int:
        """Pixels around the image that are read."""
        return max(0, *self.before, *self.after)


POINT = Window(kernel=(1, 1), stride=(1, 1), before=(0, 0), dilation=(1, 1), after=(0, 0))
"""Of a linear layer."""


def product_unit(gm: GraphModule, node: Node, taken: set[Node]) -> Unit | str | None:
    """The unit of a convolution or linear layer; why there is none; None for other ops."""
    if node.target not in _CONVOLUTION and node.target is not aten.linear.default:
        return None
    given = operands(node)
    source, weight = stored(given["input"]), weight_at(gm, given["weight"])
    if source is None or weight is None:
        return "its operands are not bytes with a constant scale, and a constant symmetric int8 weight"
    x, y = image_of(source), image_of(node)
    bias = tensor_at(gm, given["bias"])
    if x is None or y is None or (given["bias"] is not None and bias is None):
        return "sizes other than the first vary, or it has more than two dimensions of space"
    if given.get("transposed"):
        return "transposed convolutions are not built"
    linear = node.target is aten.linear.default
    window = POINT if linear else _window(given, x, y, weight)
    if window is None or (linear and len(source.meta["val"].shape) == 4):
        return "its padding has no numbers" if not linear else "a linear layer on four dimensions"
    groups = 1 if linear else int(given["groups"])
    ending = ending_of(node, taken)
    product = _Product(gm, source, weight, bias, window, groups, ending)
    if window.kernel[0] * window.kernel[1] > _MOST_TAPS:
        return f"a kernel of {window.kernel[0]} x {window.kernel[1]}"
    integers = integers_of(source)
    if integers is None or not sums_fit(weight.integers, integers):
        return "its sums may leave 32 bits"
    dequantizes = tuple(n for n in (given["input"], given["weight"]) if isinstance(n, Node))
    return Unit(
        nodes=(*dequantizes, node, *ending.nodes),
        reads=(source, *ending.reads),
        writes=ending.writes,
        emit=product.emit,
        products=True,
    )


def _window(given: dict[str, Any], x: tuple[int, int, int], y: tuple[int, int, int], weight: Weight) -> Window | None:
    kernel, stride, dilation = tuple(weight.integers.shape[2:]), pair(given["stride"]), pair(given["dilation"])
    padding = given["padding"]
    if padding == "valid":
        padding = [0, 0]
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str) or len(kernel) != 2:
        return None
    before = pair(padding)
    after = tuple((y[i] - 1) * stride[i] + (kernel[i] - 1) * dilation[i] - before[i] - (x[i] - 1) for i in range(2))
    return Window(kernel=kernel, stride=stride, before=before, dilation=dilation, after=(after[0], after[1]))


def _is_depthwise(weight: Tensor, window: Window, groups: int) -> bool:
    """Whether each channel has a kernel of its own, of a size that the kernel for that takes."""
    reach = (window.kernel[1] - 1) * window.dilation[1] + 1
    alone = weight.dim() == 4 and weight.shape[1] == 1 and groups == weight.shape[0] > 1
    return alone and window.kernel[0] <= _MOST_DEPTHWISE_ROWS and reach <= _MOST_REACH


def packed_step(constants: Constants, weight: Tensor, x: Integers, window: Window, groups: int) -> tuple[Step, int]:
    """The step of a convolution or linear layer with its weight packed, and of what multiple its outputs are.

    ``weight``: int8 ``[outputs, inputs of a group]``, and its height and width. What is read, scale, bias and what is
    written are still to be filled in.
    """
    depthwise = _is_depthwise(weight, window, groups)
    weight = weight if weight.dim() == 4 else weight[:, :, None, None]
    step = Step(
        kind=Kind.DEPTHWISE if depthwise else Kind.CONVOLUTION,
        x_scale=x.scale,
        x_zero=x.zero,
        kernel_h=window.kernel[0],
        kernel_w=window.kernel[1],
        stride_h=window.stride[0],
        stride_w=window.stride[1],
        top=window.before[0],
        left=window.before[1],
        dilation_h=window.dilation[0],
        dilation_w=window.dilation[1],
        groups=groups,
        inputs=weight.shape[1],
        outputs=weight.shape[0] // groups,
        mode=1,
        extra=1,
    )
    if depthwise:
        rows = depthwise_rows(window.kernel, window.stride, window.dilation)
        packed = pack_depthwise(weight, x.zero, rows=rows, stride=window.stride[0])
    else:
        rows = groups == 1 and window.dilation[1] == 1
        step.arithmetic = arithmetic_of(weight, x) if instruction_set() == "avx2" else Arithmetic.EXACT
        packed = pack_convolution(weight, x.zero, groups, rows=rows, arithmetic=step.arithmetic)
    step.taps, step.inner = packed.taps, packed.inner
    step.weight, step.init = constants.add(packed.weight), constants.add(packed.init)
    return step, STRIP if depthwise else LANES


@dataclass(frozen=True, slots=True)
class _Product:
    gm: GraphModule
    source: Node
    weight: Weight
    bias: Tensor | None
    window: Window
    groups: int
    ending: Ending

    def emit(self, emitter: Emitter) -> None:
        """Pack, and add the step."""
        x = integers_of(self.source)
        assert x is not None, "it was looked at before"
        step, to = packed_step(emitter.constants, self.weight.integers, x, self.window, self.groups)
        step.x = emitter.border(self.source, self.window.border)
        scale, bias, fast = self._numbers(x)
        groups = 1 if step.kind is Kind.DEPTHWISE else self.groups
        step.scale = emitter.constants.add(per_output(scale, groups, to))
        step.bias = emitter.constants.add(per_output(bias, groups, to))
        finish(emitter, step, self.ending, fast=fast)

    def _numbers(self, x: Integers) -> tuple[Tensor, Tensor, bool]:
        """Scale and bias of each output; whether they are divided by the scale of the result.

        They are where a clamp ends it. Bytes that are added are then, too, and their zero point is in the bias.
        """
        scale = self.weight.scale.double() * x.scale
        bias = torch.zeros_like(scale) if self.bias is None else self.bias.detach().double()
        end = self.ending
        y = None if end.integers is None else integers_of(end.integers)
        added = None if end.added is None or not is_quantize(end.added) else integers_of(end.added)
        alone = end.added is None or (
            added is not None and not _is_depthwise(self.weight.integers, self.window, self.groups)
        )
        if y is None or end.floats is not None or not alone or end.activation.kind not in CLAMPS:
            return scale, bias, False
        most = self.weight.integers.flatten(1).to(torch.int32).abs().sum(1, dtype=torch.int64) * 255 * scale / y.scale
        more = bias / y.scale if added is None else bias / y.scale - added.zero * added.scale / y.scale
        if bool((most + more.abs() >= _SMALL).any()) or (added is not None and 255 * added.scale / y.scale >= _SMALL):
            return scale, bias, False
        return scale / y.scale, more, True
