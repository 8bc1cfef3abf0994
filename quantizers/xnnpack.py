"""XNNPACK, the CPU delegate of ExecuTorch: signed 8-bit activations, symmetric weights.

The table says what the delegate runs on integers and under which limits; everything else it runs, or leaves, in float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch.fx import Node

from quant2e.config import QuantizationConfig
from quant2e.dataflow import operand
from quant2e.errors import AnnotationError
from quant2e.pattern import Either, Match, Op, op
from quant2e.specs import PER_CHANNEL_SCHEMES, QuantizationSpec
from quantizers import families as f
from quantizers.conditions import operand_value, spatial, value, zero_padding
from quantizers.configurable import ConfigurableQuantizer
from quantizers.observers import activation_observer, weight_observer
from quantizers.provenance import literal
from quantizers.rule import Derived, Follow, Rule, Same, accumulator_scale

aten = torch.ops.aten

ACTIVATION_EPS = 2**-12
"""Smallest scale of a static activation: the delegate bounds the ratios of scales."""

DYNAMIC_EPS = torch.finfo(torch.float32).eps
"""Smallest scale of a dynamic activation."""

WEIGHT_EPS = 2**-16
"""Smallest scale of a weight. The delegate stores a bias as int32 with scale s_x·s_w ≥ 2⁻²⁸, so |bias| < 8 always fits."""


@lru_cache
def get_symmetric_quantization_config(
    is_per_channel: bool = False,
    is_qat: bool = False,
    is_dynamic: bool = False,
    act_qmin: int = -128,
    act_qmax: int = 127,
    weight_qmin: int = -127,
    weight_qmax: int = 127,
) -> QuantizationConfig:
    """int8 activations (affine, per tensor) and int8 weights (symmetric, per tensor or per output channel).

    ``is_dynamic``: activations get their parameters at run time, and results stay float. Equal arguments give equal
    configs. ``is_qat``: the specs make fake-quantizers, for `quant2e.prepare_qat_pt2e`.
    """
    activation = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=activation_observer(is_dynamic, is_qat).with_args(
            eps=DYNAMIC_EPS if is_dynamic else ACTIVATION_EPS
        ),
        quant_min=act_qmin,
        quant_max=act_qmax,
        qscheme=torch.per_tensor_affine,
        is_dynamic=is_dynamic,
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=weight_observer(is_per_channel, is_qat).with_args(eps=WEIGHT_EPS),
        quant_min=weight_qmin,
        quant_max=weight_qmax,
        qscheme=torch.per_channel_symmetric if is_per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if is_per_channel else None,
    )
    return QuantizationConfig(activation, None if is_dynamic else activation, weight, None, is_qat)


def _up_to_two_dimensions(node: Node) -> bool | str:
    if operand(node, "transposed"):
        return "it is a transposed convolution"
    dimensions = spatial(node)
    return True if dimensions <= 2 else f"XNNPACK has no convolution in {dimensions} dimensions"


def _deconvolution_2d(node: Node) -> bool | str:
    if not operand(node, "transposed"):
        return "it is not a transposed convolution"
    return True if spatial(node) == 2 else "XNNPACK has transposed convolutions in two dimensions only"


def _stride_within_kernel(node: Node) -> bool | str:
    kernel, stride = _pair(literal(node, "kernel_size")), _pair(literal(node, "stride") or literal(node, "kernel_size"))
    if stride[0] > kernel[0] or stride[1] > kernel[1]:
        return f"its stride {stride} exceeds its kernel {kernel}"
    if operand(node, "ceil_mode") and not all(isinstance(size, int) for size in value(node).shape):
        return "ceil_mode needs static shapes"
    return True


def _pair(size: int | list[int]) -> tuple[int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes[0], sizes[-1]


def _over_image(node: Node) -> bool | str:
    """A mean over the two last of four dimensions that keeps them."""
    before, dims = operand_value(node, 0), literal(node, "dim")
    if before is None or before.dim() != 4 or sorted(d % 4 for d in dims or ()) != [2, 3]:
        return "XNNPACK averages over the two last of four dimensions only"
    if not operand(node, "keepdim"):
        return "XNNPACK averages with keepdim=True only"
    return True if operand(node, "dtype") is None else "it changes the dtype"


def _to_one_pixel(node: Node) -> bool | str:
    before = operand_value(node, 0)
    if before is None or before.dim() != 4 or tuple(value(node).shape[2:]) != (1, 1):
        return "XNNPACK has average pooling to one pixel only, on four dimensions"
    return True


def _ungrouped(match: Match) -> bool | str:
    groups = operand(match.edges["w"][1], "groups")
    return True if groups == 1 else f"with groups={groups} XNNPACK takes per-tensor weights only"


def _dense_2d(match: Match) -> bool | str:
    _, node = match.edges["w"]
    if spatial(node) != 2:
        return "XNNPACK has dynamic convolutions in two dimensions only"
    groups = operand(node, "groups")
    before = operand_value(node, 0)
    depthwise = groups > 1 and (before is None or before.shape[1] == groups)
    return "XNNPACK has no dynamic depthwise convolution" if depthwise else True


def _of_several(match: Match) -> bool | str:
    producers = {producer for producer, _ in match.operands["x"]}
    return True if len(producers) > 1 else "XNNPACK concatenates at least two different tensors"


def _pads_image(node: Node) -> bool | str:
    """A padding that the delegate computes with the convolution behind it: zeros, around the spatial dimensions."""
    if (answer := zero_padding(node)) is not True:
        return answer
    sizes, image = literal(node, "pad"), operand_value(node, 0)
    if sizes is None or image is None or any(not isinstance(size, int) or size < 0 for size in sizes):
        return "its sizes are not fixed, or it crops"
    spatial_only = not any(sizes[2 * (image.dim() - 2) :])
    return True if spatial_only and any(sizes) else "it does not pad the spatial dimensions"


_PADDED = op(aten.pad.default, aten.constant_pad_nd.default, when=_pads_image)(f.x)
_CONVOLUTION = op(aten.convolution.default, when=_up_to_two_dimensions)(f.x, f.w, f.b)
_DECONVOLUTION = op(aten.convolution.default, when=_deconvolution_2d)(f.x, f.w, f.b)
_MAX_POOL = op(aten.max_pool2d.default, when=_stride_within_kernel)
_MEAN = op(aten.mean.dim, when=_over_image)
_GLOBAL_POOL = op(aten.adaptive_avg_pool2d.default, when=_to_one_pixel)
_FUSED_CLAMP = op(aten.relu.default, aten.hardtanh.default, aten.relu6.default)
_CLAMP = op(aten.relu.default, aten.hardtanh.default, aten.relu6.default, aten.clamp.default)


ACCUMULATOR = Derived(("x", "w"), accumulator_scale, dtype=torch.float32)
"""A bias stays float, on the grid to which XNNPACK rounds it: the Q/DQ graph then computes what the delegate does."""


def _clamped(pattern: Op) -> Either:
    return _FUSED_CLAMP(pattern) | pattern


class XNNPACKQuantizer(ConfigurableQuantizer):
    """Annotates what ExecuTorch's XNNPACK delegate runs on 8-bit integers.

    Static: convolutions, transposed convolutions in two dimensions and linear, with a fused relu or clamp; add, sub, mul;
    cat, pooling, clamps and ops that move values, where they continue a quantized region. Dynamic: linear and ordinary
    two-dimensional convolutions. Weight-only configurations are refused: the delegate has no such kernels.
    """

    has_linear: ClassVar[bool] = True
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32, torch.float16})
    float_ops: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            [
                "gelu",
                "softmax",
                "sigmoid",
                "tanh",
                "silu",
                "hardswish",
                "hardsigmoid",
                "elu",
                "leaky_relu",
                "prelu",
                "exp",
                "log",
                "sqrt",
                "rsqrt",
                "abs",
                "neg",
                "pow",
                "div",
                "avg_pool2d",
                "matmul",
                "bmm",
                "mm",
                "scaled_dot_product_attention",
                "layer_norm",
                "rms_norm",
                "batch_norm",
                "group_norm",
                "instance_norm",
                "upsample_bilinear2d",
                "upsample_nearest2d",
            ],
            "XNNPACK computes it in float",
        ),
        **dict.fromkeys(("conv3d", "conv_transpose1d", "conv_transpose3d"), "XNNPACK has no such convolution"),
        **dict.fromkeys(
            ("embedding", "embedding_bag"), "XNNPACK has no lookup; EmbeddingQuantizer stores tables as int8"
        ),
    }

    def base_config(self, *, is_dynamic: bool, is_qat: bool) -> QuantizationConfig:
        """`get_symmetric_quantization_config`, with weights per output channel."""
        return get_symmetric_quantization_config(is_per_channel=True, is_qat=is_qat, is_dynamic=is_dynamic)

    def accept(self, config: Any) -> Any:
        """Refuses what the delegate cannot run; widens per-tensor weights of dynamic configurations."""
        activation, weight = config.input_activation, config.weight
        if activation is None:
            raise AnnotationError(
                "a config without input_activation is weight-only, for which XNNPACK has no kernels; "
                "use get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)"
            )
        for name, spec in (("input_activation", activation), ("weight", weight)):
            if spec is not None and spec.dtype is not torch.int8:
                raise AnnotationError(f"{name} has dtype {spec.dtype}; XNNPACK computes on torch.int8 only")
        if weight is not None and weight.qscheme in (torch.per_channel_affine, torch.per_tensor_affine):
            raise AnnotationError(
                f"the weight is {weight.qscheme}; XNNPACK ignores zero points of weights: use a symmetric one"
            )
        if activation.is_dynamic and weight is not None and weight.qscheme not in PER_CHANNEL_SCHEMES:
            self._own_notes.append("dynamic: weights are per channel, since XNNPACK takes no per-tensor weights there")
            wide = replace(
                weight,
                qscheme=torch.per_channel_symmetric,
                ch_axis=0,
                observer_or_fake_quant_ctr=weight_observer(True, config.is_qat).with_args(eps=WEIGHT_EPS),
            )
            return replace(config, weight=wide)
        return config

    def table(self, config: Any) -> Sequence[Rule]:
        """The rules of the delegate for one configuration."""
        return _dynamic(config) if config.input_activation.is_dynamic else _static(config)

    @classmethod
    def quantization_capabilities(cls) -> Mapping[str, Sequence[str]]:
        """Rule → patterns, for a static and a dynamic configuration."""
        static = _static(get_symmetric_quantization_config(is_per_channel=True))
        dynamic = _dynamic(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
        return {rule.name: tuple(str(rule.pattern).split(" | ")) for rule in (*static, *dynamic)}


def _static(config: Any) -> tuple[Rule, ...]:
    act, out, weight = config.input_activation, config.output_activation, config.weight
    product: dict[str, Any] = {"x": act, "w": weight}
    if act is not None and weight is not None:
        product["b"] = ACCUMULATOR
    per_channel = weight is not None and weight.qscheme in PER_CHANNEL_SCHEMES
    deconv = product | {"w": replace(weight, ch_axis=1) if per_channel else weight}
    limit = _ungrouped if per_channel else None
    padded = _clamped(f.conv1d(_PADDED, f.w, f.b)) | _clamped(f.conv2d(_PADDED, f.w, f.b))
    return (
        Rule(padded, product, out, name="pad + conv"),
        Rule(_clamped(f.conv1d) | _clamped(f.conv2d) | _clamped(_CONVOLUTION), product, out, name="conv"),
        Rule(_clamped(f.conv_transpose2d) | _clamped(_DECONVOLUTION), deconv, out, limit, "conv_transpose2d"),
        Rule(_clamped(f.linear), product, out, name="linear"),
        Rule(f.relu(f.add(f.x, f.y)) | f.add(f.x, f.y), {"x": act, "y": act}, out, name="add"),
        Rule(f.sub(f.x, f.y), {"x": act, "y": act}, out, name="sub"),
        Rule(f.mul(f.x, f.y), {"x": act, "y": act}, out, name="mul"),
        Rule(f.cat(f.x), {"x": Follow(act)}, Same("x"), _of_several, "cat"),
        Rule(_MAX_POOL(f.x), {"x": Follow(act)}, Same("x"), name="max_pool2d"),
        Rule(_MEAN(f.x) | _GLOBAL_POOL(f.x), {"x": Follow(act)}, out, name="mean"),
        Rule(_CLAMP(f.x), {"x": Follow(act)}, Same("x"), name="clamp"),
        Rule(f.moves, {"x": Follow(act)}, Same("x"), name="moves"),
    )


def _dynamic(config: Any) -> tuple[Rule, ...]:
    product = {"x": config.input_activation, "w": config.weight}
    return (
        Rule(f.linear, product, name="dynamic linear"),
        Rule(f.conv2d | _CONVOLUTION, product, None, _dense_2d, "dynamic conv2d"),
    )
