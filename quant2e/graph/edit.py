"""Graph edits: new nodes, each with its origin and its own value, in front of the node they are made for.

    emit(node, f, x, y)      x, y, f(x, y), node

An edit keeps what `ORIGIN` lists of the node that it serves, and works out ``meta["val"]`` from the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.graph.attributes import attribute, register_tensor
from quant2e.graph.fake_values import fake_mode, faked, value_of_call
from quant2e.graph.qdq_ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE

NO_GRAD = "quant2e_no_grad"
"""Metadata of what ``torch.no_grad()`` covered in the user's forward: True; False for ``enable_grad`` inside of it."""

ORIGIN = ("nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn", "seq_nr", "custom", NO_GRAD)
"""Metadata that says where a node came from, and what the user wrote on it: copied to the nodes made on its behalf."""

PART_OF = "quant2e_part_of"
"""Metadata of nodes that were written in place of one op, which is gone: its name. Reports and settings speak of it."""

FOLDED_OPS = "folded"
"""Metadata of an op that others are part of now: a tuple of their names (`fold_into`, `folded_ops`)."""

FROM_NODE = "from_node"
"""Metadata of torch.export: which op of the first exported graph a tensor is. Numeric debuggers match tensors by it."""


_AROUND = QUANTIZE | DEQUANTIZE | CHOOSE_QPARAMS
_NO_LAYER = "torch.nn.modules.module.Module"


def set_origin(node: Node, source: Node, *, value: Any = None) -> None:
    """Give a new node the origin of ``source``, and ``value`` as its ``val`` where it is known.

    Quantize and dequantize lie around a function and are no part of it, nor of a layer: they keep the path of the
    module, and neither the function nor the type of the layer, by which torch's source partitions collect nodes.
    """
    node.meta.update({key: source.meta[key] for key in ORIGIN if key in source.meta})
    if node.target in _AROUND:
        node.meta.pop("source_fn_stack", None)
        node.meta.pop("torch_fn", None)
        if stack := node.meta.get("nn_module_stack"):
            last = next(reversed(stack))
            node.meta["nn_module_stack"] = {**stack, last: (stack[last][0], _NO_LAYER)}
    if value is not None:
        node.meta["val"] = value


def fold_into(node: Node, *names: str) -> None:
    """Say that the ops of these ``names`` are part of ``node`` now, as a batch norm is of a convolution."""
    node.meta[FOLDED_OPS] = (*folded_ops(node), *names)


def folded_ops(node: Node) -> tuple[str, ...]:
    """The names of the ops that are part of ``node`` now, in the order in which they were folded."""
    names: tuple[str, ...] = node.meta.get(FOLDED_OPS, ())
    return names


def stands_for(node: Node, tensor: Node) -> None:
    """Give a new node that holds the tensor of another one, rounded or as integers, the identity of that tensor."""
    if FROM_NODE in tensor.meta:
        node.meta[FROM_NODE] = tensor.meta[FROM_NODE]


def take_over(node: Node, old: Node) -> None:
    """Give a new node that holds what ``old`` holds all that is known of it: its origin, its identity, its value."""
    set_origin(node, old, value=old.meta.get("val"))
    stands_for(node, old)


def insert_call(
    place: Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    value: Any = None,
    origin: Node | None = None,
) -> Node:
    """A call right before ``place``, on behalf of ``origin`` or ``place``. ``value``: its ``val``, if that is known."""
    with place.graph.inserting_before(place):
        node = place.graph.call_function(target, args, dict(kwargs or {}))
    set_origin(node, origin or place, value=value)
    return node


def emit(place: Node, target: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Node:
    """A call of ``target`` right before ``place``, with its origin and a ``val`` of its own.

    Raises what ``target`` raises for operands of such shapes and dtypes. Without ``val`` when an operand has none.
    """
    node = insert_call(place, target, args, kwargs)
    if (value := value_of_call(node)) is not None:
        node.meta["val"] = value
    return node


def emit_behind(last: Node, origin: Node, target: Callable[..., Any], /, *args: Any) -> Node:
    """A call of ``target`` on ``last`` right behind it, with the origin of ``origin`` and a ``val`` of its own."""
    node = insert_call(last.next, target, (last, *args), origin=origin)
    node.meta["val"] = value_of_call(node)
    return node


def emit_read(gm: GraphModule, place: Node, path: str, *, origin: Node | None = None) -> Node:
    """A ``get_attr`` of a tensor of ``gm`` right before ``place``, on behalf of ``origin`` or of ``place``."""
    with place.graph.inserting_before(place):
        node = place.graph.get_attr(path)
    set_origin(node, origin or place, value=faked(attribute(gm, path), fake_mode(place)))
    return node


def emit_constant(gm: GraphModule, place: Node, path: str, value: Tensor) -> Node:
    """A ``get_attr`` of a new buffer right before ``place``, at ``path`` or the first free one that starts with it."""
    return emit_read(gm, place, register_tensor(gm, path, value))


def emit_number(gm: GraphModule, place: Node, value: float) -> Node:
    """A float32 constant of one element right before ``place``, which broadcasts against any shape."""
    return emit_constant(gm, place, "number", torch.tensor([value], dtype=torch.float32))


def replace(old: Node, new: Node) -> None:
    """Let every reader of ``old``, but ``new`` itself, read ``new``. What nothing reads any more is removed."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    if not old.users:
        old.graph.erase_node(old)
