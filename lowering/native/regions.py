"""Regions: the units of a graph, joined where they are connected, each a call of one op.

graph ─▶ `find_units` ─▶ `grouped` ─▶ `WrittenRegion`: the plan of each group ─▶ `calls`: calls in their place
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from lowering.native.kernels.plan import RegionPlan, StepKind, region_plan
from lowering.native.units.attention import attention_unit
from lowering.native.units.masks import mask_of
from lowering.native.units.normalize import normalize_unit
from lowering.native.units.pointwise import (
    binary_unit,
    dequantize_unit,
    flat_unit,
    join_unit,
    quantize_unit,
    unary_unit,
)
from lowering.native.units.pools import pool_unit
from lowering.native.units.products import product_unit
from lowering.native.units.unit import Emitter, Unit
from lowering.native.units.values import image_of, image_shape, quantizes, same_size, stored
from lowering.native.writes import NO_WRITES, Writes
from quant2e.graph.qdq_ops import DEQUANTIZE

Match = Callable[[GraphModule, Node, set[Node]], Unit | str | None]

MATCHES: tuple[Match, ...] = (
    product_unit,
    attention_unit,
    normalize_unit,
    pool_unit,
    flat_unit,
    join_unit,
    binary_unit,
    unary_unit,
    quantize_unit,
)

ROWS_AT_ONCE = 64
"""Of a region in which a sample is one row: so many are computed together, and read each weight once."""

_ROW_KINDS = frozenset(
    {
        StepKind.QUANTIZE,
        StepKind.DEQUANTIZE,
        StepKind.CONVOLUTION,
        StepKind.BINARY,
        StepKind.UNARY,
        StepKind.CONCAT,
        StepKind.LAYER_NORM,
        StepKind.SOFTMAX,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """``units`` in an order in which each comes behind what it reads. ``refused``: why an op is in none, by name.

    ``before``: as in `Writes`, of ops that are in none.
    """

    units: tuple[Unit, ...]
    refused: Mapping[str, str]
    before: Mapping[Node, Node]


def find_units(gm: GraphModule, besides: Collection[str] = (), writes: Writes = NO_WRITES) -> Found:
    """The units of a graph: every op that a step can compute, with what it takes in.

    ``besides``: names of ops to leave out. ``writes``: what the graph writes in place, which is no unit's.
    """
    taken = {*writes.writers, *(node for node in map(stored, writes.writers) if node is not None)}
    units: list[Unit] = []
    refused = {node.name: writes.refusal([node]) or "" for node in writes.writers}
    for node in gm.graph.nodes:
        if node.op != "call_function" or node in taken or node.name in besides:
            continue
        for match in MATCHES:
            unit = match(gm, node, taken)
            if isinstance(unit, Unit):
                unit = writes.refusal((*unit.nodes, *unit.passed, *unit.reads, *unit.writes)) or unit
            if isinstance(unit, Unit):
                units.append(unit)
                taken.update(n for n in unit.nodes if n.target not in DEQUANTIZE)
                break
            if unit is not None:
                refused[node.name] = unit
                break
    read = {node for unit in units for node in unit.reads}
    for node in gm.graph.nodes:
        if stored(node) is None or node in writes.writers:
            continue
        if node in read or any(user not in taken or user in writes.writers for user in node.users):
            unit = dequantize_unit(gm, node, taken)
            if unit is not None:
                units.append(unit)
    return Found(units=tuple(_in_order(units)), refused=refused, before=writes.before)


def _in_order(units: Sequence[Unit]) -> Iterator[Unit]:
    maker = {node: unit for unit in units for node in unit.writes}
    done: set[int] = set()
    for first in units:
        stack = [first]
        while stack:
            unit = stack[-1]
            ahead = [maker[node] for node in unit.reads if node in maker and id(maker[node]) not in done]
            if ahead:
                stack.extend(ahead)
                continue
            stack.pop()
            if id(unit) not in done:
                done.add(id(unit))
                yield unit


class Groups:
    """Which units run together: sets of connected units between which no path leads out of the set and back."""

    def __init__(self, earlier: Mapping[Node, Node]) -> None:
        self._earlier = earlier  # what an op keeps its place behind
        self.members: dict[int, list[Unit]] = {}
        self._group: dict[Node, int] = {}  # of what a unit wrote
        self._before: dict[int, set[int]] = {}  # groups that a group depends on
        self._behind: dict[Node, frozenset[int]] = {}  # groups that a node outside of all depends on
        self._batch: dict[int, object] = {}

    def outside(self, node: Node) -> None:
        """A node that no unit stands for."""
        found: set[int] = set()
        earlier = (self._earlier[node],) if node in self._earlier else ()
        for source in (*node.all_input_nodes, *earlier):
            found |= self._of(source)
        self._behind[node] = frozenset(found)

    def add(self, unit: Unit) -> None:
        """Give a unit to the group of what it reads, if it may join one."""
        batch = image_shape(unit.writes[0])
        assert batch is not None, "units write images"
        candidates = sorted({self._group[node] for node in unit.reads if node in self._group}, reverse=True)
        chosen = next((group for group in candidates if self._joins(unit, group, batch[0])), None)
        if chosen is None:
            chosen = len(self._before)
            self.members[chosen], self._before[chosen], self._batch[chosen] = [], set(), batch[0]
        self.members[chosen].append(unit)
        for node in unit.reads:
            self._before[chosen] |= self._of(node) - {chosen}
        for node in unit.writes:
            self._group[node] = chosen
        for other in candidates:
            if other != chosen:
                self._merge(chosen, other)

    def _of(self, node: Node) -> set[int]:
        if node in self._group:
            return {self._group[node]}
        return set(self._behind.get(node, frozenset()))

    def _joins(self, unit: Unit, group: int, batch: object) -> bool:
        if not same_size(self._batch[group], batch):
            return False
        others = {found for node in unit.reads if self._group.get(node) != group for found in self._of(node)}
        return group not in self._closure(others)

    def _closure(self, groups: set[int]) -> set[int]:
        found, queue = set(groups), list(groups)
        while queue:
            for before in self._before[queue.pop()] - found:
                found.add(before)
                queue.append(before)
        return found

    def _merge(self, into: int, other: int) -> None:
        """Make one group of two, where no path leads from one to the other through a third."""
        if not same_size(self._batch[into], self._batch[other]):
            return
        others = (self._before[into] | self._before[other]) - {into, other}
        if {into, other} & self._closure(others) or self._leads(other, into) or self._leads(into, other):
            return
        self.members[into] = [*self.members.pop(other), *self.members[into]]
        self._before[into] = others
        self._before[other] = set()
        self._group = {node: into if group == other else group for node, group in self._group.items()}
        for group, before in self._before.items():
            if other in before:
                self._before[group] = (before - {other}) | {into} - {group}
        self._behind = {
            node: frozenset(into if group == other else group for group in groups)
            for node, groups in self._behind.items()
        }

    def _leads(self, first: int, second: int) -> bool:
        """Whether the second group reads what came out of the first by way of a node outside of both."""
        return any(
            first in self._behind[node] for unit in self.members[second] for node in unit.reads if node in self._behind
        )


def grouped(gm: GraphModule, found: Found) -> list[list[Unit]]:
    """The units of each region, in order; those without a product run no faster here, and are left out."""
    groups = Groups(found.before)
    inside = {node for unit in found.units for node in unit.nodes}
    maker: dict[Node, Unit] = {}
    for unit in found.units:
        for node in unit.writes:
            maker[node] = unit
    added: set[int] = set()

    def add(unit: Unit) -> None:
        if id(unit) in added:
            return
        added.add(id(unit))
        for node in unit.reads:
            if node in maker:
                add(maker[node])
        groups.add(unit)

    for node in gm.graph.nodes:
        if node in maker:
            add(maker[node])
        elif node not in inside:
            groups.outside(node)
    order = {id(unit): place for place, unit in enumerate(found.units)}
    return [sorted(units, key=lambda unit: order[id(unit)]) for units in _worthwhile(groups.members.values())]


def _worthwhile(groups: Iterable[list[Unit]]) -> list[list[Unit]]:
    """Groups with a product, and those that they exchange integers with: outside of regions, these look different."""
    left, kept = list(groups), list[list[Unit]]()
    wanted = [group for group in left if any(unit.products for unit in group)]
    while wanted:
        kept += wanted
        left = [group for group in left if group not in wanted]
        shared = {node for group in kept for unit in group for node in (*unit.reads, *unit.writes) if quantizes(node)}
        wanted = [group for group in left if any(not shared.isdisjoint((*u.reads, *u.writes)) for u in group)]
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenRegion:
    """A region as it is called. ``inputs``: nodes whose results it takes, ``outputs``: nodes whose results it makes."""

    units: tuple[Unit, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    plan: RegionPlan
    steps: int


def write(gm: GraphModule, units: Sequence[Unit]) -> WrittenRegion | str:
    """The plan of a region; why there is none."""
    made = {node for unit in units for node in unit.writes}
    own = {node for unit in units for node in unit.nodes}
    inputs = tuple(dict.fromkeys(node for unit in units for node in unit.reads if node not in made))
    outputs = tuple(node for unit in units for node in unit.writes if any(user not in own for user in node.users))
    if not inputs or not outputs:
        return "nothing enters or leaves it"
    emitter = Emitter(gm, rows=_by_rows(units))
    _emit(emitter, units, inputs)
    if emitter.rows and any(step.kind not in _ROW_KINDS for step in emitter.steps):
        emitter = Emitter(gm)
        _emit(emitter, units, inputs)
    for place, node in enumerate(outputs):
        emitter.hand_over(node, len(inputs) + place)
    shapes = [tuple(image_shape(node) or ())[1:] for node in outputs]
    plan = region_plan(
        emitter.values, emitter.steps, emitter.constants, len(inputs), shapes, ROWS_AT_ONCE if emitter.rows else 0
    )
    return WrittenRegion(units=tuple(units), inputs=inputs, outputs=outputs, plan=plan, steps=len(emitter.steps))


def _emit(emitter: Emitter, units: Sequence[Unit], inputs: Sequence[Node]) -> None:
    """Write the steps of ``units``; an input with one sample serves all those of the others."""
    samples = image_shape(units[0].writes[0])
    assert samples is not None, "units write images"
    masks = {node for unit in units for node in unit.masks}
    for place, node in enumerate(inputs):
        mask = mask_of(node) if node in masks else None
        first = node.meta["val"].shape[0] if mask is None else mask.samples
        shared = not same_size(first, samples[0])
        if mask is None:
            emitter.declare(node, argument=place, shared=shared)
        else:
            emitter.enter(node, mask.value(place, shared=shared))
    for unit in units:
        unit.emit(emitter)


def _by_rows(units: Sequence[Unit]) -> bool:
    nodes = [node for unit in units for node in (*unit.reads, *unit.writes)]
    return all(len(node.meta["val"].shape) == 2 and image_of(node) is not None for node in nodes)
