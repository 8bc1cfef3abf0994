"""AdaRound: each weight rounded up or down so that its layer's output changes least.

M. Nagel, R. A. Amjad, M. van Baalen, C. Louizos, T. Blankevoort, "Up or Down? Adaptive Rounding for Post-Training
Quantization", ICML 2020, arXiv:2004.10568. The mathematics are in `soft_rounding`. Convolutions are optimised on places
of images drawn at random, as products of matrices, so a step costs the same whatever the size of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.accuracy.algorithms.algorithm import Algorithm, Context, Stage
from quant2e.accuracy.algorithms.rounding.hessian_rounding import ColumnGrid
from quant2e.accuracy.algorithms.rounding.layer_rounding import Chosen, LayerRounding
from quant2e.accuracy.algorithms.rounding.on_copy import on_copy
from quant2e.accuracy.algorithms.rounding.soft_rounding import (
    Samples,
    SoftRounding,
    round_softly,
    row_errors,
    rows_times,
)
from quant2e.accuracy.algorithms.rounding.weight_layers import QuantizedWeight, Use
from quant2e.accuracy.lock_step import BatchRun
from quant2e.errors import Quant2eError
from quant2e.ranges.least_error import as_it_is

aten = torch.ops.aten

_BEHIND = frozenset(
    {
        aten.relu.default,
        aten.relu6.default,
        aten.hardtanh.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.leaky_relu.default,
        aten.elu.default,
        aten.gelu.default,
        aten.silu.default,
        aten.hardswish.default,
        aten.hardsigmoid.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.softplus.default,
        aten.mish.default,
    }
)
"""Activations that gradients pass through: they belong to the layer in front of them."""


@dataclass(frozen=True)
class AdaptiveRounding(Algorithm):
    """Round weights of linear layers, matrix products and convolutions up or down by what it does to their output.

    ``iterations``, ``rate``, ``batch_size``, ``regularizer``, ``warm_up``, ``beta``: see `SoftRounding`. ``samples``:
    of each layer's input, drawn at random from all batches. ``fit_ranges``: a weight first gets the range of least
    squared error, weighted by the second moment of its inputs; where its scales are shared, or were chosen before, they
    stay. ``seed``: of all draws; equal seeds give equal integers. Raises `Quant2eError` for settings that cannot be.
    """

    name: ClassVar[str] = "round_adaptively"
    stage: ClassVar[Stage] = Stage.CALIBRATED
    exact: ClassVar[bool] = True

    iterations: int = 500
    rate: float = 0.02
    batch_size: int = 128
    samples: int = 2048
    regularizer: float = 30.0
    warm_up: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    fit_ranges: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "samples"):
            if getattr(self, name) < 1:
                raise Quant2eError(f"round_adaptively: {name}={getattr(self, name)}: at least one")
        if self.rate <= 0 or self.regularizer < 0 or not 0 <= self.warm_up < 1:
            raise Quant2eError("round_adaptively: rate is above 0, regularizer not below it, warm_up from 0 to below 1")
        if not self.beta[0] >= self.beta[1] > 0:
            raise Quant2eError(f"round_adaptively: beta={self.beta}: the exponent at first and, no larger, at last")

    def apply(self, model: GraphModule, context: Context) -> list[str]:
        """Give the observers of weights their encodings and integers; see `Algorithm.apply`."""
        return _ByGradient(self).round_weights(model, context.calls)


class _ByGradient(LayerRounding):
    """AdaRound on each layer."""

    name = AdaptiveRounding.name
    also_float = True

    def __init__(self, settings: AdaptiveRounding) -> None:
        self._settings = settings
        self.fit_ranges = settings.fit_ranges

    def collect(self, use: Use, rounded: Sequence[BatchRun], exact: Sequence[BatchRun]) -> Any:
        """Samples of the rounded input, and of what the float layer makes of the float input."""
        pairs = [(one.tensor(use.x), other.tensor(use.x)) for one, other in zip(rounded, exact, strict=True)]
        there = [(one.float(), other.float()) for one, other in pairs if one is not None and other is not None]
        drawn = [part for inputs in there for part in self._drawn(use, inputs, len(there))]
        weight = exact[0].tensor(use.point)
        if weight is None or not sum(one.shape[0] for one, _ in drawn):
            return None
        w, behind = use.rows(weight.float()), _behind(use.op)
        biases = [run.tensor(use.bias()) for run in (exact[0], rounded[0])]
        own, other = (None if bias is None else bias.float().reshape(w.shape[0], 1, w.shape[1]) for bias in biases)
        x, exactly = (torch.cat(parts).transpose(0, 1).contiguous() for parts in zip(*drawn, strict=True))
        return Samples(x, behind(rows_times(exactly, w, own)), other, behind)

    def _drawn(self, use: Use, inputs: tuple[Tensor, Tensor], batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """So many samples of one batch that all together have them all: the same of both inputs."""
        generator = torch.Generator().manual_seed(self._settings.seed)
        images = use.images(inputs[0])
        wanted = -(-self._settings.samples // max(1, batches * images))
        for one, other in zip(*map(use.samples, inputs), strict=True):
            chosen = torch.randperm(one.shape[0], generator=generator)[:wanted].to(one.device)
            yield one[chosen], other[chosen]

    def second_moment(self, collected: Sequence[Any]) -> Tensor:
        """Of the samples of the rounded inputs."""
        return torch.cat([each.rounded for each in collected], 1).double().square().mean(1)

    def choose(self, weight: QuantizedWeight, grid: ColumnGrid, collected: Sequence[Any]) -> Chosen | str:
        """By gradients; see `round_softly`."""
        w, samples = weight.uses[0].rows(weight.value.float()), list(collected)
        settings = SoftRounding(
            iterations=self._settings.iterations,
            rate=self._settings.rate,
            batch_size=self._settings.batch_size,
            regularizer=self._settings.regularizer,
            warm_up=self._settings.warm_up,
            beta=self._settings.beta,
        )
        with torch.enable_grad():
            integers = round_softly(w, grid, samples, settings, torch.Generator().manual_seed(self._settings.seed))
        nearest, error = (self.error_of(weight, grid.real(q), collected) for q in (grid.nearest(w), integers))
        signal = sum(float(each.wanted.square().mean(1).sum()) for each in samples) / len(samples)
        return Chosen(integers, nearest, error, signal)

    def error_of(self, weight: QuantizedWeight, values: Tensor, collected: Sequence[Any]) -> float:
        """Mean over the samples, summed over rows."""
        return float(row_errors(list(collected), values).sum())


def _behind(op: Node) -> Callable[[Tensor], Tensor]:
    """The activation that is all that reads ``op``; nothing where something else, or a point, does."""
    user = next(iter(op.users), None)
    if len(op.users) != 1 or user is None or user.target not in _BEHIND or user.all_input_nodes != [op]:
        return as_it_is
    target, further, keywords = user.target, user.args[1:], dict(user.kwargs)
    if user.args[:1] != (op,) or not callable(target):
        return as_it_is

    def activation(y: Tensor) -> Tensor:
        result: Tensor = target(y, *further, **keywords)
        return result

    return activation


def round_adaptively(
    prepared: GraphModule,
    data: Iterable[Any],
    *,
    iterations: int = 500,
    rate: float = 0.02,
    batch_size: int = 128,
    samples: int = 2048,
    regularizer: float = 30.0,
    warm_up: float = 0.2,
    beta: tuple[float, float] = (20.0, 2.0),
    fit_ranges: bool = True,
    seed: int = 0,
) -> GraphModule:
    """A copy of a calibrated graph whose weights convert to integers chosen by AdaRound; see `AdaptiveRounding`.

    ``data``: batches of what the model takes. ``prepared`` and the tensors of the model stay as they are, and so does
    what the copy computes in float; notes of its report say what was chosen for each weight. Raises `Quant2eError` for
    a graph that is not calibrated, and `CalibrationError` without data.
    """
    algorithm = AdaptiveRounding(
        iterations=iterations,
        rate=rate,
        batch_size=batch_size,
        samples=samples,
        regularizer=regularizer,
        warm_up=warm_up,
        beta=beta,
        fit_ranges=fit_ranges,
        seed=seed,
    )
    return on_copy(AdaptiveRounding.name, _ByGradient(algorithm).round_weights, prepared, data)
