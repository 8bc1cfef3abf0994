"""Quantization ahead of moves: a linear layer's output is quantized before it is split into heads, not after.

    q(move(linear(x)))  =  move(q(linear(x)))        for one scale per tensor

The kernel of the layer then writes integers, and the moves carry a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.data_movement import Effect, When, movement
from quant2e.graph.dataflow import operand, set_operand
from quant2e.graph.edit import insert_call
from quant2e.graph.qdq_ops import qd

aten = torch.ops.aten

_QUANTIZE, _DEQUANTIZE = qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default
_EFFECTS = frozenset({Effect.SAME, Effect.RESHAPE, Effect.PERMUTE, Effect.REPEAT})


def quantized_before_moves(module: GraphModule, besides: Collection[object] = ()) -> int:
    """Quantize what a linear layer returns where it is quantized behind moves that nobody else reads; returns how
    often. ``besides``: ops that go on reading what is dequantized, with no moves between.
    """
    found = [node for node in module.graph.nodes if node.target is _QUANTIZE]
    return sum(_hoisted(node, besides) for node in found)


def _hoisted(quantize: Node, besides: Collection[object]) -> bool:
    """``linear → moves → quantize → dequantize`` becomes ``linear → quantize → dequantize → moves``."""
    readers = list(quantize.users)
    last = quantize.args[0]
    if len(readers) != 1 or readers[0].target is not _DEQUANTIZE or not isinstance(last, Node):
        return False
    if any(reader.target in besides for reader in readers[0].users):
        return False
    first, source = last, last
    while is_move(source) and len(source.users) == 1:
        first, source = source, operand(source, 0)
    if source is last or source.target is not aten.linear.default or len(source.users) != 1:
        return False
    value, dequantize = source.meta["val"], readers[0]
    integers = value.to(quantize.meta["val"].dtype)
    quantized = insert_call(first, _QUANTIZE, quantize.args, quantize.kwargs, value=integers, origin=quantize)
    set_operand(quantized, "input", source)
    values = insert_call(first, _DEQUANTIZE, dequantize.args, dequantize.kwargs, value=value, origin=dequantize)
    set_operand(values, "input", quantized)
    first.replace_input_with(source, values)
    dequantize.replace_all_uses_with(last)
    quantize.graph.erase_node(dequantize)
    quantize.graph.erase_node(quantize)
    return True


def is_move(node: Node) -> bool:
    """Whether an op moves the values of its first operand, all of them, perhaps several times, and does no more."""
    row = movement(node.target)
    return row is not None and row.effect in _EFFECTS and row.when is When.ALWAYS
