"""Rules of XNNPACK: what it runs on integers, for a static and for a dynamic configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from quant2e.annotation.granularity import PerAxis, PerToken
from quant2e.annotation.pattern import Either, Match, Op, op
from quant2e.annotation.specs import PER_CHANNEL_SCHEMES, group_size_of
from quantizers.kit import families as f
from quantizers.kit.observers import with_scale_for_each
from quantizers.kit.rule import Derived, Follow, Rule, Same, accumulator_scale
from quantizers.xnnpack import limits

aten = torch.ops.aten

_PADDED = op(aten.pad.default, aten.constant_pad_nd.default, when=limits.pads_image)(f.x)
_CONVOLUTION = op(aten.convolution.default, when=limits.up_to_two_dimensions)(f.x, f.w, f.b)
_DECONVOLUTION = op(aten.convolution.default, when=limits.deconvolution_2d)(f.x, f.w, f.b)
_MAX_POOL = op(aten.max_pool2d.default, when=limits.stride_within_kernel)
_MEAN = op(aten.mean.dim, when=limits.over_image)
_MAX_POOL_1D = op(aten.max_pool1d.default, when=limits.pools_sequences)
_GLOBAL_POOL = op(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, when=limits.to_one_value)
_FUSED_CLAMP = op(aten.relu.default, aten.hardtanh.default, aten.relu6.default)
_CLAMP = op(*_FUSED_CLAMP.targets, *f.clamp.targets)

PRODUCTS = frozenset().union(
    *(pattern.targets for pattern in (f.conv1d, f.conv2d, _CONVOLUTION, f.conv_transpose2d, f.linear))
)
"""Ops with a weight: what computes, and what a clamp is fused into."""

ELEMENTWISE = frozenset().union(*(pattern.targets for pattern in (f.add, f.sub, f.mul)))
"""Ops of two tensors, whose results have ranges of their own."""

CLAMPS = _CLAMP.targets

ACCUMULATOR = Derived(("x", "w"), accumulator_scale, dtype=torch.float32)
"""A bias stays float, on the grid to which XNNPACK rounds it: the Q/DQ graph then computes what the delegate does."""


def _clamped(pattern: Op) -> Either:
    return _FUSED_CLAMP(pattern) | pattern


Condition = Callable[[Match], bool | str]


def static_rules(config: Any, alone: Condition | None = None, moved: Condition | None = None) -> tuple[Rule, ...]:
    """Rules with numbers known beforehand.

    ``alone``: a condition on elementwise ops, which are not always worth quantizing by themselves. ``moved``: one on
    ops that move values, some of which the delegate does not have.
    """
    act, out, weight = config.input_activation, config.output_activation, config.weight
    product: dict[str, Any] = {"x": act, "w": weight}
    if act is not None and weight is not None:
        product["b"] = ACCUMULATOR
    per_channel = weight is not None and weight.qscheme in PER_CHANNEL_SCHEMES
    deconv = product | {"w": replace(weight, ch_axis=1) if per_channel else weight}
    limit = limits.ungrouped if per_channel else None
    padded = _clamped(f.conv1d(_PADDED, f.w, f.b)) | _clamped(f.conv2d(_PADDED, f.w, f.b))
    both, read = {"x": act, "y": act}, Follow(act, inputs=True, read=True)
    return (
        Rule(padded, product, out, name="pad + conv"),
        Rule(_clamped(f.conv1d) | _clamped(f.conv2d) | _clamped(_CONVOLUTION), product, out, name="conv"),
        Rule(_clamped(f.conv_transpose2d) | _clamped(_DECONVOLUTION), deconv, out, limit, "conv_transpose2d"),
        Rule(_clamped(f.linear), product, out, name="linear"),
        Rule(_clamped(f.add(f.x, f.y)), both, out, alone, "add"),
        Rule(_clamped(f.sub(f.x, f.y)), both, out, alone, "sub"),
        Rule(_clamped(f.mul(f.x, f.y)), both, out, alone, "mul"),
        Rule(f.cat(f.x), {"x": Follow(act, inputs=True)}, Same("x"), name="cat"),
        Rule(_MAX_POOL(f.x), {"x": read}, Same("x"), name="max_pool2d"),
        Rule(_MAX_POOL_1D(f.x), {"x": read}, Same("x"), name="max_pool1d"),
        Rule(_MEAN(f.x) | _GLOBAL_POOL(f.x), {"x": Follow(act, inputs=True)}, out, name="mean"),
        Rule(_CLAMP(f.x), {"x": Follow(act)}, Same("x"), name="clamp"),
        Rule(f.moves, {"x": read}, Same("x"), moved, "moves"),
    )


def is_four_bits(weight: Any) -> bool:
    """Whether XNNPACK stores a weight in 4 bits: it looks at the bounds alone."""
    return weight is not None and (weight.quant_min, weight.quant_max) == (-8, 7)


def dynamic_rules(config: Any) -> tuple[Rule, ...]:
    """Products with activations quantized at run time; results stay float.

    The runtime finds a scale for each row that a linear reads, and for each image that a convolution reads.
    """
    rows, images = (with_scale_for_each(config.input_activation, each) for each in (PerToken(), PerAxis(0)))
    product = {"x": rows, "w": config.weight}
    if is_four_bits(config.weight):
        size = group_size_of(config.weight)

        def limit(match: Match) -> bool | str:
            return limits.of_four_bits(match, size)

        return (Rule(f.linear, product, None, limit, "dynamic linear"),)
    convolution, turned = {**product, "x": images}, {"x": images, "w": replace(config.weight, ch_axis=1)}
    return (
        Rule(f.linear, product, name="dynamic linear"),
        Rule(f.conv2d | _CONVOLUTION, convolution, None, limits.dense_2d, "dynamic conv2d"),
        Rule(f.conv_transpose2d | _DECONVOLUTION, turned, None, limits.dense_2d, "dynamic conv_transpose2d"),
    )
