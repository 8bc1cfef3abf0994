"""Dequantize duplication: one for each consumer, so that partitioners and Inductor can fuse it.

    y = dq(q); f(y); g(y)        =        f(dq(q)); g(dq(q))

A dequantized tensor that is quantized anew, dynamically, is read twice for one purpose: by ``choose_qparams`` and by
the quantize op. These two share.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quant2e.graph.qdq_ops import CHOOSE_QPARAMS, DEQUANTIZE


def consumers(dequantize: Node) -> list[Node]:
    """Nodes that compute with a dequantized tensor."""
    return [user for user in dequantize.users if user.target not in CHOOSE_QPARAMS]


def split_dequantize(gm: GraphModule) -> int:
    """Copy each dequantize op in front of its second and further consumers; returns how many copies were made."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in DEQUANTIZE:
            continue
        for user in consumers(node)[1:]:
            with gm.graph.inserting_before(user):
                own = gm.graph.node_copy(node)
            user.replace_input_with(node, own)
            count += 1
    return count
