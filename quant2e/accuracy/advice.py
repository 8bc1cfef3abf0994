"""Advice: what to do about the error that one op makes, in the order of what it costs."""

from __future__ import annotations

from torch.fx import Node

from quant2e.accuracy.shadow import Powers
from quant2e.graph.qdq_ops import DEQUANTIZE, qd

_PER_TENSOR = frozenset(target for target in DEQUANTIZE if target.overloadpacket is qd.dequantize_per_tensor)

_PART = 0.1
"""Part of the error below which an op's own is not the one to mend."""


def advice(node: Node, sums: Powers) -> str:
    """A sentence for one op, or input, of a quantized graph; empty where its result has no error."""
    if sums.total == 0.0:
        return ""
    if sums.own < _PART * sums.total:
        return "the error is that of what it reads: look at the ops before it"
    if sums.weights >= sums.rounding and sums.weights > 0.0:
        if any(_is_weight_of_one_scale(source) for source in node.all_input_nodes):
            return "its weight has one scale: give it one for each channel"
        return "its weight needs more bits, or the op stays float"
    if node.op == "placeholder":
        return "few values own its range: look at the data (quant2e.check_data), or leave what reads it float"
    return "leave it float, find its scale at run time (a dynamic configuration), or give activations more bits"


def _is_weight_of_one_scale(source: Node) -> bool:
    return source.target in _PER_TENSOR and source.all_input_nodes[0].op == "get_attr"
