"""X86InductorQuantizer: oneDNN's int8 convolutions and linear layers, as Inductor finds them.

Activations are u8 (affine, per tensor), weights s8 (symmetric, per output channel). An op's output is quantized by its
consumer: where nobody wants integers, the kernel answers in float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from quant2e.annotation.config import QuantizationConfig
from quant2e.annotation.granularity import PerToken
from quant2e.annotation.pattern import short_name
from quant2e.annotation.specs import ANNOTATION, PER_CHANNEL_SCHEMES, EdgeOrNode, QuantizationSpec, group_size_of
from quant2e.cpu import InstructionSet
from quant2e.errors import AnnotationError
from quant2e.graph.dataflow import operand
from quant2e.observers.measuring import PlaceholderObserver
from quant2e.passes import run
from quantizers.kit.observers import activation_observer, weight_observer, with_scale_for_each
from quantizers.kit.rule import Rule
from quantizers.rewrites.activations import ActivationsAsFused
from quantizers.settings.configurable import ConfigurableQuantizer
from quantizers.x86.paired_ranges import link
from quantizers.x86.range_policy import RangePolicy, check_policy, note, ranged
from quantizers.x86.rules import (
    ACTIVATIONS,
    FUSED,
    capabilities,
    dynamic_rules,
    grouped_rules,
    static_rules,
    weight_only_rules,
)


def get_default_x86_inductor_quantization_config(
    is_qat: bool = False, is_dynamic: bool = False, reduce_range: bool = False
) -> QuantizationConfig:
    """u8 activations, s8 weights per output channel. Equal arguments give equal configs.

    ``is_dynamic``: activations get their parameters at run time. ``reduce_range``: activations use 0..127, with which
    no kernel saturates; without it the quantizer's ``range_policy`` decides for the machine.
    ``is_qat``: the specs make fake-quantizers, for `quant2e.prepare_qat_pt2e`.
    """
    return _config(is_dynamic, bool(reduce_range), is_qat)


def get_x86_inductor_linear_dynamic_fp16_config() -> QuantizationConfig:
    """Weights of linear in float16, activations float32: half the bytes, widened by the kernel as it multiplies."""
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

    Static: convolutions in one to three dimensions, transposed ones too, and linear, with fused activations and
    additions; cat, pooling and reshapes between them; products of two activations (matmul, and the scores of attention)
    where they are asked for by name, which our native kernels compute on integers and Inductor in float. Dynamic:
    convolutions and linear, and linear with 4-bit weights in groups by int8 rows that have a scale each
    (``"w4a8-dynamic-g32"``: faster than float rows, and less accurate). Weight-only: linear, with int8 weights
    (``"w8"``), 4 bits in groups (``"w4-g32"``) or float16 ones. Groups of 4 bits have zero points, and scales that are
    rounded to bfloat16; ``"w4-g32-sym"`` has no zero points, and ``recipe("w4-g32", scale_dtype=torch.float32)`` scales
    as they are found.

    ``isa``: the machine to quantize for, by name (``"avx512_vnni"``) or described; this one by default.
    ``range_policy``: what keeps int8 kernels exact there, see `quantizers.x86.range_policy.RangePolicy`.
    """

    has_linear: ClassVar[bool] = True
    takes_groups: ClassVar[bool] = True
    affine_groups: ClassVar[bool] = True
    recipes: ClassVar[Sequence[str]] = ("w8a8", "w8a8-dynamic", "w8", "w4-g32", "w4a8-dynamic-g32")
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
        **dict.fromkeys(("embedding", "embedding_bag"), "a lookup; EmbeddingQuantizer stores tables as int8"),
    }

    def __init__(self, isa: InstructionSet | str | None = None, range_policy: RangePolicy = "auto") -> None:
        super().__init__()
        check_policy(range_policy)
        self._isa = InstructionSet.of(isa)
        self._range_policy: RangePolicy = range_policy

    def base_config(self, *, is_dynamic: bool, is_qat: bool) -> QuantizationConfig:
        """The default configuration; `range_policy` decides on its ranges."""
        return get_default_x86_inductor_quantization_config(is_qat=is_qat, is_dynamic=is_dynamic)

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """As in the base class; activations that are spelled out behind a product become what its kernel takes in."""
        model = super().transform_for_annotation(model)
        run(model, (ActivationsAsFused(self._fused_into),))
        return model

    def _fused_into(self, node: Node) -> Sequence[str]:
        """The activations that the int8 kernel takes in which computes a tensor, perhaps with a norm behind it."""
        product: Any = operand(node, 0) if "batch_norm" in short_name(node.target) else node
        names = FUSED.get(short_name(product.target), ()) if isinstance(product, Node) else ()
        config = self.choose(product).config if names else None
        return names if config is not None and config.input_activation is not None else ()

    def accept(self, config: Any) -> Any:
        """Refuses what the kernels cannot take."""
        activation, weight = config.input_activation, config.weight
        if _is_half(config):
            return config
        if weight is None or weight.dtype is not torch.int8 or weight.qscheme not in PER_CHANNEL_SCHEMES:
            raise AnnotationError(
                "the weight must be torch.int8 per channel or, for weight-only linear layers, in groups"
            )
        size = group_size_of(weight)
        if activation is None:
            return config
        if size is not None:
            if not activation.is_dynamic or (weight.quant_min, weight.quant_max) != (-8, 7):
                raise AnnotationError(
                    f"weights in groups of {size}, and a quantized activation: int8 kernels know one weight scale per "
                    "output channel. Groups are for weight-only linear layers, 'w4-g32', and in 4 bits for rows that "
                    "are quantized at run time, 'w4a8-dynamic-g32'"
                )
            if (activation.quant_min, activation.quant_max) not in ((0, 255), (-128, 127), (None, None)):
                raise AnnotationError(
                    f"activations in [{activation.quant_min}, {activation.quant_max}]: rows that are quantized at run "
                    "time, by 4-bit weights in groups, use all of their 8 bits"
                )
            whole = replace(activation, dtype=torch.int8, quant_min=None, quant_max=None)
            return replace(config, input_activation=with_scale_for_each(whole, PerToken()))
        if activation.dtype is not torch.uint8:
            hint = "; Int16Quantizer quantizes activations to 16 bits" if activation.dtype is torch.int16 else ""
            raise AnnotationError(
                f"input_activation has dtype {activation.dtype}; this backend computes on torch.uint8{hint}"
            )
        return config

    def table(self, config: Any) -> Sequence[Rule]:
        """The rules of the backend for one configuration."""
        if config.input_activation is None:
            return weight_only_rules(config)
        if group_size_of(config.weight) is not None:
            return grouped_rules(config)
        exact = ranged(config, self._range_policy, self._isa)
        return dynamic_rules(exact) if config.input_activation.is_dynamic else static_rules(exact)

    def uncovered(self, node: Node, config: Any) -> str:
        """Why an op stays float; of an activation behind an int8 kernel, that it costs no more than arithmetic."""
        producer = next(map(self.folded_into, node.all_input_nodes), None)
        kernel = None if producer is None or ANNOTATION not in producer.meta else short_name(producer.target)
        fused = FUSED.get(kernel or "", ())
        name = short_name(node.target).removesuffix("_")
        if config is None or config.input_activation is None:
            return super().uncovered(node, config)
        if producer is None or not fused or name in fused or name not in ACTIVATIONS:
            return super().uncovered(node, config)
        return (
            f"computed in float on what the int8 kernel of '{producer.name}' returns, without being quantized between: "
            f"that kernel takes in {', '.join(fused[:-1])} and {fused[-1]}, not {name}"
        )

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, Any]) -> None:
        """Let the observers of each layer's input and weight agree on ranges that no kernel overflows with."""
        link(edge_or_node_to_obs_or_fq)

    def notes_on_configs(self) -> Sequence[str]:
        """Which ranges are used, and why."""
        exact = [c for c in self.configs() if c.input_activation is None or group_size_of(c.weight) is not None]
        return [note(c, self._range_policy, self._isa) for c in self.configs() if c not in exact]

    @classmethod
    def quantization_capabilities(cls) -> Mapping[str, Sequence[str]]:
        """Rule → patterns, for a static and a dynamic configuration."""
        return capabilities(_config(False, False), _config(True, False))


def _is_half(config: Any) -> bool:
    weight = config.weight
    return config.input_activation is None and weight is not None and weight.dtype is torch.float16
