"""Edits of a graph: new nodes, each with its origin and its own value, in front of the node on whose behalf they are
made.

    emit(node, f, x, y)      x, y, f(x, y), node

An edit keeps what `ORIGIN` lists of the node that it serves, and works out ``meta["val"]`` from the operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.graph.attributes import register_tensor
from quant2e.graph.fake_values import fake_mode, faked, value_of_call

ORIGIN = ("nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn", "seq_nr", "custom")
"""Metadata that says where a node came from, and what the user wrote on it: copied to the nodes made on its behalf."""

FROM_NODE = "from_node"
"""Metadata of torch.export: which op of the first exported graph a tensor is. Numeric debuggers match tensors by it."""


def set_origin(node: Node, source: Node, *, value: Any = None) -> None:
    """Give a new node the origin of ``source``, and ``value`` as its ``val`` where it is known."""
    node.meta.update({key: source.meta[key] for key in ORIGIN if key in source.meta})
    if value is not None:
        node.meta["val"] = value


def stands_for(node: Node, tensor: Node) -> None:
    """Give a new node that holds the tensor of another one, rounded or as integers, the identity of that tensor."""
    if FROM_NODE in tensor.meta:
        node.meta[FROM_NODE] = tensor.meta[FROM_NODE]


def emit(place: Node, target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Node:
    """A call of ``target`` right before ``place``, with its origin and a ``val`` of its own.

    Raises what ``target`` raises for operands of such shapes and dtypes. Without ``val`` when an operand has none.
    """
    graph = place.graph
    with graph.inserting_before(place):
        node = graph.call_function(target, args, kwargs)
    set_origin(node, place, value=value_of_call(node, fake_mode((*node.all_input_nodes, place))))
    return node


def emit_constant(gm: GraphModule, place: Node, path: str, value: Tensor) -> Node:
    """A ``get_attr`` of a new buffer right before ``place``, at ``path`` or the first free one that starts with it."""
    path = register_tensor(gm, path, value)
    with place.graph.inserting_before(place):
        node = place.graph.get_attr(path)
    set_origin(node, place, value=faked(value, fake_mode((*place.all_input_nodes, place))))
    return node


def emit_number(gm: GraphModule, place: Node, value: float) -> Node:
    """A float32 constant of one element right before ``place``, which broadcasts against any shape."""
    return emit_constant(gm, place, "number", torch.tensor([value], dtype=torch.float32))


def replace(old: Node, new: Node) -> None:
    """Let every reader of ``old``, but ``new`` itself, read ``new``;
    removes ``old`` where nothing is left that reads it.
    """
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    if not old.users:
        old.graph.erase_node(old)
