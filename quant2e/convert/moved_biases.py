"""Moved biases: what is lost where a bias is rounded to the steps of its accumulator, for the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.annotation.specs import INTEGER_BOUNDS
from quant2e.errors import where
from quant2e.graph.constants import Constants, evaluate
from quant2e.observers.base import inner_observer
from quant2e.observers.derived import DerivedObserver
from quant2e.observers.encodings import Encoding, PerChannelEncoding, PerTensorEncoding, RoundedConstant
from quant2e.observers.straight_through import fake_quantize, round_to_grid


@dataclass(frozen=True, slots=True)
class MovedBias:
    """A bias that conversion moves by more than one step.

    ``steps``: how far each value moves, in steps of the result where that is quantized, else of the accumulator (``of``
    says which). ``unit``: the largest step of the accumulator, in the same steps. ``cut``: values that do not fit the
    accumulator's integers.
    """

    consumer: Node
    steps: Tensor
    of: str
    unit: float
    cut: int

    def __str__(self) -> str:
        large, total = int((self.steps > 1).sum()), self.steps.numel()
        reason = (
            f"{self.cut} values do not fit 32 bits in steps of input scale × weight scale and are cut"
            if self.cut
            else f"biases are rounded to steps of input scale × weight scale, here up to {self.unit:.3g} of those"
        )
        return (
            f"{where(self.consumer)}: its bias moves by up to {float(self.steps.max()):.3g} steps of the {self.of}, "
            f"{large} of {total} values by more than one: {reason}. What helps: a scale per channel for the weight, "
            "more bits for it, an input without outliers"
        )


def moved_biases(
    gm: GraphModule, calls: Sequence[Node], encodings: Mapping[str, Encoding | None], constants: Constants
) -> list[MovedBias]:
    """Biases that move by more than one step, the farthest first. ``calls``: the observer calls of ``gm``."""
    found = [
        moved
        for call in calls
        if isinstance(inner_observer(gm.get_submodule(str(call.target))), DerivedObserver)
        and call.all_input_nodes[0] in constants
        for moved in _moved(gm, call, encodings)
        if bool((moved.steps > 1).any())
    ]
    return sorted(found, key=lambda moved: -float(moved.steps.max()))


def _moved(gm: GraphModule, call: Node, encodings: Mapping[str, Encoding | None]) -> Iterator[MovedBias]:
    value, encoding = evaluate(gm, call.all_input_nodes[0]), encodings[str(call.target)]
    if not isinstance(value, Tensor) or not isinstance(
        encoding, RoundedConstant | PerTensorEncoding | PerChannelEncoding
    ):
        return
    value = value.detach().double()
    unit = torch.as_tensor(encoding.scale, dtype=torch.float64, device=value.device)
    away = (_converted(value.float(), encoding).double() - value).abs()
    low, high = (
        INTEGER_BOUNDS[torch.int32]
        if isinstance(encoding, RoundedConstant)
        else (encoding.quant_min, encoding.quant_max)
    )
    steps = value / unit
    cut = int(((steps < low - 0.5) | (steps > high + 0.5)).sum())
    for consumer in call.users:
        step = _step_of_result(consumer, encodings)
        yield MovedBias(
            consumer,
            away / (unit if step is None else step),
            "accumulator" if step is None else "result",
            1.0 if step is None else float(unit.max()) / step,
            cut,
        )


def _converted(value: Tensor, encoding: RoundedConstant | PerTensorEncoding | PerChannelEncoding) -> Tensor:
    """What conversion makes of a constant."""
    scale = torch.as_tensor(encoding.scale, dtype=torch.float32, device=value.device)
    if isinstance(encoding, RoundedConstant):
        return round_to_grid(value, scale)
    zero_point = torch.as_tensor(encoding.zero_point, device=value.device)
    axis = encoding.axis if isinstance(encoding, PerChannelEncoding) else None
    return fake_quantize(
        value, scale.reshape(-1), zero_point.reshape(-1), encoding.quant_min, encoding.quant_max, axis=axis
    )


def _step_of_result(node: Node, encodings: Mapping[str, Encoding | None]) -> float | None:
    """The scale that the result of ``node`` gets behind ops of one tensor, as activations; None where it has none."""
    while len(node.users) == 1:
        (node,) = node.users
        encoding = encodings.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(encoding, PerTensorEncoding):
            return encoding.scale
        if node.op != "call_function" or len(node.all_input_nodes) != 1:
            return None
    return None
