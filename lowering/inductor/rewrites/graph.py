"""Private copy of a graph for Inductor, and the edits that its rewrites are made of.

The copy shares weights with the graph it came from and owns everything else: nodes, constants that a rewrite adds,
and a clone of each buffer that the graph writes to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from lowering.rewrites.layouts import VIEWS
from quant2e.graph.attributes import attribute
from quant2e.graph.edit import set_origin
from quant2e.graph.mutation import clone_together, written_attributes

TAG = "quant2e_op"
"""Key under ``node.meta["custom"]``, which Inductor carries through to the graph it generates code for."""


def call(gm: GraphModule, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Add a call where the graph's insertion point is, with the origin of ``like``.

    It has no value: `shared_values_first` looks at those of the model's own ops alone.
    """
    node = gm.graph.call_function(target, args, kwargs)
    set_origin(node, like)
    return node


def op_of(node: Node) -> str:
    """The name of the model's op on whose behalf a node stands in a private copy; its own where there is none."""
    return str((node.meta.get("custom") or {}).get(TAG, node.name))


def private_copy(model: GraphModule) -> GraphModule:
    """Copy a captured graph for Inductor: flat inputs and outputs, detached constants, each call tagged with its name.

    Input checks that ``torch.export`` leaves in the graph are dropped; `InductorProgram` makes its own.
    """
    graph = Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(model.graph, mapping)
    graph.output(tuple(pytree.tree_leaves(output)))
    copies = clone_together(written_attributes(model).values())
    constants: dict[str, Any] = {}
    first: dict[int, str] = {}
    for node in list(graph.nodes):
        node.meta = dict(node.meta)
        if node.op == "call_module" and node.name == "_guards_fn" and not node.users:
            graph.erase_node(node)
        elif node.op == "get_attr":
            value = attribute(model, str(node.target))
            if isinstance(value, Tensor):
                node.target = first.setdefault(id(value), str(node.target))  # one name for a tensor with two
                value = copies.get(id(value), value.detach())
            constants.setdefault(str(node.target), value)
        elif node.op == "call_function":
            node.meta["custom"] = {**(node.meta.get("custom") or {}), TAG: node.name}
    modules = {str(n.target): model.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"}
    return GraphModule({**constants, **modules}, graph)


def any_layout(gm: GraphModule) -> int:
    """``view(x)`` => ``reshape(x)``: what is viewed may be what a kernel writes in channels last."""
    found = [node for node in gm.graph.nodes if node.target in VIEWS]
    for node in found:
        node.target = VIEWS[node.target]
    return len(found)


def results_as_captured(gm: GraphModule) -> int:
    """Results that were captured contiguous are so, whatever layout a kernel writes; returns how many are images."""
    (output,) = gm.graph.find_nodes(op="output")
    count = 0
    for node in dict.fromkeys(output.all_input_nodes):
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and value.dim() > 3 and value.is_contiguous():
            with gm.graph.inserting_before(output):
                output.replace_input_with(node, call(gm, node, torch.ops.aten.contiguous.default, node))
            count += 1
    return count
