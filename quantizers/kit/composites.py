"""Composite functions of one tensor, spelled out op by op: x·sigmoid(x), x·relu6(x+3)/6, (x-mean)·rsqrt(var+eps).

Their parts have ranges of their own, and rounding each of them costs more accuracy than the function is worth in
speed.
A composite is found by data flow alone. It is everything between an elementwise op and the nearest tensor through which
all of its data passes, provided that the ops between are elementwise, or reductions of that tensor, and

- one of them is an op that the backend computes in float anyway (sigmoid, exp, rsqrt, ...), or
- the tensor is multiplied by a clamped copy of itself, or combined with a reduction of itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from quant2e.annotation.pattern import short_name
from quant2e.graph.constants import Constants
from quant2e.graph.dataflow import is_pointwise

_AT_MOST = 64
"""Ops of the largest composite that is looked for."""

_CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "clip"})
_MULTIPLIES = frozenset({"mul", "multiply", "div", "divide", "true_divide"})


def is_reduction(node: Node) -> bool:
    """Whether the op sums, averages or picks over whole dimensions."""
    return node.op == "call_function" and torch.Tag.reduction in getattr(node.target, "tags", ())


def _name(node: Node) -> str:
    return short_name(node.target).removesuffix("_")


@dataclass(slots=True)
class _Cone:
    """The ops that a node is computed from, latest first, as far as they are elementwise."""

    position: Mapping[Node, int]
    constants: Constants
    floats: Callable[[Node], bool]
    moves: Callable[[Node], bool]
    queue: list[tuple[int, Node]] = field(default_factory=list)

    def data(self, node: Node) -> list[Node]:
        """The operands that depend on the model's inputs."""
        return [n for n in node.all_input_nodes if n not in self.constants]

    def composite(self, root: Node) -> tuple[frozenset[Node], Node] | None:
        """The composite that ends in ``root``, and the tensor it is a function of."""
        region: dict[Node, None] = {}
        found: tuple[frozenset[Node], Node] | None = None
        self.queue = [(-self.position[root], root)]
        while self.queue and len(region) < _AT_MOST:
            place, node = heapq.heappop(self.queue)
            while self.queue and self.queue[0][0] == place:  # read by several members
                heapq.heappop(self.queue)
            if not self.queue and region:  # everything passes through this node
                if found is None and self._is_composite(region):
                    found = (frozenset(region), node)
                if found is not None and not self._continues(node):
                    return found
                if found is not None:
                    found = (frozenset([*region, node]), self.data(node)[0])
            if not self._expands(node):
                return found
            region[node] = None
            for operand in self.data(node):
                heapq.heappush(self.queue, (-self.position[operand], operand))
        return found

    def _expands(self, node: Node) -> bool:
        return is_pointwise(node) or is_reduction(node) or self.moves(node)

    def _continues(self, node: Node) -> bool:
        """Whether a composite extends to what it is a function of: a number added or multiplied in front of it.

        A clamp right behind a product or a sum of tensors is fused there and stays.
        """
        if not is_pointwise(node) or len(operands := self.data(node)) != 1 or node in operands:
            return False
        return _name(node) not in _CLAMPS or (is_pointwise(operands[0]) and len(self.data(operands[0])) == 1)

    def _is_composite(self, region: Mapping[Node, None]) -> bool:
        computes = [node for node in region if not self.moves(node)]
        if any(self.floats(node) for node in computes if is_pointwise(node)):
            return True
        joins = [node for node in computes if is_pointwise(node) and len(self.data(node)) > 1]
        if joins and any(is_reduction(node) for node in computes):
            return True
        return any(_name(node) in _MULTIPLIES for node in joins) and any(_name(node) in _CLAMPS for node in computes)


def composites(
    graph: Graph, floats: Callable[[Node], bool], moves: Callable[[Node], bool]
) -> dict[Node, tuple[Node, Node]]:
    """Member of a composite → the op that it ends in, and the tensor it is a function of.

    ``floats``: whether the backend computes an op in float only. ``moves``: whether an op only moves values; such ops
    may stand between the others, and are no members. Time is linear in the graph, with a bound on the size of a
    composite.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    constants = Constants(graph)
    cone = _Cone(position, constants, floats, moves)
    found: dict[Node, tuple[Node, Node]] = {}
    for node in reversed(graph.nodes):
        if not is_pointwise(node) or node in constants:
            continue
        if (composite := cone.composite(node)) is None:
            continue
        members, source = composite
        for member in members:
            if not moves(member):
                found.setdefault(member, (node, source))
    return found
