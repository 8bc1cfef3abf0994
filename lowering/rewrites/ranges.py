"""Ranges found at run time, of tensors that may be empty.

    choose_qparams(cat([flatten(x), 0]))  =  choose_qparams(x)        where x holds a value

Every range holds zero, so one more zero changes none, and it gives a tensor without values a range at all. Targets
that take empty tensors as they are want the op that they know, on the tensor that is quantized.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.data_movement import Effect, movements
from quant2e.graph.dataflow import operand, set_operand
from quant2e.graph.qdq_ops import CHOOSE_PER_TENSOR

_ATEN = torch.ops.aten
_FLAT = movements(Effect.RESHAPE)


def plain_ranges(module: GraphModule) -> int:
    """Find every range from the tensor alone; returns for how many that changed."""
    return sum(_plain(node) for node in module.graph.nodes if node.target in CHOOSE_PER_TENSOR)


def plain_byte_ranges(module: GraphModule) -> int:
    """As `plain_ranges`, where the integers are all that 8 bits without a sign hold."""
    found = [n for n in module.graph.nodes if n.target in CHOOSE_PER_TENSOR and operand(n, "dtype") is torch.uint8]
    return sum(_plain(n) for n in found if (operand(n, "quant_min"), operand(n, "quant_max")) == (0, 255))


def _plain(choose: Node) -> bool:
    joined = operand(choose, "input")
    if joined.target is not _ATEN.cat.default:
        return False
    flat, *zeros = operand(joined, "tensors")
    if flat.target not in _FLAT or [zero.target for zero in zeros] != [_ATEN.new_zeros.default]:
        return False
    set_operand(choose, "input", operand(flat, 0))
    return True
