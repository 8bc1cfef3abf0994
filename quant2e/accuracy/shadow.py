"""Shadow run: a quantized graph beside the float graph, each op once more on exact operands.

    what reaches an op    op(x̂)    against float: all the error so far, inherited and its own
    its shadow            op(x)     against float: the error that it makes itself

An op's own error is that of its weights and of the rounding of its result. Where a tensor is rounded for all that read
it, the rounding belongs to the op that made the tensor (or to the input of the graph); where one reader alone wants it
rounded, or the scale is found at run time, to that reader. An op whose results lie on the grid already, since it only
moves or picks values, rounds nothing.

Running ops on float operands beside the quantized model is what PyTorch's Numeric Suite calls shadow modules.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from quant2e.accuracy.output_error import powers
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.inputs import flat_inputs
from quant2e.graph.captured.module import independent_copy
from quant2e.graph.constants import Constants
from quant2e.graph.dataflow import SHAPE_READERS
from quant2e.graph.effects import is_random, writes
from quant2e.graph.mutation import written_nodes
from quant2e.graph.qdq_ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE, qd
from quant2e.integer.functionalize import use_functional_ops
from quant2e.isolation import IsolatedRandomness
from quant2e.observers.base import is_observer_call

_STEPS = QUANTIZE | DEQUANTIZE | CHOOSE_QPARAMS | {qd.convert_element_type.no_fuse}


def rounds(node: Node) -> bool:
    """Whether a node is a step of rounding: q, dq, what finds scales at run time, or a fake-quantizer."""
    if node.target is operator.getitem:
        return node.all_input_nodes[0].target in CHOOSE_QPARAMS
    return is_observer_call(node) or node.target in _STEPS


@dataclass(slots=True)
class Powers:
    """Sums of squares over all data, of elements that are finite in float; inf where others differ.

    ``signal``: the float result. ``own``, ``weights``, ``rounding``: errors on exact operands; of weights alone, and
    of rounding activations alone. ``total``: the error of what came out. ``product``, ``reached``: for a cosine.
    """

    signal: float = 0.0
    own: float = 0.0
    weights: float = 0.0
    rounding: float = 0.0
    total: float = 0.0
    product: float = 0.0
    reached: float = 0.0

    def add_result(self, exact: Tensor, result: Tensor) -> None:
        """Add what came out beside what comes out in float."""
        finite = torch.isfinite(exact)
        wanted, got = (torch.where(finite, value, 0.0).double() for value in (exact, result))
        self.signal += float(wanted.square().sum())
        self.total += powers(exact, result)[1]
        self.product += float((wanted * got).sum())
        self.reached += float(got.square().sum())

    @property
    def cosine(self) -> float:
        """Of the angle between what came out and the float result; 1 where both are zero."""
        if self.signal == 0.0 or self.reached == 0.0:
            return float(self.signal == self.reached)
        return self.product / math.sqrt(self.signal * self.reached)


class FloatValues(Interpreter):
    """Runs a copy of a float graph and keeps what the named nodes give."""

    def __init__(self, gm: GraphModule, names: frozenset[str]) -> None:
        copied = independent_copy(gm)
        super().__init__(copied)
        self._gm = copied
        self._names = names
        self._overwritten = any(writes(node) for node in copied.graph.nodes)
        self._values: dict[str, Any] = {}

    def of(self, call: Call) -> dict[str, Any]:
        """Values by the name of their node, for one item of data."""
        self._values = {}
        with torch.no_grad(), IsolatedRandomness():
            self.run(*flat_inputs(self._gm, call.copied()), enable_io_processing=False)
        return self._values

    def run_node(self, n: Node) -> Any:
        """The value of ``n``."""
        result = super().run_node(n)
        if n.name in self._names:
            self._values[n.name] = result.clone() if self._overwritten and isinstance(result, Tensor) else result
        return result


class ShadowRun(Interpreter):
    """Runs a copy of a quantized graph and adds up the errors of its ops and inputs, by name, in ``powers``.

    ``counterparts``: for ops of ``gm``, the node of the float graph that computes the same tensor. Ops that read or
    give a tensor that is written to have no exact operands: they are in ``not_compared``, and run on what reaches them.
    """

    def __init__(self, gm: GraphModule, counterparts: Mapping[str, str]) -> None:
        copied = independent_copy(gm)
        use_functional_ops(copied)
        super().__init__(copied)
        self._gm = copied
        self.counterparts = counterparts
        self._constants = Constants(copied.graph)
        self._made_by = _owners(copied, self._constants)
        written = written_nodes(copied.graph)
        self.not_compared = {
            node for node in copied.graph.nodes if not written.isdisjoint((node, *node.all_input_nodes))
        }
        self._exact: Mapping[str, Any] = {}
        self._shadows: dict[Node, Any] = {}  # from exact operands
        self._plain: dict[Node, Any] = {}  # where it differs: with no activation rounded
        self._unrounded: dict[Node, _Unrounded] = {}
        self.powers: dict[str, Powers] = {}

    def add(self, call: Call, exact: Mapping[str, Any]) -> None:
        """Run one item of data, of which ``exact`` holds the float values."""
        self._exact = exact
        with torch.no_grad(), IsolatedRandomness():
            self.run(*flat_inputs(self._gm, call.copied()), enable_io_processing=False)
        self._exact = {}
        self._shadows.clear()
        self._plain.clear()
        self._unrounded.clear()

    def run_node(self, n: Node) -> Any:
        """The value of ``n`` in the quantized graph."""
        result = super().run_node(n)
        if n in self._constants or n.op not in ("placeholder", "call_function", "call_module"):
            return result
        if n in self._made_by:
            self._round(n, self._made_by[n], result)
        elif n.op == "placeholder":
            self._made(n, result, result, result, result)
        elif rounds(n):
            source = n.all_input_nodes[0]
            self._shadows[n] = self._on(n, self._shadows)
            self._plain[n] = self._plain.get(source, self._shadows.get(source, self.env[source]))
        else:
            self._compute(n, result)
        return result

    def _compute(self, n: Node, result: Any) -> None:
        exact = self._exact.get(self.counterparts.get(n.name, ""))
        if not _alike(exact, result) or n in self.not_compared:
            exact = None
        if writes(n) or is_random(n) or n in self.not_compared:
            own = weights = result if exact is None else exact
        else:
            own = weights = self._on(n, self._shadows)
            if any(x in self._plain for x in n.all_input_nodes):
                weights = self._on(n, {**self._shadows, **self._plain})
                if exact is None:
                    self._plain[n] = weights
        self._made(n, exact, own, weights, result)

    def _made(self, n: Node, exact: Any, own: Any, weights: Any, result: Any) -> None:
        """``n`` has its value; where that is rounded for all readers, the record waits for it."""
        self._shadows[n] = own if exact is None else exact
        if exact is None:
            return
        if any(user in self._made_by for user in n.users):
            self._unrounded[n] = _Unrounded(exact, weights, result, {n: (exact, own)})
        elif n.op != "placeholder":
            self._record(n, exact, own, weights, None, result)

    def _round(self, n: Node, source: Node, result: Any) -> None:
        """A step that rounds what ``source`` made, for all that read it; the last step completes its record."""
        waiting = self._unrounded.get(source)
        if waiting is None:  # without a counterpart: the rounding counts for the next op that has one
            self._shadows[n] = self._on(n, self._shadows)
            return
        self._shadows[n] = waiting.exact
        step = n.all_input_nodes[0]
        exact, own = waiting.rounded[step]
        waiting.rounded[n] = exact, own = self._on(n, {step: exact}), self._on(n, {step: own})
        if any(user in self._made_by for user in n.users) or waiting.recorded:
            return
        waiting.recorded = True
        _, unrounded = waiting.rounded[source]
        on_grid = source.op == "call_function" and torch.equal(waiting.result, result)
        if on_grid:
            self._record(source, waiting.exact, unrounded, waiting.weights, None, result)
        else:
            self._record(source, waiting.exact, own, waiting.weights, exact, result)

    def _on(self, n: Node, operands: Mapping[Node, Any]) -> Any:
        """``n`` computed once more, with other values for some of its operands."""
        other = {x: operands[x] for x in n.all_input_nodes if x in operands}
        before = {x: self.env[x] for x in other}
        self.env.update(other)
        try:
            return super().run_node(n)
        finally:
            self.env.update(before)

    def _record(self, n: Node, exact: Any, own: Any, weights: Any, rounded: Any, result: Any) -> None:
        if not isinstance(exact, Tensor) or not exact.is_floating_point():
            return
        sums = self.powers.setdefault(n.name, Powers())
        sums.add_result(exact, result)
        own_error, weight_error = powers(exact, own)[1], powers(exact, weights)[1]
        sums.own += own_error
        sums.weights += weight_error
        sums.rounding += max(own_error - weight_error, 0.0) if rounded is None else powers(exact, rounded)[1]


@dataclass(slots=True)
class _Unrounded:
    """A tensor on its way through the steps of its rounding.

    ``exact``: in float. ``weights``: from exact operands, before it is rounded. ``result``: what came out, before it is
    rounded. ``rounded``: after each step, what becomes of the float tensor and of the one from exact operands.
    """

    exact: Tensor
    weights: Tensor
    result: Tensor
    rounded: dict[Node, tuple[Tensor, Tensor]]
    recorded: bool = False


def _alike(exact: Any, result: Any) -> bool:
    if isinstance(exact, Tensor) and isinstance(result, Tensor):
        return exact.shape == result.shape
    return exact is not None and type(exact) is type(result)


def _owners(gm: GraphModule, constants: Constants) -> dict[Node, Node]:
    """Steps that round a tensor for all of its readers, with the node that made it."""
    found: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        if node in constants or node.op not in ("placeholder", "call_function") or rounds(node):
            continue
        readers = [user for user in node.users if user.target not in SHAPE_READERS]
        if len(readers) != 1 or not _is_static_step(readers[0], node):
            continue
        found[readers[0]] = node
        for last in readers[0].users:
            if last.target in _STEPS and last.target not in QUANTIZE | CHOOSE_QPARAMS:
                found[last] = node
    return found


def _is_static_step(step: Node, source: Node) -> bool:
    if is_observer_call(step):
        return True
    return step.target in _STEPS - CHOOSE_QPARAMS and not any(
        rounds(x) and x is not source for x in step.all_input_nodes
    )
