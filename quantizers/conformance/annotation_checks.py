"""Checks of annotations, before any of the graph runs. One function per kind of mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.annotation.interop import read_plan
from quant2e.annotation.pattern import short_name
from quant2e.annotation.plan import DerivedFrom, Edge, Output, Plan
from quant2e.annotation.specs import ANNOTATION, INTEGER_BOUNDS, PER_CHANNEL_SCHEMES
from quant2e.errors import PlanError, Quant2eError
from quant2e.graph import dataflow
from quant2e.graph.constants import Constants
from quant2e.graph.data_movement import Effect, movements
from quant2e.graph.fake_values import node_tensor
from quant2e.observers.base import inner_observer
from quant2e.prepare.insert_observers import make_observers
from quant2e.ranges.qparams import plain_dtype
from quantizers.conformance.report import Finding
from quantizers.kit.families import MOVES
from quantizers.kit.value_source import ValueSources

JOINS = frozenset(map(str, movements(Effect.JOIN)))
MOVING = frozenset(map(str, MOVES)) | JOINS | {f"aten.max_pool{n}d.default" for n in (1, 2, 3)}
"""Ops whose results are values of their operands: their integers are moved, not computed."""

KEEPS_RANGE = MOVING | {
    f"aten.{name}"
    for name in (
        "relu.default", "relu_.default", "relu6.default", "relu6_.default", "hardtanh.default", "hardtanh_.default",
        "clamp.default", "clamp_.default", "clamp_min.default", "clamp_max.default", "avg_pool1d.default",
        "avg_pool2d.default", "adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "mean.dim", "mean.default",
        "amax.default", "adaptive_max_pool2d.default", "upsample_bilinear2d.vec",
        "max_pool2d_with_indices.default", "masked_fill.Scalar", "maximum.default", "minimum.default", "where.self",
    )
}  # fmt: skip
"""Ops whose results lie within the range of their operands (and zero)."""

_SUMS_OVER: Mapping[str, tuple[int, ...]] = {
    **{f"conv{n}d": tuple(range(1, n + 2)) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": (0, *range(2, n + 2)) for n in (1, 2, 3)},
    "linear": (1,),
}
"""Op → the axes of its weight over which it sums up: scales along them cannot be taken out of the sum."""


@dataclass(slots=True)
class Annotated:
    """A graph with annotations, and what is known about its tensors."""

    gm: GraphModule
    constants: Constants = field(init=False)
    value_sources: ValueSources = field(init=False)
    nodes: dict[str, Node] = field(init=False)

    def __post_init__(self) -> None:
        self.constants = Constants(self.gm.graph)
        self.value_sources = ValueSources(self.gm)
        self.nodes = {node.name: node for node in self.gm.graph.nodes}

    def notes(self) -> Iterator[tuple[Node, Any]]:
        """Nodes with their annotations."""
        for node in self.gm.graph.nodes:
            if (note := node.meta.get(ANNOTATION)) is not None:
                yield node, note

    def specs(self) -> Iterator[tuple[Node, Node | None, Any]]:
        """``(node, operand or None for its output, spec)`` of everything that is annotated."""
        for node, note in self.notes():
            inputs = getattr(note, "input_qspec_map", None)
            for key, spec in (inputs or {}).items() if hasattr(inputs, "items") else ():
                if isinstance(key, Node) and spec is not None and self.nodes.get(key.name) is key:
                    yield node, key, spec
            if getattr(note, "output_qspec", None) is not None:
                yield node, None, note.output_qspec

    def tensor(self, node: Node) -> Tensor | None:
        """The (fake) tensor of a node."""
        return node_tensor(node)

    def is_constant(self, node: Node) -> bool:
        """Whether it depends on parameters only."""
        return node in self.constants


def finding(kind: str, node: Node, message: str) -> Finding:
    """A finding about one node, with the rule that annotated it."""
    rule = str(getattr(node.meta.get(ANNOTATION), "rule", "") or "")
    return Finding(kind, message, rule, node.name, str(node.target))


def _operands(a: Annotated) -> Iterator[Finding]:
    for node, note in a.notes():
        inputs = getattr(note, "input_qspec_map", None)
        if not hasattr(inputs, "items") or not hasattr(note, "output_qspec"):
            yield finding(
                "malformed annotation", node, f"a {type(note).__name__} without input_qspec_map and output_qspec"
            )
            continue
        for key in inputs or ():
            if isinstance(key, Node) and key in node.all_input_nodes:
                continue
            if isinstance(key, Node) and a.nodes.get(key.name) is not key:
                yield finding("another graph", node, f"its annotation has a spec on '{key.name}' of another graph")
            else:
                yield finding("not an operand", node, f"its annotation has a spec on {key!r}, which it does not read")


def _shares(a: Annotated) -> Iterator[Finding]:
    specs = {(n if operand is None else (operand, n)): spec for n, operand, spec in a.specs()}
    floats = {
        (key, node)
        for node, note in a.notes()
        for key, s in (getattr(note, "input_qspec_map", None) or {}).items()
        if s is None
    }
    for place, spec in specs.items():
        node = place if isinstance(place, Node) else place[1]
        path: list[Any] = [place]
        while hasattr(spec, "edge_or_node"):
            target = spec.edge_or_node
            if (wrong := _wrong_reference(a, target)) is not None:
                yield finding(
                    "another graph", node, f"{_place(path[-1])} shares with {wrong}, which is not in this graph"
                )
                break
            if target in path:
                yield finding("cyclic share", node, " => ".join(map(_place, [*path, target])))
                break
            path.append(target)
            if target not in specs:
                if target not in floats:
                    yield finding("dangling share", node, " => ".join(map(_place, path)) + ", which has no spec")
                break
            spec = specs[target]
        for source in getattr(specs[place], "derived_from", ()):
            if (wrong := _wrong_reference(a, source)) is not None:
                yield finding(
                    "another graph", node, f"{_place(place)} derives from {wrong}, which is not in this graph"
                )
            elif source not in specs:
                yield finding(
                    "dangling share", node, f"{_place(place)} derives from {_place(source)}, which has no spec"
                )


def _wrong_reference(a: Annotated, place: Any) -> str | None:
    for part in place if isinstance(place, tuple | list) else (place,):
        if not isinstance(part, Node):
            return repr(part)
        if a.nodes.get(part.name) is not part:
            return f"'{part.name}'"
    return None


def _place(place: Any) -> str:
    parts = place if isinstance(place, tuple | list) else (place,)
    return "(" + " -> ".join(str(getattr(part, "name", part)) for part in parts) + ")"


def _tensors(a: Annotated) -> Iterator[Finding]:
    for node, operand, _spec in a.specs():
        source = node if operand is None else operand
        place = "its output" if operand is None else f"operand '{source.name}'"
        tensor = a.tensor(source)
        if tensor is not None and not tensor.is_floating_point():
            yield finding(
                "integer tensor", node, f"{place} is {str(tensor.dtype).removeprefix('torch.')}, and has a spec"
            )
        elif (operand is None or not a.is_constant(source)) and (why := a.value_sources.objection(source)) is not None:
            yield finding("mask", node, f"{place} has a spec, and is {why}")


def _axes(a: Annotated) -> Iterator[Finding]:
    for node, operand, spec in a.specs():
        if getattr(spec, "qscheme", None) not in PER_CHANNEL_SCHEMES:
            continue
        source = node if operand is None else operand
        tensor, axis = a.tensor(source), getattr(spec, "ch_axis", None)
        if axis is None or (tensor is not None and not -tensor.dim() <= axis < tensor.dim()):
            yield finding(
                "wrong axis", node, f"ch_axis={axis} of '{source.name}', which has {getattr(tensor, 'ndim', '?')} axes"
            )
            continue
        weight = dataflow.operand(node, 1)
        summed = _SUMS_OVER.get(short_name(node.target), ())
        grouped = (
            axis == 0
            and tensor is not None
            and tensor.dim() > 2
            and tensor.shape[0] == dataflow.operand(node, "groups")
        )
        if operand is weight and axis in summed and not grouped:
            yield finding(
                "wrong axis", node, f"the weight has a scale for each index of axis {axis}, over which the op sums"
            )
        if not a.is_constant(source):
            yield finding(
                "wrong axis", node, f"'{source.name}' is an activation, with a scale for each index of axis {axis}"
            )


def _ranges(a: Annotated) -> Iterator[Finding]:
    for node, _operand, spec in a.specs():
        dtype = _plain(getattr(spec, "dtype", None))
        low, high = getattr(spec, "quant_min", None), getattr(spec, "quant_max", None)
        bounds = INTEGER_BOUNDS.get(dtype) if isinstance(dtype, torch.dtype) else None
        if not isinstance(low, int) or not isinstance(high, int) or bounds is None:
            continue
        if low >= high:
            yield finding("bad range", node, f"quant_min={low} is not below quant_max={high}")
        elif not bounds[0] <= low <= high <= bounds[1]:
            yield finding(
                "bad range", node, f"{low}..{high} does not fit {dtype}, which holds {bounds[0]}..{bounds[1]}"
            )
        elif not low <= 0 <= high:
            yield finding("bad range", node, f"{low}..{high} leaves out 0")


LOOKS: tuple[Callable[[Annotated], Iterator[Finding]], ...] = (_operands, _shares, _tensors, _axes, _ranges)
"""Checks that need no plan."""


def requested_plan(a: Annotated) -> tuple[Plan | None, list[Finding]]:
    """The plan that the annotations ask for, or why there is none."""
    try:
        return read_plan(a.gm), []
    except PlanError as error:
        return None, [Finding("unresolved", str(error))]
    except Quant2eError as error:
        return None, [Finding("malformed annotation", str(error))]


def against_plan(a: Annotated, plan: Plan) -> Iterator[Finding]:
    """What is wrong with a plan that resolves: observers, and scales around ops."""
    yield from _observers(a, plan)
    for node, _ in a.notes():
        yield from _scales_around(a, plan, node)


def _functional(node: Node) -> str:
    """``aten.relu.default`` also for ``aten.relu_.default``."""
    return str(node.target).replace("_.", ".")


def _plain(value: Any) -> Any:
    """Torch's quantized dtypes as the dtypes that store them; anything else as it is."""
    return plain_dtype(value) if isinstance(value, torch.dtype) else value


def _observers(a: Annotated, plan: Plan) -> Iterator[Finding]:
    def owner(index: int) -> Node:
        point = plan.groups[index].points[0]
        return a.nodes[point.dst if isinstance(point, Edge) else point.node]

    try:
        observers = make_observers(plan)
    except Exception as error:  # noqa: BLE001  # whatever an author's constructor raises is a finding
        broken = next((i for i in range(len(plan.groups)) if not _makes(Plan((plan.groups[i],)))), 0)
        yield finding("observer", owner(broken), f"it cannot be made: {type(error).__name__}: {error}")
        return
    for index, (group, observer) in enumerate(zip(plan.groups, observers, strict=True)):
        if isinstance(group.spec, DerivedFrom):
            continue
        measured = inner_observer(observer)
        for name in ("dtype", "quant_min", "quant_max", "qscheme", "ch_axis", "is_dynamic"):
            said, done = getattr(group.spec, name, None), getattr(measured, name, None)
            said, done = _plain(said), _plain(done)
            if said is not None and done is not None and said != done:
                yield finding("observer", owner(index), f"its spec says {name}={said}, and its observer has {done}")
                break


def _makes(plan: Plan) -> bool:
    try:
        make_observers(plan)
    except Exception:  # noqa: BLE001
        return False
    return True


def _scales_around(a: Annotated, plan: Plan, node: Node) -> Iterator[Finding]:
    out = plan.group_of(Output(node.name))
    if out is None or isinstance(plan.groups[out].spec, DerivedFrom):
        return
    for source in node.all_input_nodes:
        group = plan.group_of(Edge(source.name, node.name))
        if group is None or a.is_constant(source) or getattr(plan.groups[group].spec, "is_dynamic", False):
            continue
        if group == out and str(node.target).startswith("aten.") and _functional(node) not in KEEPS_RANGE:
            yield finding("shared across", node, f"its output has the scale of its operand '{source.name}'")
        if group != out and str(node.target) in MOVING:
            yield finding("mismatched scales", node, f"operand '{source.name}' and its output have scales of their own")
