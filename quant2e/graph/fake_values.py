"""Fake values: what a node produces, as tensors without data under ``node.meta["val"]``.

val(f(x, y))  =  f(val(x), val(y))      in the fake mode of the graph
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from quant2e.graph.attributes import tensor_at


def shape_of(node: Node) -> tuple[int | torch.SymInt, ...]:
    """Shape of what a node produces, symbolic where the program is dynamic."""
    return tuple(node.meta["val"].shape)


def node_tensor(node: object) -> Tensor | None:
    """The (fake) tensor that a node produces; None for literals, for other results and where none is recorded.

    What a ``get_attr`` node reads is known without a record, in a graph that belongs to a module.
    """
    if not isinstance(node, Node):
        return None
    value, owner = node.meta.get("val"), node.graph.owning_module
    if value is None and owner is not None:
        value = tensor_at(owner, node)
    return value if isinstance(value, Tensor) else None


def fake_mode(nodes: Iterable[Node]) -> FakeTensorMode | None:
    """The mode that the fake values of ``nodes`` belong to; None when none of them has one."""
    leaves = (leaf for node in nodes for leaf in pytree.tree_leaves(node.meta.get("val")))
    return next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)


def faked(value: Tensor, mode: FakeTensorMode | None) -> Tensor:
    """``value`` as a fake tensor of ``mode``, all sizes static; itself when it is one or there is no mode."""
    if mode is None or isinstance(value, FakeTensor):
        return value
    return mode.from_tensor(value, static_shapes=True)


def value_of_call(node: Node, mode: FakeTensorMode | None) -> Any:
    """What a call produces, worked out from the values of its operands; None where one of them has no value."""
    assert callable(node.target)
    if any("val" not in operand.meta for operand in node.all_input_nodes):
        return None

    def value(operand: Node) -> Any:
        known = operand.meta["val"]
        return faked(known, mode) if isinstance(known, Tensor) else known

    args, kwargs = map_arg((node.args, node.kwargs), value)
    with mode or contextlib.nullcontext():
        return node.target(*args, **kwargs)
