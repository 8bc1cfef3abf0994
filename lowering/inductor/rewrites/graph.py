"""A private copy of a graph, and the few edits that rewrites for Inductor are made of.

The copy shares weights with the graph it came from and owns everything else: nodes, constants that a rewrite adds,
and a clone of each buffer that the graph writes to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from quant2e.graph.mutation import clone_together, written_attributes

TAG = "quant2e_op"
"""Key under ``node.meta["custom"]``, which Inductor carries through to the graph it generates code for."""


def constant(gm: GraphModule, node: Any) -> Tensor | None:
    """The tensor that a ``get_attr`` node reads; None for any other node or value."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach() if isinstance(value, Tensor) else None


def operands(node: Node) -> dict[str, Any]:
    """Arguments of an ATen or ``quantized_decomposed`` call by name, defaults included."""
    schema = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else []
    bound: dict[str, Any] = {}
    for place, argument in enumerate(schema):
        if place < len(node.args):
            bound[argument.name] = node.args[place]
        else:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return bound


def add_constant(gm: GraphModule, before: Node, name: str, value: Tensor) -> Node:
    """Register ``value`` under the first free name that starts with ``name``, and read it before ``before``."""
    free, number = name, 0
    while hasattr(gm, free):
        number += 1
        free = f"{name}_{number}"
    gm.register_buffer(free, value)
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(free)
    node.meta["val"] = value
    return node


def call(gm: GraphModule, like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Add a call where the graph's insertion point is. It inherits ``like``'s provenance, not its value."""
    node = gm.graph.call_function(target, args, kwargs)
    node.meta = {key: value for key, value in like.meta.items() if key != "val"}
    return node


def replace(gm: GraphModule, old: Node, new: Node) -> None:
    """Let every user of ``old`` read ``new``, and remove ``old``."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    gm.graph.erase_node(old)


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
            value = _attribute(model, str(node.target))
            if isinstance(value, Tensor):
                node.target = first.setdefault(id(value), str(node.target))  # one name for a tensor with two
                value = copies.get(id(value), value.detach())
            constants.setdefault(str(node.target), value)
        elif node.op == "call_function":
            node.meta["custom"] = {**(node.meta.get("custom") or {}), TAG: node.name}
    modules = {str(n.target): model.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"}
    return GraphModule({**constants, **modules}, graph)


def _attribute(model: GraphModule, path: str) -> Any:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value
