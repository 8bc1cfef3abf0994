"""The int8 share of any Q/DQ graph, whoever made it: multiply-accumulates whose two operands come from integers.

    dequantize ─▶ (moves, a bias of a pad) ─▶ linear ◀─ dequantize ◀─ int8 weight

A recurrent layer counts where its weights come from integers and its input does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from quant2e.graph.fake_values import node_tensor
from quant2e.report.macs import count_macs

_MOVES = frozenset(
    {
        "view", "reshape", "_unsafe_view", "transpose", "permute", "t", "expand", "clone", "contiguous", "unsqueeze",
        "squeeze", "flatten", "slice", "select", "constant_pad_nd", "pad", "dropout", "detach", "alias", "_to_copy",
        "to", "unflatten", "cat", "repeat", "split", "chunk", "getitem",
    }
)  # fmt: skip
"""Names of ops that only move values, in the spellings of the graphs that are compared."""


class _Values(Interpreter):
    """Runs a graph and leaves what each node produces in its metadata, where `count_macs` looks for shapes."""

    def run_node(self, n: Node) -> Any:
        """The value of ``n``."""
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def _name(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).rsplit(".", 1)[-1].split(" ")[-1].rstrip(">")


def from_integers(node: Node) -> bool:
    """Whether a tensor is dequantized, and moved at most, since it was an integer."""
    seen = 0
    while _name(node) in _MOVES and node.all_input_nodes and seen < 1000:
        node, seen = node.all_input_nodes[0], seen + 1
    return _name(node).startswith("dequantize")


def int8_share(graph: GraphModule, inputs: Sequence[Tensor]) -> float:
    """Share of the multiply-accumulates of one call with ``inputs`` whose operands come from integers, 0 to 1.

    Products inside of control flow are not counted. ``graph`` keeps the values in its metadata.
    """
    with torch.no_grad():
        _Values(graph).run(*inputs)
    total = quantized = 0
    for node in graph.graph.nodes:
        macs = count_macs(node)
        operands = [source for source in node.all_input_nodes if (x := node_tensor(source)) is not None and x.dim() > 1]
        total += macs
        quantized += macs if operands and all(map(from_integers, operands)) else 0
    return quantized / total if total else 0.0
