"""cat([dequantize(q), dequantize(q)])  =  cat([dequantize(q), dequantize'(q)])        one dequantize for each operand.

    cat([x])  =  x        as DenseNet begins each block

XNNPACK's partitioner counts the nodes that a concatenation reads, and takes it from two on.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.edit import emit
from quant2e.graph.qdq_ops import DEQUANTIZE

_ATEN = torch.ops.aten


def distinct_operands(module: GraphModule) -> int:
    """Give operands that are concatenated with themselves a dequantize of their own; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not _ATEN.cat.default:
            continue
        operands, seen = list(node.args[0]), set()
        for index, operand in enumerate(operands):
            if isinstance(operand, Node) and operand in seen and operand.target in DEQUANTIZE:
                operands[index] = emit(node, operand.target, *operand.args, **operand.kwargs)
                count += 1
            seen.add(operand)
        node.args = (operands, *node.args[1:])
    return count


def lone_operands(module: GraphModule) -> int:
    """Let readers of a concatenation of one tensor read that tensor; returns how many concatenations had any.

    A result of the graph stays a tensor of its own.
    """
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not _ATEN.cat.default or len(node.args[0]) != 1:
            continue
        readers = [user for user in node.users if user.op != "output"]
        node.replace_all_uses_with(node.args[0][0], delete_user_cb=lambda user: user.op != "output")
        count += bool(readers)
    return count
