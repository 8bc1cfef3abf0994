"""Edge settings: the use of one tensor by one op.

``None`` leaves the edge float, and with it whatever rule needs it quantized: a backend has no kernel with one operand
quantized and the other not. A spec replaces the numbers that the rule would give that operand. Either is closer than
every setting for a node, and neither makes an op quantized that no other setting covers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from quant2e.annotation.pattern import Match, arguments
from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation
from quant2e.errors import AnnotationError
from quant2e.graph.control_flow import BODY, graphs_of
from quantizers.kit.rule import Rule
from quantizers.settings.diagnostics import near
from quantizers.settings.scopes import NodeName, Place, Predicate, node_scope

Refine = Callable[[Any, bool], Any]
"""What a user set for an edge, and whether its tensor is a constant → the spec of the edge."""


@dataclass(frozen=True, slots=True)
class EdgeScope:
    """The edges between two nodes, each given by name or by a predicate."""

    producer: NodeName | Predicate
    consumer: NodeName | Predicate

    def __str__(self) -> str:
        ends = [end.name if isinstance(end, NodeName) else str(end) for end in (self.producer, self.consumer)]
        return f"edge ({ends[0]} -> {ends[1]})"

    def covers(self, producer: Node, consumer: Node) -> bool:
        """Whether it names that edge."""
        named = (self.consumer, consumer), (self.producer, producer)
        return all(end.specificity(Place(node)) is not None for end, node in named)


def edge_scope(
    producer: str | Node | Callable[[Node], bool], consumer: str | Node | Callable[[Node], bool]
) -> EdgeScope:
    """The edge between two nodes. Raises `AnnotationError` for what is neither a node, its name, nor a predicate."""
    return EdgeScope(node_scope(producer), node_scope(consumer))


@dataclass(slots=True)
class EdgeSettings:
    """What the user set for edges. The later of two that name the same edge applies."""

    made: dict[EdgeScope, Any] = field(default_factory=dict)
    _of: dict[tuple[Node, Node], EdgeScope] = field(default_factory=dict)
    _named: dict[EdgeScope, list[tuple[Node, Node]]] = field(default_factory=dict)
    _notes: list[str] = field(default_factory=list)

    def put(self, scope: EdgeScope, config: Any) -> None:
        """Add a setting, as the latest."""
        self.made.pop(scope, None)
        self.made[scope] = config

    def bind(self, gm: GraphModule) -> None:
        """Find the edges in a graph. Raises `AnnotationError` for settings that name none, with near misses."""
        self._of, self._named, self._notes = {}, {scope: [] for scope in self.made}, []
        nodes = [node for _, graph in graphs_of(gm) for node in graph.graph.nodes] if self.made else []
        found = set()
        for edge in [(source, node) for node in nodes for source in node.all_input_nodes]:
            for scope in self.made:
                if scope.covers(*edge):
                    if edge[1].graph is gm.graph:
                        self._bind(edge, scope)
                    found.add(scope)
        lines = [f"there is no {scope}{_near(scope, gm)}" for scope in self._named if scope not in found]
        if lines and BODY not in gm.meta:  # a body is asked with its program
            raise AnnotationError("; ".join(lines))

    def _bind(self, edge: tuple[Node, Node], scope: EdgeScope) -> None:
        earlier = self._of.get(edge)
        if earlier is not None and self.made[earlier] != self.made[scope]:
            names = f"'{edge[0].name}' -> '{edge[1].name}'"
            self._notes.append(f"{earlier} and {scope} both name {names}; the later, {scope}, applies")
        self._of[edge] = scope
        self._named[scope].append(edge)

    def objection(self, producer: Node, consumer: Node) -> str | None:
        """Why an edge must stay float; None when it may be quantized."""
        scope = self._of.get((producer, consumer))
        return f"{scope} is set to float" if scope is not None and self.made[scope] is None else None

    def refine(
        self, rule: Rule, match: Match, made: dict[Node, QuantizationAnnotation], refine: Refine
    ) -> dict[Node, QuantizationAnnotation]:
        """The annotations of a match with the specs of the edges that the user set. ``made`` is changed.

        Raises `AnnotationError` for an edge whose numbers are those of another one.
        """
        for name, edges in match.operands.items() if self._of else ():
            for producer, consumer in edges:
                scope = self._of.get((producer, consumer))
                if scope is None or rule.operands.get(name) is None:
                    continue
                specs = made[consumer].input_qspec_map
                if (place := getattr(specs.get(producer), "edge_or_node", None)) is not None and isinstance(
                    place, tuple
                ):
                    raise AnnotationError(
                        f"{scope}: rule '{rule.name}' gives it the numbers of edge "
                        f"({place[0].name} -> {place[1].name}), because the op takes one set of them; set that edge"
                    )
                specs[producer] = refine(self.made[scope], arguments(rule.pattern)[name].constant)
        return made

    def notes(self) -> Iterator[str]:
        """What the user should know, once the graph is annotated."""
        yield from self._notes
        for scope, edges in self._named.items():
            idle = [c for p, c in edges if (note := c.meta.get(ANNOTATION)) is None or p not in note.input_qspec_map]
            if self.made[scope] is not None and len(idle) == len(edges):
                yield f"{scope} has no effect: no rule quantizes that operand of '{idle[0].name}'"


def _near(scope: EdgeScope, gm: GraphModule) -> str:
    """The inputs of the consumer, if that exists; else nodes of a similar name."""
    named = {node.name: node for node in gm.graph.nodes}
    for end, other in ((scope.consumer, "all_input_nodes"), (scope.producer, "users")):
        if isinstance(end, NodeName) and end.name not in named:
            return near(end.name, named)
        if isinstance(end, NodeName) and (neighbours := list(getattr(named[end.name], other))):
            role = "reads" if other == "all_input_nodes" else "is read by"
            return f"; '{end.name}' {role} {', '.join(repr(n.name) for n in neighbours[:8])}"
    return ""
