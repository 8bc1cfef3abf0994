"""Activation decomposition: functions that XNNPACK has no kernel for, or another kernel, in terms of its kernels.

hardsigmoid(x) = clamp(x + 3, 0, 6) / 6
gelu(x, "tanh") = x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))     XNNPACK's gelu is the exact one
prelu(x, w)    = relu(x) - w·relu(-x)
elu(x, α)      = relu(x) + α·(exp(-relu(-x)) - 1)
softplus(x)    = relu(x) + log(1 + exp(-|x|))
mish(x)        = x·tanh(softplus(x))
softmax(x, d)  = softmax over the last dimension, between two permutations; of images, over the last of three

And arithmetic with numbers:

x + 3  =  x + tensor(3),  x³ = x·x·x,  1/x = tensor(1)/x

ExecuTorch makes tensors of numbers too, but integers of integers, and casts them on every call by an op that no
delegate takes. XNNPACK has squares and no other power.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lowering.executorch.xnnpack.legalize.requirements import (
    X,
    all_of,
    argument_is,
    dimensions,
    float32,
    of_images,
    unary,
)
from quant2e.annotation.pattern import Arg, Condition, Match, Op
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import emit, emit_number
from quant2e.graph.fake_values import shape_of
from quant2e.passes.rewrite import Rewrite, RewriteTable

_ATEN = torch.ops.aten


# ---------------------------------------------------------------- activations


def _hardsigmoid(gm: GraphModule, match: Match) -> Node:
    node, x = match.root, match.edges["x"][0]
    shifted = emit(node, _ATEN.add.Tensor, x, emit_number(gm, node, 3.0))
    clamped = emit(node, _ATEN.hardtanh.default, shifted, 0.0, 6.0)
    return emit(node, _ATEN.div.Tensor, clamped, emit_number(gm, node, 6.0))


def _gelu(gm: GraphModule, match: Match) -> Node:
    node, x = match.root, match.edges["x"][0]
    cube = emit(node, _ATEN.mul.Tensor, emit(node, _ATEN.mul.Tensor, x, x), x)
    cube = emit(node, _ATEN.mul.Tensor, cube, emit_number(gm, node, 0.044715))
    total = emit(node, _ATEN.add.Tensor, x, cube)
    inner = emit(node, _ATEN.mul.Tensor, total, emit_number(gm, node, math.sqrt(2 / math.pi)))
    gate = emit(node, _ATEN.add.Tensor, emit(node, _ATEN.tanh.default, inner), emit_number(gm, node, 1.0))
    return emit(node, _ATEN.mul.Tensor, emit(node, _ATEN.mul.Tensor, x, emit_number(gm, node, 0.5)), gate)


def _prelu(_: GraphModule, match: Match) -> Node:
    node, x, weight = match.root, match.edges["x"][0], match.edges["weight"][0]
    slopes = emit(node, _ATEN.reshape.default, weight, [-1, *[1] * (dimensions(x) - 2)])
    below = emit(node, _ATEN.mul.Tensor, slopes, _below(node, x))
    return emit(node, _ATEN.sub.Tensor, emit(node, _ATEN.relu.default, x), below)


def _has_channels(node: Node) -> bool | str:
    return dimensions(operand(node, 0)) >= 2 or f"the operand of '{node.name}' has no channels"


def _below(node: Node, x: Node) -> Node:
    return emit(node, _ATEN.relu.default, emit(node, _ATEN.neg.default, x))


def _elu(gm: GraphModule, match: Match) -> Node:
    node, x, alpha = match.root, match.edges["x"][0], operand(match.root, "alpha")
    fallen = emit(node, _ATEN.exp.default, emit(node, _ATEN.neg.default, _below(node, x)))
    fallen = emit(node, _ATEN.sub.Tensor, fallen, emit_number(gm, node, 1.0))
    if alpha != 1:
        fallen = emit(node, _ATEN.mul.Tensor, fallen, emit_number(gm, node, float(alpha)))
    return emit(node, _ATEN.add.Tensor, emit(node, _ATEN.relu.default, x), fallen)


def _threshold(node: Node) -> bool | str:
    # beyond the threshold torch returns x itself; at 20 and above the two differ by less than the last bit
    found = operand(node, "threshold") or 20
    return found >= 20 or f"'{node.name}' is linear from {found} on, where softplus is not yet"


def _softplus(gm: GraphModule, match: Match) -> Node:
    node, x = match.root, match.edges["x"][0]
    decay = emit(node, _ATEN.exp.default, emit(node, _ATEN.neg.default, emit(node, _ATEN.abs.default, x)))
    tail = emit(node, _ATEN.log.default, emit(node, _ATEN.add.Tensor, decay, emit_number(gm, node, 1.0)))
    return emit(node, _ATEN.add.Tensor, emit(node, _ATEN.relu.default, x), tail)


def _mish(gm: GraphModule, match: Match) -> Node:
    gate = emit(match.root, _ATEN.tanh.default, _softplus(gm, match))
    return emit(match.root, _ATEN.mul.Tensor, match.edges["x"][0], gate)


def _another_softmax(node: Node) -> bool | str:
    x, dim = operand(node, 0), operand(node, 1)
    dims = dimensions(x)
    if dims == 0 or not isinstance(dim, int):
        return f"'{node.name}' is not over a dimension"
    if of_images(x):
        return (
            sum(not isinstance(size, int) for size in shape_of(x)) <= 1 or f"'{node.name}' has several sizes that vary"
        )
    return dim % dims != dims - 1 or f"'{node.name}' is over the last dimension, as XNNPACK's"


def _softmax(_: GraphModule, match: Match) -> Node:
    node, x = match.root, match.edges["x"][0]
    dim, shape = operand(node, 1) % dimensions(x), shape_of(x)
    if not of_images(x):
        order = list(range(len(shape)))
        order[dim], order[-1] = order[-1], order[dim]
        return _between_permutations(node, x, order)
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    before, behind = (-1 if -1 in part else math.prod(part) for part in (sizes[:dim], sizes[dim + 1 :]))
    rows = emit(node, _ATEN.reshape.default, x, [before, sizes[dim], behind])
    return emit(node, _ATEN.reshape.default, _between_permutations(node, rows, [0, 2, 1]), sizes)


def _between_permutations(node: Node, x: Node, order: list[int]) -> Node:
    inner = emit(node, _ATEN.softmax.int, emit(node, _ATEN.permute.default, x, order), -1)
    return emit(node, _ATEN.permute.default, inner, order)


decompose_activations = RewriteTable(
    "decompose_activations",
    (
        Rewrite("hardsigmoid", unary(_ATEN.hardsigmoid.default, when=float32), _hardsigmoid),
        Rewrite("gelu", unary(_ATEN.gelu.default, when=all_of(float32, argument_is("approximate", "tanh"))), _gelu),
        Rewrite(
            "prelu",
            Op(frozenset({_ATEN.prelu.default}), (X, Arg("weight")), when=all_of(float32, _has_channels)),
            _prelu,
        ),
        Rewrite(
            "elu",
            unary(_ATEN.elu.default, when=all_of(float32, argument_is("scale", 1), argument_is("input_scale", 1))),
            _elu,
        ),
        Rewrite(
            "softplus",
            unary(_ATEN.softplus.default, when=all_of(float32, argument_is("beta", None, 1), _threshold)),
            _softplus,
        ),
        Rewrite("mish", unary(_ATEN.mish.default, when=float32), _mish),
        Rewrite(
            "softmax",
            unary(_ATEN.softmax.int, when=all_of(float32, _another_softmax, argument_is("dtype", None))),
            _softmax,
        ),
    ),
)
"""Activations of float32 tensors."""


# ---------------------------------------------------------------- arithmetic with numbers


def _float_result(node: Node) -> bool | str:
    """A number beside a tensor without dimensions may decide on the dtype."""
    values = [other.meta.get("val") for other in (node, operand(node, 0)) if isinstance(other, Node)]
    if all(isinstance(v, torch.Tensor) and v.dtype is torch.float32 and v.dim() > 0 for v in values):
        return len(values) == 2 or f"'{node.name}' has a number as its first operand"
    return f"'{node.name}' is not arithmetic of float32 tensors with dimensions"


def _a_number(node: Node) -> bool | str:
    value, alpha = operand(node, 1), operand(node, "alpha")
    if not isinstance(value, int | float):
        return f"the second operand of '{node.name}' is a tensor"
    return alpha in (None, 1) or f"'{node.name}' has alpha={alpha}"


def _with_tensor(target: Any) -> Callable[[GraphModule, Match], Node]:
    def build(gm: GraphModule, match: Match) -> Node:
        node = match.root
        number = emit_number(gm, node, float(operand(node, 1)))
        return emit(node, target, match.edges["x"][0], number)

    return build


def _reversed(gm: GraphModule, match: Match) -> Node:
    node = match.root
    return emit(node, _ATEN.sub.Tensor, emit_number(gm, node, float(operand(node, 1))), match.edges["x"][0])


def _reciprocal(gm: GraphModule, match: Match) -> Node:
    return emit(match.root, _ATEN.div.Tensor, emit_number(gm, match.root, 1.0), match.edges["x"][0])


def _square(_: GraphModule, match: Match) -> Node:
    x = match.edges["x"][0]
    return emit(match.root, _ATEN.mul.Tensor, x, x)


def _cube(gm: GraphModule, match: Match) -> Node:
    return emit(match.root, _ATEN.mul.Tensor, _square(gm, match), match.edges["x"][0])


def _root(target: Any) -> Callable[[GraphModule, Match], Node]:
    return lambda _, match: emit(match.root, target, match.edges["x"][0])


def _power(exponent: float) -> Op:
    return unary(_ATEN.pow.Tensor_Scalar, when=all_of(_float_result, argument_is("exponent", exponent)))


_NUMBER: Condition = all_of(_float_result, _a_number)

tensor_operands = RewriteTable(
    "tensor_operands",
    (
        *(
            Rewrite(
                f"{name} with a number", unary(packet.Tensor, packet.Scalar, when=_NUMBER), _with_tensor(packet.Tensor)
            )
            for name, packet in (("add", _ATEN.add), ("sub", _ATEN.sub), ("mul", _ATEN.mul), ("div", _ATEN.div))
        ),
        Rewrite("number less x", unary(_ATEN.rsub.Scalar, when=_NUMBER), _reversed),
        Rewrite("reciprocal", unary(_ATEN.reciprocal.default, when=_float_result), _reciprocal),
        Rewrite("square", unary(_ATEN.square.default, when=_float_result), _square),
        Rewrite("x²", _power(2), _square),
        Rewrite("x³", _power(3), _cube),
        Rewrite("√x", _power(0.5), _root(_ATEN.sqrt.default)),
        Rewrite("1/√x", _power(-0.5), _root(_ATEN.rsqrt.default)),
        Rewrite("1/x", _power(-1), _reciprocal),
    ),
)
"""Arithmetic of float32 tensors with numbers; powers as torch computes them: x·x, (x·x)·x, square root and inverses."""
