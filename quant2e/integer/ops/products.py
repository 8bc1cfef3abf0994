"""Convolutions and matrix products in integers: int8 products, int32 sums, one requantization.

    acc = Σ (x - zero_point_x) * (w - zero_point_w) + bias,        bias = round(b / (scale_x * scale_w))

in int32, or in int64 where a bound on the sum says that int32 could overflow, and where torch has no int32 kernel.
What a bias between two integers leaves is requantized with the sum, as fraction bits
(`quant2e.integer.arithmetic.bias`). Padding pads with zeros after the zero point is gone, so it stands for the real
number zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.graph.constants import evaluate
from quant2e.graph.dataflow import operand
from quant2e.integer.arithmetic.bias import bias_fraction, bias_integers
from quant2e.integer.arithmetic.builder import NoIntegerFormError, Record
from quant2e.integer.arithmetic.grid import Grid
from quant2e.integer.arithmetic.values import IntegerContext, Part, Value, Wide, rank
from quant2e.integer.ops.constant_weights import IntegerWeight, integer_weight_of
from quant2e.integer.ops.dynamic_quantization import DynamicProduct, DynamicStored

aten = torch.ops.aten

INT32 = 2**31


class IntegerProduct(Wide):
    """An accumulator that is also what a float reader gets, dequantized: the sums are integers in any case."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._real: Node | None = None

    def real(self, ctx: IntegerContext) -> Node:
        if self._real is None:
            ctx.integer.setdefault(self.node.name, f"{self.kind}, read in float")
            with ctx.b.at(self.node):
                self._real = dequantized_sum(ctx, self.node, self._parts)
            self._record(ctx, self._real)
        return self._real

    def _record(self, ctx: IntegerContext, real: Node) -> None:
        """A sum that is dequantized: ``float32(acc) * scale``."""
        part = self._parts[0]
        if len(self._parts) > 1 or self.forms:
            return
        ctx.b.record(
            Record(
                name=self.node.name,
                kind=f"float_{self.kind}",
                inputs=self.inputs,
                output=real.name,
                constants=self.constants | {"scale": float32_scale(part)},
                attributes=self.attributes | {"out_dtype": "float32"},
                accumulator=(part.accumulator or part.node).name,
            )
        )


def float32_scale(part: Part) -> Tensor:
    """What one unit of a sum is worth, each product in float32: 0-D, or one for each output channel."""
    scale = torch.ones((), dtype=torch.float32)
    for factor in part.scales:
        scale = scale * torch.as_tensor(factor).to(torch.float32)
    return scale


def dequantized_sum(ctx: IntegerContext, node: Node, parts: list[Part]) -> Node:
    """``Σ acc * scale`` in the float dtype of ``node``."""
    total: Node | None = None
    for part in parts:
        scale = float32_scale(part)
        by: Node | float = (
            float(scale)
            if scale.dim() == 0
            else ctx.b.constant(_spread(scale, part.axis, rank(node)), f"{node.name}_scale")
        )
        term = ctx.b.call(aten.mul.Tensor, ctx.b.cast(part.node, torch.float32), by)
        total = term if total is None else ctx.b.call(aten.add.Tensor, total, term)
    assert total is not None
    value = node.meta.get("val")
    return ctx.b.cast(total, value.dtype) if isinstance(value, Tensor) else total


def _spread(values: Tensor, axis: int | None, dims: int) -> Tensor:
    return values.reshape([-1 if i == axis else 1 for i in range(dims)])


def _bias(ctx: IntegerContext, node: Node, name: str | int) -> Tensor | None:
    """The values of a constant bias; None when there is none. Raises `NoIntegerFormError` when it is not constant."""
    bias = operand(node, name)
    if bias is None:
        return None
    if bias not in ctx.constants:
        raise NoIntegerFormError(node, "its bias is not constant")
    value = evaluate(ctx.gm, bias)
    assert isinstance(value, Tensor)
    return value.detach()


def _operands(ctx: IntegerContext, node: Node, x: Any, w: Any) -> tuple[Any, IntegerWeight]:
    activation = ctx.value(x, node)
    weight = integer_weight_of(ctx, w)
    if weight is None:
        raise NoIntegerFormError(node, f"its weight '{getattr(w, 'name', w)}' is not an integer constant")
    if not isinstance(activation, DynamicStored) and activation.grid is None:
        raise NoIntegerFormError(node, f"its operand '{activation.node.name}' is not on an 8-bit or 16-bit grid")
    return activation, weight


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """A product with a constant weight, and what is known of it.

    ``call``: makes it of integers, a laid out weight and a bias. ``out_scale``: of the weight, 0-D or one for each
    index of ``axis`` of the result. ``reach``: the largest sum of |w| of an output. ``wide``: torch has int64 kernels
    only. ``laid_out``: the weight as ``call`` takes it, where that is not ``weight``.
    """

    kind: str
    weight: IntegerWeight
    bias: Tensor | None
    call: Callable[[Node, Node, Node | None], Node]
    out_scale: float | Tensor
    axis: int
    reach: Tensor
    wide: bool = False
    attributes: dict[str, Any] = field(default_factory=dict)
    laid_out: IntegerWeight | None = None

    def weight_node(self, ctx: IntegerContext, node: Node, dtype: torch.dtype) -> Node:
        return (self.laid_out or self.weight).node(ctx, node, dtype)

    def dtype(self, span: int) -> torch.dtype:
        """What the sums are computed in, when they are below ``span``."""
        return torch.int64 if self.wide or span >= INT32 else torch.int32


def _accumulated(ctx: IntegerContext, node: Node, activation: Any, product: _Product) -> Value:
    """The accumulator of a product, by the kind of its activation."""
    dynamic = isinstance(activation, DynamicStored)
    return (_dynamic_sum if dynamic else _static_sum)(ctx, node, activation, product)


def _dynamic_sum(ctx: IntegerContext, node: Node, activation: DynamicStored, product: _Product) -> Value:
    """Sums without a bias: the scale of the activation, and so the unit of the sums, is known at run time only."""
    span = int(product.reach.max()) * activation.span
    with ctx.b.at(node):
        dtype = product.dtype(span)
        acc = product.call(activation.shifted(ctx, dtype), product.weight_node(ctx, node, dtype), None)
        acc = ctx.b.cast(acc, torch.int32) if span < INT32 else acc
    weight, known = product.weight, product.attributes | {"weight_zero_point": product.weight.zero_point_list()}
    return DynamicProduct(
        node, acc, activation, product.out_scale, product.axis, product.bias, product.kind,
        {"weight": weight.integers}, known,
    )  # fmt: skip


def _static_sum(ctx: IntegerContext, node: Node, activation: Any, product: _Product) -> Value:
    """Sums with the bias in their units, and with what is left of it as a fraction."""
    grid: Grid = activation.grid
    integers = activation.quantized(ctx, grid)
    weight, bias, out_scale, axis = product.weight, product.bias, product.out_scale, product.axis
    bias_q = None if bias is None else bias_integers(bias, grid.scale, out_scale)
    fraction = None
    largest = product.reach.to(torch.float64) * grid.span + (0 if bias_q is None else bias_q.abs().to(torch.float64))
    span = int(largest.max())
    if bias is not None and bias_q is not None:
        fraction = bias_fraction(bias, bias_q, grid.scale, out_scale, span)
    constants = {"weight": weight.integers}
    with ctx.b.at(node):
        dtype = product.dtype(span)
        kept = None if bias_q is None else bias_q.to(torch.int32 if int(bias_q.abs().max()) < INT32 else torch.int64)
        constants |= {} if kept is None else {"bias": kept}
        bias_node = None if kept is None else ctx.b.cast(ctx.b.constant(kept, f"{node.name}_bias"), dtype)
        x = ctx.b.shifted(integers, grid.zero_point, dtype)
        acc = product.call(x, product.weight_node(ctx, node, dtype), bias_node)
        if span >= INT32:
            ctx.b.notes.append(f"'{node.name}': sums in int64: they can reach {span:.4g}, and int32 holds {INT32:.4g}")
        elif product.wide:
            acc = ctx.b.cast(acc, torch.int32)
        channels = axis if isinstance(out_scale, Tensor) else None
        part = Part(acc, (grid.scale, out_scale), span, channels, owner=node.name)
        if fraction is not None:
            part = fraction.added(ctx.b, part, axis, rank(node), f"{node.name}_bias_fraction")
            constants["bias_fraction"] = fraction.integers
    known = product.attributes | {
        "bias_fraction_bits": 0 if fraction is None else fraction.bits,
        "channel_axis": axis,
        "zero_point": grid.zero_point,
        "weight_zero_point": weight.zero_point_list(),
        "accumulator": "int64" if span >= INT32 else "int32",
    }
    return IntegerProduct(
        node, [part], kind=product.kind, inputs={"x": integers.name}, constants=constants, attributes=known
    )


_CONVOLUTIONS = {
    aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3,
    aten.conv1d.padding: 1, aten.conv2d.padding: 2, aten.conv3d.padding: 3,
}  # fmt: skip
_TRANSPOSED = {aten.conv_transpose1d.default: 1, aten.conv_transpose2d.input: 2, aten.conv_transpose3d.input: 3}


def _plain(value: Any) -> Any:
    return [int(v) for v in value] if isinstance(value, list | tuple) else value


def _convolution(ctx: IntegerContext, node: Node) -> Value:
    activation, weight = _operands(ctx, node, operand(node, 0), operand(node, 1))
    bias = _bias(ctx, node, "bias")
    spatial = weight.integers.dim() - 2
    groups = operand(node, "groups")
    transposed = node.target in _TRANSPOSED or operand(node, "transposed") is True
    dilation = _plain(operand(node, "dilation"))
    dilated = any(d != 1 for d in (dilation if isinstance(dilation, list) else [dilation]))
    scale = weight.output_scales(node, groups, transposed=transposed)
    magnitude = weight.centred().abs().to(torch.int64)
    if transposed:
        reach = magnitude.flatten(2).sum(-1).reshape(groups, -1, magnitude.shape[1]).sum(1).flatten()
    else:
        reach = magnitude.flatten(1).sum(1)
    attributes = {
        "transposed": transposed,
        "stride": _plain(operand(node, "stride")),
        "padding": operand(node, "padding")
        if isinstance(operand(node, "padding"), str)
        else _plain(operand(node, "padding")),
        "output_padding": _plain(operand(node, "output_padding")) if transposed else 0,
        "dilation": dilation,
        "groups": groups,
    }

    def call(x: Node, w: Node, b: Node | None) -> Node:
        replaced = {0: x, 1: w, 2: b}
        args = tuple(replaced.get(i, a) for i, a in enumerate(node.args))
        args = (*args, b) if len(args) == 2 else args
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("input", "weight", "bias")}
        return ctx.b.call(node.target, *args, **kwargs)

    axis = rank(node) - spatial - 1
    product = _Product(
        kind="convolution", weight=weight, bias=bias, call=call, out_scale=scale, axis=axis, reach=reach,
        wide=dilated or transposed, attributes=attributes,
    )  # fmt: skip
    return _accumulated(ctx, node, activation, product)


def _linear(ctx: IntegerContext, node: Node) -> Value:
    activation, weight = _operands(ctx, node, operand(node, 0), operand(node, 1))
    bias = _bias(ctx, node, "bias")
    if weight.group_size:
        return _grouped_linear(ctx, node, activation, weight, bias)
    scale = weight.along(node, 0)
    reach = weight.centred().abs().to(torch.int64).sum(-1)
    # torch multiplies integers half as fast again by a matrix that lies as [K, N]
    columns = replace(
        weight, integers=weight.integers.t().contiguous(), axis=None if weight.axis is None else 1, source=None
    )

    product = _Product(
        kind="linear", weight=weight, bias=bias, call=partial(_matmul_and_add, ctx), out_scale=scale,
        axis=rank(node) - 1, reach=reach, laid_out=columns,
    )  # fmt: skip
    return _accumulated(ctx, node, activation, product)


def _matmul_and_add(ctx: IntegerContext, x: Node, w: Node, bias: Node | None) -> Node:
    product = ctx.b.call(aten.matmul.default, x, w)
    return product if bias is None else ctx.b.call(aten.add.Tensor, product, bias)


def _grouped_linear(
    ctx: IntegerContext, node: Node, activation: Any, weight: IntegerWeight, bias: Tensor | None
) -> Value:
    """One product for each group of input channels, and the sum of these on their scales."""
    size = weight.group_size
    scales = torch.as_tensor(weight.scale)
    dynamic = isinstance(activation, DynamicStored)
    x_span = activation.span if dynamic else activation.grid.span
    parts: list[Part] = []
    integers = activation.integers if dynamic else activation.quantized(ctx, activation.grid)
    constants = {"weight": weight.without_zero_point(), "weight_scale": scales}
    attributes: dict[str, Any] = {"group_size": size, "channel_axis": rank(node) - 1, "bias_fraction_bits": 0}
    with ctx.b.at(node):
        x = activation.shifted(ctx, torch.int32) if dynamic else ctx.b.shifted(integers, activation.grid.zero_point)
        w = weight.node(ctx, node, torch.int32)
        for g in range(scales.shape[1]):
            xs = ctx.b.call(aten.slice.Tensor, x, -1, g * size, (g + 1) * size)
            ws = ctx.b.call(aten.slice.Tensor, w, 1, g * size, (g + 1) * size)
            span = int(weight.centred()[:, g * size : (g + 1) * size].abs().sum(1).max()) * x_span
            scale = scales[:, g].contiguous()
            bias_node = fraction = None
            if g == 0 and bias is not None and not dynamic:
                bias_q = bias_integers(bias, activation.grid.scale, scale)
                span += int(bias_q.abs().max())
                bias_node = ctx.b.constant(bias_q.clamp(-INT32, INT32 - 1).to(torch.int32), f"{node.name}_bias")
                fraction = bias_fraction(bias, bias_q, activation.grid.scale, scale, span)
                constants["bias"] = bias_q
            if span >= INT32:
                raise NoIntegerFormError(node, f"the sum over a group of {size} can reach {span:.4g}, beyond int32")
            acc = ctx.b.call(aten.linear.default, xs, ws, bias_node)
            factors = (scale,) if dynamic else (activation.grid.scale, scale)
            part = Part(acc, factors, span, rank(node) - 1, owner=node.name)
            if fraction is not None:
                part = fraction.added(ctx.b, part, rank(node) - 1, rank(node), f"{node.name}_bias_fraction")
                constants["bias_fraction"], attributes["bias_fraction_bits"] = fraction.integers, fraction.bits
            parts.append(part)
        if dynamic:
            total = dequantized_sum(ctx, node, parts)
            return DynamicProduct(
                node, total, activation, 1.0, rank(node) - 1, bias, "grouped_linear", constants, attributes
            )
    attributes["zero_point"] = activation.grid.zero_point
    return IntegerProduct(
        node, parts, kind="grouped_linear", inputs={"x": integers.name}, constants=constants, attributes=attributes
    )


def _times_weight(ctx: IntegerContext, node: Node, x: Any, w: Any, bias: Tensor | None) -> Value:
    """A matrix product with a constant on the right, [..., K] × [K, N]."""
    activation, weight = _operands(ctx, node, x, w)
    if weight.integers.dim() != 2:
        raise NoIntegerFormError(node, "its weight is not a matrix")
    scale = weight.along(node, 1)
    reach = weight.centred().abs().to(torch.int64).sum(0)
    product = _Product(
        kind="matmul_weight", weight=weight, bias=bias, call=partial(_matmul_and_add, ctx), out_scale=scale,
        axis=rank(node) - 1, reach=reach,
    )  # fmt: skip
    return _accumulated(ctx, node, activation, product)


def _addmm(ctx: IntegerContext, node: Node) -> Value:
    if operand(node, "alpha") != 1 or operand(node, "beta") != 1:
        raise NoIntegerFormError(node, "alpha or beta is not 1")
    bias = _bias(ctx, node, 0)
    if bias is not None and bias.dim() != 1:
        raise NoIntegerFormError(node, "what it adds is not a bias per output channel")
    return _times_weight(ctx, node, operand(node, 1), operand(node, 2), bias)


def _matmul(ctx: IntegerContext, node: Node) -> Value:
    left, right = operand(node, 0), operand(node, 1)
    if isinstance(right, Node) and right in ctx.constants and integer_weight_of(ctx, right) is not None:
        weight = integer_weight_of(ctx, right)
        if weight is not None and weight.integers.dim() == 2:
            return _times_weight(ctx, node, left, right, None)
    values = [ctx.value(side, node) for side in (left, right)]
    grids = [value.grid for value in values]
    if isinstance(values[0], DynamicStored) or isinstance(values[1], DynamicStored) or None in grids:
        raise NoIntegerFormError(node, "one of its operands is not on a known grid")
    a, b = (grid for grid in grids if grid is not None)
    inner = left.meta["val"].shape[-1]
    span = int(inner) * a.span * b.span if isinstance(inner, int) else INT32
    nodes = [value.quantized(ctx, grid) for value, grid in zip(values, (a, b), strict=True)]
    with ctx.b.at(node):
        dtype = torch.int64 if span >= INT32 else torch.int32
        if span >= INT32:
            ctx.b.notes.append(f"'{node.name}': sums in int64: they can reach {span:.4g}, and int32 holds {INT32:.4g}")
        sides = [ctx.b.shifted(q, grid.zero_point, dtype) for q, grid in zip(nodes, (a, b), strict=True)]
        acc = ctx.b.call(node.target, *sides)
    attributes = {"zero_point": a.zero_point, "zero_point_y": b.zero_point, "accumulator": str(dtype)[6:]}
    inputs = {"x": nodes[0].name, "y": nodes[1].name}
    return IntegerProduct(
        node,
        [Part(acc, (a.scale, b.scale), span, owner=node.name)],
        kind="matmul",
        inputs=inputs,
        attributes=attributes,
    )


FORMS: Mapping[Any, Callable[[IntegerContext, Node], Value]] = {
    **dict.fromkeys((*_CONVOLUTIONS, *_TRANSPOSED, aten.convolution.default), _convolution),
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), _matmul),
}
"""Target → form."""
