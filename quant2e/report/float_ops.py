"""Float ops of a captured graph, before anything is rewritten: the rows of the report.

Only ops that produce a float tensor count.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from quant2e.documents.schema import LATER
from quant2e.errors import module_path, source_line
from quant2e.graph.control_flow import bodies
from quant2e.graph.fake_values import is_float
from quant2e.report.macs import count_macs


@dataclass(frozen=True, slots=True)
class FloatOp:
    """One op of the captured graph that produces a float tensor.

    ``macs``: multiply-accumulates at the example shapes; 0 for ops that are not products. ``inputs``: the float ops and
    inputs of the model whose tensors it computes from, by name, whatever lies between; empty in records of before.
    """

    name: str
    target: str
    module: str
    source: str
    macs: int
    inputs: tuple[str, ...] = field(default=(), metadata=LATER)


def list_float_ops(gm: GraphModule) -> tuple[FloatOp, ...]:
    """The float ops of a captured graph, in graph order, without control flow: its bodies compute, and are graphs."""
    found: list[FloatOp] = []
    sources: dict[Node, tuple[str, ...]] = {}
    for node in gm.graph.nodes:
        before = tuple(dict.fromkeys(name for read in node.all_input_nodes for name in sources[read]))
        if node.op == "call_function" and is_float(node) and not bodies(node) and not _is_result_of_bodies(node):
            macs = count_macs(node)
            found.append(FloatOp(node.name, str(node.target), module_path(node), source_line(node), macs, before))
            sources[node] = (node.name,)
        elif node.op == "placeholder":
            sources[node] = (node.name,)
        else:
            sources[node] = before if _holds_tensors(node) else ()
    return tuple(found)


def _holds_tensors(node: Node) -> bool:
    """Whether values flow through a node; sizes say nothing of them."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor | tuple | list)


def _is_result_of_bodies(node: Node) -> bool:
    return node.target is operator.getitem and bool(bodies(node.all_input_nodes[0]))
