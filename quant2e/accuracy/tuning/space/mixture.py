"""The graph of one mix: the points that it wants, of the alternatives that it picked, in one prepared graph.

Nothing is calibrated again: the observers are those of the alternatives, with what they saw. Which points are wanted:

    an output             while the op that makes the tensor is quantized by this alternative
    the use by an op      while the op that reads it is

An op that reads integers since its producer makes some, and says nothing of its operand, keeps reading integers when
the producer stays float: the point moves from the output to this use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from quant2e.accuracy.tuning.space.space import FLOAT_PICK, Alternative, Family, Mix, Space, float_graph
from quant2e.annotation.plan import Edge, Group, Output, Plan, Point
from quant2e.errors import CalibrationError
from quant2e.observers.encodings import (
    CustomEncoding,
    DynamicEncoding,
    Encoding,
    PerChannelEncoding,
    PerTensorEncoding,
    encode,
)
from quant2e.prepare.insert_observers import observe
from quant2e.report.record import RECORD_KEY, GraphRecord
from quant2e.report.report import FLOAT, Report, Verdict

TUNED_FLOAT = "left float by tune"
"""The reason of ops that an alternative quantizes and a mix does not."""


def prepared_for(space: Space, mix: Mix) -> GraphModule:
    """A prepared and calibrated graph that quantizes what ``mix`` says, for `quant2e.convert_pt2e`.

    It shares observers and parameters with the graphs of the alternatives, which stay as they are.
    """
    family = space.families[mix.family]
    mixture = _Mixture(family, mix.picks)
    gm = mixture.float_graph()
    plan, modules = mixture.plan()
    names = observe(gm, plan, dict(enumerate(modules)))
    report = mixture.report()
    gm.meta[RECORD_KEY] = GraphRecord(plan, tuple(names.get(i, "") for i in range(len(plan.groups))), report)
    return gm


class _Mixture:
    """What one mix takes of each alternative of a family."""

    def __init__(self, family: Family, picks: tuple[str, ...]) -> None:
        self._family = family
        self._picks = picks
        self._used = tuple(a for a in family.alternatives if a.name in picks)

    def float_graph(self) -> GraphModule:
        """The graph without observers, but for those in the bodies of control flow that the mix quantizes."""
        for group, pick in zip(self._family.groups, self._picks, strict=True):
            if not group.nodes and pick != FLOAT_PICK:
                return float_graph(self._family.by_name[pick].prepared, bodies=True)
        return float_graph(self._family.alternatives[0].prepared)

    def plan(self) -> tuple[Plan, list[nn.Module]]:
        """The wanted points, and the observer of each group of them."""
        groups: list[Group] = []
        observers: list[nn.Module] = []
        encodings: list[Encoding | None] = []
        for alternative in self._used:
            others = len(groups)
            for group, name in zip(alternative.plan.groups, alternative.record.observers, strict=True):
                points = tuple(self._wanted(alternative, group)) if name else ()
                if not points:
                    continue
                observer = alternative.prepared.get_submodule(name)
                encoding = _encoding(observer) if len(self._used) > 1 else None
                for place in range(others):
                    shared = [p for p in points if _tensors(groups[place]) & {p.tensor}]
                    if shared and _equal(encodings[place], encoding):
                        groups[place] = replace(groups[place], points=(*groups[place].points, *shared))
                        points = tuple(p for p in points if p not in shared)
                if points:
                    groups.append(Group(group.spec, points))
                    observers.append(observer)
                    encodings.append(encoding)
        ignored = dict.fromkeys(item for alternative in self._used for item in alternative.plan.ignored)
        return Plan(tuple(groups), tuple(ignored)), observers

    def _picked(self, node: str, alternative: Alternative) -> bool | None:
        """Whether the group of a node is quantized by this alternative; None for a node that is in no group."""
        index = self._family.group_of.get(node)
        return None if index is None else self._picks[index] == alternative.name

    def _wanted(self, alternative: Alternative, group: Group) -> Iterator[Point]:
        for point in group.points:
            if isinstance(point, Edge):
                if self._picked(point.dst, alternative) is not False:
                    yield point
            elif self._is_made(point, alternative):
                yield point
            else:
                for reader in self._family.readers.get(point.node, ()):
                    edge = Edge(point.node, reader)
                    if self._picked(reader, alternative) and edge not in alternative.plan:
                        yield edge

    def _is_made(self, point: Output, alternative: Alternative) -> bool:
        """Whether the tensor itself is quantized: its op is, or it is in no group, and nobody wants it float."""
        made = self._picked(point.node, alternative)
        if made is not None:
            return made
        return all(self._picked(reader, alternative) is not False for reader in self._family.readers[point.node])

    def report(self) -> Report:
        """The verdict of each op by the alternative that its group picked; float with the reason where none was."""
        sources = self._used or self._family.alternatives[:1]
        pick = {op: p for g, p in zip(self._family.groups, self._picks, strict=True) for op in g.ops}
        verdicts = tuple(self._verdict(verdict, pick) for verdict in sources[0].report.verdicts)
        notes = dict.fromkeys(note for alternative in sources for note in alternative.report.notes)
        return replace(sources[0].report, verdicts=verdicts, notes=tuple(notes))

    def _verdict(self, verdict: Verdict, picks: Mapping[str, str]) -> Verdict:
        pick = picks.get(verdict.op.name)
        if pick is None:
            return verdict
        if pick != FLOAT_PICK:
            return self._family.by_name[pick].report.of(verdict.op.name)
        return Verdict(verdict.op, FLOAT, TUNED_FLOAT)


def _tensors(group: Group) -> set[str]:
    return {point.tensor for point in group.points}


def _encoding(observer: nn.Module) -> Encoding | None:
    try:
        return encode(observer)
    except CalibrationError:  # told where the graph is converted, with its place
        return None


def _equal(one: Encoding | None, other: Encoding | None) -> bool:
    """Whether two alternatives quantize a tensor with the same numbers, so that one pair of q/dq does for both."""
    if type(one) is not type(other) or one is None or isinstance(one, CustomEncoding):
        return False
    if not isinstance(one, PerTensorEncoding | PerChannelEncoding | DynamicEncoding):
        return False
    fields = type(one).__dataclass_fields__
    return all(_same(getattr(one, name), getattr(other, name)) for name in fields)


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return a == b
