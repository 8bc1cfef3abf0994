"""Fake values: what a node produces, as tensors without data under ``node.meta["val"]``.

val(f(x, y))  =  f(val(x), val(y))      in the fake mode of the graph
"""

from __future__ import annotations

import contextlib
import itertools
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


def is_float(node: object) -> bool:
    """Whether a node's result is a floating-point tensor, or holds one; a ``get_attr`` needs no record, as above."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    items = value if isinstance(value, list | tuple) else (node_tensor(node),)
    return any(isinstance(item, Tensor) and item.is_floating_point() for item in items)


def example_shape(node: object) -> tuple[int, ...] | None:
    """Sizes of the tensor that a node produces, dynamic ones at their example value (1 where there is none).

    None for literals and other results.
    """
    tensor = node_tensor(node)
    return None if tensor is None else example_sizes(tensor)


def example_sizes(tensor: Tensor) -> tuple[int, ...]:
    """Sizes of a tensor, dynamic ones as in `example_shape`."""
    return tuple(map(_example_size, tensor.shape))


def _example_size(size: int | torch.SymInt) -> int:
    hint = size if isinstance(size, int) else size.node.hint
    return int(hint) if isinstance(hint, int) else 1


def fake_mode(node: Node) -> FakeTensorMode | None:
    """The mode of the fake values in the graph of ``node``, looked for near it first; None in a graph without any."""
    nodes = itertools.chain(node.all_input_nodes, (node,), node.graph.nodes)
    leaves = (leaf for each in nodes for leaf in pytree.tree_leaves(each.meta.get("val")))
    return next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)


def faked(value: Tensor, mode: FakeTensorMode | None) -> Tensor:
    """``value`` as a fake tensor of ``mode``, all sizes static; itself when it is one or there is no mode."""
    if mode is None or isinstance(value, FakeTensor):
        return value
    return mode.from_tensor(value, static_shapes=True)


def value_of_call(node: Node) -> Any:
    """What a call produces, worked out from the values of its operands; None where one of them has no value.

    A fake value, and a real one only in a graph of real ones.
    """
    assert callable(node.target)
    if any("val" not in operand.meta for operand in node.all_input_nodes):
        return None

    mode = fake_mode(node)

    def value(operand: Node) -> Any:
        known = operand.meta["val"]
        return faked(known, mode) if isinstance(known, Tensor) else known

    args, kwargs = map_arg((node.args, node.kwargs), value)
    with mode or contextlib.nullcontext():
        return node.target(*args, **kwargs)


def empty_like(value: Any, dtype: torch.dtype) -> Any:
    """A tensor like ``value`` of another dtype; None when ``value`` is no tensor."""
    return torch.empty_like(value, dtype=dtype) if isinstance(value, Tensor) else None


class FakeValueCache:
    """Values for ``meta["val"]``: of equal shape, strides and dtype only one is made, which nodes share."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, value: Any, dtype: torch.dtype) -> Any:
        """What a tensor like ``value`` of that dtype looks like; None when ``value`` is no tensor."""
        if not isinstance(value, Tensor):
            return None
        if not all(type(size) is int for size in (*value.shape, *value.stride())):
            return empty_like(value, dtype)  # symbolic sizes have no hash; strides are such where a shape is fixed
        key = (type(value), value.device, dtype, tuple(value.shape), value.stride())
        if key not in self._made:
            self._made[key] = empty_like(value, dtype)
        return self._made[key]
