"""Groups of ops that are quantized or left float together, and the points that each wants rounded.

Together are: what one kernel computes (a convolution and the activation behind it, no point between them), ops whose
results share a scale (a concatenation and what it joins), those that read one weight, and the steps of one layer. A
point, one use of a tensor, is wanted by the group that makes the tensor and by the one that reads it: it is rounded
while one of them is quantized.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch.fx import Node

from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.errors import module_path
from quant2e.graph.edit import PART_OF
from quant2e.report.report import Report


@dataclass(frozen=True, slots=True, eq=False)
class OpGroup:
    """``nodes``: ops in graph order; ``points``: observer calls that they want rounded."""

    nodes: tuple[Node, ...]
    points: frozenset[Node]

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of the ops; of a layer that was written out in steps, its name."""
        return tuple(dict.fromkeys(node.meta.get(PART_OF, node.name) for node in self.nodes))

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of their modules, each once."""
        return tuple(dict.fromkeys(path for node in self.nodes if (path := module_path(node))))


def op_groups(simulated: SimulatedGraph, report: Report) -> tuple[OpGroup, ...]:
    """The groups of the ops that ``report`` calls quantized, in graph order."""
    names = {verdict.op.name for verdict in report.verdicts if verdict.quantized}
    ops = [node for node in simulated.graph.graph.nodes if node.op == "call_function"]
    nodes = [node for node in ops if node.name in names or node.meta.get(PART_OF) in names]
    leader = {node: node for node in nodes}
    for one, other in _together(simulated, leader):
        _union(leader, one, other)
    members: dict[Node, list[Node]] = {}
    for node in nodes:
        members.setdefault(_find(leader, node), []).append(node)
    wanted = _wanted(simulated, leader)
    groups = (OpGroup(tuple(inside), frozenset(wanted.get(first, ()))) for first, inside in members.items())
    return tuple(group for group in groups if group.points)


def rounded_without(groups: Collection[OpGroup], left_out: Collection[OpGroup]) -> frozenset[Node]:
    """Points that are still rounded when some of the groups are left float."""
    return frozenset().union(*(group.points for group in groups if group not in left_out))


def _together(simulated: SimulatedGraph, ops: Mapping[Node, Node]) -> Iterator[tuple[Node, Node]]:
    """Pairs of ops that move together."""
    for node in ops:
        for source in node.all_input_nodes:
            if source in ops and source not in simulated.constants:
                yield source, node
    layers: dict[str, Node] = {}
    for node in ops:
        if PART_OF in node.meta:
            yield layers.setdefault(node.meta[PART_OF], node), node
    sharing: dict[str, Node] = {}
    reading: dict[Node, Node] = {}
    for call in simulated.points:
        source = call.all_input_nodes[0]
        if source in simulated.constants:
            for reader in (user for user in call.users if user in ops):
                yield reading.setdefault(source, reader), reader
        elif source in ops:
            yield sharing.setdefault(simulated.observers[call], source), source


def _wanted(simulated: SimulatedGraph, leader: dict[Node, Node]) -> dict[Node, set[Node]]:
    found: dict[Node, set[Node]] = {}
    for call in simulated.points:
        for node in (call.all_input_nodes[0], *call.users):
            if node in leader:
                found.setdefault(_find(leader, node), set()).add(call)
    return found


def _find(leader: dict[Node, Node], node: Node) -> Node:
    while leader[node] is not node:
        leader[node] = leader[leader[node]]
        node = leader[node]
    return node


def _union(leader: dict[Node, Node], one: Node, other: Node) -> None:
    """The one that comes first in the graph leads, so that groups do not depend on the order of the pairs."""
    first, second = _find(leader, one), _find(leader, other)
    if second < first:
        first, second = second, first
    leader[second] = first
