"""QuantizationConfig: the specs of activations, weights and bias given to a quantizer, with PT2E's field names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class QuantizationConfig:
    """Specs of the operands of one kind of op; ``None`` leaves an operand float.

    ``input_activation``, ``output_activation``: what flows in and out; dynamic if ``is_dynamic`` is set in the spec.
    ``weight``, ``bias``: parameters. ``is_qat``: the specs make fake-quantizers, for training.
    """

    input_activation: Any
    output_activation: Any
    weight: Any
    bias: Any
    is_qat: bool = False

    @property
    def is_dynamic(self) -> bool:
        """Whether activations get their parameters at run time."""
        return bool(getattr(self.input_activation, "is_dynamic", False))


class OperatorConfig(NamedTuple):
    """A config and the op patterns (lists of modules or functions) it can be used for."""

    config: QuantizationConfig
    operators: Sequence[Sequence[Callable[..., Any]]]
