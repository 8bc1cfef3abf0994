"""The space that is searched: for each group of ops, float or one of the ways in which they can be quantized.

An *alternative* is one quantizer, with the graph that it prepared and that data calibrated. Alternatives that annotate
the same graph can be mixed, group by group: they are a *family*. Those that rewrote the float graph in different ways
(one equalized its weights, say) are families of their own, of which a model takes one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.fx import GraphModule

from quant2e.accuracy.float_graphs import drop_observers
from quant2e.annotation.plan import Plan
from quant2e.calibration.held_out import HeldOutData
from quant2e.graph.attributes import attribute
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.control_flow import graphs_of
from quant2e.observers.base import OBSERVER_PREFIX
from quant2e.report.algorithm_step import AlgorithmStep
from quant2e.report.record import GraphRecord, record_of
from quant2e.report.report import Report

FLOAT_PICK = "float"
"""What a group of ops is when no alternative quantizes it."""


@dataclass(frozen=True, slots=True, eq=False)
class Alternative:
    """One way to quantize: ``prepared`` is annotated by one quantizer and calibrated; ``held_out``: the data that was
    not calibrated on; ``by``: the quantizer's type, as encodings name it; ``steps``: what algorithms did to it.
    """

    name: str
    prepared: GraphModule
    held_out: HeldOutData
    by: str
    steps: tuple[AlgorithmStep, ...] = ()

    @property
    def record(self) -> GraphRecord:
        """The record of the prepared graph."""
        return record_of(self.prepared)

    @property
    def plan(self) -> Plan:
        """What the quantizer asked for."""
        return self.record.plan

    @property
    def report(self) -> Report:
        """A verdict for each float op."""
        return self.record.report


@dataclass(frozen=True, slots=True)
class TunedGroup:
    """Ops that are quantized or left float together.

    ``ops``: their names in the report, in graph order; ``modules``: paths of their modules; ``nodes``: names of the
    nodes that they are, none for what is quantized inside of the bodies of control flow; ``options``: names of the
    alternatives that quantize some of them.
    """

    ops: tuple[str, ...]
    modules: tuple[str, ...]
    nodes: frozenset[str]
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the first op, which no other group has."""
        return self.ops[0]

    @property
    def choices(self) -> tuple[str, ...]:
        """`options`, and float."""
        return (*self.options, FLOAT_PICK)

    def __str__(self) -> str:
        more = f" and {len(self.ops) - 3} more" if len(self.ops) > 3 else ""
        return ", ".join(self.ops[:3]) + more


@dataclass(frozen=True, slots=True)
class Mix:
    """A point of the space: ``picks`` has, for each group of the family of that number, an alternative or float."""

    family: int
    picks: tuple[str, ...]

    def with_pick(self, index: int, pick: str) -> Mix:
        """The same with another pick for one group."""
        return Mix(self.family, (*self.picks[:index], pick, *self.picks[index + 1 :]))


@dataclass(frozen=True, eq=False)
class Family:
    """Alternatives that can be mixed, in the order in which the user named them, and the groups of their ops."""

    alternatives: tuple[Alternative, ...]
    groups: tuple[TunedGroup, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Alternative]:
        """The alternatives by name."""
        return {alternative.name: alternative for alternative in self.alternatives}

    @cached_property
    def group_of(self) -> Mapping[str, int]:
        """The index of its group, by the name of a node."""
        return {name: index for index, group in enumerate(self.groups) for name in group.nodes}

    @cached_property
    def readers(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the nodes that read a node, by its name, in the float graph."""
        graph = float_graph(self.alternatives[0].prepared)
        return {node.name: tuple(user.name for user in node.users) for node in graph.graph.nodes}


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """All that can be chosen: a family, and for each of its groups an alternative or float."""

    families: tuple[Family, ...]

    def left_float(self, mix: Mix) -> tuple[str, ...]:
        """Names of the ops that some alternative quantizes and this mix does not."""
        groups = zip(self.families[mix.family].groups, mix.picks, strict=True)
        return tuple(op for group, pick in groups if pick == FLOAT_PICK for op in group.ops)

    def all_of(self, index: int, name: str) -> Mix:
        """The mix that quantizes by one alternative of a family wherever that can, else by the first that can."""
        groups = self.families[index].groups
        return Mix(index, tuple(name if name in group.options else group.options[0] for group in groups))

    def all_float(self, index: int = 0) -> Mix:
        """Nothing quantized."""
        return Mix(index, tuple(FLOAT_PICK for _ in self.families[index].groups))

    @property
    def size(self) -> int:
        """How many choices there are."""
        return sum(math.prod(len(group.choices) for group in family.groups) for family in self.families)


def float_graph(prepared: GraphModule, *, bodies: bool = False) -> GraphModule:
    """A copy of a prepared graph without observers; those in bodies of control flow stay where ``bodies``."""
    gm = copy_graph(prepared, compiled=False)
    graphs = [graph for _, graph in graphs_of(gm)]
    bare = graphs[:1] if bodies else graphs
    drop_observers(bare)
    for graph in bare:
        for name in [name for name, _ in graph.named_children() if name.startswith(OBSERVER_PREFIX)]:
            graph.delete_submodule(name)
    return gm


def float_text(prepared: GraphModule) -> tuple[str, ...]:
    """The float graph as lines: equal ones compute the same, but for the values of their constants."""
    return tuple(
        f"{path} {node.name} {node.op} {node.target} {node.args} {node.kwargs}"
        for path, graph in graphs_of(float_graph(prepared))
        for node in graph.graph.nodes
    )


def constants_of(gm: GraphModule) -> Iterator[Tensor]:
    """The tensors that a graph and its bodies read from their module, in graph order."""
    for _, graph in graphs_of(gm):
        for node in graph.graph.nodes:
            value = attribute(graph, str(node.target), None) if node.op == "get_attr" else None
            if isinstance(value, Tensor):
                yield value
