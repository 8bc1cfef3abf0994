"""Layer by layer: the walk that rounds each weight of a calibrated graph, with those before it rounded already.

    for each weight, in the order of use:    look at its inputs  →  fit its range  →  choose its integers

What is chosen becomes the encoding and the integers of its observer (`quant2e.observers.given`), so conversion writes
exactly that; the float graph stays as it is. Tied weights are one: what their other products see comes from a run
before, with all weights rounded to nearest. At a time there are what one layer collects, what is collected for tied
ones, and the tensors of all batches that are still to be read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.accuracy.algorithms.rounding.hessian_rounding import ColumnGrid
from quant2e.accuracy.algorithms.rounding.output_weights import OutputWeights
from quant2e.accuracy.algorithms.rounding.weight_layers import (
    QuantizedWeight,
    Use,
    check_calibrated,
    quantized_weights,
    simulated_weights,
    weights_in_bodies,
)
from quant2e.accuracy.algorithms.rounding.weight_ranges import fit_encoding, was_given
from quant2e.accuracy.lock_step import BatchRun, Visit, in_lock_step
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.errors import CalibrationError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.module import check_dtypes
from quant2e.observers.base import integer_limits
from quant2e.observers.given import give_encoding, give_integers
from quant2e.ranges.sqnr import sqnr_db


@dataclass(frozen=True, slots=True)
class Chosen:
    """``integers``: as floats, as `Use.rows` lays them out. ``nearest``, ``error``, ``signal``: squared errors of the
    nearest integers and of these at the result of the layer, and the power of what it should be.
    """

    integers: Tensor
    nearest: float
    error: float
    signal: float
    remark: str = ""


class LayerRounding(ABC):
    """Chooses the integers of weights, one layer after the other, by what the layers read."""

    name: ClassVar[str]
    also_float: ClassVar[bool] = False
    """Whether it compares with what the float model computes."""
    fit_ranges: bool
    weights: OutputWeights
    """What `weigh` found."""

    def weigh(self, simulated: SimulatedGraph, calls: Sequence[Call], uses: Sequence[Use]) -> OutputWeights:
        """How much each sample of each product counts, found before the first is looked at; empty: all alike."""
        return {}

    @abstractmethod
    def collect(self, use: Use, rounded: Sequence[BatchRun], exact: Sequence[BatchRun]) -> Any:
        """What is kept of the inputs of one product."""

    @abstractmethod
    def second_moment(self, collected: Sequence[Any]) -> Tensor:
        """Mean square of each column of the inputs, ``[groups, columns]``, of all products of a weight."""

    @abstractmethod
    def choose(self, weight: QuantizedWeight, grid: ColumnGrid, collected: Sequence[Any]) -> Chosen | str:
        """The integers of a weight, no worse than the nearest ones, or why these stay."""

    @abstractmethod
    def error_of(self, weight: QuantizedWeight, values: Tensor, collected: Sequence[Any]) -> float:
        """The squared error at the results of all products with ``values`` in place of the weight's rows."""

    def round_weights(self, model: GraphModule, calls: Sequence[Call]) -> list[str]:
        """Give the observers of weights, in place, their encodings and integers, by what ``calls`` bring to each layer.

        Returns a line for each weight; none where there is nothing to round.
        """
        check_calibrated(model, self.name)
        if not calls:
            raise CalibrationError(
                f"{self.name} needs at least one batch of data: it looks at the inputs of each layer"
            )
        for call in calls:
            check_dtypes(model, call)
        simulated = simulated_weights(model)
        return [] if simulated is None else _Walk(self, model, simulated, calls).run()


class _Walk:
    """One walk over the weights of a model."""

    def __init__(
        self, algorithm: LayerRounding, model: GraphModule, simulated: SimulatedGraph, calls: Sequence[Call]
    ) -> None:
        self._algorithm, self._model, self._simulated, self._calls = algorithm, model, simulated, calls
        self._weights = quantized_weights(model, simulated)
        self._shared = _shared(self._weights, simulated)
        self._ahead: dict[Use, Any] = {}
        self._lines: list[str] = []

    def run(self) -> list[str]:
        possible = [weight for weight in self._weights if not weight.reason]
        uses = [use for weight in possible for use in weight.uses]
        self._algorithm.weights = self._algorithm.weigh(self._simulated, self._calls, uses)
        tied = [use for weight in possible for use in weight.uses[1:]]
        if tied:
            self._in_lock_step({use.op: self._look_ahead(use) for use in tied})
        self._in_lock_step({weight.uses[0].op: self._round(weight) for weight in possible})
        if not self._lines:
            return []
        left = [f"{weight.place}: rounded to nearest, {weight.reason}" for weight in self._weights if weight.reason]
        bodies = [f"'{path}': what its body reads is rounded to nearest" for path in weights_in_bodies(self._model)]
        return [*self._lines, *left, *bodies]

    def _in_lock_step(self, visits: dict[Node, Visit]) -> None:
        if visits:
            in_lock_step(self._simulated, self._calls, visits, also_float=self._algorithm.also_float)

    def _look_ahead(self, use: Use) -> Visit:
        def visit(rounded: Sequence[BatchRun], exact: Sequence[BatchRun]) -> None:
            self._ahead[use] = self._algorithm.collect(use, rounded, exact)

        return visit

    def _round(self, weight: QuantizedWeight) -> Visit:
        def visit(rounded: Sequence[BatchRun], exact: Sequence[BatchRun]) -> None:
            here = self._algorithm.collect(weight.uses[0], rounded, exact)
            self._choose(weight, [here, *(self._ahead.pop(use) for use in weight.uses[1:])])

        return visit

    def _choose(self, weight: QuantizedWeight, collected: Sequence[Any]) -> None:
        collected = [each for each in collected if each is not None]
        if not collected:
            weight.reason = "no input came"
            return
        moment = self._algorithm.second_moment(collected)
        if not bool(torch.isfinite(moment).all()):
            weight.reason = "its input holds NaN or infinity"
            return
        chosen, grid = self._best(weight, moment, collected)
        if isinstance(chosen, str):
            weight.reason = chosen
            return
        integers = weight.uses[0].weight(chosen.integers, weight.value.shape)
        for name in dict.fromkeys(str(call.target) for call in weight.calls):
            give_encoding(self._model, name, weight.encoding)
        for call in weight.calls:
            give_integers(self._model, call, integers.to(weight.encoding.dtype))
        value = weight.uses[0].weight(grid.real(chosen.integers), weight.value.shape).to(weight.value.dtype)
        for use in weight.uses:
            self._simulated.round_to(use.point, value)
        self._lines.append(
            f"{weight.place}: {sqnr_db(chosen.signal, chosen.error):.1f} dB, to nearest "
            f"{sqnr_db(chosen.signal, chosen.nearest):.1f} dB ({weight.numbers}{chosen.remark})"
        )

    def _best(
        self, weight: QuantizedWeight, moment: Tensor, collected: Sequence[Any]
    ) -> tuple[Chosen | str, ColumnGrid]:
        """With a fitted range; with the old one where even its nearest integers are better than that."""
        asked, own = weight.encoding, self._grid(weight)
        if self._algorithm.fit_ranges:
            self._fit(weight, moment)
        grid = self._grid(weight)
        chosen = self._algorithm.choose(weight, grid, collected)
        if isinstance(chosen, str) or weight.encoding is asked:
            return chosen, grid
        rows = weight.uses[0].rows(weight.value.float())
        nearest = self._algorithm.error_of(weight, own.real(own.nearest(rows)), collected)
        if chosen.error > nearest:
            weight.encoding = asked
            return self._algorithm.choose(weight, own, collected), own
        return replace(chosen, nearest=nearest), grid

    def _fit(self, weight: QuantizedWeight, moment: Tensor) -> None:
        """Give the weight the range of least error, unless it shares its scales, or somebody chose them."""
        observers = {str(call.target) for call in weight.calls}
        observer = self._model.get_submodule(str(weight.calls[0].target))
        if observers & self._shared or was_given(observer):
            return
        importance = importance_of(weight, moment)
        found = fit_encoding(observer, weight.encoding, [weight.value], [importance])
        if not isinstance(found, str):
            weight.encoding = found.encoding

    def _grid(self, weight: QuantizedWeight) -> ColumnGrid:
        """The integers of a weight, with the limits that a kernel sets them where the observer knows of one."""
        scale, zero = weight.grid()
        low, high = weight.encoding.quant_min, weight.encoding.quant_max
        grid = ColumnGrid(scale=scale, zero_point=zero, low=low, high=high)
        use, observers = weight.uses[0], dict.fromkeys(str(call.target) for call in weight.calls)
        nearest = use.weight(grid.nearest(use.rows(weight.value.float())), weight.value.shape)
        for name in observers:
            limits = integer_limits(self._model.get_submodule(name), nearest)
            if limits is not None:
                least, most = (grid.within(use.rows(end.to(nearest))) for end in limits)
                grid = replace(grid, low=least, high=most)
        return grid


def importance_of(weight: QuantizedWeight, moment: Tensor) -> Tensor:
    """The second moment of the input that meets each value of a weight, of its shape.

    A column that saw nothing but zeros counts a thousandth of the mean, so that its weights do not become anything.
    """
    least = moment.mean(-1, keepdim=True) / 1000
    use = weight.uses[0]
    rows = torch.maximum(moment, least).unsqueeze(1).float()
    return use.weight(rows.expand_as(use.rows(weight.value)), weight.value.shape)


def _shared(weights: Sequence[QuantizedWeight], simulated: SimulatedGraph) -> frozenset[str]:
    """Observers that look at several tensors: their scales are not one weight's to choose."""
    seen: dict[str, set[int]] = {}
    for index, weight in enumerate(weights):
        for call in weight.calls:
            seen.setdefault(str(call.target), set()).add(index)
    for point, name in simulated.observers.items():
        if simulated.constant(point) is None:
            seen.setdefault(name, set()).add(-1)
    return frozenset(name for name, tensors in seen.items() if len(tensors) > 1)
