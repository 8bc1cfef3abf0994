"""Embedding tables as 8-bit integers, one scale per row. Independent of the backend: only the weight is quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch

from quant2e.config import OperatorConfig, QuantizationConfig
from quant2e.errors import AnnotationError
from quant2e.pattern import constant, op
from quant2e.specs import QuantizationSpec
from quantizers.configurable import ConfigurableQuantizer
from quantizers.observers import table_observer
from quantizers.rule import Rule

aten = torch.ops.aten


@lru_cache
def get_embedding_quantization_config(is_qat: bool = False) -> QuantizationConfig:
    """Weight-only: int8 in -127..127, symmetric, one scale per row, so that the error is at most half a step of the row.

    ``is_qat``: the spec makes a fake-quantizer, which follows the table without delay.
    """
    weight = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=table_observer(is_qat),
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    return QuantizationConfig(None, None, weight, None, is_qat)


def get_embedding_operators_config() -> OperatorConfig:
    """The default configuration with the modules and functions it is for."""
    functions: list[list[Callable[..., Any]]] = [
        [torch.nn.Embedding],
        [torch.nn.functional.embedding],
        [torch.nn.EmbeddingBag],
    ]
    return OperatorConfig(get_embedding_quantization_config(), functions)


class EmbeddingQuantizer(ConfigurableQuantizer):
    """Quantizes the tables of embedding and embedding-bag; every one, unless it is told otherwise.

    Compose it before a backend's quantizer. ``set_module_name("head", None)`` and its kin leave a table float.
    """

    float_ops: ClassVar[Mapping[str, str]] = {}
    recipes: ClassVar[Sequence[str]] = ("w8",)

    def __init__(self) -> None:
        super().__init__()
        self.set_global(get_embedding_quantization_config())

    def base_config(self, *, is_dynamic: bool, is_qat: bool) -> QuantizationConfig:
        """`get_embedding_quantization_config`."""
        return get_embedding_quantization_config(is_qat)

    def accept(self, config: Any) -> Any:
        """Refuses configurations that quantize more than a weight."""
        if config.weight is None or config.input_activation is not None or config.output_activation is not None:
            raise AnnotationError(
                "an embedding has a weight and no other float operand: give a config with a weight only, such as "
                "get_embedding_quantization_config()"
            )
        return config

    def table(self, config: Any) -> Sequence[Rule]:
        """Embedding and embedding-bag."""
        return _rules(config)

    @classmethod
    def quantization_capabilities(cls) -> Mapping[str, Sequence[str]]:
        """Rule → patterns."""
        return {rule.name: (str(rule.pattern),) for rule in _rules(get_embedding_quantization_config())}


def _rules(config: Any) -> tuple[Rule, ...]:
    table = constant("w")
    return (
        Rule(op(aten.embedding.default)(table), {"w": config.weight}, name="embedding"),
        Rule(op(aten.embedding_bag)(table), {"w": config.weight}, name="embedding_bag"),
    )
