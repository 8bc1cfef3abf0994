"""Channel rules: how a factor on a channel passes an op that has no constants to take it.

    f(s·x) = s·f(x), s > 0      relu, leaky relu, pools, means over other axes, resizing, padding with zeros
    s·a + s·b = s·(a + b)       sums, maxima, joins: all operands have the factor
    (s·a)·b                     a gate, attention: the factor of one operand, if the other has none
    clamp(s·x, s·l, s·h)        bounds for each channel

Every other op stops a factor: it may not be on what that reads.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from quant2e.accuracy.algorithms.channels.labels import Labels, aligned, moved, split_labels, tidy
from quant2e.accuracy.algorithms.channels.layers import LAYERS, plus, times, times_constant
from quant2e.accuracy.algorithms.channels.walk import Walk
from quant2e.graph.data_movement import Effect, movement
from quant2e.graph.dataflow import SHAPE_READERS, literal, operand
from quant2e.graph.effects import is_in_place, trains
from quant2e.graph.fake_values import is_float, node_tensor, shape_of
from quant2e.graph.mutation import observed_writes

Rule = Callable[[Walk, Node], Labels]

_NO_VALUES = SHAPE_READERS | {torch.ops.aten._assert_tensor_metadata.default}
"""Ops that read no value of a tensor."""

OPAQUE = "reads it, and can take no factor"


def label(walk: Walk, node: Node) -> None:
    """Label what a node makes."""
    if node in walk.constants or node.target in _NO_VALUES or node.op in ("placeholder", "get_attr"):
        return
    if node.target is operator.getitem:
        walk.labels[node] = _item(walk, node)
        return
    name = aten_name(node)
    row = movement(node.target)
    made: Labels = None
    if name in LAYERS:
        made = LAYERS[name](walk, node)
    elif name in RULES:
        made = RULES[name](walk, node)
    elif any(walk.of(source) is not None or source in walk.parts for source in node.all_input_nodes):
        if row is not None and row.effect is Effect.SPLIT:
            _split(walk, node)
        elif row is not None and walk.of(operand(node, 0)) is not None:
            made = _move(walk, node)
        else:
            _stop_all(walk, node)
    if is_in_place(node) and not _same(made, walk.of(operand(node, 0))):
        walk.join(made, walk.of(operand(node, 0)))
    walk.labels[node] = None if made is None else tidy(made)


def aten_name(node: Node) -> str:
    """Name of an ATen op, of its in-place spelling as well; empty for other nodes."""
    if not isinstance(node.target, OpOverload) or node.target.namespace != "aten":
        return ""
    return node.target._opname.removesuffix("_")


def _same(a: Labels, b: Labels) -> bool:
    return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))


def _stop_all(walk: Walk, node: Node, why: str = OPAQUE) -> None:
    for source in node.all_input_nodes:
        _stop(walk, source, node, why)


def _stop(walk: Walk, source: Any, node: Node, why: str = OPAQUE) -> None:
    walk.stop(walk.of(source), node, why)
    for part in walk.parts.get(source, ()):
        walk.stop(part, node, why)


def _item(walk: Walk, node: Node) -> Labels:
    made, place = walk.parts.get(node.all_input_nodes[0], []), node.args[1]
    return made[place] if isinstance(place, int) and place < len(made) else None


def _split(walk: Walk, node: Node) -> None:
    labels = walk.of(operand(node, 0))
    found = None if labels is None else split_labels(node, labels)
    if found is None:
        _stop_all(walk, node, "splits channels in a way that is not followed")
    else:
        walk.parts[node] = [tidy(part) for part in found]


def _move(walk: Walk, node: Node) -> Labels:
    labels = walk.of(operand(node, 0))
    found = None if labels is None else moved(node, labels)
    if found is None:
        _stop_all(walk, node, "moves channels in a way that is not followed")
    for source in node.all_input_nodes[1:]:
        _stop(walk, source, node)
    return found


def _through(walk: Walk, node: Node) -> Labels:
    """f(s·x) = s·f(x) for every value alone."""
    x = operand(node, 0)
    for source in node.all_input_nodes:
        if source is not x:
            _stop(walk, source, node)
    if trains(node):
        _stop(walk, x, node, "draws at random")
        return None
    return walk.of(x)


def _spatial(axes: int) -> Rule:
    """f(s·x) = s·f(x) over the last axes, along which the factor has to be the same."""

    def rule(walk: Walk, node: Node) -> Labels:
        labels = walk.of(operand(node, 0))
        if labels is not None and labels.dim() > axes and all(size == 1 for size in labels.shape[-axes:]):
            if isinstance(node.meta.get("val"), list | tuple):
                walk.parts[node] = [labels]
                return None
            return labels
        _stop_all(walk, node, "mixes what has different factors")
        return None

    return rule


def _pad(walk: Walk, node: Node) -> Labels:
    """Zeros, or values of the same channel, around the values of each channel."""
    labels, sizes, value = walk.of(operand(node, 0)), literal(node, "pad"), operand(node, "value")
    sizes = literal(node, "padding") if sizes is None else sizes
    zeros = operand(node, "mode", "constant") != "constant" or value in (None, 0, 0.0)
    if labels is not None and zeros and isinstance(sizes, list | tuple):
        padded = [axis for axis in range(len(sizes) // 2) if any(sizes[2 * axis : 2 * axis + 2])]
        if all(labels.size(-1 - axis) == 1 for axis in padded):
            return labels
    _stop_all(walk, node, "pads channels")
    return None


def _reduce(walk: Walk, node: Node) -> Labels:
    """Sum, mean, largest and smallest over axes along which the factor is the same."""
    labels, axes = walk.of(operand(node, 0)), literal(node, "dim")
    axes = [axes] if isinstance(axes, int) else axes
    if labels is None:
        return None
    rank = labels.dim()
    reduced = {axis % rank for axis in axes} if axes else set(range(rank))
    if not is_float(node) or node_tensor(node) is None or any(labels.size(axis) > 1 for axis in reduced):
        _stop_all(walk, node, "mixes what has different factors")
        return None
    if operand(node, "keepdim"):
        return labels
    return labels.reshape([size for axis, size in enumerate(labels.shape) if axis not in reduced])


def _clamp(walk: Walk, node: Node) -> Labels:
    """Bounds get a factor for each channel; one at 0 has it already."""
    labels = walk.of(operand(node, 0))
    bounds = clamp_bounds(node)
    if labels is None or bounds is None:
        _stop_all(walk, node, "has bounds that are no numbers")
        return None
    if all(bound in (None, 0.0) for bound in bounds):
        return labels
    if observed_writes(node):
        _stop_all(walk, node, "has bounds, and writes to a tensor that others read")
        return None
    walk.clamps[node] = labels
    return labels


def clamp_bounds(node: Node) -> tuple[float | None, float | None] | None:
    """The bounds of a clamp, hardtanh or relu6 with numbers as bounds; None for other ops and bounds."""
    name = aten_name(node)
    if name == "relu6":
        return 0.0, 6.0
    names = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
    low, high = (operand(node, each) for each in names)
    if any(isinstance(bound, Node) for bound in (low, high)):
        return None
    return (None if low is None else float(low)), (None if high is None else float(high))


def _sum(walk: Walk, node: Node) -> Labels:
    """All operands have the factor of the result; a constant takes it."""
    sources = [operand(node, 0), operand(node, 1)]
    for place, (x, other) in enumerate((sources, sources[::-1])):
        if isinstance(other, Node) and other in walk.constants:
            return plus(walk, node, x, _argument(node, 1 - place))
    if all(isinstance(source, Node) for source in sources):
        return _joined(walk, node, sources)
    if any(isinstance(source, int | float) and source == 0 for source in sources):
        return walk.of(sources[0]) if isinstance(sources[0], Node) else walk.of(sources[1])
    _stop_all(walk, node, "adds the same to all channels")
    return None


def _largest(walk: Walk, node: Node) -> Labels:
    """The larger, or smaller, of two values with the same positive factor."""
    return _joined(walk, node, [operand(node, 0), operand(node, 1)])


def _where(walk: Walk, node: Node) -> Labels:
    """One of two values with the same factor."""
    _stop(walk, operand(node, "condition"), node)
    return _joined(walk, node, [operand(node, "self"), operand(node, "other")])


def _joined(walk: Walk, node: Node, sources: Iterable[Any]) -> Labels:
    found = [walk.of(source) for source in sources]
    if all(labels is None for labels in found):
        return None
    made: Labels = None
    for a, b in pairwise(found):
        made = walk.join(a, b)
    return None if made is None else aligned(made, len(shape_of(node)))


def _cat(walk: Walk, node: Node) -> Labels:
    """Several tensors behind each other: along channels each brings its own factors."""
    sources, axis = operand(node, 0), literal(node, "dim")
    found = [walk.of(source) for source in sources]
    if all(labels is None for labels in found):
        return None
    rank = len(shape_of(node))
    sizes = [shape_of(source)[axis % rank] for source in sources]
    if all(labels is None or labels.size(axis) == 1 for labels in found):
        return _joined(walk, node, sources)
    if not all(isinstance(size, int) for size in sizes):
        _stop_all(walk, node, "joins channels of a number that varies")
        return None
    zero = torch.zeros((1,) * rank, dtype=torch.int64)
    whole = [zero if labels is None else labels for labels in found]
    wide = [max(labels.size(each) for labels in whole) for each in range(rank)]
    return torch.cat(
        [
            x.expand([int(n) if i == axis % rank else w for i, w in enumerate(wide)])
            for x, n in zip(whole, sizes, strict=True)
        ],
        axis,
    )


def _times(walk: Walk, node: Node) -> Labels:
    """One operand's factor, if the other has none; a number changes nothing, and a constant takes and gives factors."""
    a, b = operand(node, 0), operand(node, 1)
    for place, (x, other) in enumerate(((a, b), (b, a))):
        if not isinstance(other, Node):
            return walk.of(x)
        if other in walk.constants and is_float(node):
            return times(walk, node, x, _argument(node, 1 - place))
    rank = len(shape_of(node))
    x, other = (a, b) if walk.of(a) is not None else (b, a)
    _stop(walk, other, node, "is multiplied with what has a factor")
    labels = walk.of(x)
    return None if labels is None else aligned(labels, rank)


def _divide(walk: Walk, node: Node) -> Labels:
    """The factor of what is divided; a constant that divides takes and gives factors."""
    x, by = operand(node, 0), operand(node, 1)
    if operand(node, "rounding_mode") is not None or not isinstance(x, Node):
        _stop_all(walk, node)
        return None
    if by in walk.constants and is_float(node) and not isinstance(walk.parameter(node, "other"), str):
        return times(walk, node, x, "other", sign=-1)
    _stop(walk, by, node, "divides by it")
    labels = walk.of(x)
    return None if labels is None else aligned(labels, len(shape_of(node)))


def _matmul(walk: Walk, node: Node) -> Labels:
    """Attention on values, (…, t, s) @ (…, s, d): the factor of d, where it does not change along s."""
    a, b = operand(node, 0), operand(node, 1)
    if isinstance(b, Node) and b in walk.constants:
        return times_constant(walk, node)
    labels, rank = walk.of(b), len(shape_of(node))
    _stop(walk, a, node, "is summed up over its channels")
    if labels is None:
        return None
    if labels.dim() < 2 or labels.dim() != rank or labels.size(-2) > 1:
        _stop(walk, b, node, "is summed up over its channels")
        return None
    return labels


def _attention(walk: Walk, node: Node) -> Labels:
    """The factor of the values, for each head and channel; heads that share values share factors."""
    for name in ("query", "key", "attn_mask"):
        _stop(walk, operand(node, name), node, "is summed up over its channels")
    labels = walk.of(operand(node, "value"))
    if labels is None:
        return None
    if labels.dim() < 3 or labels.size(-2) > 1 or trains(node):
        _stop(walk, operand(node, "value"), node, "mixes what has different factors")
        return None
    if not operand(node, "enable_gqa") or labels.size(-3) == 1:
        return labels
    heads, shared = shape_of(node)[-3], shape_of(operand(node, "value"))[-3]
    if not isinstance(heads, int) or not isinstance(shared, int):
        _stop_all(walk, node, "has a number of heads that varies")
        return None
    return labels.repeat_interleave(heads // shared, -3)


def _argument(node: Node, place: int) -> str:
    assert isinstance(node.target, OpOverload)
    return node.target._schema.arguments[place].name


def _named(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: Mapping[str, Rule] = {
    **_named("relu leaky_relu prelu _prelu_kernel abs neg dropout feature_dropout alpha_dropout", _through),
    **_named("max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d", _spatial(1)),
    **_named("max_pool1d_with_indices upsample_nearest1d upsample_linear1d", _spatial(1)),
    **_named("max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d", _spatial(2)),
    **_named("max_pool2d_with_indices upsample_nearest2d upsample_bilinear2d upsample_bicubic2d", _spatial(2)),
    **_named("max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d", _spatial(3)),
    **_named("max_pool3d_with_indices upsample_nearest3d upsample_trilinear3d", _spatial(3)),
    **_named("pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d", _pad),
    **_named("replication_pad1d replication_pad2d replication_pad3d", _pad),
    **_named("mean sum amax amin", _reduce),
    **_named("relu6 hardtanh clamp clamp_min clamp_max", _clamp),
    **_named("add sub", _sum),
    **_named("maximum minimum", _largest),
    **_named("cat concat concatenate", _cat),
    "where": _where,
    "mul": _times,
    "div": _divide,
    **_named("matmul bmm mm", _matmul),
    "scaled_dot_product_attention": _attention,
}
"""Name of an ATen op → its rule."""
