"""Observer callback: the quantizer may look at each point's observer, exchange it, merge points, drop or add some.

What it leaves in the map decides; the plan follows, so that the report and the encodings say what really happened.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quant2e.annotation.plan import Edge, Group, Output, Plan, Point
from quant2e.annotation.quantizer import Quantizer
from quant2e.annotation.specs import EdgeOrNode, QuantizationSpec
from quant2e.errors import AnnotationError, PlanError
from quant2e.observers.base import inner_observer
from quant2e.observers.derived import DerivedObserver


def call_back(
    gm: GraphModule, quantizer: Quantizer, plan: Plan, made: list[nn.Module]
) -> tuple[Plan, Mapping[int, nn.Module]]:
    """Call ``quantizer.prepare_obs_or_fq_callback(gm, map)``; returns the plan and its observers by group.

    ``map``: an observer for each point, inputs of a node before its output, in graph order; the same object for points
    that share. Raises `AnnotationError` for a key that is no point of the graph, or a value that is no module.
    """
    callback = getattr(quantizer, "prepare_obs_or_fq_callback", None)
    if not callable(callback):
        return plan, dict(enumerate(made))
    named = {node.name: node for node in gm.graph.nodes}
    points = sorted((point for group in plan.groups for point in group.points), key=_Order(gm))
    shown: dict[Any, Any] = {}
    for point in points:
        index = plan.group_of(point)
        assert index is not None
        shown[_place(point, named)] = made[index]
    before = dict(shown)
    callback(gm, shown)
    if shown == before:
        return plan, dict(enumerate(made))
    return _regroup(plan, made, {_point(key, named): value for key, value in shown.items() if value is not None})


class _Order:
    """Sorts points as PT2E does: by node in graph order, its inputs before its output."""

    def __init__(self, gm: GraphModule) -> None:
        self._position = {node.name: i for i, node in enumerate(gm.graph.nodes)}
        self._operand = {
            (src.name, node.name): i for node in gm.graph.nodes for i, src in enumerate(node.all_input_nodes)
        }

    def __call__(self, point: Point) -> tuple[int, int, int]:
        if isinstance(point, Output):
            return self._position[point.node], 1, 0
        return self._position[point.dst], 0, self._operand[point.src, point.dst]


def _place(point: Point, named: Mapping[str, Node]) -> EdgeOrNode:
    return named[point.node] if isinstance(point, Output) else (named[point.src], named[point.dst])


def _point(place: Any, named: Mapping[str, Node]) -> Point:
    """The point that a key of the map stands for."""
    nodes = place if isinstance(place, tuple) else (place,)
    known = all(isinstance(node, Node) and named.get(node.name) is node for node in nodes)
    if known and len(nodes) == 1:
        return Output(nodes[0].name)
    if known and len(nodes) == 2 and nodes[0] in nodes[1].all_input_nodes:
        return Edge(nodes[0].name, nodes[1].name)
    raise AnnotationError(
        f"prepare_obs_or_fq_callback put an observer on {place!r}, which is neither a node of the graph nor one of its "
        "edges (producer, consumer)"
    )


def _regroup(plan: Plan, made: list[nn.Module], observed: Mapping[Point, Any]) -> tuple[Plan, Mapping[int, nn.Module]]:
    specs = {id(observer): plan.groups[index].spec for index, observer in enumerate(made)}
    points: dict[int, list[Point]] = {}
    observers: dict[int, nn.Module] = {}
    for point, observer in observed.items():
        if not isinstance(observer, nn.Module):
            raise AnnotationError(
                f"prepare_obs_or_fq_callback put a {type(observer).__name__} on ({point}); an observer is an nn.Module"
            )
        points.setdefault(id(observer), []).append(point)
        observers[id(observer)] = observer
    for observer in observers.values():
        if isinstance(observer, DerivedObserver):
            observer.sources = [_source(source, observed) for source in specs[id(observer)].sources]
    groups = tuple(
        Group(specs[key] if key in specs else _spec_of(observers[key]), tuple(members))
        for key, members in points.items()
    )
    return Plan(groups, plan.ignored), dict(enumerate(observers.values()))


def _source(point: Point, observed: Mapping[Point, Any]) -> nn.Module:
    if point not in observed:
        raise PlanError(
            f"prepare_obs_or_fq_callback dropped the observer of ({point}), from which others derive their parameters"
        )
    observer: nn.Module = observed[point]
    return observer


def _spec_of(observer: Any) -> Any:
    """What an observer that the quantizer brought along asks for."""
    inner = inner_observer(observer)
    if not isinstance(getattr(inner, "dtype", None), torch.dtype):
        raise AnnotationError(
            f"prepare_obs_or_fq_callback brought a {type(observer).__name__} without a dtype: what its tensor becomes "
            "is not known"
        )
    return QuantizationSpec(
        dtype=inner.dtype,
        observer_or_fake_quant_ctr=type(observer),
        quant_min=getattr(inner, "quant_min", None),
        quant_max=getattr(inner, "quant_max", None),
        qscheme=getattr(inner, "qscheme", None),
        ch_axis=getattr(inner, "ch_axis", None),
        is_dynamic=bool(getattr(inner, "is_dynamic", False)),
    )
