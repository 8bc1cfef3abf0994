"""Layouts: a graph whose results do not depend on how its tensors lie in memory.

    view(x)                 =  reshape(x)
    contiguous(x, format)   =  contiguous(x)       and so for every op that answers in a format
    constant in any layout  =  the same constant, contiguous

A model may have been captured with images, weights or intermediate results in channels last, or with weights that are
transposed views. A view of such a tensor needs its strides, which a rewrite, or another kernel, does not keep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lowering.signature import contiguous_strides
from quant2e.graph.attributes import register_tensor, tensor_at
from quant2e.graph.captured.calls import Call
from quant2e.graph.dataflow import operand, set_operand
from quant2e.graph.edit import emit, replace
from quant2e.graph.fake_values import shape_of
from quant2e.graph.mutation import written_attributes
from quant2e.passes import Pass

aten = torch.ops.aten

VIEWS: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}
"""Op that asks for strides it can view → the op that takes any."""

_FORMAT = "memory_format"


def reshapes_for_views(module: GraphModule) -> int:
    """Reshape where the graph views; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.target in VIEWS:
            node.target = VIEWS[node.target]
            count += 1
        elif node.target is aten.unflatten.int:
            replace(node, emit(node, aten.reshape.default, operand(node, 0), _unflattened_sizes(node)))
            count += 1
    return count


def _unflattened_sizes(node: Node) -> list[Any]:
    x, dim, inner = operand(node, 0), operand(node, "dim"), operand(node, "sizes")
    sizes = list(shape_of(x))
    dim %= len(sizes)
    outer = [s if isinstance(s, int) else emit(node, aten.sym_size.int, x, i) for i, s in enumerate(sizes) if i != dim]
    return [*outer[:dim], *inner, *outer[dim:]]


def no_formats(module: GraphModule) -> int:
    """Drop the format that an op is asked to answer in, where it is not plain contiguous; returns how many."""
    count = 0
    for node in module.graph.nodes:
        if operand(node, _FORMAT) in (torch.channels_last, torch.channels_last_3d):
            set_operand(node, _FORMAT, torch.contiguous_format)
            count += 1
    return count


def contiguous_constants(module: GraphModule) -> int:
    """Lay out the constants of a graph contiguously, those alone that it does not write; returns how many."""
    written = written_attributes(module)
    paths: dict[int, str] = {}
    for node in module.graph.nodes:
        value = tensor_at(module, node)
        if value is None or str(node.target) in written or value.stride() == contiguous_strides(value.shape):
            continue
        if id(value) not in paths:
            paths[id(value)] = register_tensor(module, str(node.target).replace(".", "_"), contiguous(value.detach()))
        node.target = paths[id(value)]
        known = node.meta.get("val")
        if isinstance(known, Tensor):
            node.meta["val"] = contiguous(known)
    return len(paths)


def contiguous(value: Tensor) -> Tensor:
    """``value`` laid out contiguously, with the strides of a new tensor also where a size of 1 leaves them open."""
    if value.stride() == contiguous_strides(value.shape):
        return value
    return value.clone(memory_format=torch.contiguous_format)


def contiguous_call(call: Call) -> Call:
    """The same inputs, each laid out contiguously."""
    return Call(*pytree.tree_map_only(Tensor, contiguous, tuple(call)))


PLAIN_LAYOUTS: tuple[Pass, ...] = (reshapes_for_views, no_formats, contiguous_constants)
"""What makes a graph independent of layouts; its inputs then are those of `contiguous_call`."""
