"""Projection splitting: one linear for each part of a joint projection.

slice(linear(x, W, b), outputs i to j)  =  linear(x, W[i:j], b[i:j]).

Attention often makes query, key and value by one product, and takes it apart: by a slice, or by a view as
[batch, length, 3, heads, width], a permutation and a selection. XNNPACK does not slice tensors with a size that is
known at run time only, so each part would start a delegate of its own. One product per part needs no slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.graph.attributes import tensor_at
from quant2e.graph.data_movement import Effect, movements
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit, emit_constant
from quant2e.graph.fake_values import shape_of
from quant2e.graph.qdq_ops import qd

_ATEN = torch.ops.aten
_RESHAPES = movements(Effect.RESHAPE)


@dataclass(frozen=True, slots=True)
class _Part:
    """A run of a linear's outputs, and the ops between the linear and the slice, in order, that remain."""

    linear: Node
    start: int
    stop: int
    between: tuple[Node, ...]


def split_projections(module: GraphModule) -> int:
    """Rewrite slices of a linear's outputs where a size is dynamic; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not _ATEN.slice.Tensor or not _dynamic(node):
            continue
        part = _part(node)
        if part is None:
            continue
        result = _projected(module, node, part)
        if result is not None:
            node.replace_all_uses_with(result)
            module.graph.erase_node(node)
            count += 1
    return count


def _dynamic(node: Node) -> bool:
    return not all(isinstance(size, int) for size in shape_of(node))


def _part(node: Node) -> _Part | None:
    """Follow the sliced dimension back, through permutations and one view that split it off, to a linear."""
    x, dim, start, stop = (operand(node, place) for place in range(4))
    if operand(node, "step") not in (None, 1):
        return None
    dim %= len(shape_of(x))
    size = shape_of(x)[dim]
    if not isinstance(size, int) or not isinstance(start, int) or not isinstance(stop, int):
        return None
    start, stop = slice(start, stop).indices(size)[:2]
    inner, between = 1, []
    while x.target is not _ATEN.linear.default:
        source = x.args[0] if x.op == "call_function" and x.args else None
        if not isinstance(source, Node):
            return None
        if x.target in (_ATEN.permute.default, _ATEN.transpose.int):
            dim = _order(x)[dim]
        elif x.target in _RESHAPES and inner == 1 and (found := _split_off(x, source, dim)):
            dim, inner = len(shape_of(source)) - 1, found
        else:
            return None
        between.append(x)
        x = source
    if dim != len(shape_of(x)) - 1:
        return None
    return _Part(x, start * inner, stop * inner, tuple(reversed(between)))


def _order(node: Node) -> list[int]:
    rank = len(shape_of(node))
    if node.target is _ATEN.permute.default:
        return [d % rank for d in operand(node, "dims")]
    a, b = (operand(node, place) % rank for place in (1, 2))
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return order


def _split_off(view: Node, source: Node, dim: int) -> int:
    """How many outputs one step along ``dim`` of a view is, if ``dim`` leads the split of the last one; else 0."""
    before, after = shape_of(source), shape_of(view)
    lead = len(before) - 1
    if dim != lead or not isinstance(before[-1], int) or before[:-1] != after[:lead]:
        return 0
    sizes = after[dim:]
    inner = 1
    for size in sizes[1:]:
        if not isinstance(size, int):
            return 0
        inner *= size
    return inner if isinstance(sizes[0], int) and sizes[0] * inner == before[-1] else 0


def _projected(module: GraphModule, node: Node, part: _Part) -> Node | None:
    x, weight, bias = (*part.linear.args, None)[:3]
    rows = _rows(module, node, weight, part)
    if rows is None:
        return None
    own_bias = None
    if isinstance(bias, Node):
        own_bias = _rows(module, node, bias, part)
        if own_bias is None:
            return None
    result = emit(node, _ATEN.linear.default, x, rows, own_bias)
    size = part.stop - part.start
    for step in part.between:
        if step.target in _RESHAPES:
            after = shape_of(step)
            dim = len(shape_of(result)) - 1
            inner = [int(s) for s in after[dim + 1 :]]
            count = size
            for s in inner:
                count //= s
            result = emit(node, _ATEN.unflatten.int, result, dim, [count, *inner])
        else:
            result = emit(node, _ATEN.permute.default, result, _order(step))
    return result


def _rows(module: GraphModule, node: Node, value: object, part: _Part) -> Node | None:
    """Rows of a weight or a bias: a tensor, or one that is dequantized per tensor or per row."""
    stored = tensor_at(module, value)
    if stored is not None:
        return _cut(module, node, stored, part)
    if not isinstance(value, Node) or value.target not in _DEQUANTIZE:
        return None
    held = tensor_at(module, value.args[0])
    if held is None:
        return None
    rows = _cut(module, node, held, part)
    if value.target is qd.dequantize_per_tensor.default:
        return emit(node, value.target, rows, *value.args[1:], **value.kwargs)
    scales, zeros, axis, *rest = value.args[1:]
    scale_of, zero_of = tensor_at(module, scales), tensor_at(module, zeros)
    if axis != 0 or scale_of is None or zero_of is None:
        return None
    own = (_cut(module, node, scale_of, part), _cut(module, node, zero_of, part))
    return emit(node, value.target, rows, *own, axis, *rest, **value.kwargs)


_DEQUANTIZE = frozenset({qd.dequantize_per_tensor.default, qd.dequantize_per_channel.default})


def _cut(module: GraphModule, node: Node, stored: Tensor, part: _Part) -> Node:
    return emit_constant(module, node, "part", stored.detach()[part.start : part.stop].clone())
