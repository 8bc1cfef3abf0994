"""Where the annotations of a graph have specs, and which of them follow from others."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from quant2e.accuracy.recipe.matching import op_path
from quant2e.accuracy.recipe.rewriting import is_plain
from quant2e.annotation.specs import ANNOTATION, EdgeOrNode
from quant2e.graph.constants import Constants


@dataclass(frozen=True, slots=True)
class SpecPlace:
    """Where an annotation has a spec: for an operand of ``node``, or for its result where ``source`` is None."""

    node: Node
    source: Node | None = field(default=None)

    @property
    def name(self) -> str:
        """As encodings name it."""
        return self.node.name if self.source is None else f"{self.source.name} -> {self.node.name}"

    @property
    def tensor(self) -> Node:
        """The node whose tensor it is."""
        return self.source or self.node

    @property
    def spec(self) -> Any:
        """What stands there; None for float, and where nothing does."""
        note = self.node.meta.get(ANNOTATION)
        if note is None:
            return None
        return note.output_qspec if self.source is None else note.input_qspec_map.get(self.source)

    def put(self, spec: Any) -> None:
        """Write a spec there, into a copy of the annotation."""
        note = self.node.meta[ANNOTATION] = copy.copy(self.node.meta[ANNOTATION])
        note.input_qspec_map = dict(note.input_qspec_map)
        if self.source is None:
            note.output_qspec = spec
        else:
            note.input_qspec_map[self.source] = spec


def spec_places(model: GraphModule) -> Iterator[SpecPlace]:
    """Every place of a graph that has a spec."""
    for node in model.graph.nodes:
        if (note := node.meta.get(ANNOTATION)) is None:
            continue
        yield from (SpecPlace(node, source) for source, spec in note.input_qspec_map.items() if spec is not None)
        if note.output_qspec is not None:
            yield SpecPlace(node)


def place_of(edge_or_node: EdgeOrNode) -> SpecPlace:
    """The place that a shared or derived spec refers to."""
    if isinstance(edge_or_node, Node):
        return SpecPlace(edge_or_node)
    return SpecPlace(edge_or_node[1], edge_or_node[0])


def root_of(place: SpecPlace) -> SpecPlace:
    """The place whose numbers a shared one has."""
    seen: set[tuple[str, str]] = set()
    while hasattr(place.spec, "edge_or_node") and (key := (place.name, "")) not in seen:
        seen.add(key)
        place = place_of(place.spec.edge_or_node)
    return place


def drop_dangling(model: GraphModule) -> set[str]:
    """Leave float what shares the numbers of a tensor that is float now, or would derive its own from it; which ops."""
    lost: set[str] = set()
    changed = True
    while changed:
        changed = False
        for place in list(spec_places(model)):
            spec = place.spec
            if hasattr(spec, "edge_or_node"):
                gone = place_of(spec.edge_or_node).spec is None
            else:
                sources = [root_of(place_of(source)).spec for source in getattr(spec, "derived_from", ())]
                gone = any(source is None or getattr(source, "is_dynamic", False) for source in sources)
            if gone:
                place.put(None)
                changed = True
                lost.add(op_path(place.node))
    return lost


def is_empty(note: Any) -> bool:
    """Whether an annotation has no spec at all."""
    return note.output_qspec is None and not any(spec is not None for spec in note.input_qspec_map.values())


def head_of(node: Node) -> Node:
    """The op that computes, of an op that is fused behind it: one that is annotated with a result alone."""
    while (note := node.meta.get(ANNOTATION)) is not None and not note.input_qspec_map:
        before = [source for source in node.all_input_nodes if source.meta.get(ANNOTATION) is not None]
        if len(before) != 1 or before[0].meta[ANNOTATION].output_qspec is not None:
            return node
        node = before[0]
    return node


def is_weighted(node: Node, constants: Constants) -> bool:
    """Whether an op has a weight that is quantized."""
    note = node.meta.get(ANNOTATION)
    specs = {} if note is None else note.input_qspec_map
    return any(source in constants and is_plain(spec) for source, spec in specs.items())


def is_fused(node: Node) -> bool:
    """Whether what is annotated behind an op is one with it: an op that is annotated with a result alone."""
    notes = [user.meta[ANNOTATION] for user in node.users if ANNOTATION in user.meta]
    return any(not note.input_qspec_map for note in notes)
