"""Simulated quantization: a prepared graph whose points can be rounded or not, one by one.

    x → observer → op        =>        x → (round, when on) → op

A point is one observer call: one tensor on its way to those that read it. What it rounds to is what convert would
write for it, made by the same edit, so with all points on the graph computes what the converted graph does, and with
none what the float model does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from quant2e.accuracy.float_bodies import drop_observers_inside
from quant2e.convert.encode_all import encode_all
from quant2e.convert.insert_qdq import quantize_at
from quant2e.errors import Quant2eError
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.mutation import own_written_tensors
from quant2e.observers.base import OBSERVER_PREFIX, is_observer_call
from quant2e.observers.encodings import Encoding, RoundedConstant
from quant2e.observers.measuring import searchable
from quant2e.observers.straight_through import round_to_grid
from quant2e.passes.train_batch_norm import FUSED
from quant2e.prepare.masks import left_float
from quant2e.ranges.search import searched_together


class Point(nn.Module):
    """One observed tensor: handed on rounded when ``on``, else as it is."""

    def __init__(self, rounded: nn.Module) -> None:
        super().__init__()
        self.rounded = rounded
        self.on = False

    def forward(self, x: Tensor) -> Tensor:
        """``x``, of any shape, or what it becomes."""
        if not self.on:
            return x
        result: Tensor = self.rounded(x)
        return result


class SimulatedGraph:
    """``graph``: a copy of a calibrated graph, with a `Point` where it had an observer call; ``points``: those calls.

    Raises `Quant2eError` for a graph that is no prepared one or is being trained, and `CalibrationError` as
    `quant2e.convert_pt2e` does.
    """

    def __init__(self, prepared: GraphModule) -> None:
        if FUSED in prepared.meta:
            raise Quant2eError("this graph was prepared for training: convert it, and compare the result with float")
        gm = drop_observers_inside(copy_graph(prepared))
        own_written_tensors(gm)
        calls = [node for node in gm.graph.nodes if is_observer_call(node)]
        if not calls:
            raise Quant2eError("this graph has no observers: call prepare_pt2e on it, and calibrate")
        floats = left_float(prepared)
        with searched_together(searchable(prepared.modules())):
            encodings = encode_all(gm, calls, floats.observers)
        self.graph = gm
        self.constants = Constants(gm.graph)
        self.observers = {call: str(call.target) for call in calls}
        self.points: dict[Node, Point] = {}
        for index, call in enumerate(calls):
            rounded = _rounded(call, gm, encodings[str(call.target)], call.all_input_nodes[0] in self.constants)
            if rounded is None:
                call.replace_all_uses_with(call.all_input_nodes[0])
                gm.graph.erase_node(call)
                continue
            name = f"{OBSERVER_PREFIX}point_{index}"
            gm.add_submodule(name, point := Point(rounded))
            call.target = name
            self.points[call] = point
        gm.recompile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph(*args, **kwargs)

    @contextmanager
    def rounding(self, points: Collection[Node]) -> Iterator[None]:
        """Round at ``points`` and nowhere else, inside the block."""
        for call, point in self.points.items():
            point.on = call in points
        try:
            yield
        finally:
            for point in self.points.values():
                point.on = False


def _rounded(call: Node, gm: GraphModule, encoding: Encoding | None, constant: bool) -> nn.Module | None:
    """What rounds as convert would at this call; None where it would not."""
    source = call.all_input_nodes[0]
    if encoding is None:
        return None
    if isinstance(encoding, RoundedConstant):
        return _Constant(round_to_grid(evaluate(gm, source).detach(), encoding.scale)) if constant else None
    graph = Graph()
    x = graph.placeholder("x")
    x.meta = dict(source.meta)
    graph.call_module("observer", (x,))
    holder = nn.Module()
    holder.add_module("observer", gm.get_submodule(str(call.target)))
    made = GraphModule(holder, graph)
    observer = next(node for node in graph.nodes if node.op == "call_module")
    observer.meta = {key: call.meta[key] for key in ("val",) if key in call.meta}
    graph.output(observer)
    quantize_at(made, observer, encoding, "x")
    made.delete_submodule("observer")
    made.recompile()
    return _Constant(_run(made, evaluate(gm, source))) if constant else made


def _run(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(x.detach())
    return result


class _Constant(nn.Module):
    """A rounded constant: it is rounded once."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value: Tensor
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        """The value, whatever ``x``."""
        return self.value
