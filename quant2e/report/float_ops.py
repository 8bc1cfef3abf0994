"""Float ops of a captured graph, before anything is rewritten: the rows of the report.

Only ops that produce a float tensor count.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from quant2e.errors import module_path, source_line
from quant2e.graph.control_flow import bodies
from quant2e.graph.fake_values import is_float
from quant2e.report.macs import count_macs


@dataclass(frozen=True, slots=True)
class FloatOp:
    """One op of the captured graph that produces a float tensor.

    ``macs``: multiply-accumulates at the example shapes; 0 for ops that are not products.
    """

    name: str
    target: str
    module: str
    source: str
    macs: int


def list_float_ops(gm: GraphModule) -> tuple[FloatOp, ...]:
    """The float ops of a captured graph, in graph order, without control flow: its bodies compute, and are graphs."""
    return tuple(
        FloatOp(node.name, str(node.target), module_path(node), source_line(node), count_macs(node))
        for node in gm.graph.nodes
        if node.op == "call_function" and is_float(node) and not bodies(node) and not _is_result_of_bodies(node)
    )


def _is_result_of_bodies(node: Node) -> bool:
    return node.target is operator.getitem and bool(bodies(node.all_input_nodes[0]))
