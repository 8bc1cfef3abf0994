"""Worst places of a quantized graph: the ops that add most of the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from quant2e.errors import where
from quant2e.graph.captured.inputs import flat_inputs
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.mutation import own_written_tensors
from quant2e.graph.qdq_ops import DEQUANTIZE, QUANTIZE
from quant2e.isolation import IsolatedRandomness
from quant2e.observers.base import is_observer_call
from quant2e.ranges.sqnr import sqnr_db

_CLEAN_DB = 60.0
"""SQNR above which operands count as intact."""

_NOTICEABLE = 0.01
"""Noise, of a signal of power 1, that an op must add to be a place to look at."""


@dataclass(frozen=True, slots=True)
class NoisyOp:
    """One op: SQNR in dB of its result against float, and the lowest one among its operands."""

    op: str
    sqnr_db: float
    before_db: float

    @property
    def added(self) -> float:
        """Noise that comes in here, of a signal of power 1: what is drowned already cannot drown again."""
        return min(_noise(self.sqnr_db), 1.0) - min(_noise(self.before_db), 1.0)

    def __str__(self) -> str:
        reached = "intact" if self.before_db >= _CLEAN_DB else f"with {self.before_db:.1f} dB"
        return f"{self.op}: {self.sqnr_db:.1f} dB behind it, what it reads arrives {reached}"


def worst_places(prepared: GraphModule, converted: GraphModule, batch: Any, count: int = 3) -> list[NoisyOp]:
    """The ``count`` ops of ``converted`` that add most noise to their signal, the worst first, on one item of data.

    ``prepared``: the observed graph that it was made from, run in float for comparison; both are left as they are.
    """
    exact = _Results(prepared)
    exact.run_on(batch)
    compared = _Results(converted)
    compared.run_on(batch)
    named = {node.name: node for node in prepared.graph.nodes}
    ratios: dict[Node, float] = {}
    places = []
    for node in converted.graph.nodes:
        before = min((ratios[source] for source in node.all_input_nodes), default=math.inf)
        ours, theirs = compared.values.get(node.name), exact.values.get(node.name)
        moves = node.target in QUANTIZE or node.target in DEQUANTIZE
        if moves or ours is None or theirs is None or ours.shape != theirs.shape:
            ratios[node] = before
            continue
        ratios[node] = _ratio(theirs, ours)
        if node.op == "call_function":
            places.append(NoisyOp(where(named[node.name]), ratios[node], before))
    places.sort(key=lambda place: -place.added)
    return [place for place in places[:count] if place is places[0] or place.added >= _NOTICEABLE]


def _noise(sqnr: float) -> float:
    return 1e6 if sqnr < -_CLEAN_DB else float(10.0 ** (-sqnr / 10.0))


def _ratio(exact: Tensor, ours: Tensor) -> float:
    finite = torch.isfinite(exact)
    wanted = torch.where(finite, exact, 0.0).double()
    error = torch.where(finite, ours, 0.0).double() - wanted
    noise = float(error.square().sum())
    return sqnr_db(float(wanted.square().sum()), math.inf if math.isnan(noise) else noise)


class _Results(Interpreter):
    """Runs a copy of a graph and keeps every float result; observers hand on what they get."""

    def __init__(self, gm: GraphModule) -> None:
        copied = copy_graph(gm)
        own_written_tensors(copied)
        super().__init__(copied)
        self._graph_module = copied
        self.values: dict[str, Tensor] = {}

    def run_on(self, batch: Any) -> None:
        """Run one item of data."""
        with torch.no_grad(), IsolatedRandomness():
            self.run(*flat_inputs(self._graph_module, batch), enable_io_processing=False)

    def run_node(self, n: Node) -> Any:
        """The value of ``n``."""
        if is_observer_call(n):
            return self.env[n.all_input_nodes[0]]
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.is_floating_point():
            self.values[n.name] = result.detach().clone()
        return result
