"""Rules of Inductor on x86: what becomes oneDNN's int8 kernels, and what carries integers between.

An op's output is quantized by its consumer: where nobody wants integers, the kernel answers in float. So an activation
that no kernel can take in costs nothing: it is computed in float behind the kernel, fused into what follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from quant2e.annotation.pattern import Match, Op, Pattern, op, short_name
from quant2e.annotation.specs import group_size_of
from quant2e.graph.dataflow import literal, operand
from quantizers.kit import families as f
from quantizers.kit.conditions import batched, in_eval_mode, same_shape, spatial
from quantizers.kit.rule import Follow, Rule, Same

aten = torch.ops.aten


def _of(kind: str, *dimensions: int) -> Op:
    """The convolutions of one kind, ``"conv"`` or ``"conv_transpose"``, as modules and as ``aten.convolution``."""
    named = {n: getattr(aten, f"{kind}{n}d") for n in dimensions}
    overloads = [getattr(packet, name) for packet in named.values() for name in packet.overloads()]

    def is_of_that_kind(node: Node) -> bool | str:
        if node.target is not aten.convolution.default:
            return batched(node)
        if bool(operand(node, "transposed")) is not (kind == "conv_transpose"):
            return "it is a transposed convolution" if kind == "conv" else "it is no transposed convolution"
        n = spatial(node)
        return n in dimensions or f"it is a convolution in {n} dimension(s)"

    return op(*overloads, aten.convolution.default, when=is_of_that_kind)(f.x, f.w, f.b)


def _with_its_numbers(node: Node) -> bool | str:
    if short_name(node.target).removesuffix("_") != "clamp":
        return True
    bounds = (literal(node, "min"), literal(node, "max"))
    return True if all(isinstance(b, int | float) for b in bounds) else "it has one bound, which no kernel takes in"


_CONV, _CONV_3D = _of("conv", 1, 2), _of("conv", 3)
_TRANSPOSED, _TRANSPOSED_3D = _of("conv_transpose", 1, 2), _of("conv_transpose", 3)
_CONV_UNARY = op(
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.hardswish.default, aten.silu.default,
    aten.clamp.default, when=_with_its_numbers,
)  # fmt: skip
_LINEAR_UNARY = op(
    *_CONV_UNARY.targets, aten.gelu.default, aten.leaky_relu.default, aten.tanh.default, when=_with_its_numbers
)
_RESHAPES = (aten.flatten.using_ints, aten.view.default, aten.reshape.default)
"""The reshapes that carry integers to an int8 kernel."""
_DROPOUT = op(aten.dropout.default, aten.feature_dropout.default, when=in_eval_mode)

_IMAGES = ("relu", "relu6", "hardtanh", "hardswish", "silu")
FUSED = {
    **dict.fromkeys(("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "convolution"), _IMAGES),
    "linear": (*_IMAGES, "gelu", "leaky_relu", "tanh"),
}
"""Product → activations that become part of its int8 kernel, clamps to two numbers among them."""

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
    pools = f.max_pool(f.x) | f.avg_pool(f.x) | f.adaptive_avg_pool(f.x)
    return (
        Rule(_added(f.conv2d), {**product, "y": act}, None, _equal_shapes, "conv + add"),
        *_convolutions(config),
        Rule(_added(_DROPOUT(f.linear) | f.linear), product, None, _equal_shapes, "linear + add"),
        Rule(_LINEAR_UNARY(f.linear) | f.linear, product, name="linear"),
        Rule(op(aten.matmul.default, aten.bmm.default)(f.x, f.y), {"x": act, "y": act}, name="matmul", opt_in=True),
        Rule(f.scores, {"x": act, "y": act}, name="attention scores", opt_in=True),
        Rule(f.mul(f.x, f.y), {"x": act, "y": act}, when=_equal_factors, name="mul", opt_in=True),
        Rule(pools, moved, Same("x"), name="pool"),
        Rule(f.cat(f.x), {"x": Follow(act, every=True)}, Same("x"), name="cat"),
        Rule(op(*_RESHAPES)(f.x), moved, Same("x"), _before_a_kernel, "reshape"),
    )


def dynamic_rules(config: Any) -> tuple[Rule, ...]:
    """Convolutions and linear layers, with activations that get their parameters at run time."""
    product = {"x": config.input_activation, "w": config.weight}
    return (
        Rule(_added(_DROPOUT(f.linear) | f.linear), product, None, _equal_shapes, "dynamic linear + add"),
        Rule(_LINEAR_UNARY(f.linear) | f.linear, product, name="dynamic linear"),
        *_convolutions(config, "dynamic "),
    )


def _volume_last(image: Pattern, volume: Pattern) -> Pattern:
    """Kernels of three dimensions take in no activation; relu is what quantizing to unsigned integers does anyway."""
    return _CONV_UNARY(image) | image | f.relu(volume) | volume


def _convolutions(config: Any, kind: str = "") -> tuple[Rule, ...]:
    """Convolutions by themselves. The output channels of a transposed one are the second axis of its weight."""
    plain = {"x": config.input_activation, "w": config.weight}
    transposed = plain | {"w": replace(config.weight, ch_axis=1)}
    return (
        Rule(_volume_last(_CONV, _CONV_3D), plain, name=f"{kind}conv"),
        Rule(_volume_last(_TRANSPOSED, _TRANSPOSED_3D), transposed, name=f"{kind}transposed conv"),
    )


def weight_only_rules(config: Any) -> tuple[Rule, ...]:
    """Linear with weights in float16, in 8 bits or fewer per output channel, or in groups."""
    kind = "float16 weight" if config.weight.dtype is torch.float16 else "weight only"
    whole = partial(_whole_groups, group_size_of(config.weight))
    return (Rule(f.linear, {"w": config.weight}, when=whole, name=f"linear, {kind}"),)


def grouped_rules(config: Any) -> tuple[Rule, ...]:
    """Linear with 4-bit weights in groups, by rows that are quantized at run time, each by itself."""
    whole = partial(_whole_groups, group_size_of(config.weight))
    product = {"x": config.input_activation, "w": config.weight}
    return (Rule(f.linear, product, when=whole, name="dynamic linear, weight in groups"),)


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


_KERNELS = frozenset({*FUSED, "conv3d", "conv_transpose3d", "matmul"})


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
