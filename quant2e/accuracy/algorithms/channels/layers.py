"""Channel layers: the ops that hold constants on which a factor of a channel can be put, and where it lies on them.

    conv, linear, addmm, matmul, embedding        rows make channels, columns read them
    batch, layer, group, instance, rms norm       weight and bias make channels; a batch norm of its own reads them, too
    x · c, x / c, x + c                           c makes and reads them; c takes the factor of x

A batch norm that `fold_batch_norm` will fold into the op before it is one op with that: its channels are that op's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.accuracy.algorithms.channels.labels import Labels, aligned, along, on_axis, tidy
from quant2e.accuracy.algorithms.channels.walk import FactorTerm, Parameter, Strength, Walk
from quant2e.graph.dataflow import operand
from quant2e.graph.effects import trains
from quant2e.graph.fake_values import shape_of
from quant2e.passes.fold_batch_norm import channel_axis, producer

Rule = Callable[[Walk, Node], Labels]

_SIGMAS = 3.0
"""A normalised value lies within three standard deviations: Nagel et al. 2019, section 4.1.3."""

_TWO_AXES = 2


def conv(walk: Walk, node: Node) -> Labels:
    """A convolution, transposed or not, in groups or not, with or without a bias."""
    x, weight = operand(node, "input"), walk.parameter(node, "weight")
    if isinstance(weight, str):
        walk.stop(walk.of(x), node, weight)
        return None
    transposed = "transpose" in str(node.target) or bool(operand(node, "transposed"))
    groups, rank = int(operand(node, "groups")), weight.value.dim()
    first, second = int(weight.value.shape[0]), int(weight.value.shape[1])
    made, read = (second * groups, first) if transposed else (first, second * groups)
    axis = channel_axis(node)
    columns = _reads(walk, node, walk.of(x), axis, weight, read)
    rows = walk.axis(weight, "makes", (made,))
    split = (_grouped(rows, groups, first), on_axis(columns, 0, rank))
    plain = (on_axis(rows, 0, rank), _grouped(columns, groups, first))
    out, into = split if transposed else plain
    _matrix(walk, node, weight, aligned_to(out, rank), aligned_to(into, rank), x)
    return _with_bias(walk, node, rows, on_axis(rows, axis, len(shape_of(node))))


def linear(walk: Walk, node: Node) -> Labels:
    """A linear: the weight is (made, read)."""
    return _product(walk, node, ("input", "weight"), makes=0)


def addmm(walk: Walk, node: Node) -> Labels:
    """``bias + x @ weight``: the weight is (read, made)."""
    return _product(walk, node, ("mat1", "mat2"), makes=1, bias="self")


def times_constant(walk: Walk, node: Node) -> Labels:
    """``x @ weight`` with a constant weight of two axes."""
    names = ("self", "mat2") if operand(node, "mat2") is not None else ("self", "other")
    return _product(walk, node, names, makes=1)


def _product(walk: Walk, node: Node, names: tuple[str, str], makes: int, bias: str = "bias") -> Labels:
    x, rank = operand(node, names[0]), len(shape_of(node))
    weight = walk.parameter(node, names[1])
    if isinstance(weight, str) or weight.value.dim() != _TWO_AXES or rank < _TWO_AXES:
        walk.stop(walk.of(x), node, weight if isinstance(weight, str) else "its weight has not two axes")
        return None
    made, read = int(weight.value.shape[makes]), int(weight.value.shape[1 - makes])
    columns = _reads(walk, node, walk.of(x), rank - 1, weight, read)
    rows = walk.axis(weight, "makes", (made,))
    _matrix(walk, node, weight, on_axis(rows, makes, 2), on_axis(columns, 1 - makes, 2), x)
    return _with_bias(walk, node, rows, on_axis(rows, rank - 1, rank), bias)


def embedding(walk: Walk, node: Node) -> Labels:
    """Rows of a table: its columns make channels."""
    weight = walk.parameter(node, "weight")
    if isinstance(weight, str):
        return None
    rows = walk.axis(weight, "makes", (int(weight.value.shape[1]),))
    weight.terms["makes"] = FactorTerm(rows[None], 1)
    walk.strengths[node] = Strength(node, weight.value.abs(), rows[None])
    return on_axis(rows, -1, len(shape_of(node)))


def norm(walk: Walk, node: Node) -> Labels:
    """Layer, group, instance and rms norm: whatever scale their input had is gone, weight and bias give a new one."""
    x = operand(node, "input")
    walk.stop(walk.of(x), node, "a norm over channels")
    sizes, rank = operand(node, "normalized_shape"), len(shape_of(node))
    if sizes is None:
        count = shape_of(node)[1]
        return _scaled(walk, node, (count,), 1) if isinstance(count, int) else None
    if not all(isinstance(size, int) for size in sizes):
        return None
    return _scaled(walk, node, tuple(sizes), rank - len(sizes))


def batch_norm(walk: Walk, node: Node) -> Labels:
    """A batch norm in evaluation mode: with the op that it is folded into, or of its own."""
    x = operand(node, "input")
    count, mac = shape_of(node)[1], producer(node)
    if trains(node) or not isinstance(count, int) or operand(node, "running_mean") is None:
        walk.stop(walk.of(x), node, "a norm with statistics of the batch")
        return _scaled(walk, node, (count,), 1) if isinstance(count, int) else None
    if mac is not None and mac in walk.strengths:
        walk.stop(walk.of(x), node, "")
        made = _scaled(walk, node, (count,), 1)
        if made is not None:
            walk.strengths[node] = _folded(walk, node, walk.strengths.pop(mac))
        return made
    return _own_batch_norm(walk, node, count)


def _folded(walk: Walk, node: Node, mac: Strength) -> Strength:
    """The op before a batch norm with the norm's gain on its rows."""
    known, gain = walk.strengths[node], _gain(walk, node)
    rows = walk.of(operand(node, "input"))
    channels = None if rows is None else along(rows, 1, gain.numel())
    if channels is None:
        return known
    by_label = torch.zeros(int(mac.makes.max()) + 1, dtype=torch.int64)
    by_label[channels] = torch.arange(gain.numel())
    place = by_label[mac.makes]
    return Strength(node, mac.size * gain[place], known.makes.flatten()[place], mac.reads, mac.source)


def _gain(walk: Walk, node: Node) -> Tensor:
    """|g / sqrt(v + eps)| of a batch norm."""
    deviation = (walk.value(operand(node, "running_var")) + float(operand(node, "eps"))).sqrt()
    weight = operand(node, "weight")
    return ((torch.ones_like(deviation) if weight is None else walk.value(weight)) / deviation).abs()


def _own_batch_norm(walk: Walk, node: Node, count: int) -> Labels:
    """(s·x - s·m) · (g/s) / sqrt(v + eps) + b: mean and weight take the factor of what is read."""
    x, mean = operand(node, "input"), walk.parameter(node, "running_mean")
    made = _scaled(walk, node, (count,), 1)
    if isinstance(mean, str) or len(mean.places) > 1:
        walk.stop(walk.of(x), node, mean if isinstance(mean, str) else "a batch norm that is called several times")
        return made
    weight = None if made is None else _weight(walk, node, (count,))
    channels = along(walk.of(x), 1, count)
    if not isinstance(weight, Parameter) or channels is None:
        walk.stop(walk.of(x), node, "a batch norm that can take no factor")
        return made
    read = walk.axis(mean, "reads", (count,))
    walk.join(read, channels)
    mean.terms["reads"], weight.terms["reads"] = FactorTerm(read, 1), FactorTerm(read, -1)
    known = walk.strengths[node]
    walk.strengths[node] = Strength(node, known.size, known.makes, read, x, is_matrix=False)
    return made


def _weight(walk: Walk, node: Node, sizes: tuple[int, ...]) -> Parameter | str:
    if operand(node, "weight") is None:
        like = shape_of(node)
        value = node.meta["val"]
        assert like is not None
        return walk.absent(node, "weight", torch.ones(sizes, dtype=value.dtype, device=value.device))
    return walk.parameter(node, "weight")


def _scaled(walk: Walk, node: Node, sizes: tuple[int, ...], axis: int) -> Labels:
    """Labels of a norm's result, from ``axis`` on; None where its weight or bias can take no factor."""
    weight, has_bias = _weight(walk, node, sizes), operand(node, "bias") is not None
    if isinstance(weight, str):
        return None
    rows = walk.axis(weight, "makes", sizes)
    rank = len(shape_of(node))
    labels = rows.reshape((1,) * axis + sizes + (1,) * (rank - axis - len(sizes)))
    made = _with_bias(walk, node, rows, labels) if has_bias else labels
    weight.terms["makes"] = FactorTerm(rows, 1)
    size = weight.value.abs().double() * _SIGMAS
    if has_bias and operand(node, "bias") in walk.constants:
        size = size + walk.value(operand(node, "bias")).abs().reshape(sizes)
    walk.strengths[node] = Strength(node, size, rows, is_matrix=False)
    return made


def times(walk: Walk, node: Node, x: Any, name: str, sign: int = 1) -> Labels:
    """``x · c`` with a constant c, ``x / c`` for a ``sign`` of -1: it takes the factor of x, and gives one of its own.

    A constant that is the same for all channels of x leaves the factor as it is.
    """
    labels, rank = walk.of(x), len(shape_of(node))
    factor = walk.parameter(node, name)
    sizes = tuple(walk.value(operand(node, name)).shape)
    if labels is not None and rank == labels.dim() and _constant_along(sizes, labels):
        if isinstance(factor, Parameter) and len(factor.places) > 1:
            walk.stop(torch.cat([walk.axis(factor, role, sizes).flatten() for role in ("makes", "reads")]), node, "")
        return labels
    if isinstance(factor, str):
        walk.stop(labels, node, factor)
        return None
    rows, read = (walk.axis(factor, role, sizes) for role in ("makes", "reads"))
    factor.terms["makes"], factor.terms["reads"] = FactorTerm(rows, sign), FactorTerm(read, -sign)
    channels = None if labels is None else _within(labels, sizes)
    if channels is None:
        walk.stop(labels, node, "its constant has not an entry for each channel")
        walk.stop(read, node, "")
    else:
        walk.join(read, channels)
    size = factor.value.abs()
    if sign < 0:
        size = torch.where(size > 0, size, torch.inf).reciprocal()
    walk.strengths[node] = Strength(node, size, rows, read, x, is_matrix=False)
    return tidy(aligned(rows, rank))


def _constant_along(sizes: tuple[int, ...], labels: Tensor) -> bool:
    """Whether a constant of these sizes is the same along all axes along which labels change."""
    wide = (1,) * (labels.dim() - len(sizes)) + sizes
    return all(count == 1 or size == 1 for count, size in zip(labels.shape, wide, strict=True))


def _within(labels: Tensor, sizes: tuple[int, ...]) -> Tensor | None:
    """Labels without leading axes, that broadcast to a constant of these sizes; None where they do not."""
    lead = labels.dim() - len(sizes)
    if lead < 0 or any(size != 1 for size in labels.shape[:lead]):
        return None
    kept = labels.shape[lead:]
    return labels.reshape(kept) if all(a in (1, b) for a, b in zip(kept, sizes, strict=True)) else None


def plus(walk: Walk, node: Node, x: Any, name: str) -> Labels:
    """``x + c`` with a constant c: it takes the factor of x."""
    labels, shift = walk.of(x), walk.parameter(node, name)
    if labels is None:
        return None
    if isinstance(shift, str):
        why = shift
    elif shift.value.dim() > labels.dim():
        why = "its constant has more axes than the tensor"
    elif len(shift.places) > 1:
        why = "its constant is added in several places"
    else:
        shift.terms["makes"] = FactorTerm(labels, 1)
        return labels
    walk.stop(labels, node, why)
    return None


def _reads(walk: Walk, node: Node, labels: Labels, axis: int, weight: Parameter, count: int) -> Tensor:
    """Labels of the columns of a weight, which are those of what it reads, if these lie on its channels alone."""
    columns, channels = walk.axis(weight, "reads", (count,)), along(labels, axis, count)
    if channels is None:
        walk.stop(labels, node, "its factors differ along another axis than that of channels")
    if channels is None or labels is None:
        walk.stop(columns, node, "")
    else:
        walk.join(columns, channels)
    return columns


def _matrix(walk: Walk, node: Node, weight: Parameter, rows: Tensor, columns: Tensor, x: Node) -> None:
    """What a weight matrix makes and reads; over the other axes, of a kernel, its largest absolute values."""
    weight.terms["makes"], weight.terms["reads"] = FactorTerm(rows, 1), FactorTerm(columns, -1)
    size = weight.value.abs()
    if size.dim() > _TWO_AXES:
        size = size.flatten(_TWO_AXES).amax(-1) if size.numel() else size.flatten(_TWO_AXES).sum(-1)
    rows, columns = (labels.reshape(labels.shape[:_TWO_AXES]) for labels in (rows, columns))
    walk.strengths[node] = Strength(node, size, rows, columns, x)


def _with_bias(walk: Walk, node: Node, rows: Tensor, labels: Tensor, name: str = "bias") -> Labels:
    """Let a bias take the factors of rows; without one there is nothing to take. None where it can take none."""
    if operand(node, name) is None:
        return labels
    bias = walk.parameter(node, name)
    if isinstance(bias, str) or bias.value.shape != rows.shape:
        walk.stop(rows, node, bias if isinstance(bias, str) else "its bias has not an entry for each channel")
        return None
    own = walk.axis(bias, "makes", tuple(rows.shape))
    walk.join(own, rows)
    bias.terms["makes"] = FactorTerm(own, 1)
    return labels


def _grouped(channels: Tensor, groups: int, first: int) -> Tensor:
    """Labels of the second axis of a weight in groups: (1, n) in one group, else (first, n / groups)."""
    if groups == 1:
        return channels[None]
    return channels.reshape(groups, -1).repeat_interleave(first // groups, 0)


def aligned_to(labels: Tensor, rank: int) -> Tensor:
    """Labels with axes of size 1 behind them, up to ``rank``."""
    return labels.reshape(tuple(labels.shape) + (1,) * (rank - labels.dim()))


LAYERS: Mapping[str, Rule] = {
    "conv1d": conv,
    "conv2d": conv,
    "conv3d": conv,
    "conv_transpose1d": conv,
    "conv_transpose2d": conv,
    "conv_transpose3d": conv,
    "convolution": conv,
    "linear": linear,
    "addmm": addmm,
    "embedding": embedding,
    "layer_norm": norm,
    "group_norm": norm,
    "instance_norm": norm,
    "rms_norm": norm,
    "batch_norm": batch_norm,
}
"""Name of an ATen op → its rule."""
