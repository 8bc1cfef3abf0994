"""Activation ranges by the loss of the output: each tensor takes the step with which the model errs least.

    s = argmin ‖f(x) - f(x; the tensor rounded in steps of s)‖²        s = s₀ · 1.2ⁿ, s₀ as calibrated

Calibration looks at a tensor and at the ops that read it. A clipped outlier may cost these next to nothing and the
model a lot, where the outlier is what attention rests on; only the output tells. That steps are chosen by the loss of
the task is the idea of Y. Nahshan et al., "Loss Aware Post-Training Quantization", arXiv:1911.07190, who search for all
steps together; here each is found by itself, with everything else in float, which needs a few evaluations a tensor and
no labels. Errors of several tensors add up where they are small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from quant2e.accuracy.algorithms.algorithm import Algorithm, Context, Stage
from quant2e.accuracy.algorithms.rounding.on_copy import on_copy
from quant2e.accuracy.algorithms.rounding.weight_layers import check_calibrated, simulated_weights
from quant2e.accuracy.algorithms.rounding.weight_ranges import was_given
from quant2e.accuracy.output_evaluation import OutputEvaluation
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.errors import CalibrationError, Quant2eError
from quant2e.graph.captured.calls import Call
from quant2e.observers.base import inner_observer
from quant2e.observers.derived import DerivedObserver
from quant2e.observers.encodings import PerTensorEncoding, encode
from quant2e.observers.given import give_encoding
from quant2e.observers.placeholder import FixedQParamsObserver
from quant2e.ranges.qparams import fake_quantize_per_tensor
from quant2e.ranges.sqnr import sqnr_db

RATIO = 1.2
"""Between two steps that are tried one after the other."""

_MOST = 8
"""Steps that are tried in one direction: up to 4.3 times as wide, or as narrow."""

_CLEARLY = 0.97
"""Part of the error that another step must leave at most: the data is a sample."""

_NEGLIGIBLE = 0.1
"""Tensors that together make less than this part of the error, each by itself, stay as they are."""

_AT_MOST = 24
"""Tensors whose steps are tried: each takes some evaluations of the whole model."""


@dataclass(frozen=True)
class FittedActivationRanges(Algorithm):
    """Give quantized activations with one scale for the tensor the step of least output error.

    ``batches``: so many of the data are evaluated on, spread over it. Scales that were given or that a spec fixes stay.
    Raises `Quant2eError` for less than one.
    """

    name: ClassVar[str] = "fit_activation_ranges"
    stage: ClassVar[Stage] = Stage.CALIBRATED
    exact: ClassVar[bool] = True

    batches: int = 2

    def __post_init__(self) -> None:
        if type(self.batches) is not int or self.batches < 1:
            raise Quant2eError(f"fit_activation_ranges: batches={self.batches!r} is no whole number above 0")

    def apply(self, model: GraphModule, context: Context) -> list[str]:
        """Give the observers of activations their encodings; see `Algorithm.apply`."""
        return self.fit_activations(model, context.calls)

    def fit_activations(self, model: GraphModule, calls: Sequence[Call]) -> list[str]:
        """As `apply`, on some of ``calls``."""
        check_calibrated(model, self.name)
        if not calls:
            raise CalibrationError(f"{self.name} needs at least one batch of data")
        simulated = simulated_weights(model)
        tensors = [] if simulated is None else list(_tensors(model, simulated))
        if simulated is None or not tensors:
            return []
        evaluation = OutputEvaluation(simulated, _spread(calls, self.batches))
        lines = []
        for tensor, signal, before in _costly(evaluation, tensors):
            factor, after = _climbed(evaluation, simulated, tensor, before)
            if factor != 1.0:
                give_encoding(model, tensor.observer, tensor.scaled(factor))
                change = f"{sqnr_db(signal, before):.1f} -> {sqnr_db(signal, after):.1f} dB at the output"
                lines.append(f"{tensor.name}: {factor:.2f} × the calibrated range, {change} by itself")
        return lines


@dataclass(frozen=True, slots=True, eq=False)
class _Tensor:
    """``name``: of the tensor; ``observer``: the path of its observer, and ``points`` all its uses; ``covered``: the
    factor from which on its range holds every value that was seen.
    """

    name: str
    observer: str
    points: frozenset[Node]
    encoding: PerTensorEncoding
    covered: float

    def scaled(self, factor: float) -> PerTensorEncoding:
        """Steps of another size around the same zero."""
        return replace(self.encoding, scale=self.encoding.scale * factor)


def _tensors(model: GraphModule, simulated: SimulatedGraph) -> Iterator[_Tensor]:
    """Activations whose one scale an observer found in data."""
    points: dict[str, list[Node]] = {}
    for point, path in simulated.observers.items():
        points.setdefault(path, []).append(point)
    for name, own in points.items():
        observer = model.get_submodule(name)
        if was_given(observer) or isinstance(inner_observer(observer), FixedQParamsObserver | DerivedObserver):
            continue
        encoding = encode(observer)
        if isinstance(encoding, PerTensorEncoding) and any(simulated.constant(point) is None for point in own):
            source = next(point for point in own if simulated.constant(point) is None).all_input_nodes[0]
            yield _Tensor(source.name, name, frozenset(own), encoding, _covered(inner_observer(observer), encoding))


def _covered(observer: Any, encoding: PerTensorEncoding) -> float:
    low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
    if not isinstance(low, Tensor) or not isinstance(high, Tensor) or low.numel() != 1 or high.numel() != 1:
        return float("inf")
    below = (encoding.zero_point - encoding.quant_min) * encoding.scale
    above = (encoding.quant_max - encoding.zero_point) * encoding.scale
    needed = [float(value) / room for value, room in ((-low, below), (high, above)) if float(value) > 0 and room > 0]
    return max(needed, default=1.0)


def _spread(calls: Sequence[Call], count: int) -> list[Call]:
    """``count`` of ``calls``, or all, at equal distances, the last among them."""
    if len(calls) <= count:
        return list(calls)
    return [calls[(index + 1) * len(calls) // count - 1] for index in range(count)]


def _costly(evaluation: OutputEvaluation, tensors: Sequence[_Tensor]) -> list[tuple[_Tensor, float, float]]:
    """Those that make the most of the error, the costliest first, with the power of the output and of their error."""
    found = [(tensor, *evaluation.powers(tensor.points)) for tensor in tensors]
    found.sort(key=lambda one: -one[2])
    kept: list[tuple[_Tensor, float, float]] = []
    total = left = sum(noise for *_, noise in found)
    for one in found:
        if one[2] <= 0 or left < _NEGLIGIBLE * total or len(kept) == _AT_MOST:
            break
        kept.append(one)
        left -= one[2]
    return kept


def _climbed(
    evaluation: OutputEvaluation, simulated: SimulatedGraph, tensor: _Tensor, before: float
) -> tuple[float, float]:
    """The factor that leaves the least error, and this error: wider for as long as it falls, and narrower if it rises.

    The points of the tensor keep the last step that was tried: each tensor is evaluated by itself, once.
    """
    best = 1.0, before
    for ratio in (RATIO, 1 / RATIO):
        factor, least = 1.0, before
        for _ in range(_MOST):
            if ratio > 1 and factor >= tensor.covered:
                break
            factor *= ratio
            rounded = _Rounded(tensor.scaled(factor))
            for point in tensor.points:
                simulated.points[point].rounded = rounded
            error = evaluation.powers(tensor.points)[1]
            if not error < least:
                break
            least = error
            if error < min(best[1], _CLEARLY * before):
                best = factor, error
        if best[0] != 1.0:
            break
    return best


class _Rounded(nn.Module):
    """Rounds as conversion does with one encoding."""

    def __init__(self, encoding: PerTensorEncoding) -> None:
        super().__init__()
        self._encoding = encoding

    def forward(self, x: Tensor) -> Tensor:
        """``x``, of any shape, in the integers of the encoding, as float32."""
        e = self._encoding
        return fake_quantize_per_tensor(x, e.scale, e.zero_point, e.quant_min, e.quant_max, e.dtype)


def fit_activation_ranges(prepared: GraphModule, data: Iterable[Any], *, batches: int = 2) -> GraphModule:
    """A copy of a calibrated graph whose activations have the steps of least output error.

    ``data``: what the model takes, as for `quant2e.calibrate`; ``batches`` of it are evaluated on, a few times for each
    activation. ``prepared`` stays as it is, and so does what the copy computes in float; notes of its report say what
    was gained at each tensor. Raises `Quant2eError` for a graph that is not calibrated or has no float output, and
    `CalibrationError` without data.
    """
    algorithm = FittedActivationRanges(batches)
    return on_copy(algorithm.name, algorithm.fit_activations, prepared, data)
