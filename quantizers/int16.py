"""Int16Quantizer: 16-bit activations and 8-bit weights, for hardware that computes 16x8.

Activations are s16 (symmetric, per tensor), weights s8 (symmetric, per output channel), as in TensorFlow Lite's 16x8
specification. No runtime that `lowering` knows has kernels for these: onnxruntime and Inductor compute such graphs in
float between the integers. The graph, its integer form and its ONNX file are what tools for such hardware read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from quant2e.annotation.config import QuantizationConfig
from quant2e.annotation.pattern import Either, Op, Pattern, op
from quant2e.annotation.specs import QuantizationSpec
from quant2e.errors import AnnotationError
from quant2e.graph.dataflow import operand
from quant2e.observers.measuring import MinMaxObserver
from quant2e.passes import run
from quantizers.kit import families as f
from quantizers.kit.observers import activation_observer, weight_observer
from quantizers.kit.rule import Follow, Rule, Same
from quantizers.kit.value_source import MASK_VALUE, Source, ValueSources
from quantizers.rewrites.scalars import scalars_as_tensors
from quantizers.settings.configurable import ConfigurableQuantizer

aten = torch.ops.aten

_CLAMP = op(*f.relu.targets, *f.hardtanh.targets, *f.clamp.targets)
_MATMUL = op(aten.matmul.default, aten.bmm.default)
_POOLS = f.max_pool(f.x)
_AVERAGES = f.avg_pool(f.x) | f.adaptive_avg_pool(f.x) | f.mean(f.x)


@lru_cache
def get_int16_quantization_config(is_qat: bool = False) -> QuantizationConfig:
    """s16 activations, s8 weights per output channel; both symmetric. Equal arguments give equal configs.

    Ranges are the extremes of the data: 16 bits have the room, and a histogram has not as many bins.

    ``is_qat``: the specs make fake-quantizers, for `quant2e.prepare_qat_pt2e`.
    """
    activation = QuantizationSpec(
        dtype=torch.int16,
        observer_or_fake_quant_ctr=activation_observer(False, True) if is_qat else MinMaxObserver.with_args(),
        quant_min=-32768,
        quant_max=32767,
        qscheme=torch.per_tensor_symmetric,
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=weight_observer(True, is_qat),
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    return QuantizationConfig(activation, activation, weight, None, is_qat)


class Int16Quantizer(ConfigurableQuantizer):
    """Annotates convolutions, linear layers and what lies between them for 16-bit activations and 8-bit weights.

    Convolutions and linear, with a clamp behind them; matrix products of two activations; add, sub, mul, also with a
    number; cat, pooling, means, clamps, and ops that move values. The rest stays float. Static only.
    """

    has_linear: ClassVar[bool] = True
    recipes: ClassVar[Sequence[str]] = ("a16w8", "a16w8-qat")

    def base_config(self, *, is_dynamic: bool, is_qat: bool) -> QuantizationConfig:
        """`get_int16_quantization_config`. Raises `AnnotationError` for a dynamic one."""
        if is_dynamic:
            raise AnnotationError("the ops that find scales at run time know int8 and uint8")
        return get_int16_quantization_config(is_qat)

    def accept(self, config: Any) -> Any:
        """Refuses other numbers than symmetric s16 activations and symmetric s8 weights."""
        activation, weight = config.input_activation, config.weight
        numbers = (getattr(activation, "dtype", None), getattr(activation, "qscheme", None))
        if numbers != (torch.int16, torch.per_tensor_symmetric) or activation.is_dynamic:
            raise AnnotationError(
                f"activations are {numbers[0]}, {numbers[1]}; here they are static torch.int16, per_tensor_symmetric: "
                "XNNPACKQuantizer and X86InductorQuantizer quantize to 8 bits"
            )
        if weight is None or weight.dtype is not torch.int8 or weight.qscheme not in _SYMMETRIC:
            raise AnnotationError("weights are symmetric torch.int8, per tensor or per output channel")
        return config

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Spell products as linear, and numbers as tensors; no value changes."""
        model = super().transform_for_annotation(model)
        sources = ValueSources(model)

        def of_number(node: Node) -> bool:
            number = operand(node, 1)
            data = sources.source[node] is Source.DATA and sources.objection(node) is None
            small = isinstance(number, int | float) and abs(number) < MASK_VALUE
            return data and small and self.choose(node).config is not None

        run(model, (scalars_as_tensors(of_number),))
        return model

    def table(self, config: Any) -> Sequence[Rule]:
        """The rules for one configuration."""
        act, out, weight = config.input_activation, config.output_activation, config.weight
        product, both, follow = {"x": act, "w": weight}, {"x": act, "y": act}, {"x": Follow(act, inputs=True)}
        return (
            Rule(_clamped(f.conv1d) | _clamped(f.conv2d) | _clamped(f.convolution), product, out, name="conv"),
            Rule(_clamped(f.linear), product, out, name="linear"),
            Rule(_MATMUL(f.x, f.y), both, out, name="matmul"),
            Rule(_clamped(f.add(f.x, f.y)), both, out, name="add"),
            Rule(f.sub(f.x, f.y), both, out, name="sub"),
            Rule(f.mul(f.x, f.y), both, out, name="mul"),
            Rule(f.cat(f.x), follow, Same("x"), name="cat"),
            Rule(_AVERAGES, follow, out, name="average"),
            Rule(_POOLS | _CLAMP(f.x), {"x": Follow(act)}, Same("x"), name="pool, clamp"),
            Rule(f.moves, {"x": Follow(act, inputs=True, read=True)}, Same("x"), name="moves"),
        )


_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)


def _clamped(pattern: Op | Pattern) -> Either:
    return _CLAMP(pattern) | pattern
