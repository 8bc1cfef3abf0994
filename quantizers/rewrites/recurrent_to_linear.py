"""Recurrent layers → linear.

rnn(x)  =  h,   h_t = tanh(linear(x, W, b)_t + linear(h_(t-1), U, d))      for every step t; LSTM and GRU likewise.

The products with the input are one linear for all steps; those with the state are one for each step, and share their
weight. What comes out is stacked where the layer was. Layers whose number of steps varies, or is large, stay whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from quant2e.graph.constants import Constants
from quant2e.graph.dataflow import operand
from quant2e.graph.edit import PART_OF, emit, fold_into
from quant2e.graph.effects import aliases, writes
from quant2e.graph.fake_values import node_tensor, shape_of

aten = torch.ops.aten

LAYERS = frozenset({aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input})
CELLS = frozenset(
    {aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default}
)
PACKED = frozenset({aten.lstm.data, aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data})
RECURRENT = LAYERS | CELLS | PACKED

MOST_STEPS = 1024
"""So many steps, of all layers and directions together, are written out; each is about 20 nodes in every graph."""

State = tuple[Node, ...]
"""What one step hands to the next: ``h``, and the cell of an LSTM."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters of one layer in one direction. ``projection``: of an LSTM whose ``h`` is smaller than its cell."""

    input: Node
    hidden: Node
    input_bias: Node | None = None
    hidden_bias: Node | None = None
    projection: Node | None = None


def _lstm(place: Node, x: Node, state: State, weights: Weights) -> State:
    h, c = state
    i, f, g, o = _chunks(place, _with_hidden(place, x, h, weights), 4)
    kept = emit(place, aten.mul.Tensor, emit(place, aten.sigmoid.default, f), c)
    new = emit(place, aten.mul.Tensor, emit(place, aten.sigmoid.default, i), emit(place, aten.tanh.default, g))
    c = emit(place, aten.add.Tensor, kept, new)
    h = emit(place, aten.mul.Tensor, emit(place, aten.sigmoid.default, o), emit(place, aten.tanh.default, c))
    return h if weights.projection is None else _product(place, h, weights.projection), c


def _gru(place: Node, x: Node, state: State, weights: Weights) -> State:
    (h,) = state
    hidden = _hidden(place, h, weights)
    x_r, x_z, x_n = _chunks(place, x, 3)
    if hidden is not None:
        h_r, h_z, h_n = _chunks(place, hidden, 3)
        x_r, x_z = emit(place, aten.add.Tensor, x_r, h_r), emit(place, aten.add.Tensor, x_z, h_z)
        x_n = emit(
            place, aten.add.Tensor, x_n, emit(place, aten.mul.Tensor, emit(place, aten.sigmoid.default, x_r), h_n)
        )
    z, n = emit(place, aten.sigmoid.default, x_z), emit(place, aten.tanh.default, x_n)
    return (emit(place, aten.add.Tensor, n, emit(place, aten.mul.Tensor, z, emit(place, aten.sub.Tensor, h, n))),)


def _rnn(activation: Any) -> Step:
    def step(place: Node, x: Node, state: State, weights: Weights) -> State:
        return (emit(place, activation, _with_hidden(place, x, state[0], weights)),)

    return step


def _with_hidden(place: Node, x: Node, h: Node, weights: Weights) -> Node:
    hidden = _hidden(place, h, weights)
    return x if hidden is None else emit(place, aten.add.Tensor, hidden, x)


def _hidden(place: Node, h: Node, weights: Weights) -> Node | None:
    """The product with the state, or the bias alone where the state is zero; None where nothing is left."""
    return weights.hidden_bias if _is_zero(h) else _product(place, h, weights.hidden, weights.hidden_bias)


def _is_zero(h: Node) -> bool:
    """Whether a state is zeros, as layers make it that are given none."""
    while h.target in (operator.getitem, aten.unbind.int):
        h = h.all_input_nodes[0]
    made = h.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
    return made and not _is_written(h)


def _is_written(tensor: Node) -> bool:
    """Whether an op changes a tensor in place, itself or through a view."""
    return any(tensor in writes(user) or (tensor in aliases(user) and _is_written(user)) for user in tensor.users)


def _product(place: Node, x: Node, weight: Node, bias: Node | None = None) -> Node:
    return emit(place, aten.linear.default, x, weight, *(() if bias is None else (bias,)))


def _chunks(place: Node, x: Node, count: int) -> tuple[Node, ...]:
    return _parts(place, emit(place, aten.chunk.default, x, count, -1), count)


def _parts(place: Node, several: Node, count: int) -> tuple[Node, ...]:
    return tuple(emit(place, operator.getitem, several, index) for index in range(count))


Step = Callable[[Node, Node, State, Weights], State]
"""Writes one step in front of a node: products with the input, the state before, weights → the state after."""

_STEPS: dict[Any, Step] = {
    aten.lstm.input: _lstm,
    aten.lstm_cell.default: _lstm,
    aten.gru.input: _gru,
    aten.gru_cell.default: _gru,
    aten.rnn_tanh.input: _rnn(aten.tanh.default),
    aten.rnn_tanh_cell.default: _rnn(aten.tanh.default),
    aten.rnn_relu.input: _rnn(aten.relu.default),
    aten.rnn_relu_cell.default: _rnn(aten.relu.default),
}


def why_whole(node: Node, constants: Constants) -> str | None:
    """Why a recurrent layer is not written out as linear layers; None if it can be."""
    if node.target in PACKED:
        return "its sequences are packed, of different lengths; pad them instead"
    value = node_tensor(operand(node, 0))
    if value is None or not value.is_floating_point():
        return "its input is not known"
    if any(weight not in constants for weight in _weights(node)):
        return "its weights are not constant"
    if node.target in CELLS:
        return None
    steps: Any = value.shape[_time(node)]
    several = len(list(_layers(node)))
    if not isinstance(steps, int):
        return "its number of steps varies; where it is fixed, the layer is quantized step by step"
    if steps * several > MOST_STEPS:
        return f"it has {steps} steps in {several} layers and directions; up to {MOST_STEPS} steps are quantized"
    return None if steps else "it has no steps"


@dataclass(frozen=True, slots=True)
class RecurrentAsLinear:
    """A pass: the recurrent layers and cells that ``wanted`` answers True for, written out step by step.

    What is written for a layer has the layer's name under ``meta[PART_OF]``.
    """

    wanted: Callable[[Node], bool]
    __name__: ClassVar[str] = "recurrent_as_linear"

    def __call__(self, gm: GraphModule) -> int:
        """Rewrite every such layer; returns how many."""
        found = [node for node in gm.graph.nodes if node.target in RECURRENT]
        constants = Constants(gm.graph) if found else None
        count = 0
        for node in found:
            assert constants is not None
            if why_whole(node, constants) is None and self.wanted(node):
                _write_out(node)
                count += 1
        return count


def _write_out(node: Node) -> None:
    before = node.prev
    results = _cell(node) if node.target in CELLS else _layer(node)
    written = before.next
    while written is not node:
        written.meta[PART_OF] = node.name
        written = written.next
    for user in list(node.users) if len(results) > 1 else ():
        assert user.target is operator.getitem, "several results are picked one by one"
        result = results[operand(user, 1)]
        fold_into(result, user.name)
        user.replace_all_uses_with(result)
        node.graph.erase_node(user)
    if len(results) == 1:
        node.replace_all_uses_with(results[0])
    node.graph.erase_node(node)


def _cell(node: Node) -> State:
    """One step; the results of the op: the state after it."""
    (weights,) = _layers(node)
    x = _product(node, operand(node, "input"), weights.input, weights.input_bias)
    return _STEPS[node.target](node, x, _states(node), weights)


def _layer(node: Node) -> State:
    """All steps; the results of the op: what every step put out, and the last states."""
    bidirectional = bool(operand(node, "bidirectional"))
    weights, states = list(_layers(node)), _initial(node)
    last: list[State] = []
    x, dropout = operand(node, "input"), float(operand(node, "dropout"))
    for layer in range(0, len(weights), 1 + bidirectional):
        if layer and dropout:
            x = emit(node, aten.dropout.default, x, dropout, bool(operand(node, "train")))
        outputs = []
        for direction in range(1 + bidirectional):
            output, state = _all_steps(node, x, states[layer + direction], weights[layer + direction], direction == 1)
            outputs.append(output)
            last.append(state)
        x = emit(node, aten.cat.default, outputs, -1) if bidirectional else outputs[0]
    return (x, *(_stacked(node, each) for each in zip(*last, strict=True)))


def _all_steps(node: Node, x: Node, state: State, weights: Weights, reverse: bool) -> tuple[Node, State]:
    """One layer in one direction: what all steps put out, at the places of what they took, and the last state."""
    time, step = _time(node), _STEPS[node.target]
    steps = int(shape_of(x)[time])
    products = _product(node, x, weights.input, weights.input_bias)
    each = _parts(node, emit(node, aten.unbind.int, products, time), steps)
    made = []
    for product in reversed(each) if reverse else each:
        state = step(node, product, state, weights)
        made.append(state[0])
    return _stacked(node, made[::-1] if reverse else made, time), state


def _stacked(place: Node, tensors: Sequence[Node], axis: int = 0) -> Node:
    """Along a new axis; one tensor is not copied for that."""
    if len(tensors) == 1:
        return emit(place, aten.unsqueeze.default, tensors[0], axis)
    return emit(place, aten.stack.default, list(tensors), axis)


def _initial(node: Node) -> list[State]:
    """The state in front of the first step, for every layer and direction."""
    count = len(list(_layers(node)))
    given = [_parts(node, emit(node, aten.unbind.int, each), count) for each in _states(node)]
    return list(zip(*given, strict=True))


def _time(node: Node) -> int:
    """The axis of the input over which the steps run."""
    return 1 if operand(node, "batch_first") else 0


def _layers(node: Node) -> Iterator[Weights]:
    """Weights of every layer and direction, in the order of the op."""
    if node.target in CELLS:
        yield Weights(*(operand(node, name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")))
        return
    weights, has_biases = _weights(node), bool(operand(node, "has_biases"))
    directions = int(operand(node, "num_layers")) * (1 + bool(operand(node, "bidirectional")))
    each = len(weights) // directions
    for first in range(0, len(weights), each):
        several = weights[first : first + each]
        biases = several[2:4] if has_biases else (None, None)
        yield Weights(*several[:2], *biases, *several[4 if has_biases else 2 :])


def _weights(node: Node) -> Sequence[Node]:
    if node.target in CELLS:
        names = ("w_ih", "w_hh", "b_ih", "b_hh")
        return [weight for name in names if (weight := operand(node, name)) is not None]
    return list(operand(node, "params"))


def _states(node: Node) -> State:
    """``h``, and the cell of an LSTM, in front of the first step: one for a cell, those of all layers for a layer."""
    hx = operand(node, "hx")
    return tuple(hx) if isinstance(hx, list | tuple) else (hx,)
