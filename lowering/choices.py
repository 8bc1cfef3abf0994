"""Choices: ops that choose by comparing values, where a tie, or one step, makes two right programs choose differently.

    topk, sort, argmax, x > y        the program's choice is right  ⇔  what it chose is as large as what the graph chose

Everything behind a choice differs with it: other boxes, in another order. So the graph is asked what it computes given
the program's own choices, each of which is held to the same bound as any other value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from lowering.own_noise import compare_within_noise
from lowering.parts import returning
from lowering.state import Apart, State, initial_state_of
from lowering.verify import Bound, Tally, Verification, measure, scale_at
from quant2e.errors import LoweringError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.inputs import inputs_of
from quant2e.graph.constants import Constants
from quant2e.graph.dataflow import operand
from quant2e.graph.fake_values import is_float

aten = torch.ops.aten

_PLACES = frozenset({aten.argmax.default, aten.argmin.default, aten.argsort.default, aten.argsort.stable})
"""Ops that return places along a dimension."""

_VALUES_AND_PLACES = frozenset(
    {aten.max.dim, aten.min.dim, aten.sort.default, aten.sort.stable, aten.topk.default, aten.kthvalue.default}
)
"""Ops that return values with their places along a dimension."""

_COMPARISONS = frozenset(
    overload
    for packet in (aten.gt, aten.ge, aten.lt, aten.le, aten.eq, aten.ne)
    for overload in (packet.Tensor, packet.Scalar)
)

Lower = Callable[[GraphModule], Callable[..., Any]]
"""Lowers a graph that has the inputs of the one in question, without comparing it."""


def choices_in(graph: GraphModule) -> list[Node]:
    """The nodes that hold what a graph chooses among float values: places along a dimension, or which are larger."""
    constant = Constants(graph.graph)
    found = []
    for node in graph.graph.nodes:
        if node.op != "call_function" or node in constant or not is_float(operand(node, 0)):
            continue
        if node.target in _PLACES or node.target in _COMPARISONS:
            found.append(node)
        elif node.target in _VALUES_AND_PLACES:
            found += [user for user in node.users if user.target is operator.getitem and user.args[1] == 1]
    return found


def compare_as_chosen(
    program: Callable[..., Any],
    reference: Any,
    graph: GraphModule,
    batches: Sequence[Call],
    lower: Lower,
    bound: Bound | None = None,
) -> Verification:
    """`compare_within_noise`; where that fails, given what the program chooses among values that are as good.

    ``graph``: ``reference`` as a graph. What the program chooses is read off a program of the same graph that returns
    its choices; each has to be within the bound of the graph's own.
    """
    found = compare_within_noise(program, reference, batches, bound)
    chosen = [] if found.passed else choices_in(graph)
    if not chosen:
        return found
    try:
        chooser = lower(returning(graph, chosen))
        choosing = Choosing(graph, chosen, chooser, found.bound, initial_state_of(program))
        given = measure(program, choosing, graph, batches, bound=found.bound)
    except LoweringError:
        return found
    return replace(given, choices=tuple(choosing.differing)) if choosing.right and given.passed else found


class Choosing(Apart):
    """A graph that computes with the choices of another program, and judges them.

    ``chosen``: the nodes that hold choices; ``chooser``: returns them, for the same inputs. ``right``: whether every
    choice so far was within ``bound`` of the graph's own; ``differing``: names of the ops that chose otherwise.
    """

    def __init__(
        self,
        graph: GraphModule,
        chosen: Sequence[Node],
        chooser: Callable[..., Any],
        bound: Bound,
        start: State | None = None,
    ) -> None:
        super().__init__(graph, start)
        assert isinstance(self.model, GraphModule)
        self._graph = self.model
        self._chosen = {node.name: _op(node) for node in chosen}
        self._chooser = chooser
        self._bound = bound
        self._tallies: dict[str, Tally] = {}
        self._twice = False
        self.differing: dict[str, None] = {}

    @property
    def right(self) -> bool:
        return not self._twice and all(tally.difference().within(self._bound) for tally in self._tallies.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs).copied()
        chosen = dict(zip(self._chosen, pytree.tree_leaves(self._chooser(*call.args, **call.kwargs)), strict=True))
        flat = inputs_of(self._graph).flat(args, kwargs)
        return _Given(self._graph, chosen, self._judge).run(*flat, enable_io_processing=False)

    def _judge(self, name: str, operands: tuple[Any, Any], own: Tensor, chosen: Tensor) -> None:
        """Note how far what the program took is from what the graph took."""
        if torch.equal(own, chosen):
            return
        self.differing[self._chosen[name].name] = None
        tally = self._tallies.setdefault(name, Tally())
        x, other = operands
        if own.dtype is torch.bool:  # right where both are about the same
            x, other = torch.broadcast_tensors(x, torch.as_tensor(other, dtype=x.dtype))
            mine, theirs = x, torch.where(own != chosen, other, x)
        else:
            mine, theirs = _taken(x, other, own), _taken(x, other, chosen)
            self._twice |= _takes_twice(x, other, chosen)
        tally.add_float(theirs, mine, scale_at(operand(self._chosen[name], 0)))


def _taken(x: Tensor, dim: int | None, places: Tensor) -> Tensor:
    """The values of ``x`` at ``places`` along ``dim``; None: of all of them in a row."""
    x, dim = (x.flatten(), 0) if dim is None else (x, dim)
    places = places if places.dim() == x.dim() else places.unsqueeze(dim)
    if bool(((places < 0) | (places >= x.shape[dim])).any()):
        raise LoweringError("the program chose a place that is not there")
    return x.gather(dim, places)


def _takes_twice(x: Tensor, dim: int | None, places: Tensor) -> bool:
    """Whether an op that takes several places took one of them more than once."""
    if dim is None or places.dim() != x.dim() or not places.dim():
        return False
    ordered = places.sort(dim).values
    return bool((ordered.diff(dim=dim) == 0).any())


class _Given(Interpreter):
    """Runs a graph with given values for some nodes, each of which is judged first."""

    def __init__(self, graph: GraphModule, given: Mapping[str, Tensor], judge: Callable[..., None]) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self._given = given
        self._judge = judge

    def run_node(self, n: Node) -> Any:
        own = super().run_node(n)
        if n.name not in self._given:
            return own
        chosen = self._given[n.name].to(own.dtype)
        if chosen.shape != own.shape:
            raise LoweringError(f"{n.name} has shape {tuple(chosen.shape)} instead of {tuple(own.shape)}")
        op = _op(n)
        names = (0, 1 if op.target in _COMPARISONS else "dim")
        x, other = (self.map_nodes_to_values(operand(op, name), n) for name in names)
        self._judge(n.name, (x, other), own, chosen)
        return chosen


def _op(node: Node) -> Node:
    """The op that chooses, of a node that holds its choice."""
    (source, *_) = node.all_input_nodes
    return source if node.target is operator.getitem else node
