"""Simulated quantization: a prepared graph whose points can be rounded or not, one by one.

    x → observer → op        =>        x → (round, when on) → op

A point is one use of an observed tensor: the tensor on its way to one op that reads it. What it rounds to is what
convert would write for it, made by the same edit, so with all points on the graph computes what the converted graph
does, and with none what the float model does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from quant2e.accuracy.float_graphs import drop_observers
from quant2e.convert.encode_all import encode_all
from quant2e.convert.insert_qdq import quantize_at
from quant2e.errors import Quant2eError
from quant2e.graph.captured.module import independent_copy
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.control_flow import graphs_of
from quant2e.graph.effects import is_in_place
from quant2e.graph.mutation import written_attributes
from quant2e.integer.functionalize import use_functional_ops
from quant2e.observers.base import OBSERVER_PREFIX, is_observer_call
from quant2e.observers.encodings import Encoding, RoundedConstant
from quant2e.observers.given import constant_of
from quant2e.observers.measuring import searchable
from quant2e.observers.straight_through import round_to_grid
from quant2e.passes.train_batch_norm import FUSED
from quant2e.prepare.masks import left_float
from quant2e.ranges.search import searched_together


class Point(nn.Module):
    """One use of an observed tensor, which is handed on rounded when ``on``, else as it is."""

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
    """``graph``: a copy of a calibrated graph, with a `Point` for each reader where it had an observer call.

    ``points``: the calls of those; ``observers``: the name of the observer that each was; ``observed``: the name of its
    call.

    What is written in place is written to new tensors, where nobody sees the difference. ``float_bodies``: bodies of
    control flow have points as well, which are left out.
    Raises `Quant2eError` for a graph that is no prepared one or is being trained, and `CalibrationError` as
    `quant2e.convert_pt2e` does.
    """

    def __init__(self, prepared: GraphModule) -> None:
        if FUSED in prepared.meta:
            raise Quant2eError("this graph was prepared for training: convert it, and compare the result with float")
        inside = any(is_observer_call(node) for _, body in list(graphs_of(prepared))[1:] for node in body.graph.nodes)
        gm = independent_copy(prepared)
        drop_observers(body for _, body in list(graphs_of(gm))[1:])
        calls = [node for node in gm.graph.nodes if is_observer_call(node)]
        if not calls and inside:
            raise Quant2eError("all that is quantized lies in bodies of control flow, which count as a whole here")
        if not calls:
            raise Quant2eError("this graph has no observers: call prepare_pt2e on it, and calibrate")
        self.float_bodies = inside
        floats = left_float(prepared)
        with searched_together(searchable(prepared.modules())):
            encodings = encode_all(gm, calls, floats.observers)
        self.graph = gm
        self.constants = Constants(gm.graph)
        self.observers: dict[Node, str] = {}
        self.observed: dict[Node, str] = {}
        self.points: dict[Node, Point] = {}
        uses = []
        for call in calls:
            source = call.all_input_nodes[0]
            rounded = _rounded(call, gm, encodings[str(call.target)], source in self.constants)
            if rounded is not None:
                uses += [(call, source, rounded, reader) for reader in call.users]
            call.replace_all_uses_with(source)
        writers = {node for node in gm.graph.nodes if is_in_place(node)}
        use_functional_ops(gm)
        for call, source, rounded, reader in uses:
            self._insert(call, rounded, reader, _now(source, reader, writers))
        for call in calls:
            gm.graph.erase_node(call)
        gm.recompile()
        self._initial = {path: value.detach().clone() for path, value in written_attributes(gm).items()}

    def _insert(self, call: Node, rounded: nn.Module, reader: Node, source: Node) -> None:
        """A point between ``source`` and one op that reads it."""
        name = f"{OBSERVER_PREFIX}point_{len(self.points)}"
        self.graph.add_submodule(name, module := Point(rounded))
        with self.graph.graph.inserting_before(reader):
            point = self.graph.graph.call_module(name, (source,))
        point.meta = dict(call.meta)
        reader.replace_input_with(source, point)
        self.observers[point], self.observed[point], self.points[point] = str(call.target), call.name, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph(*args, **kwargs)

    def constant(self, point: Node) -> Tensor | None:
        """What the constant of ``point`` is rounded to, once; None where it is no constant."""
        rounded = self.points[point].rounded
        return rounded.value if isinstance(rounded, _Constant) else None

    def round_to(self, point: Node, value: Tensor) -> None:
        """Let a constant be rounded to ``value``, of its shape, at ``point`` and at the others of the same call."""
        rounded = self.points[point].rounded
        assert isinstance(rounded, _Constant), "only constants are rounded once"
        rounded.value = value

    def start_again(self) -> None:
        """Put the buffers that the model writes to back to their first values."""
        with torch.no_grad():
            for path, value in written_attributes(self.graph).items():
                value.copy_(self._initial[path])

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
    return _Constant(_run(made, constant_of(gm, call))) if constant else made


def _now(source: Node, reader: Node, writers: Collection[Node]) -> Node:
    """What a reader of ``source`` reads where an op that wrote into it gives a new tensor."""
    if source in reader.all_input_nodes:
        return source
    return next(node for node in reader.all_input_nodes if node in writers and source in node.all_input_nodes)


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
