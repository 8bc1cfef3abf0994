"""Post ops: the activations that oneDNN's int8 kernels compute on their accumulators, under the kernels' names.

What each kernel takes was found by calling it: a linear layer all of these, a convolution in one or two dimensions
those that are not `LINEAR_ONLY`, and one in three dimensions none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from quant2e.graph.dataflow import operand

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class PostOp:
    """An activation as a kernel is told of it: ``scalars`` are its numbers, ``algorithm`` is one of several."""

    name: str = "none"
    scalars: tuple[float, ...] = ()
    algorithm: str = ""

    @property
    def args(self) -> tuple[str, list[float], str]:
        """The last three arguments of a kernel."""
        return self.name, list(self.scalars), self.algorithm


NONE = PostOp()

LINEAR_ONLY = frozenset({"gelu", "leaky_relu", "tanh"})
"""Post ops that no convolution takes."""


def _clamp(node: Node) -> PostOp | None:
    bounds = operand(node, 1), operand(node, 2)
    return PostOp("hardtanh", tuple(map(float, bounds))) if all(isinstance(b, int | float) for b in bounds) else None


_POST_OPS: Mapping[str, Callable[[Node], PostOp | None]] = {
    "relu": lambda _: PostOp("relu"),
    "relu6": lambda _: PostOp("hardtanh", (0.0, 6.0)),
    "hardtanh": _clamp,
    "clamp": _clamp,
    "hardswish": lambda _: PostOp("hardswish"),
    "silu": lambda _: PostOp("swish"),
    "leaky_relu": lambda node: PostOp("leaky_relu", (float(operand(node, "negative_slope")),)),
    "tanh": lambda _: PostOp("tanh"),
    "gelu": lambda node: PostOp("gelu", (), operand(node, "approximate")),
}
_NAMES: Mapping[Any, str] = {
    getattr(aten, name + suffix).default: name
    for name in _POST_OPS
    for suffix in ("", "_")
    if hasattr(aten, name + suffix)
}
"""ATen op, plain or in place → its name."""


def post_op_of(node: Node) -> PostOp | None:
    """The post op that an activation is; None where it is none of a kernel's."""
    name = _NAMES.get(node.target)
    return None if name is None else _POST_OPS[name](node)
