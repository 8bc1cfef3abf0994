"""Weight ranges by least squared error: scales, and zero points where there are some, of every quantized weight.

The search, its formulas and papers are in `quant2e.ranges.least_error`. Extremes keep the largest value of a channel
or group and let all others pay with a wider step; at 4 bits a step that clips a few of them is better for the sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.accuracy.algorithms.algorithm import Algorithm, Context, Stage
from quant2e.accuracy.algorithms.rounding.layer_rounding import importance_of
from quant2e.accuracy.algorithms.rounding.on_copy import on_copy
from quant2e.accuracy.algorithms.rounding.weight_layers import (
    QuantizedWeight,
    Use,
    check_calibrated,
    quantized_weights,
    simulated_weights,
)
from quant2e.accuracy.algorithms.rounding.weight_ranges import FittedRange, fit_encoding, was_given
from quant2e.accuracy.lock_step import BatchRun, Visit, in_lock_step
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.errors import CalibrationError, Quant2eError
from quant2e.graph.captured.calls import Call
from quant2e.observers.given import give_encoding

_WORTH_A_LINE = 0.999
"""Share of the squared error that is left, from which on a weight was as good as it was."""


@dataclass(frozen=True)
class FittedWeightRanges(Algorithm):
    """Give every quantized weight the range of least squared error, per tensor, channel or group as it is.

    ``by_inputs``: values count by the second moment of the input that they meet, so that the error of the product is
    what is made small; else all count the same. ``zero_points``: "as_asked" by the spec, or "where_better": symmetric
    weights get zero points, too, where these leave clearly less error. Backends with symmetric kernels do not take
    such weights. Scales that were given, or that activations share, stay. Raises `Quant2eError` for another word.
    """

    name: ClassVar[str] = "fit_weight_ranges"
    stage: ClassVar[Stage] = Stage.CALIBRATED
    exact: ClassVar[bool] = True

    by_inputs: bool = False
    zero_points: Literal["as_asked", "where_better"] = "as_asked"

    def __post_init__(self) -> None:
        if self.zero_points not in ("as_asked", "where_better"):
            raise Quant2eError(f"fit_weight_ranges: zero_points={self.zero_points!r}: 'as_asked' or 'where_better'")

    def apply(self, model: GraphModule, context: Context) -> list[str]:
        """Give the observers of weights their encodings; see `Algorithm.apply`."""
        return self.fit_weights(model, context.calls)

    def fit_weights(self, model: GraphModule, calls: Sequence[Call]) -> list[str]:
        """As `apply`, with the batches to look at, which ``by_inputs`` needs."""
        check_calibrated(model, self.name)
        if self.by_inputs and not calls:
            raise CalibrationError("fit_weight_ranges: by_inputs needs at least one batch of data")
        simulated = simulated_weights(model)
        if simulated is None:
            return []
        weights = quantized_weights(model, simulated)
        moments = _importances(weights, simulated, calls) if self.by_inputs else {}
        data = {name for point, name in simulated.observers.items() if simulated.constant(point) is None}
        lines = []
        for name in dict.fromkeys(str(call.target) for weight in weights for call in weight.calls):
            own = [weight for weight in weights if any(str(call.target) == name for call in weight.calls)]
            observer = model.get_submodule(name)
            if name in data or was_given(observer):
                continue  # a scale that activations share, or that somebody chose
            found = fit_encoding(
                observer,
                own[0].encoding,
                [weight.value for weight in own],
                [moments.get(weight) for weight in own],
                zero_points=self.zero_points,
            )
            if isinstance(found, FittedRange) and found.after < _WORTH_A_LINE * found.before:
                give_encoding(model, name, found.encoding)
                lines.append(_line(own, found))
        return lines


def _line(weights: Sequence[QuantizedWeight], found: FittedRange) -> str:
    others = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
    zeros = torch.as_tensor(found.encoding.zero_point) != torch.as_tensor(weights[0].encoding.zero_point)
    told = ", with zero points" if bool(zeros.any()) else ""
    left = found.after / found.before
    return f"{weights[0].place}{others}: {left:.0%} of the squared error is left ({weights[0].numbers}{told})"


def _importances(
    weights: Sequence[QuantizedWeight], simulated: SimulatedGraph, calls: Sequence[Call]
) -> dict[QuantizedWeight, Tensor]:
    """The second moment of the inputs that meet each value of the weights of products; others have none."""
    sums: dict[QuantizedWeight, tuple[Tensor, int]] = {}
    visits: dict[Any, Visit] = {}

    def visit(weight: QuantizedWeight, use: Use) -> Visit:
        def look(rounded: Sequence[BatchRun], _: Sequence[BatchRun]) -> None:
            for run in rounded:
                x = run.tensor(use.x)
                for samples in () if x is None else use.samples(x):
                    total, count = sums.get(weight, (0.0, 0))
                    sums[weight] = total + samples.double().square().sum(0), count + samples.shape[0]

        return look

    for weight in weights:
        for use in weight.uses if not weight.reason else ():
            visits[use.op] = visit(weight, use)
    if visits:
        in_lock_step(simulated, calls, visits)
    means = {weight: total / count for weight, (total, count) in sums.items() if count}
    return {w: importance_of(w, mean) for w, mean in means.items() if bool(torch.isfinite(mean).all())}


def fit_weight_ranges(
    prepared: GraphModule,
    data: Iterable[Any] = (),
    *,
    by_inputs: bool = False,
    zero_points: Literal["as_asked", "where_better"] = "as_asked",
) -> GraphModule:
    """A copy of a calibrated graph whose weights have the range of least squared error; see `FittedWeightRanges`.

    ``data``: batches of what the model takes, for ``by_inputs``. ``prepared`` and the tensors of the model stay as they
    are, and so does what the copy computes in float; notes of its report say what was gained at each weight. Raises
    `Quant2eError` for a graph that is not calibrated, and `CalibrationError` where data is needed and there is none.
    """
    algorithm = FittedWeightRanges(by_inputs, zero_points)
    return on_copy(algorithm.name, algorithm.fit_weights, prepared, data)
