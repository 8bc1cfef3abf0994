"""Rules of Inductor on x86: what its patterns turn into oneDNN's int8 kernels, and what carries integers between.

An op's output is quantized by its consumer: where nobody wants integers, the kernel answers in float. So an activation
that no kernel can take in costs nothing: it is computed in float behind the kernel, fused into what follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from quant2e.annotation.pattern import Match, Op, Pattern, op, short_name
from quant2e.annotation.specs import group_size_of
from quant2e.graph.dataflow import literal, operand
from quantizers.kit import families as f
from quantizers.kit.conditions import in_eval_mode, same_shape, spatial
from quantizers.kit.rule import Follow, Rule, Same

aten = torch.ops.aten


def _no_more_than_2d(node: Node) -> bool | str:
    if operand(node, "transposed"):
        return "Inductor does not lower transposed convolutions to integers"
    return True if spatial(node) <= 2 else "Inductor lowers convolutions in one and two dimensions only"


def _two_numbers(node: Node) -> bool | str:
    bounds = (literal(node, "min"), literal(node, "max"))
    return True if all(isinstance(b, int | float) for b in bounds) else "it has one bound, which no kernel takes in"


_CONVOLUTION = op(aten.convolution.default, when=_no_more_than_2d)(f.x, f.w, f.b)
_CONV = f.conv2d | _CONVOLUTION | f.conv1d
_CONV_UNARY = op(
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.hardswish.default, aten.silu.default
)
_CLAMP = op(aten.clamp.default, when=_two_numbers)
_LINEAR_UNARY = op(aten.relu.default, aten.gelu.default)
_RESHAPES = (aten.flatten.using_ints, aten.view.default, aten.reshape.default)
"""The reshapes that carry integers to an int8 kernel."""
_DROPOUT = op(aten.dropout.default, aten.feature_dropout.default, when=in_eval_mode)

FUSED = {"conv": ("relu", "relu6", "hardtanh", "hardswish", "silu"), "linear": ("relu", "gelu")}
"""Activations that become part of an int8 kernel."""

ACTIVATIONS = frozenset(
    [
        "clamp",
        "clamp_max",
        "clamp_min",
        "elu",
        "gelu",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "leaky_relu",
        "mish",
        "relu6",
        "sigmoid",
        "silu",
        "tanh",
    ]
)
"""Activations that users put behind a kernel."""


def _added(product: Pattern) -> Pattern:
    total: Op = f.add([product, f.y])
    return f.relu(total) | total


def static_rules(config: Any) -> tuple[Rule, ...]:
    """Convolutions, linear layers, and what carries integers between them, with parameters found by calibration."""
    act, product = config.input_activation, {"x": config.input_activation, "w": config.weight}
    moved = {"x": Follow(act)}
    pools = f.max_pool2d(f.x) | f.avg_pool2d(f.x) | f.adaptive_avg_pool2d(f.x)
    return (
        Rule(_added(f.conv2d), {**product, "y": act}, None, _equal_shapes, "conv + add"),
        Rule(_CONV_UNARY(_CONV) | _CLAMP(_CONV) | _CONV, product, name="conv"),
        Rule(_added(_DROPOUT(f.linear) | f.linear), product, None, _equal_shapes, "linear + add"),
        Rule(_LINEAR_UNARY(f.linear) | f.linear, product, name="linear"),
        Rule(op(aten.matmul.default, aten.bmm.default)(f.x, f.y), {"x": act, "y": act}, name="matmul", opt_in=True),
        Rule(f.mul(f.x, f.y), {"x": act, "y": act}, when=_equal_factors, name="mul", opt_in=True),
        Rule(pools, moved, Same("x"), name="pool"),
        Rule(f.cat(f.x), {"x": Follow(act, every=True)}, Same("x"), name="cat"),
        Rule(op(*_RESHAPES)(f.x), moved, Same("x"), _before_a_kernel, "reshape"),
    )


def dynamic_rules(config: Any) -> tuple[Rule, ...]:
    """Linear, with activations that get their parameters at run time."""
    product = {"x": config.input_activation, "w": config.weight}
    return (
        Rule(_added(_DROPOUT(f.linear) | f.linear), product, None, _equal_shapes, "dynamic linear + add"),
        Rule(_LINEAR_UNARY(f.linear) | f.linear, product, name="dynamic linear"),
    )


def weight_only_rules(config: Any) -> tuple[Rule, ...]:
    """Linear with weights in float16, in 8 bits or fewer per output channel, or in groups."""
    kind = "float16 weight" if config.weight.dtype is torch.float16 else "weight only"
    whole = partial(_whole_groups, group_size_of(config.weight))
    return (Rule(f.linear, {"w": config.weight}, when=whole, name=f"linear, {kind}"),)


def _whole_groups(group_size: int | None, match: Match) -> bool | str:
    weight, _ = match.edges["w"]
    columns = weight.meta["val"].shape[-1]
    return group_size is None or columns % group_size == 0 or f"its {columns} inputs are no multiple of {group_size}"


def capabilities(static: Any, dynamic: Any) -> Mapping[str, tuple[str, ...]]:
    """Rule → patterns, for a static and a dynamic configuration."""
    rules = (*static_rules(static), *dynamic_rules(dynamic))
    return {rule.name: tuple(str(rule.pattern).split(" | ")) for rule in rules}


def _equal_shapes(match: Match) -> bool | str:
    other, add = match.edges["y"]
    return same_shape(match, other, add)


def _equal_factors(match: Match) -> bool | str:
    (left, node), (right, _) = match.edges["x"], match.edges["y"]
    equal = same_shape(match, left, node) is True and same_shape(match, right, node) is True
    return True if equal else "its operands are not two tensors of its own shape"


_KERNELS = frozenset({"conv1d", "conv2d", "convolution", "linear", "matmul"})


def _before_a_kernel(match: Match) -> bool | str:
    """A reshape whose result, possibly reshaped again, goes into an int8 kernel."""
    waiting, seen = [match.root], {match.root}
    while waiting:
        for user in waiting.pop().users:
            name = short_name(user.target) if user.op == "call_function" else ""
            if name in _KERNELS:
                return True
            if user.target in _RESHAPES and user not in seen:
                seen.add(user)
                waiting.append(user)
    return "no int8 kernel reads it"
