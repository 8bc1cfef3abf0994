"""XNNPACK quantizer: what ExecuTorch's XNNPACK delegate runs on integers, annotated so that it is run there.

The table (`quantizers.xnnpack.rules`) says what the delegate takes, its limits (`quantizers.xnnpack.limits`) what it
refuses; everything else it runs, or leaves, in float, and says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from quant2e.annotation.config import QuantizationConfig
from quant2e.annotation.pattern import Match, roots, short_name
from quant2e.annotation.specs import PER_CHANNEL_SCHEMES, group_size_of
from quant2e.errors import AnnotationError
from quant2e.graph.constants import Constants
from quant2e.graph.dataflow import operand
from quant2e.passes import run
from quantizers.kit.composites import composites
from quantizers.kit.families import MOVES, linear
from quantizers.kit.float_regions import float_tail, stands_between_float_ops
from quantizers.kit.observers import weight_observer
from quantizers.kit.rule import Rule
from quantizers.kit.value_source import MASK_VALUE, Source, ValueSources
from quantizers.rewrites.clamps import clamps_as_fused
from quantizers.rewrites.scalars import WITH_NUMBERS, scalars_as_tensors
from quantizers.settings.configurable import ConfigurableQuantizer
from quantizers.xnnpack.config import WEIGHT_EPS, get_symmetric_quantization_config
from quantizers.xnnpack.limits import moves_inside
from quantizers.xnnpack.rules import CLAMPS, ELEMENTWISE, PRODUCTS, dynamic_rules, is_four_bits, static_rules

_FLOAT = "XNNPACK computes it in float"
_BETWEEN = "it stands between ops that XNNPACK computes in float"
_FLOAT_OPS = (
    "gelu", "softmax", "sigmoid", "tanh", "silu", "hardswish", "hardsigmoid", "elu", "leaky_relu", "prelu", "exp",
    "log", "sqrt", "rsqrt", "abs", "neg", "pow", "div", "avg_pool1d", "avg_pool2d", "matmul", "bmm", "mm",
    "scaled_dot_product_attention", "layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm",
    "upsample_bilinear2d",
)  # fmt: skip

_TYPICAL = get_symmetric_quantization_config(is_per_channel=True)
_QUANTIZED = frozenset().union(*(roots(rule.pattern) for rule in static_rules(_TYPICAL)))
"""Targets that some static rule ends in."""


def _moves(node: Node) -> bool:
    return node.target in MOVES


def _floats(node: Node) -> bool:
    known = node.target in _QUANTIZED or node.target in WITH_NUMBERS or _is_getitem(node)
    return node.op == "call_function" and not known


def _is_getitem(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _passes(node: Node) -> bool:
    elementwise = node.target in ELEMENTWISE or node.target in WITH_NUMBERS
    return elementwise or node.target in CLAMPS or _moves(node) or _is_getitem(node)


def _differs_at_run_time(activation: Any) -> bool:
    bounds = (activation.quant_min, activation.quant_max)
    return bounds not in ((-128, 127), (None, None)) or activation.qscheme is torch.per_tensor_symmetric


class XNNPACKQuantizer(ConfigurableQuantizer):
    """Annotates what ExecuTorch's XNNPACK delegate runs on 8-bit integers.

    Static: convolutions, transposed convolutions in two dimensions and linear; add, sub, mul, also with a number; all
    of these with a fused relu or clamp; cat, pooling, clamps and ops that move values, where they continue a quantized
    region. Activations that a model spells out (``x * sigmoid(x)``) and normalisations stay whole, in float. Dynamic:
    linear, with a scale for each row (token) that it reads, and convolutions in two dimensions that are not depthwise,
    also transposed, with a scale for each image of a batch, which is what the runtime finds. Weight-only configurations
    are refused: the delegate has no such kernels.

    ``float_tail``: what a detector does behind its last convolution or linear, from the first sum or product on, stays
    float: box decoding mixes ranges that no common scale holds.
    """

    has_linear: ClassVar[bool] = True
    takes_groups: ClassVar[bool] = True
    recipes: ClassVar[Sequence[str]] = ("w8a8", "w8a8-dynamic", "w4a8-dynamic", "w4a8-dynamic-g32")
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32, torch.float16})
    float_ops: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(_FLOAT_OPS, _FLOAT),
        "conv3d": "XNNPACK convolves in one and two dimensions only",
        **dict.fromkeys(
            ("conv_transpose1d", "conv_transpose3d"), "XNNPACK has transposed convolutions in two dimensions only"
        ),
        **dict.fromkeys(
            ("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d"),
            "XNNPACK pools in one and two dimensions only",
        ),
        **dict.fromkeys(
            ("embedding", "embedding_bag"), "XNNPACK has no lookup; EmbeddingQuantizer stores tables as int8"
        ),
    }

    def __init__(self, *, float_tail: bool = False) -> None:
        super().__init__()
        self.float_tail = float_tail
        self._whole: dict[str, str] = {}
        self._constants = Constants(Graph())

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
                hint = "; Int16Quantizer quantizes activations to 16 bits" if spec.dtype is torch.int16 else ""
                raise AnnotationError(f"{name} has dtype {spec.dtype}; XNNPACK computes on torch.int8 only{hint}")
        if weight is not None and weight.qscheme in (torch.per_channel_affine, torch.per_tensor_affine):
            raise AnnotationError(
                f"the weight is {weight.qscheme}; XNNPACK ignores zero points of weights: use a symmetric one"
            )
        if weight is not None:
            weight = self._stored(weight, activation.is_dynamic)
            config = replace(config, weight=weight)
        if activation.is_dynamic and _differs_at_run_time(activation):
            self._own_notes.append("dynamic: activations are affine in [-128, 127], as XNNPACK quantizes at run time")
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

    def _stored(self, weight: Any, is_dynamic: bool) -> Any:
        """The weight with scales as XNNPACK stores them; raises for weights of 4 bits that it has no kernel for."""
        size = group_size_of(weight)
        if size is None:
            if is_four_bits(weight) and not is_dynamic:
                raise AnnotationError(
                    "a weight in [-8, 7] is stored in 4 bits, which XNNPACK multiplies with activations quantized at "
                    "run time only: use is_dynamic=True, or weight_qmin=-7 for 4 bits stored in 8"
                )
            return weight
        if not is_dynamic or not is_four_bits(weight) or size % 32:
            raise AnnotationError(
                f"weights in [{weight.quant_min}, {weight.quant_max}] and groups of {size}: XNNPACK takes groups of a "
                "multiple of 32 with weights in [-8, 7] and activations quantized at run time; use "
                "get_symmetric_quantization_config(is_dynamic=True, group_size=32)"
            )
        rounded = weight.observer_or_fake_quant_ctr.with_args(scale_dtype=torch.bfloat16)
        return replace(weight, observer_or_fake_quant_ctr=rounded)

    def table(self, config: Any) -> Sequence[Rule]:
        """The rules of the delegate for one configuration."""
        if config.input_activation.is_dynamic:
            return dynamic_rules(config)
        return static_rules(config, self._alone, self._stays_inside)

    @classmethod
    def quantization_capabilities(cls) -> Mapping[str, Sequence[str]]:
        """Rule → patterns, for a static and a dynamic configuration."""
        dynamic = dynamic_rules(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
        return {rule.name: tuple(str(rule.pattern).split(" | ")) for rule in (*static_rules(_TYPICAL), *dynamic)}

    def uncovered(self, node: Node, config: Any) -> str:
        """As in the base class; also why a sum, difference or product with a number keeps its number."""
        if is_four_bits(config.weight) and node.target in PRODUCTS and node.target not in linear.targets:
            return "XNNPACK has weights of 4 bits for linear only"
        with_number = node.target in WITH_NUMBERS and not config.input_activation.is_dynamic
        return _BETWEEN if with_number and not self._is_worth_it(node) else super().uncovered(node, config)

    # ------------------------------------------------------------ the quantizer's interface

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Spell products as linear, numbers as tensors, and clamps as the delegate fuses them; no value changes."""
        model = super().transform_for_annotation(model)
        self._look(model)
        value_sources = ValueSources(model)

        def is_static(node: Node) -> bool:
            config = self.choose(node).config
            return config is not None and not config.input_activation.is_dynamic

        def of_number(node: Node) -> bool:
            number = operand(node, 1)
            return (
                is_static(node)
                and value_sources.source[node] is Source.DATA
                and value_sources.objection(node) is None
                and isinstance(number, int | float)
                and abs(number) < MASK_VALUE
                and node.name not in self._whole
                and self._is_worth_it(node)
            )

        def of_arithmetic(node: Node) -> bool:
            source = operand(node, 0)
            return is_static(node) and (source.target in PRODUCTS or self._mixes(source))

        run(model, (clamps_as_fused(of_arithmetic), scalars_as_tensors(of_number)))
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate what the settings cover. Raises `AnnotationError` for settings that match nothing."""
        self._look(model)
        return super().annotate(model)

    def objection_to_node(self, node: Node) -> str | None:
        """Why an op stays float although a rule would match it: a piece of a composite, or of the float tail."""
        return self._whole.get(node.name)

    def _look(self, model: GraphModule) -> None:
        """Find what stays float as a whole."""
        self._constants = Constants(model.graph)
        self._whole = {}
        for node, (root, source) in composites(model.graph, _floats, _moves).items():
            if not _floats(node):
                self._whole[node.name] = (
                    f"part of a function of '{source.name}' that ends in '{root.name}' and stays whole"
                )
        if self.float_tail:
            tail = float_tail(model.graph, lambda n: n.target in PRODUCTS, self._mixes)
            self._whole |= {
                n.name: f"float tail: behind the last product, from '{first.name}' on" for n, first in tail.items()
            }

    def _mixes(self, node: Node) -> bool:
        return node.op == "call_function" and short_name(node.target).removesuffix("_") in (
            "add",
            "sub",
            "rsub",
            "mul",
            "div",
        )

    def _alone(self, match: Match) -> bool | str:
        return self._is_worth_it(match.root) or _BETWEEN

    def _stays_inside(self, match: Match) -> bool | str:
        return moves_inside(match.root, self._constants)

    def _is_worth_it(self, node: Node) -> bool:
        def floats(result: Node) -> bool:
            other = self.folded_into(result)
            return other.name in self._whole or _floats(other)

        return not stands_between_float_ops(node, self._constants, lambda n: not floats(n) and _passes(n), floats)
