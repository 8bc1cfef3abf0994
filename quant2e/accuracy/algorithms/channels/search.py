"""Scale search: of several factors for the channels of each group, those under which its layers lose least.

    error(group) = Σ |op(q(x), q(w)) - op(x, w)|² / |op(x, w)|²        over the ops that make and read its channels

What an op makes is weighted by channel, those with more power than half of them as if they had that of the middle one:
a norm behind takes such a channel back, and its noise would hide that of all others.

Each op is run on the operands that it has in float, rounded as the quantizer has them rounded: with its own observers,
granularity and bits, in a graph that was prepared and calibrated with the factors in it. So a candidate costs one
preparation and one run for all groups at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quant2e.accuracy.algorithms.channels.moves import move
from quant2e.accuracy.algorithms.channels.scaling import ChannelGroup, ChannelScaling, channel_scaling
from quant2e.accuracy.simulated import SimulatedGraph
from quant2e.annotation.quantizer import Quantizer
from quant2e.calibration.calibrate import calibrate
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.capture import as_graph_module
from quant2e.graph.captured.inputs import flat_inputs
from quant2e.graph.control_flow import GraphInterpreter
from quant2e.graph.dataflow import operand
from quant2e.graph.fake_values import node_tensor
from quant2e.isolation import IsolatedRandomness
from quant2e.prepare.prepare import prepare_pt2e

PAYS = 0.9
"""Factors are put in where the error falls below this part of what it is without: about half a dB."""

CLAMPED_PAYS = 0.25
"""The same where they need bounds for each channel: 6 dB."""

SEARCHED_ON = 4
"""Batches at most on which a search runs."""

INSERTED_PAYS = 0.7
"""The same where they need a division of their own: 1.5 dB."""

Factors = Callable[[float], Tensor]
"""Factors of a graph, ``(count,)``, for an exponent."""


@dataclass(frozen=True, slots=True)
class ScaleChoice:
    """The exponent that was chosen for a group, with the error of its layers without factors and with them.

    ``inserted``: a division that was put in carries the factors.
    """

    group: ChannelGroup
    exponent: float
    before: float
    after: float
    inserted: bool = False

    def __str__(self) -> str:
        before, after = (-10.0 * math.log10(max(error, 1e-30)) for error in (self.before, self.after))
        count = self.group.channels.numel()
        text = f"{self.group}: {count} channels, exponent {self.exponent:g}, its layers {before:.1f} -> {after:.1f} dB"
        return text + (", by a division in float that is put in" if self.inserted else "")


@dataclass(frozen=True, slots=True)
class Split:
    """Data to find ranges on, and data to measure on: every fourth batch from the second, unless there is only one.

    Of more batches than `SEARCHED_ON` so many, evenly spread: ranges that only rank exponents need no more.
    """

    fit: tuple[Call, ...]
    held_out: tuple[Call, ...]

    @classmethod
    def of(cls, calls: Sequence[Call]) -> Split:
        """Split calls."""
        if len(calls) > SEARCHED_ON:
            calls = [calls[place * (len(calls) - 1) // (SEARCHED_ON - 1)] for place in range(SEARCHED_ON)]
        if len(calls) == 1:
            return cls(tuple(calls), tuple(calls))
        kept = frozenset(range(1, len(calls), 4))
        return cls(
            tuple(call for index, call in enumerate(calls) if index not in kept),
            tuple(call for index, call in enumerate(calls) if index in kept),
        )


def choose_scales(
    model: GraphModule, quantizer: Quantizer, data: Split, exponents: Sequence[float], factors: Factors
) -> tuple[ScaleChoice, ...]:
    """For each group of ``model`` the best of ``exponents``, where it pays; ``model`` stays as it is.

    Raises the errors of preparation and calibration.
    """
    scaling = channel_scaling(model)
    without = _errors(model, scaling, quantizer, data, torch.ones(scaling.count))
    tried = {each: _errors(model, scaling, quantizer, data, factors(each)) for each in exponents}
    found = []
    for place, (group, own) in enumerate(zip(scaling.groups, without, strict=True)):
        errors = {each: tried[each][place] for each in exponents}
        exponent, best = min(errors.items(), key=lambda item: item[1].total)
        inserted = is_inserted(model, group)
        # What makes the channels has an error of its own with other groups' factors in it, and would have it without.
        least = own.made if inserted else min(own.made, *(each.made for each in errors.values()))
        before, after = own.read + least, best.total
        if after < before * _bound(scaling, group, inserted):
            found.append(ScaleChoice(group, exponent, before, after, inserted))
    return tuple(found)


def _bound(scaling: ChannelScaling, group: ChannelGroup, inserted: bool) -> float:
    """Below which part of it the error has to fall."""
    if scaling.clamped(group):
        return CLAMPED_PAYS
    return INSERTED_PAYS if inserted else PAYS


class _Error(NamedTuple):
    """Of the layers that read the channels of a group, and of those that make them."""

    read: float
    made: float

    @property
    def total(self) -> float:
        return self.read + self.made


INSERTED = "quant2e_inserted_factor"
"""Metadata of divisions that were put in to carry factors."""


def is_inserted(model: GraphModule, group: ChannelGroup) -> bool:
    """Whether a division that was put in for them makes the channels of a group."""
    return any(node.name in group.makers and INSERTED in node.meta for node in model.graph.nodes)


def chosen_factors(scaling: ChannelScaling, choices: Sequence[ScaleChoice], factors: Factors) -> Tensor:
    """The factors of all groups together; 1 for those that were not chosen."""
    made = torch.ones(scaling.count, dtype=torch.float64)
    for each in choices:
        made[each.group.channels] = factors(each.exponent)[each.group.channels]
    return made


def _errors(
    model: GraphModule, scaling: ChannelScaling, quantizer: Quantizer, data: Split, factors: Tensor
) -> list[_Error]:
    """The error of each group with these factors; inf where it cannot be measured."""
    candidate = as_graph_module(model)
    move(candidate, channel_scaling(candidate), factors)
    prepared = prepare_pt2e(candidate, quantizer)
    calibrate(prepared, data.fit)
    run = _LocalErrors(SimulatedGraph(prepared), {x for group in scaling.groups for x in group.makers + group.readers})
    for call in data.held_out:
        run.add(call)
    return [run.of(group) for group in scaling.groups]


class _LocalErrors(GraphInterpreter):
    """Runs a simulated graph in float, and adds up the errors of some ops on exact operands, rounded."""

    def __init__(self, simulated: SimulatedGraph, names: set[str]) -> None:
        super().__init__(simulated.graph)
        self._simulated = simulated
        self._names = names
        self._read: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._made: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, call: Call) -> None:
        """Run one item of data."""
        self._simulated.start_again()
        with torch.no_grad(), IsolatedRandomness():
            self.run(*flat_inputs(self._simulated.graph, call), enable_io_processing=False)

    def of(self, group: ChannelGroup) -> _Error:
        """The error of a group: of what it reads as a whole, and of what it makes by channel, whatever their scales."""
        read = [_sums(self._read[name]) for name in group.readers if name in self._read]
        if not read:
            return _Error(math.inf, 0.0)
        made = 0.0
        for name in group.makers:
            found = self._made.get(name, [])
            if found:
                signal, noise = _sums(found)
                made += float((noise / signal)[signal > 0].mean().nan_to_num())
        return _Error(sum(_relative(signal, noise) for signal, noise in read), made)

    def run_node(self, n: Node) -> Any:
        """The value of ``n`` in float; on the way, what it would be with its operands rounded."""
        result = super().run_node(n)
        points = {node for node in n.all_input_nodes if node in self._simulated.points}
        if n.name not in self._names or not points or not isinstance(result, Tensor):
            return result
        noise, exact = self._noise(n, result, points), result.double().square()
        axis = _channels(n, exact.dim())
        self._read.setdefault(n.name, []).append((_by_channel(exact, axis), _by_channel(noise, axis)))
        if INSERTED not in n.meta:  # the rounding of what another op made is not its own
            noise = self._noise(n, result, {x for x in points if x.all_input_nodes[0] in self._simulated.constants})
        self._made.setdefault(n.name, []).append((_by_channel(exact, axis), _by_channel(noise, axis)))
        return result

    def _noise(self, n: Node, result: Tensor, points: Collection[Node]) -> Tensor:
        """The squared error of an op with its operands rounded at ``points``."""

        def value(node: Node) -> Any:
            return self._simulated.points[node].rounded(self.env[node]) if node in points else self.env[node]

        args, kwargs = map_arg((n.args, dict(n.kwargs)), value)
        assert callable(n.target), "an op with a weight"
        found: Tensor = n.target(*args, **kwargs)
        return (found - result).double().square()


def _sums(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Signal and noise of each channel over all data."""
    signal, noise = (torch.stack(side).sum(0) for side in zip(*found, strict=True))
    return signal, noise


def _relative(signal: Tensor, noise: Tensor) -> float:
    """Noise over signal, where no channel counts for more than the middle one."""
    middle = signal.median()
    if not bool(middle > 0):
        return float((noise.sum() / signal.sum()).nan_to_num(posinf=0.0))
    weight = middle / signal.clamp(min=float(middle))
    return float((noise * weight).sum() / (signal * weight).sum())


def _channels(node: Node, rank: int) -> int:
    """The axis of a result along which its channels lie: behind the batch for convolutions and their norms."""
    weight = node_tensor(operand(node, "weight"))
    if "conv" in str(node.target) and weight is not None:
        return rank - weight.dim() + 1
    return 1 if "batch_norm" in str(node.target) else -1


def _by_channel(values: Tensor, axis: int) -> Tensor:
    return values.movedim(axis, -1).flatten(0, -2).sum(0)


def logs_of(values: Mapping[str, Tensor], scaling: ChannelScaling) -> Tensor:
    """Logarithms of the largest of several statistics of each factor, ``(scaling.count,)``; 0 for zeros."""
    found = torch.zeros(scaling.count, dtype=torch.float64)
    for each in values.values():
        found = torch.maximum(found, each)
    return torch.where(found > 0, found, 1.0).log()


def balanced(logs: Tensor, scaling: ChannelScaling) -> Tensor:
    """Factors from their logarithms, with a geometric mean of 1 in each group."""
    factors = torch.ones_like(logs)
    for group in scaling.groups:
        own = logs[group.channels]
        factors[group.channels] = (own - own.mean()).exp()
    return factors
