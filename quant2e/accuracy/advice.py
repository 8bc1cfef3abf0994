"""Advice: what to do about the error that one op makes, in the order of what it costs."""

from __future__ import annotations

import operator

from torch.fx import Node

from quant2e.accuracy.shadow import Powers, rounds
from quant2e.graph.qdq_ops import CHOOSE_QPARAMS, DEQUANTIZE, qd

_PER_TENSOR = frozenset(target for target in DEQUANTIZE if target.overloadpacket is qd.dequantize_per_tensor)

_NEGLIGIBLE = 1e-12
"""Part of the signal that is the rounding of float arithmetic."""

_PART = 0.1
"""Part of the error below which an op's own is not the one to mend."""


def advice(node: Node, sums: Powers) -> str:
    """A sentence for one op, or input, of a quantized graph; empty where its result has no error."""
    if sums.total == 0.0:
        return ""
    if sums.own < _PART * sums.total:
        return "the error is that of what it reads: look at the ops before it"
    weights = [root for source in node.all_input_nodes if (root := _quantized_constant(source)) is not None]
    if weights and sums.weights >= sums.rounding:
        if any(source.target in _PER_TENSOR for source in weights):
            return "its weight has one scale: give it one for each channel, or move the spread away (equalize)"
        return "its weight needs more bits, or the op stays float"
    if sums.own < _NEGLIGIBLE * sums.signal:
        return ""
    if node.op == "placeholder":
        return "few values own its range: look at the data (quant2e.check_data), or leave what reads it float"
    if any(map(_is_dynamic, node.all_input_nodes)):
        return "leave it float, or give activations more bits"
    return (
        "move its outlier channels into the weights behind it (equalize, smooth), find its scale at run time "
        "(a dynamic configuration), leave it float, or give activations more bits"
    )


def _is_dynamic(source: Node) -> bool:
    """Whether a tensor comes with a scale that was found at run time."""
    while rounds(source):
        if source.target in CHOOSE_QPARAMS or any(x.target is operator.getitem for x in source.all_input_nodes[1:]):
            return True
        source = source.all_input_nodes[0]
    return False


def _quantized_constant(source: Node) -> Node | None:
    """The dequantize op, or fake-quantizer, through which a node reads a constant; None for anything else."""
    root = source
    while rounds(root):
        root = root.all_input_nodes[0]
    return source if root is not source and root.op == "get_attr" else None
