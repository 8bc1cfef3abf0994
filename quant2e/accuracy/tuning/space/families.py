"""Families: alternatives that annotate the same float graph, and the groups of ops that move together under all.

Groups of one alternative are those of `quant2e.accuracy.op_groups`; where two alternatives join ops differently (a
static one lets a concatenation share the scale of what it joins, a dynamic one does not), what one joins is joined.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.fx import GraphModule, Node

from quant2e.accuracy.op_groups import op_groups
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.accuracy.tuning.space.space import Alternative, Family, Space, TunedGroup, constants_of, float_text
from quant2e.calibration.statistics import observers_of
from quant2e.errors import Quant2eError, module_path
from quant2e.graph.edit import PART_OF


def space_of(alternatives: Sequence[Alternative]) -> Space:
    """The space of these alternatives. Raises `Quant2eError` when none of them quantizes anything."""
    found: list[tuple[tuple[str, ...], list[Alternative]]] = []
    for alternative in alternatives:
        text = float_text(alternative.prepared)
        for other, members in found:
            if text == other and _same_constants(members[0].prepared, alternative.prepared):
                members.append(alternative)
                break
        else:
            found.append((text, [alternative]))
    made = (Family(tuple(members), _groups(members)) for _, members in found)
    families = tuple(family for family in made if family.groups)
    if not families:
        raise Quant2eError(
            "no op of this model is quantized, so there is nothing to tune: give the quantizer a configuration "
            f"(set_global, say); the reasons are these\n{alternatives[0].report}"
        )
    return Space(families)


def _same_constants(one: GraphModule, other: GraphModule) -> bool:
    pairs = zip(constants_of(one), constants_of(other), strict=True)
    return all(a is b or (a.shape == b.shape and torch.equal(a, b)) for a, b in pairs)


def _groups(alternatives: Sequence[Alternative]) -> tuple[TunedGroup, ...]:
    """In graph order; what is quantized in the bodies of control flow is one more, the last."""
    position = {node.name: place for place, node in enumerate(alternatives[0].prepared.graph.nodes)}
    merged: dict[str, set[str]] = {}
    nodes: dict[str, Node] = {}
    by: dict[str, set[str]] = {}
    for alternative in alternatives:
        for group in _groups_of(alternative):
            joined = {node.name for node in group}.union(*(merged.get(node.name, ()) for node in group))
            merged.update(dict.fromkeys(joined, joined))
            for node in group:
                nodes.setdefault(node.name, node)
                by.setdefault(node.name, set()).add(alternative.name)
    sets = {frozenset(members) for members in merged.values()}
    ordered = sorted((sorted(members, key=position.__getitem__) for members in sets), key=lambda m: position[m[0]])
    groups = [_group([nodes[name] for name in members], by, alternatives) for members in ordered]
    inside = _inside(alternatives)
    return (*groups, *([] if inside is None else [inside]))


def _groups_of(alternative: Alternative) -> Iterator[tuple[Node, ...]]:
    prepared = alternative.prepared
    if any("." not in name for name in observers_of(prepared)):
        for group in op_groups(SimulatedGraph(prepared), alternative.report):
            yield group.nodes


def _group(members: Sequence[Node], by: Mapping[str, set[str]], alternatives: Sequence[Alternative]) -> TunedGroup:
    judged = {verdict.op.name for alternative in alternatives for verdict in alternative.report.verdicts}
    names = (name for node in members for name in (node.name, node.meta.get(PART_OF)))
    quantizing = set().union(*(by[node.name] for node in members))
    return TunedGroup(
        ops=tuple(dict.fromkeys(name for name in names if name in judged)),
        modules=tuple(dict.fromkeys(path for node in members if (path := module_path(node)))),
        nodes=frozenset(node.name for node in members),
        options=tuple(a.name for a in alternatives if a.name in quantizing),
    )


def _inside(alternatives: Sequence[Alternative]) -> TunedGroup | None:
    """What is quantized in bodies of control flow: no point of it can be switched alone, so it is a whole."""
    ops: dict[str, None] = {}
    options = []
    for alternative in alternatives:
        if any("." in name for name in observers_of(alternative.prepared)):
            quantized = [v.op.name for v in alternative.report.verdicts if v.quantized and "." in v.op.name]
            ops.update(dict.fromkeys(quantized))
            options += [alternative.name] if quantized else []
    return TunedGroup(tuple(ops), (), frozenset(), tuple(options)) if options else None
