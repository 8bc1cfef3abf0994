"""EmbeddingQuantizer: embedding tables in 8 or 4 bits, whatever the backend; only the weight is quantized.

At 8 bits each row has a scale, at 4 bits each group of neighbours in a row. Rounding to the nearest step of a range
that holds all values, the error is at most half a step of that row or group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch

from quant2e.annotation.config import OperatorConfig, QuantizationConfig
from quant2e.annotation.pattern import Match, constant, op
from quant2e.annotation.specs import QuantizationSpec, group_size_of
from quant2e.errors import AnnotationError
from quant2e.graph.dataflow import operand
from quant2e.graph.fake_values import node_tensor
from quant2e.observers.per_group import PerGroupMinMaxObserver
from quantizers.kit.observers import table_observer
from quantizers.kit.rule import Rule
from quantizers.settings.configurable import ConfigurableQuantizer

aten = torch.ops.aten

_RANGES = {
    (8, True): (-127, 127), (8, False): (-128, 127), (4, True): (-8, 7), (4, False): (-8, 7),
}  # fmt: skip


@lru_cache
def get_embedding_quantization_config(
    is_qat: bool = False, *, bits: int = 8, group_size: int | None = None, symmetric: bool = True
) -> QuantizationConfig:
    """Weight-only. Equal arguments give equal configs.

    ``bits``: 8 or 4, stored as int8. ``group_size``: so many neighbours in a row share a scale; 0: the whole row does;
    None: 32 at 4 bits, the whole row at 8. ``symmetric``: the integer zero is the number zero; without, zero points.
    ``is_qat``: the spec makes a fake-quantizer, which follows the table without delay.
    Raises `AnnotationError` for other bits, and for groups in training.
    """
    if (bits, symmetric) not in _RANGES:
        raise AnnotationError(f"bits={bits}: an embedding table has 8 or 4 bits")
    size = (32 if bits == 4 else 0) if group_size is None else group_size
    if size and is_qat:
        raise AnnotationError("groups of a row are not trained: use group_size=0, one scale per row")
    low, high = _RANGES[bits, symmetric]
    weight = QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=PerGroupMinMaxObserver.with_args(group_size=size)
        if size
        else table_observer(is_qat),
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_channel_symmetric if symmetric else torch.per_channel_affine,
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
    takes_groups: ClassVar[bool] = True
    recipes: ClassVar[Sequence[str]] = ("w8", "w4-g32", "w8-asym", "w4-g32-asym")

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
    table, size = constant("w"), group_size_of(config.weight)

    def divides(match: Match) -> bool | str:
        """A table whose rows are a whole number of groups."""
        tensor = node_tensor(operand(match.root, 0))
        if size is None or tensor is None or (tensor.dim() == 2 and tensor.shape[1] % size == 0):
            return True
        return f"groups of {size} do not divide the rows of its table, which is {list(tensor.shape)}"

    return (
        Rule(op(aten.embedding.default)(table), {"w": config.weight}, None, divides, "embedding"),
        Rule(op(aten.embedding_bag)(table), {"w": config.weight}, None, divides, "embedding_bag"),
    )
