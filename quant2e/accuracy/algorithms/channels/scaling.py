"""Channel scaling: where in a graph a factor for each channel can be moved from one op's weights to the next ones'.

    conv(relu(conv(x, w, b)), v)  =  conv(relu(conv(x, s·w, s·b)), v/s)          s > 0, one for each channel between

Every factor is a class of labels (`quant2e.accuracy.algorithms.channels.walk`) that nothing stops: the rows of all that
makes these channels, the columns of all that reads them, and what lies between. The analysis changes nothing; `move`
puts factors in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quant2e.accuracy.algorithms.channels.rules import label
from quant2e.accuracy.algorithms.channels.walk import FactorTerm, Parameter, Strength, Walk
from quant2e.errors import where
from quant2e.graph.captured.capture import as_graph_module


@dataclass(frozen=True, slots=True, eq=False)
class ChannelGroup:
    """Factors that are chosen together: the ``channels`` (numbers of factors) between some ops.

    ``makers``, ``readers``: names of the ops whose weights take a factor and its inverse.
    """

    makers: tuple[str, ...]
    readers: tuple[str, ...]
    channels: Tensor

    def __str__(self) -> str:
        made, read = ("'" + "', '".join(names) + "'" for names in (self.makers, self.readers))
        return f"{made} → {read}"


@dataclass(frozen=True, slots=True, eq=False)
class ChannelScaling:
    """All factors that a graph can take; names are those of its nodes.

    ``count``: how many, the factor 1 with number 0 among them. ``parameters``, ``strengths``, ``clamps``: where they
    are, with numbers of factors as labels; ``tensors``: those of what is read. ``left``: ops whose channels take no
    factor, with the reason.
    """

    count: int
    parameters: tuple[Parameter, ...]
    strengths: tuple[Strength, ...]
    clamps: Mapping[Node, Tensor]
    tensors: Mapping[str, Tensor]
    groups: tuple[ChannelGroup, ...]
    left: Mapping[str, str]

    def clamped(self, group: ChannelGroup) -> tuple[Node, ...]:
        """The clamps between makers and readers whose bounds take factors of a group."""
        return tuple(node for node, labels in self.clamps.items() if bool(torch.isin(labels, group.channels).any()))

    def __str__(self) -> str:
        lines = [f"{group}: {group.channels.numel()} channels" for group in self.groups]
        return "\n".join(lines + [f"'{name}': left, {why}" for name, why in self.left.items()])


def channel_scaling(gm: GraphModule) -> ChannelScaling:
    """Find where factors of channels can be moved in a captured float graph, which stays as it is.

    Exact for all inputs: sizes may vary. Tied weights and weights that are read in two roles take no factor, layers
    that are called several times take one. Bodies of control flow are left as they are. Linear in the graph and its
    channels.
    """
    walk = Walk(gm)
    with torch.no_grad():
        for node in gm.graph.nodes:
            label(walk, node)
    number, stopped = _numbers(walk)
    parameters = tuple(_numbered(parameter, number) for parameter in walk.parameters.values())
    strengths = tuple(
        replace(each, makes=number[each.makes], reads=None if each.reads is None else number[each.reads])
        for each in walk.strengths.values()
    )
    count = int(number.max()) + 1
    sources = {source: walk.of(source) for each in strengths if (source := each.source) is not None}
    return ChannelScaling(
        count=count,
        parameters=parameters,
        strengths=strengths,
        clamps={node: number[labels] for node, labels in walk.clamps.items() if bool(number[labels].any())},
        tensors={
            x.name: number[labels] for x, labels in sources.items() if labels is not None and number[labels].any()
        },
        groups=tuple(_groups(strengths, count)),
        left=dict(_left(walk, number, stopped)),
    )


def channels_left(captured: GraphModule) -> Mapping[str, str]:
    """The ops of a captured graph whose channels can take no factor, by name, each with the reason.

    They are what `equalize`, `smooth` and `awq` cannot scale. Raises `CaptureError` for what is no captured graph.
    """
    return channel_scaling(as_graph_module(captured)).left


def _numbers(walk: Walk) -> tuple[Tensor, Tensor]:
    """The number of the factor of each label; and the place among ``walk.stops`` of what stops it, -1 for nothing."""
    total = next(walk._count)
    classes = torch.arange(total)
    pairs = torch.cat(walk.joined, 1) if walk.joined else torch.zeros(2, 0, dtype=torch.int64)
    while pairs.numel():
        least = torch.minimum(classes[pairs[0]], classes[pairs[1]])
        before = classes.clone()
        for side in pairs:
            classes.scatter_reduce_(0, classes[side], least, "amin")
            classes.scatter_reduce_(0, side, least, "amin")
        classes = classes[classes]
        if torch.equal(classes, before):
            break
    stopped = torch.zeros(total, dtype=torch.bool)
    stopped[0] = True
    why = torch.full((total,), -1)
    for place, stop in enumerate(walk.stops):
        touched = classes[stop.labels]
        stopped[touched] = True
        if stop.why:
            why[touched[why[touched] < 0]] = place
    free = ~stopped[classes]
    number = torch.zeros(total, dtype=torch.int64)
    number[free] = classes[free].unique(return_inverse=True)[1] + 1
    return number, why[classes]


def _numbered(parameter: Parameter, number: Tensor) -> Parameter:
    terms = {role: FactorTerm(number[term.labels], term.sign) for role, term in parameter.terms.items()}
    return Parameter(parameter.value, parameter.places, {r: t for r, t in terms.items() if bool(t.labels.any())})


def _groups(strengths: tuple[Strength, ...], count: int) -> Iterator[ChannelGroup]:
    """Factors that one op makes, or reads, are chosen together."""
    leader = torch.arange(count)
    for _ in range(count):
        before = leader.clone()
        for each in strengths:
            for side in (each.makes, each.reads):
                members = torch.zeros(0, dtype=torch.int64) if side is None else side[side > 0].unique()
                if members.numel():
                    leader[members] = leader[leader[members]].min()
        leader = leader[leader]
        if torch.equal(before, leader):
            break
    makers, readers = defaultdict[int, list[str]](list), defaultdict[int, list[str]](list)
    for each in strengths:
        for side, names in ((each.makes, makers), (each.reads, readers)):
            if side is not None and bool(side.any()):
                names[int(leader[side[side > 0]][0])].append(each.node.name)
    for first in makers:
        if readers[first]:
            yield ChannelGroup(tuple(makers[first]), tuple(readers[first]), (leader == first).nonzero().flatten())


def _left(walk: Walk, number: Tensor, stopped: Tensor) -> Iterator[tuple[str, str]]:
    for each in walk.strengths.values():
        if bool(number[each.makes].any()):
            continue
        places = stopped[each.makes.flatten()]
        known = places[places >= 0]
        if known.numel():
            stop = walk.stops[int(known[0])]
            yield each.node.name, f"{where(stop.node)}: {stop.why}"
        elif bool((places < 0).any()) and not _is_silent(walk, each):
            yield each.node.name, "it is joined with a tensor that takes no factor"


def _is_silent(walk: Walk, strength: Strength) -> bool:
    """Whether channels take no factor since the op belongs to a batch norm, which is another entry."""
    return any(not stop.why and bool(torch.isin(strength.makes, stop.labels).any()) for stop in walk.stops)
