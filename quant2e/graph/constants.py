"""Which nodes are constant, and their value.

constant(n)  ⇔  n reads a parameter or buffer that nothing writes, or n is deterministic and its operands are constant
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from quant2e.errors import PassError, where
from quant2e.graph.attributes import attribute
from quant2e.graph.effects import aliases, is_deterministic, writes

Memory = tuple[str, int] | Node
"""Where a tensor lives: a storage, or the node that allocated it."""


def _owner(graph: Graph) -> torch.nn.Module:
    if graph.owning_module is None:
        raise PassError("this graph belongs to no GraphModule, so its parameters cannot be found")
    return graph.owning_module


def _storage(tensor: Tensor) -> tuple[str, int]:
    pointer = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
    return ("storage", pointer) if pointer else ("tensor", id(tensor))


def memories(graph: Graph) -> dict[Node, set[Memory]]:
    """For each node, the memory its value may live in. Two parameters that are one tensor have one memory."""
    found: dict[Node, set[Memory]] = {}
    module = _owner(graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            value = attribute(module, str(node.target))
            found[node] = {_storage(value)} if isinstance(value, Tensor) else {node}
        else:
            shared = set().union(*(found[n] for n in aliases(node)))
            found[node] = shared | {node}
    return found


def constant_nodes(graph: Graph) -> set[Node]:
    """Nodes whose value depends only on literals and on parameters and buffers that the graph never writes.

    A tensor that any node writes in place (also through a view, also under a second name) is not constant, nor is
    what a training-mode batch norm updates. Random and uninitialised tensors, control flow and modules are not.
    Linear in the number of nodes. Raises `PassError` when the graph belongs to no module.
    """
    module = _owner(graph)
    memory = memories(graph)
    written = set().union(*(memory[operand] for node in graph.nodes for operand in writes(node)))
    constants: set[Node] = set()
    for node in graph.nodes:
        if not memory[node].isdisjoint(written):
            continue
        if node.op == "get_attr":
            if isinstance(attribute(module, str(node.target)), Tensor):
                constants.add(node)
        elif is_deterministic(node) and constants.issuperset(node.all_input_nodes):
            constants.add(node)
    return constants


def evaluate(gm: GraphModule, node: Node, values: dict[Node, Any] | None = None) -> Any:
    """Value of a constant node (see `constant_nodes`): usually a tensor, without gradient history.

    A node that only reads an attribute gives the attribute itself, not a copy. Draws no random numbers.
    ``values`` keeps results between calls. Raises `PassError` when the node is not constant.
    """
    known: dict[Node, Any] = {} if values is None else values
    with torch.inference_mode(False), torch.no_grad():
        for step in _ancestors(node, known):
            if step.op == "get_attr":
                known[step] = attribute(gm, str(step.target))
            elif is_deterministic(step) and callable(step.target):
                args, kwargs = map_arg((step.args, dict(step.kwargs)), known.__getitem__)
                known[step] = step.target(*args, **kwargs)
            else:
                raise PassError(f"{where(step)} is not constant, so the value of '{node.name}' is not known")
    return known[node]


def _ancestors(node: Node, known: dict[Node, Any]) -> list[Node]:
    """``node`` and what it needs, operands first, without what is already known. Iterative: chains can be deep."""
    order: list[Node] = []
    seen = set(known)
    pending = [(node, False)]
    while pending:
        current, ready = pending.pop()
        if ready:
            order.append(current)
        elif current not in seen:
            seen.add(current)
            pending.append((current, True))
            pending.extend((operand, False) for operand in current.all_input_nodes)
    return order
