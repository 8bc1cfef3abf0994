"""Requirements of XNNPACK's kernels: conditions of patterns that say why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from lowering.export import op_name
from quant2e.annotation.pattern import Arg, Condition, Op
from quant2e.graph.dataflow import operand
from quant2e.graph.fake_values import node_tensor, shape_of

X = Arg("x")

MOST_DIMENSIONS = 6
"""How many dimensions a tensor of XNNPACK has at most."""


def unary(*targets: Callable[..., Any], when: Condition) -> Op:
    """A call of one of ``targets``, none of which writes in place, on a tensor ``x`` and literals."""
    return Op(frozenset(targets), (X,), when=when)


def all_of(*conditions: Condition) -> Condition:
    """The first answer that is not True."""

    def answer(node: Node) -> bool | str:
        return next((found for found in (condition(node) for condition in conditions) if found is not True), True)

    return answer


def float32(node: Node) -> bool | str:
    """XNNPACK computes float ops in float32."""
    value = node_tensor(operand(node, 0))
    if value is None:
        return f"'{node.name}' has no tensor as its first operand"
    return value.dtype is torch.float32 or f"the operand of '{node.name}' is {value.dtype}, not float32"


def argument_is(name: str, *values: object) -> Condition:
    """An argument that is one of ``values``."""

    def answer(node: Node) -> bool | str:
        found = operand(node, name)
        return found in values or f"'{node.name}' has {name}={found!r}"

    return answer


def fixed(*sizes: int | torch.SymInt) -> bool:
    """Whether sizes are known before the program runs."""
    return all(isinstance(size, int) for size in sizes)


def dimensions(node: Node) -> int:
    """The number of dimensions of what a node produces."""
    return len(shape_of(node))


# ---------------------------------------------------------------- channels that come last
#
# ExecuTorch stores the inputs and results of convolutions and pools with their channels last, and what ops of any
# layout make of them, until a view or a linear puts the channels back. Ops along an axis have to know; of those that
# XNNPACK takes, ExecuTorch 1.4 asks permutations, paddings, slices and concatenations, and forgets softmax, which is
# along the channels then.

_IMAGE_OPS = tuple(
    f"aten.{name}"
    for name in (
        "conv", "upsample", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "max_pool2d", "mean", "amax",
        "max.dim", "prelu",
    )
)  # fmt: skip
"""How the names of ops begin whose results have their channels last."""

_PLAIN_OPS = tuple(
    f"aten.{name}"
    for name in ("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "linear", "addmm")
)
"""And of those that take channels where the graph has them."""


def of_images(node: Node) -> bool:
    """Whether ``node``, of ATen or of its edge dialect, may have its channels last: it has four axes, and an image op,
    or an input that is stored so, is among what it is made of.
    """
    seen: set[Node] = set()
    waiting = [node]
    while waiting:
        found = waiting.pop()
        value = node_tensor(found)
        if found in seen or value is None or value.dim() != 4:
            continue
        seen.add(found)
        if found.op == "placeholder" and not value.is_contiguous():
            return True
        name = op_name(found) if found.op == "call_function" else ""
        if name.startswith(_IMAGE_OPS):
            return True
        if not name.startswith(_PLAIN_OPS):
            waiting += found.all_input_nodes
    return False
