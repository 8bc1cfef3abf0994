"""Inductor on x86 CPUs: oneDNN's int8 convolutions and linear layers.

Activations are u8 (affine, per tensor), weights s8 (symmetric, per output channel). An op's output is quantized by its
consumer: where nobody wants integers, the kernel answers in float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch.fx import Node

from quant2e.config import QuantizationConfig
from quant2e.dataflow import operand
from quant2e.errors import AnnotationError
from quant2e.observer import PlaceholderObserver
from quant2e.pattern import Match, Op, Pattern, op, short_name
from quant2e.specs import PER_CHANNEL_SCHEMES, QuantizationSpec
from quantizers import families as f
from quantizers.conditions import same_shape, spatial
from quantizers.configurable import ConfigurableQuantizer
from quantizers.isa import InstructionSet, detect
from quantizers.observers import activation_observer, weight_observer
from quantizers.rule import Follow, Rule, Same

aten = torch.ops.aten


def get_default_x86_inductor_quantization_config(
    is_qat: bool = False, is_dynamic: bool = False, reduce_range: bool | None = None
) -> QuantizationConfig:
    """u8 activations, s8 weights per output channel. Equal arguments give equal configs.

    ``is_dynamic``: activations get their parameters at run time. ``reduce_range``: activations use 0..127, with which
    no kernel saturates; None decides for this machine (see `quantizers.isa`).
    ``is_qat``: the specs make fake-quantizers, for `quant2e.prepare_qat_pt2e`.
    """
    return _config(is_dynamic, detect().saturates if reduce_range is None else reduce_range, is_qat)


def get_x86_inductor_linear_dynamic_fp16_config() -> QuantizationConfig:
    """Weights of linear in float16, activations float32: half the bytes, for a kernel that widens them as it multiplies."""
    return _half_config()


@lru_cache
def _half_config() -> QuantizationConfig:
    return QuantizationConfig(None, None, QuantizationSpec(torch.float16, PlaceholderObserver), None)


@lru_cache
def _config(is_dynamic: bool, reduce_range: bool, is_qat: bool = False) -> QuantizationConfig:
    activation = QuantizationSpec(
        dtype=torch.uint8,
        observer_or_fake_quant_ctr=activation_observer(is_dynamic, is_qat),
        quant_min=0,
        quant_max=127 if reduce_range else 255,
        qscheme=torch.per_tensor_affine,
        is_dynamic=is_dynamic,
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=weight_observer(True, is_qat),
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    return QuantizationConfig(activation, None if is_dynamic else activation, weight, None, is_qat)


class X86InductorQuantizer(ConfigurableQuantizer):
    """Annotates what Inductor lowers to oneDNN's int8 kernels on x86.

    Static: conv1d, conv2d and linear with fused activations and additions; cat, pooling and reshapes between them;
    matmul where it is asked for by name. Dynamic: linear. Float16 weights: linear. ``isa`` describes another machine than this one.
    """

    has_linear: ClassVar[bool] = True
    float_ops: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            [
                "add",
                "sub",
                "mul",
                "div",
                "relu",
                "gelu",
                "silu",
                "hardswish",
                "hardtanh",
                "sigmoid",
                "tanh",
                "softmax",
                "layer_norm",
                "rms_norm",
                "batch_norm",
                "group_norm",
                "scaled_dot_product_attention",
                "bmm",
                "mean",
                "permute",
                "transpose",
            ],
            "Inductor computes it in float, fused with its neighbours",
        ),
        **dict.fromkeys(
            ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "conv3d"),
            "oneDNN's int8 path in Inductor does not have it",
        ),
        **dict.fromkeys(("embedding", "embedding_bag"), "a lookup; EmbeddingQuantizer stores tables as int8"),
    }

    def __init__(self, isa: InstructionSet | None = None) -> None:
        super().__init__()
        self._isa = isa

    def base_config(self, *, is_dynamic: bool, is_qat: bool) -> QuantizationConfig:
        """The default configuration, with the range of activations that this machine multiplies exactly."""
        return get_default_x86_inductor_quantization_config(is_qat=is_qat, is_dynamic=is_dynamic)

    def accept(self, config: Any) -> Any:
        """Refuses what the kernels cannot take."""
        activation, weight = config.input_activation, config.weight
        if _is_half(config):
            return config
        if activation is None:
            raise AnnotationError(
                "a config without input_activation is weight-only, which Inductor on x86 lowers for float16 weights of "
                "linear only: get_x86_inductor_linear_dynamic_fp16_config()"
            )
        if activation.dtype is not torch.uint8:
            raise AnnotationError(
                f"input_activation has dtype {activation.dtype}; this backend computes on torch.uint8"
            )
        if weight is None or weight.dtype is not torch.int8 or weight.qscheme not in PER_CHANNEL_SCHEMES:
            raise AnnotationError(
                "the weight must be torch.int8 per channel: Inductor lowers no other kind to integers"
            )
        return config

    def table(self, config: Any) -> Sequence[Rule]:
        """The rules of the backend for one configuration."""
        if _is_half(config):
            return (Rule(f.linear, {"w": config.weight}, name="linear, float16 weight"),)
        return _dynamic(config) if config.input_activation.is_dynamic else _static(config)

    def notes_on_configs(self) -> Sequence[str]:
        """Which range activations use, and why."""
        isa = self._isa or detect()
        notes = []
        for config in self.configs():
            if _is_half(config):
                continue
            top = config.input_activation.quant_max
            if top is not None and top <= 127:
                why = "would saturate" if isa.saturates else "would not saturate"
                notes.append(f"activations use 0..{top}: on a full range the int8 kernels {why} on {isa.name}")
            elif isa.saturates:
                notes.append(
                    f"WARNING: activations use 0..{top}, and the int8 kernels saturate on {isa.name}: results may be "
                    "wrong there; reduce_range=True is exact"
                )
            else:
                notes.append(f"activations use 0..{top}: {isa.name} multiplies full ranges exactly")
        return notes

    @classmethod
    def quantization_capabilities(cls) -> Mapping[str, Sequence[str]]:
        """Rule → patterns, for a static and a dynamic configuration."""
        rules = (*_static(_config(False, False)), *_dynamic(_config(True, False)))
        return {rule.name: tuple(str(rule.pattern).split(" | ")) for rule in rules}


def _is_half(config: Any) -> bool:
    weight = config.weight
    return config.input_activation is None and weight is not None and weight.dtype is torch.float16


def _no_more_than_2d(node: Node) -> bool | str:
    if operand(node, "transposed"):
        return "Inductor does not lower transposed convolutions to integers"
    return True if spatial(node) <= 2 else "Inductor lowers convolutions in one and two dimensions only"


_CONVOLUTION = op(aten.convolution.default, when=_no_more_than_2d)(f.x, f.w, f.b)
_CONV_2D = f.conv2d | _CONVOLUTION
_CONV_UNARY = op(
    aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.hardswish.default, aten.silu.default
)
_LINEAR_UNARY = op(aten.relu.default, aten.gelu.default)


def _added(product: Pattern) -> Pattern:
    total: Op = f.add([product, f.y])
    return f.relu(total) | total


def _static(config: Any) -> tuple[Rule, ...]:
    act, product = config.input_activation, {"x": config.input_activation, "w": config.weight}
    moved = {"x": Follow(act)}
    pools = f.max_pool2d(f.x) | f.avg_pool2d(f.x) | f.adaptive_avg_pool2d(f.x)
    reshapes = op(aten.flatten.using_ints, aten.view.default, aten.reshape.default)(f.x)
    return (
        Rule(_added(f.conv2d), {**product, "y": act}, None, _equal_shapes, "conv + add"),
        # int8 conv1d has no fused activation but relu.
        Rule(_CONV_UNARY(_CONV_2D) | f.relu(f.conv1d) | _CONV_2D | f.conv1d, product, name="conv"),
        Rule(_added(f.linear), product, None, _equal_shapes, "linear + add"),
        Rule(_LINEAR_UNARY(f.linear) | f.linear, product, name="linear"),
        Rule(op(aten.matmul.default)(f.x, f.y), {"x": act, "y": act}, name="matmul", opt_in=True),
        Rule(pools, moved, Same("x"), name="pool"),
        Rule(f.cat(f.x), {"x": Follow(act, every=True)}, Same("x"), name="cat"),
        Rule(reshapes, moved, Same("x"), _before_a_kernel, "reshape"),
    )


def _dynamic(config: Any) -> tuple[Rule, ...]:
    return (Rule(f.linear, {"x": config.input_activation, "w": config.weight}, name="dynamic linear"),)


def _equal_shapes(match: Match) -> bool | str:
    other, add = match.edges["y"]
    return same_shape(match, other, add)


_KERNELS = frozenset({"conv1d", "conv2d", "convolution", "linear", "matmul"})
_RESHAPES = frozenset({"flatten", "view", "reshape"})


def _before_a_kernel(match: Match) -> bool | str:
    """A reshape whose result, possibly reshaped again, goes into an int8 kernel."""
    waiting, seen = [match.root], {match.root}
    while waiting:
        for user in waiting.pop().users:
            name = short_name(user.target) if user.op == "call_function" else ""
            if name in _KERNELS:
                return True
            if name in _RESHAPES and user not in seen:
                seen.add(user)
                waiting.append(user)
    return "no int8 kernel reads it"
