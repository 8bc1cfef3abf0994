"""Multiply-accumulates of an op, from the shapes of its operands: one rule for each kind of product.

    linear(x [n, i], w [o, i])                  n · o · i
    conv2d(x, w [o, i, h, w])                   elements of the result · i · h · w
    lstm(x [t, b, i], weights)                  t · b · elements of all weights

Sizes that vary count at their example value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quant2e.graph.dataflow import literal, operand
from quant2e.graph.fake_values import example_shape, example_sizes

aten = torch.ops.aten

Shape = tuple[int, ...]


def count_macs(node: Node) -> int:
    """Multiply-accumulates of a convolution, a matrix product, an attention or a recurrent layer; 0 for other ops.

    Also 0 where the shape of an operand is not known.
    """
    rule = _RULES.get(getattr(node.target, "overloadpacket", None)) if node.op == "call_function" else None
    out = _result(node)
    return 0 if rule is None or out is None else rule(node, out)


def _result(node: Node) -> Shape | None:
    """Shape of what a node produces, of the first tensor where it produces several."""
    value = node.meta.get("val")
    first = next(iter(value), None) if isinstance(value, list | tuple) else value
    return example_sizes(first) if isinstance(first, Tensor) else None


def _shape(node: Node, place: int | str) -> Shape:
    """Shape of an operand; a single zero, which no product survives, where it is not known."""
    return example_shape(operand(node, place)) or (0,)


def _rows(node: Node, out: Shape) -> int:
    """Each element of the result is a sum over the last axis of the first operand."""
    return math.prod(out) * _shape(node, 0)[-1]


def _added_to(node: Node, out: Shape) -> int:
    """As `_rows`, with what is added in front of the operands."""
    return math.prod(out) * _shape(node, 1)[-1]


def _added_batches(node: Node, out: Shape) -> int:
    return math.prod(out) * _shape(node, 1)[0] * _shape(node, 1)[-1]


def _grouped(node: Node, out: Shape) -> int:
    """Groups are runs of one axis. Where they are runs of the axis that is summed over, each result sums over one."""
    left, right = _shape(node, 0), _shape(node, 1)
    return math.prod(out[1:] if len(left) == len(right) == 2 else out) * left[-1]


def _summed_axes(node: Node, out: Shape) -> int:
    x, axes = _shape(node, 0), literal(node, "dims_self")
    sizes: list[int] = [x[axis] for axis in axes or ()]
    return math.prod(out) * math.prod(sizes)


def _chain(node: Node, _out: Shape) -> int:
    """From left to right; torch may find an order that takes fewer."""
    shapes: list[Shape] = [example_shape(matrix) or (0,) for matrix in operand(node, 0)]
    rows: int = shapes[0][0] if len(shapes[0]) == 2 else 1
    return rows * sum(math.prod(shape) for shape in shapes[1:])


def _bilinear(node: Node, out: Shape) -> int:
    """The weight meets one vector, and what comes out meets the other."""
    return math.prod(out) * (math.prod(_shape(node, 2)[1:]) + _shape(node, 1)[-1])


def _convolution(node: Node, out: Shape) -> int:
    weight = _shape(node, 1)
    return _transposed(node, out) if operand(node, "transposed") else math.prod(out) * math.prod(weight[1:])


def _transposed(node: Node, _out: Shape) -> int:
    """Every element of the input meets each of its group's weights once."""
    return math.prod(_shape(node, 0)) * math.prod(_shape(node, 1)[1:])


def _convolution_tbc(node: Node, out: Shape) -> int:
    return math.prod(out) * math.prod(_shape(node, 1)[:2])


def _attention(node: Node, out: Shape) -> int:
    """Scores of every query and key, and sums of values."""
    queries, keys = _shape(node, 0), _shape(node, 1)
    return (math.prod(queries) + math.prod(out)) * keys[-2] if len(keys) > 1 else 0


def _recurrent(node: Node, _out: Shape) -> int:
    """Every step of every sequence meets each weight once."""
    rows = math.prod(_shape(node, 0)[:-1])
    weights = [*(operand(node, "params") or ()), operand(node, "w_ih"), operand(node, "w_hh")]
    shapes = [shape for weight in weights if (shape := example_shape(weight)) is not None]
    return rows * sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def _einsum(node: Node, out: Shape) -> int:
    """One for each combination of indices, when there is more than one operand."""
    equation, operands = str(operand(node, "equation")).replace(" ", ""), operand(node, "tensors")
    subscripts, arrow, result = equation.partition("->")
    if "," not in subscripts or not isinstance(operands, list | tuple):
        return 0
    if not arrow:  # the letters that occur once
        result = "".join(letter for letter in set(subscripts) - {",", "."} if subscripts.count(letter) == 1)
    sizes: dict[str, int] = {}
    for letters, tensor in zip(subscripts.split(","), operands, strict=False):
        shape = example_shape(tensor) or ()
        before, _, after = letters.partition("...")
        sizes |= dict(zip(before, shape, strict=False))
        sizes |= dict(zip(reversed(after), reversed(shape), strict=False)) if after else {}
    broadcast = out[: len(out) - len(result.replace("...", ""))] if "..." in subscripts else ()
    return math.prod(sizes.values()) * math.prod(broadcast)


Rule = Callable[[Node, Shape], int]

_RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        (aten.linear, aten.matmul, aten.linalg_matmul, aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot, aten.inner),
        _rows,
    ),
    **dict.fromkeys((aten.addmm, aten._addmm_activation, aten.baddbmm, aten.addmv), _added_to),
    aten.addbmm: _added_batches,
    aten._grouped_mm: _grouped,
    aten._scaled_mm: _rows,
    aten._scaled_grouped_mm: _grouped,
    aten.tensordot: _summed_axes,
    **dict.fromkeys((aten.chain_matmul, aten.linalg_multi_dot), _chain),
    aten.bilinear: _bilinear,
    **dict.fromkeys((aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, aten._convolution), _convolution),
    **dict.fromkeys((aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d), _transposed),
    aten.conv_tbc: _convolution_tbc,
    **dict.fromkeys(
        (
            aten.scaled_dot_product_attention,
            aten._scaled_dot_product_attention_math,
            aten._scaled_dot_product_cudnn_attention,
            aten._scaled_dot_product_efficient_attention,
            aten._scaled_dot_product_flash_attention,
            aten._scaled_dot_product_flash_attention_for_cpu,
            aten._scaled_dot_product_fused_attention_overrideable,
        ),
        _attention,
    ),
    **dict.fromkeys((aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu), _recurrent),
    **dict.fromkeys((aten.lstm_cell, aten.gru_cell, aten.rnn_tanh_cell, aten.rnn_relu_cell), _recurrent),
    aten.einsum: _einsum,
}
"""Op → its rule, which takes the node and the shape of its result."""
