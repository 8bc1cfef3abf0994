"""Output evaluation: what rounding at some points of a simulated graph costs at its outputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor
from torch.fx import Node

from quant2e.accuracy.output_error import outputs_of, powers
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.errors import Quant2eError
from quant2e.graph.captured.calls import Call
from quant2e.isolation import IsolatedRandomness
from quant2e.ranges.sqnr import sqnr_db


class OutputEvaluation:
    """SQNR at the output of ``simulated`` on ``calls``, for any set of rounded points.

    Raises `Quant2eError` for a model without a float output.
    """

    def __init__(self, simulated: SimulatedGraph, calls: Sequence[Call]) -> None:
        self._simulated = simulated
        self._calls = calls
        with simulated.rounding(()):
            self._wanted = self._outputs()
        if not any(self._wanted):
            raise Quant2eError(
                "this model has no float output, so nothing can be measured at it: return what comes before the index"
            )

    def _outputs(self) -> list[list[Tensor]]:
        """The float outputs of each item of data, from the same state and with the same random numbers each time."""
        self._simulated.start_again()
        randomness = IsolatedRandomness()
        return [_outputs(self._simulated, call, randomness) for call in self._calls]

    def powers(self, points: Collection[Node]) -> tuple[float, float]:
        """Sums of squares of the outputs with no point rounded, and of what they are off by with ``points`` rounded."""
        signal = noise = 0.0
        with self._simulated.rounding(points):
            for wanted, found in zip(self._wanted, self._outputs(), strict=True):
                for exact, got in zip(wanted, found, strict=True):
                    s, n = powers(exact, got)
                    signal, noise = signal + s, noise + n
        return signal, noise

    def sqnr(self, points: Collection[Node]) -> float:
        """In dB, against the graph with no point rounded."""
        return sqnr_db(*self.powers(points))


def _outputs(model: SimulatedGraph, call: Call, randomness: IsolatedRandomness) -> list[Tensor]:
    leaves = outputs_of(model, call, randomness)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
