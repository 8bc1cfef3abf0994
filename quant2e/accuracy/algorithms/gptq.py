"""GPTQ: weights rounded column by column, each column making up for the errors of those before it.

E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, arXiv:2210.17323. The mathematics are in `hessian_rounding`. Guided, samples count by how much
the output rests on them, see `output_weights`:

    H = Σ x xᵀ        guided:  H = Σ w_x x xᵀ
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.accuracy.algorithms.algorithm import Algorithm, Context, Stage
from quant2e.accuracy.algorithms.rounding.hessian_rounding import ColumnGrid, round_by_hessian, squared_error
from quant2e.accuracy.algorithms.rounding.layer_rounding import Chosen, LayerRounding
from quant2e.accuracy.algorithms.rounding.on_copy import on_copy
from quant2e.accuracy.algorithms.rounding.output_weights import OutputWeights, output_weights
from quant2e.accuracy.algorithms.rounding.weight_layers import QuantizedWeight, Use
from quant2e.accuracy.lock_step import BatchRun
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.errors import Quant2eError
from quant2e.graph.captured.calls import Call


@dataclass(frozen=True, slots=True)
class _Hessian:
    """``sum``: Σ x xᵀ, float64 ``[groups, columns, columns]``; ``count``: of samples."""

    sum: Tensor
    count: int


@dataclass(frozen=True)
class GPTQ(Algorithm):
    """Round weights of linear layers, matrix products and convolutions by GPTQ, with static groups.

    ``damping``: part of the mean of the Hessian's diagonal that is added to it, above 0. ``activation_order``: columns
    of large inputs first. ``block_size``: columns between two updates of all others. ``fit_ranges``: a weight first
    gets the range of least squared error, weighted by the second moment of its inputs; where its scales are shared, or
    were chosen before, they stay. ``guided``: samples are weighted by the gradient of the output, which takes two
    backward passes over the data. Raises `Quant2eError` for settings that cannot be.
    """

    name: ClassVar[str] = "gptq"
    stage: ClassVar[Stage] = Stage.CALIBRATED
    exact: ClassVar[bool] = True

    damping: float = 0.01
    activation_order: bool = True
    block_size: int = 128
    fit_ranges: bool = True
    guided: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise Quant2eError(f"gptq: damping={self.damping}: a part of the diagonal's mean, above 0, at most 1")
        if self.block_size < 1:
            raise Quant2eError(f"gptq: block_size={self.block_size}: columns, at least one")

    def apply(self, model: GraphModule, context: Context) -> list[str]:
        """Give the observers of weights their encodings and integers; see `Algorithm.apply`."""
        return _ByHessian(self).round_weights(model, context.calls)


class _ByHessian(LayerRounding):
    """GPTQ on each layer."""

    name = GPTQ.name

    def __init__(self, settings: GPTQ) -> None:
        self._settings = settings
        self.fit_ranges = settings.fit_ranges

    def weigh(self, simulated: SimulatedGraph, calls: Sequence[Call], uses: Sequence[Use]) -> OutputWeights:
        """By the gradient of the output, where that is asked for."""
        return output_weights(simulated, calls, uses) if self._settings.guided and uses else {}

    def collect(self, use: Use, rounded: Sequence[BatchRun], exact: Sequence[BatchRun]) -> Any:
        """The Hessian of the squared error, from the inputs as rounding before makes them."""
        total, count = None, 0
        weights = self.weights.get(use.op, [None] * len(rounded))
        for run, counts in zip(rounded, weights, strict=True):
            x, first = run.tensor(use.x), 0
            for samples in () if x is None else use.samples(x.float()):
                last = first + samples.shape[0]
                columns = samples if counts is None else samples * counts[first:last].sqrt().unsqueeze(-1)
                columns, first = columns.transpose(0, 1), last
                part = columns.transpose(1, 2) @ columns
                total = part.double() if total is None else total.add_(part)
                count += samples.shape[0]
        return _Hessian(total, count) if total is not None and count else None

    def second_moment(self, collected: Sequence[Any]) -> Tensor:
        """The diagonal of the Hessian, for one sample."""
        total = _added(collected)
        return total.sum.diagonal(dim1=-2, dim2=-1) / total.count

    def choose(self, weight: QuantizedWeight, grid: ColumnGrid, collected: Sequence[Any]) -> Chosen | str:
        """By the sum of the Hessians of all products of the weight."""
        hessian, asked = _added(collected).sum, self._settings
        w = weight.uses[0].rows(weight.value.float())
        found = round_by_hessian(
            w, grid, hessian, damping=asked.damping, order=asked.activation_order, block=asked.block_size
        )
        if found.damping is None:
            silent = not bool((hessian != 0).any())
            return "its input is zero throughout" if silent else "its Hessian is not positive definite, however damped"
        remark = "" if found.damping == asked.damping else f", damping {found.damping:g}"
        signal = float(squared_error(w, hessian).sum())
        return Chosen(found.integers, float(found.before.sum()), float(found.after.sum()), signal, remark)

    def error_of(self, weight: QuantizedWeight, values: Tensor, collected: Sequence[Any]) -> float:
        """``δ H δᵀ``, summed over rows."""
        delta = values - weight.uses[0].rows(weight.value.float())
        return float(squared_error(delta, _added(collected).sum).sum())


def _added(collected: Sequence[_Hessian]) -> _Hessian:
    return _Hessian(torch.stack([each.sum for each in collected]).sum(0), sum(each.count for each in collected))


def gptq(
    prepared: GraphModule,
    data: Iterable[Any],
    *,
    damping: float = 0.01,
    activation_order: bool = True,
    block_size: int = 128,
    fit_ranges: bool = True,
    guided: bool = False,
) -> GraphModule:
    """A copy of a calibrated graph whose weights convert to integers chosen by GPTQ; for the settings see `GPTQ`.

    ``data``: batches of what the model takes. ``prepared`` and the tensors of the model stay as they are, and so does
    what the copy computes in float; notes of its report say what was chosen for each weight. Raises `Quant2eError` for
    a graph that is not calibrated, and, guided, for one without a float output, and `CalibrationError` without data.
    """
    rounding = _ByHessian(GPTQ(damping, activation_order, block_size, fit_ranges, guided))
    return on_copy(GPTQ.name, rounding.round_weights, prepared, data)
