"""Calls of regions in the graph: where they stand, and how what they read and write lies in memory."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from lowering.native.regions import WrittenRegion
from lowering.native.units.layouts import numbers
from lowering.native.units.masks import float_mask
from lowering.native.units.values import OFFSET, lies_in, quantizes
from lowering.native.writes import Writes
from quant2e.graph.qdq_ops import DEQUANTIZE
from quant2e.passes.dead_code import remove_dead_code

aten = torch.ops.aten

_BY_VALUES = frozenset({"aten", "prims", "quantized_decomposed", "quant2e"})
"""Namespaces of ops that compute the same of tensors however these lie in memory, but for `_BY_STRIDES`."""

_BY_STRIDES = frozenset(
    {
        aten._reshape_alias.default,
        aten._unsafe_view.default,
        aten.as_strided.default,
        aten.as_strided_.default,
        aten.as_strided_copy.default,
        aten.as_strided_scatter.default,
        aten.view.default,
        aten.view.dtype,
        aten.view_as.default,
        aten.view_as_complex.default,
    }
)


_CHANNELS_LAST = (0, 2, 3, 1)


def call_regions(gm: GraphModule, regions: Sequence[WrittenRegion], op: Callable[..., object], writes: Writes) -> None:
    """Put a call in the place of each region, its plan and constants as buffers of ``gm``; what is not read goes.

    ``writes``: what the graph writes in place, outside of all regions.
    """
    graph = gm.graph
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    nodes = {node for region in regions for unit in region.units for node in unit.nodes}
    viewed = _viewed(gm, {node for node in nodes if node.target not in DEQUANTIZE}, writes)
    made: dict[Node, Node] = {}
    for number, region in enumerate(regions):
        names = {"plan": region.plan.numbers, "constants": region.plan.constants}
        for name, tensor in names.items():
            gm.register_buffer(f"_region_{number}_{name}", tensor, persistent=False)
        with graph.inserting_before(output):
            given = [made[node] if node in made else _stored(gm, node) for node in region.inputs]
            inputs = [_laid_out(gm, region, *both) for both in zip(region.inputs, given, strict=True)]
            held = [graph.get_attr(f"_region_{number}_{name}") for name in names]
            called = graph.call_function(op, (inputs, *held, list(region.plan.outputs)))
            for place, node in enumerate(region.outputs):
                made[node] = graph.call_function(operator.getitem, (called, place))
                made[node].meta["val"] = node.meta["val"]
                left = _as_it_lay(gm, node, made[node]) if node in viewed else made[node]
                node.replace_all_uses_with(left)
    _sort(gm, writes.before)
    remove_dead_code(gm)


def _stored(gm: GraphModule, node: Node) -> Node:
    """The result of an op in no region, with integers as regions store them: unsigned."""
    if not quantizes(node) or node.meta["val"].dtype is not torch.int8:
        return node
    unsigned = gm.graph.call_function(aten.view.dtype, (node, torch.uint8))
    return gm.graph.call_function(aten.bitwise_xor.Scalar, (unsigned, OFFSET))


def _laid_out(gm: GraphModule, region: WrittenRegion, node: Node, given: Node) -> Node:
    """``given``, which is ``node`` by now, in the layout that steps read, where more than a quantize op reads it."""
    readers = [unit for unit in region.units if node in unit.reads]
    if any(node in unit.masks for unit in readers):
        return float_mask(gm.graph, node, given)
    if all(quantizes(unit.nodes[0]) for unit in readers):
        return given
    images = len(node.meta["val"].shape) == 4
    layout = torch.channels_last if images else torch.contiguous_format
    return gm.graph.call_function(aten.contiguous.default, (given,), {"memory_format": layout})


def _viewed(gm: GraphModule, inside: set[Node], writes: Writes) -> set[Node]:
    """Nodes whose layout in memory is seen outside of the regions, be it that of a result computed of them.

    Where memory is written, any op may see it: whether ``reshape`` copies depends on how its operand lies.
    """
    found: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        outside = [user for user in node.users if user not in inside]
        if any(user in found or user in writes.writers or not _by_values(user) for user in outside):
            found.add(node)
    return found


def _by_values(node: Node) -> bool:
    target = node.target
    if target is operator.getitem:
        return True
    return isinstance(target, OpOverload) and target.namespace in _BY_VALUES and target not in _BY_STRIDES


def _as_it_lay(gm: GraphModule, node: Node, made: Node) -> Node:
    """``made``, what a region wrote, with the strides that the result of ``node`` had."""
    value = node.meta["val"]
    axes = range(value.dim())
    if lies_in(value, axes):
        return gm.graph.call_function(aten.contiguous.default, (made,))
    if value.dim() == len(_CHANNELS_LAST) and lies_in(value, _CHANNELS_LAST):
        return made
    strides = numbers(value.stride())
    order = sorted(axes, key=lambda axis: -strides[axis])
    moved = gm.graph.call_function(aten.permute.default, (made, order))
    dense = gm.graph.call_function(aten.contiguous.default, (moved,))
    return gm.graph.call_function(aten.permute.default, (dense, [order.index(axis) for axis in axes]))


def _sort(gm: GraphModule, before: Mapping[Node, Node]) -> None:
    """Each node behind what it reads and what keeps its place before it, and otherwise as they were."""
    done: dict[Node, None] = {}
    for first in list(gm.graph.nodes):
        stack = [first]
        while stack:
            earlier = [before[stack[-1]]] if stack[-1] in before else []
            ahead = [node for node in (*stack[-1].all_input_nodes, *earlier) if node not in done]
            stack.extend(ahead)
            if not ahead:
                done.setdefault(stack.pop())
    for one, node in itertools.pairwise(done):
        one.append(node)
