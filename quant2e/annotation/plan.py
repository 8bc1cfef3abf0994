"""The plan (read this first): which tensors of a graph share which quantization parameters, as an immutable table.

A backend's annotations are read once (`quant2e.annotation.interop`) and resolved here into groups. Points are names,
not live nodes, so a plan survives copies, pickling and rewrites of the graph; it prints and it diffs.

`resolve_plan` is pure and does not depend on the order of its input:

1. the shares that authors wrote: each points at one other point, so together they form a forest;
2. per tensor, the points whose numbers agree, where the consumer allows implicit sharing.

A point whose spec is None stays float, and so does every point that shares with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from quant2e.annotation.specs import dynamic_granularity_of, group_size_of, spec_text
from quant2e.errors import PlanError


@dataclass(frozen=True, slots=True)
class Output:
    """The tensor a node produces."""

    node: str

    @property
    def tensor(self) -> str:
        """Name of the node that produces this point's tensor."""
        return self.node

    def __str__(self) -> str:
        return self.node


@dataclass(frozen=True, slots=True)
class Edge:
    """The use of ``src``'s tensor by ``dst``."""

    src: str
    dst: str

    @property
    def tensor(self) -> str:
        """Name of the node that produces this point's tensor."""
        return self.src

    def __str__(self) -> str:
        return f"{self.src} -> {self.dst}"


Point = Output | Edge


@dataclass(frozen=True, slots=True)
class SharedWith:
    """A share that an author wrote: this point has the parameters of another one."""

    point: Point


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedFrom:
    """Parameters computed from those of other points; never merged with any other group.

    ``derive`` takes the observers of ``sources``, in order, and returns ``(scale, zero_point)``.
    """

    sources: tuple[Point, ...]
    derive: Callable[[list[Any]], Any]
    dtype: torch.dtype
    quant_min: int | None
    quant_max: int | None
    qscheme: torch.qscheme | None
    ch_axis: int | None


@dataclass(frozen=True, slots=True)
class Group:
    """Points that share one set of quantization parameters.

    ``spec`` is concrete: a plain or fixed spec (ours, or one of another library, recognised by its fields), or a
    `DerivedFrom`. ``points`` are in the order of the graph; the first plain one decides which observer is used.
    """

    spec: Any
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Ignored:
    """An annotated point that cannot be quantized, and why: an integer tensor, a buffer that is written to."""

    point: Point
    reason: str


@dataclass(frozen=True, repr=False)
class Plan:
    """Every quantized point of a graph, in exactly one group.

    Invariants: no point is in two groups; every source of a derived group is in another group. ``str(plan)`` is the
    whole plan, ``repr(plan)`` its size.
    """

    groups: tuple[Group, ...] = ()
    ignored: tuple[Ignored, ...] = field(default=())

    @cached_property
    def _index(self) -> Mapping[Point, int]:
        return {point: i for i, group in enumerate(self.groups) for point in group.points}

    def group_of(self, point: Point) -> int | None:
        """Index of the group that holds ``point``; None when the point stays float."""
        return self._index.get(point)

    def __contains__(self, point: Point) -> bool:
        return point in self._index

    def __repr__(self) -> str:
        ignored = f", {len(self.ignored)} ignored" if self.ignored else ""
        return f"Plan({len(self.groups)} groups of {len(self._index)} points{ignored})"

    def __str__(self) -> str:
        """One line per group, then one per ignored point."""
        lines = [f"{spec_text(g.spec)}: {'; '.join(str(p) for p in g.points)}" for g in self.groups]
        lines += [f"ignored: {item.point}: {item.reason}" for item in self.ignored]
        return "\n".join(lines)


NUMBERS = ("dtype", "is_dynamic", "quant_min", "quant_max", "qscheme", "ch_axis", "scale", "zero_point")
"""Fields that must agree for two specs to share implicitly. The observer is not one: it estimates, it does not define.
Only the size of its groups and the granularity of dynamic scales, which no field of a spec says, are compared."""

_ABSENT = object()


def same_numbers(a: Any, b: Any) -> bool:
    """Whether two concrete specs describe the same numbers. Derived specs equal nothing, not even each other."""
    if a is None or b is None or isinstance(a, DerivedFrom) or isinstance(b, DerivedFrom):
        return False
    same = all(getattr(a, name, _ABSENT) == getattr(b, name, _ABSENT) for name in NUMBERS)
    return same and all(of(a) == of(b) for of in (group_size_of, dynamic_granularity_of))


class _Forest:
    """Disjoint sets of points."""

    def __init__(self, points: Iterable[Point]) -> None:
        self._parent = {point: point for point in points}

    def root(self, point: Point) -> Point:
        parent = self._parent
        while parent[point] != point:
            parent[point] = point = parent[parent[point]]
        return point

    def union(self, a: Point, b: Point) -> None:
        self._parent[self.root(a)] = self.root(b)

    def sets(self) -> Iterator[tuple[Point, ...]]:
        members: dict[Point, list[Point]] = defaultdict(list)
        for point in self._parent:
            members[self.root(point)].append(point)
        return (tuple(points) for points in members.values())


def _chain(points: Iterable[Point]) -> str:
    return " => ".join(f"({point})" for point in points)


def _anchors(specs: Mapping[Point, Any]) -> dict[Point, Point]:
    """For every point, the point at the end of its chain of explicit shares. Iterative, linear."""
    anchor: dict[Point, Point] = {}
    for start in specs:
        path: dict[Point, None] = {}
        point = start
        while point not in anchor:
            if point in path:
                cycle = [*list(path)[list(path).index(point) :], point]
                raise PlanError(
                    f"shared specs form a cycle: {_chain(cycle)}. Give one of these points a spec of its own."
                )
            path[point] = None
            spec = specs[point]
            if not isinstance(spec, SharedWith):
                anchor[point] = point
                break
            if spec.point not in specs:
                raise PlanError(
                    f"dangling share: {_chain([*path, spec.point])}, but ({spec.point}) has no spec. "
                    "Annotate that point, or share with one that is annotated."
                )
            point = spec.point
        for passed in path:
            anchor[passed] = anchor[point]
    return anchor


def _check_derived(specs: Mapping[Point, Any], anchor: Mapping[Point, Point]) -> None:
    """Sources of derived specs exist, are quantized, and do not derive from each other in a circle."""
    for point, spec in specs.items():
        for source in spec.sources if isinstance(spec, DerivedFrom) else ():
            if source not in specs:
                raise PlanError(
                    f"dangling derivation: {_chain([point, source])}, but ({source}) has no spec. "
                    "Annotate it, or derive from a point that is annotated."
                )
            if specs[anchor[source]] is None:
                raise PlanError(f"({point}) derives its parameters from ({source}), which is annotated to stay float")
    done: set[Point] = set()
    for point, spec in specs.items():
        if isinstance(spec, DerivedFrom):
            _check_acyclic(point, specs, anchor, done)


def _check_acyclic(start: Point, specs: Mapping[Point, Any], anchor: Mapping[Point, Point], done: set[Point]) -> None:
    """Walk derivations depth first from ``start``; ``done`` holds derived points that lead into no circle."""
    path: dict[Point, Iterator[Point]] = {start: iter(specs[start].sources)}
    while path:
        point, pending = next(reversed(path.items()))
        source = next(pending, None)
        if source is None:
            path.popitem()
            done.add(point)
            continue
        end = anchor[source]
        if end in path:
            points = list(path)
            raise PlanError(f"derived specs form a cycle: {_chain([*points[points.index(end) :], source])}")
        if end not in done and isinstance(specs[end], DerivedFrom):
            path[end] = iter(specs[end].sources)


def resolve_plan(specs: Mapping[Point, Any], implicit: Collection[str], ignored: tuple[Ignored, ...] = ()) -> Plan:
    """Partition annotated points into groups.

    ``specs``: the spec of each annotated point, in graph order: plain or fixed, `DerivedFrom`, `SharedWith`, or None
    for "stays float". ``implicit``: names of the consumers whose inputs share implicitly.
    Raises `PlanError` for shares that dangle or run in a circle; the message prints the chain.
    """
    anchor = _anchors(specs)
    _check_derived(specs, anchor)
    forest = _Forest(specs)
    for point in specs:
        if anchor[point] != point:
            forest.union(point, anchor[point])
    by_tensor: dict[str, list[Point]] = defaultdict(list)
    for point in specs:
        by_tensor[point.tensor].append(point)
    for points in by_tensor.values():
        _share_implicitly(points, specs, anchor, implicit, forest)
    groups = []
    for members in forest.sets():
        spec = next((specs[p] for p in members if not isinstance(specs[p], SharedWith)), None)
        if spec is not None:
            groups.append(Group(spec, members))
    return Plan(tuple(groups), ignored)


def _share_implicitly(
    points: list[Point],
    specs: Mapping[Point, Any],
    anchor: Mapping[Point, Point],
    implicit: Collection[str],
    forest: _Forest,
) -> None:
    """Union the uses of one tensor whose numbers agree with those of a use that allows it.

    Linear in the number of points that agree: only the first of each kind is compared with.
    """
    kinds: list[tuple[Any, list[Point]]] = []
    for point in points:
        spec = specs[anchor[point]]
        if spec is None or isinstance(spec, DerivedFrom):
            continue
        same = next((members for kind, members in kinds if same_numbers(kind, spec)), None)
        if same is None:
            kinds.append((spec, [point]))
        else:
            same.append(point)
    for _, members in kinds:
        if any(isinstance(p, Edge) and p.dst in implicit for p in members):
            for other in members[1:]:
                forest.union(other, members[0])
