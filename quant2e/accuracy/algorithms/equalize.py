"""Cross-layer equalization: channels of one tensor get ranges that one scale fits, by factors between layers.

    s_c = sqrt(r2_c / r1_c)        w1 rows · s, w2 columns / s        both ranges become sqrt(r1_c · r2_c)

``r1_c``: largest absolute weight that makes channel c; ``r2_c``: that reads it. M. Nagel, M. van Baalen,
T. Blankevoort, M. Welling: Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section
4.1. All layers are equalized together, repeated until no factor moves, so a depthwise layer between two others is, too.
What makes channels without a weight matrix, a norm say, has as r1 the range of its result: measured where there is
data, else |bias| + 3·|weight|. With data, r1 of a weight matrix is the geometric mean of its rows' range and of the
range of what they make. Only ratios between channels matter; the geometric mean of a group's factors stays 1.

The paper replaces relu6 by relu, which changes the model. Here its bound gets a factor for each channel, which costs an
op and so is only done for factors from `CLAMPED` on. Its absorption of high biases (section 4.1.3) is left out: it is
exact only while the activations stay above a bound that is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from quant2e.accuracy.algorithms.algorithm import Algorithm, Context, Stage
from quant2e.accuracy.algorithms.channels.moves import move
from quant2e.accuracy.algorithms.channels.ranges import activation_ranges, largest, scaled
from quant2e.accuracy.algorithms.channels.scaling import ChannelGroup, ChannelScaling, channel_scaling
from quant2e.calibration.batches import check_batch, check_iterable
from quant2e.errors import Quant2eError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.capture import as_graph_module

WORTH = 2.0
"""A group whose factors all lie between 1 / this and this is left as it is: it would gain less than a bit."""

CLAMPED = 4.0
"""The same for groups with a bound that would need an op of its own."""

_STILL = 1e-3
_UNREAD = 1e-6
"""Part of the largest weight that a channel counts as read with which nothing reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Equalize(Algorithm):
    """Cross-layer equalization; ``max_sweeps``: the most repetitions. Raises `Quant2eError` for less than one."""

    name: ClassVar[str] = "equalize"
    stage: ClassVar[Stage] = Stage.CAPTURED
    exact: ClassVar[bool] = True

    max_sweeps: int = 100

    def __post_init__(self) -> None:
        if type(self.max_sweeps) is not int or self.max_sweeps < 1:
            raise Quant2eError(f"equalize: max_sweeps={self.max_sweeps!r}: a whole number, at least 1")

    def apply(self, model: GraphModule, context: Context) -> list[str]:
        """Equalize ``model``, with the ranges of its activations on ``context.calls``."""
        scaling = channel_scaling(model)
        factors = equalizing_factors(model, scaling, context.calls, self.max_sweeps)
        lines = [line for group in scaling.groups if (line := _line(scaling, group, factors))]
        if lines:
            move(model, scaling, factors)
        return lines


def equalize(captured: GraphModule, data: Iterable[Any] = ()) -> GraphModule:
    """A captured graph with equalized channels, which computes the same to rounding; ``captured`` stays as it is.

    ``data``: batches of what the model takes, for the ranges of activations; it works without. `channels_left` says
    which ops are left, and why. Raises `CaptureError` for what is no captured graph, and `CalibrationError` for data
    that the model does not take.
    """
    model = as_graph_module(captured)
    check_iterable(data, "data")
    calls = [check_batch(batch, f"batch {index}", model) for index, batch in enumerate(data)]
    scaling = channel_scaling(model)
    move(model, scaling, equalizing_factors(model, scaling, calls))
    return model


def equalizing_factors(
    gm: GraphModule, scaling: ChannelScaling, calls: Sequence[Call] = (), max_sweeps: int = 100
) -> Tensor:
    """The factors, ``(scaling.count,)`` float64, of cross-layer equalization; 1 for groups that it is not worth it."""
    logs = torch.zeros(scaling.count, dtype=torch.float64)
    measured = activation_ranges(gm, scaling, calls) if calls and scaling.groups else {}
    sides = [_Sides(scaling, group, measured) for group in scaling.groups]
    for _ in range(max_sweeps):
        factors, steps = logs.exp(), torch.zeros_like(logs)
        for each in sides:
            steps[each.group.channels] = each.step(factors)
        logs += steps
        if not sides or float(steps.abs().max()) < _STILL:
            break
    factors = logs.exp()
    for group in scaling.groups:
        least = CLAMPED if scaling.clamped(group) else WORTH
        if float(logs[group.channels].abs().max()) < torch.tensor(least).log():
            factors[group.channels] = 1.0
    return factors


class _Sides:
    """The ops on both sides of the channels of one group."""

    def __init__(self, scaling: ChannelScaling, group: ChannelGroup, measured: dict[str, Tensor]) -> None:
        self.group = group
        self._count = scaling.count
        self._makers = [each for each in scaling.strengths if each.node.name in group.makers]
        self._readers = [each for each in scaling.strengths if each.node.name in group.readers]
        sources = {each.source.name for each in self._readers if each.source is not None}
        self._seen = [measured[name][group.channels] for name in sorted(sources) if name in measured]

    def step(self, factors: Tensor) -> Tensor:
        """How far the logarithm of each factor moves; 0 for channels that nothing makes."""
        channels = self.group.channels
        made = [largest(scaled(each, factors), each.makes, self._count)[channels] for each in self._makers]
        read = [
            largest(scaled(each, factors), each.reads, self._count)[channels]
            for each in self._readers
            if each.reads is not None
        ]
        rows = _together(made)
        if self._seen:
            seen = _together([each * factors[channels] for each in self._seen])
            rows = (rows + seen) / 2.0 if all(each.is_matrix for each in self._makers) else seen
        columns = _together(read)
        columns = columns.clamp(min=float(columns.max()) + math.log(_UNREAD))
        step = (columns - rows) / 2.0
        known = torch.isfinite(step)
        return torch.where(known, step - step[known].mean(), 0.0) if bool(known.any()) else torch.zeros_like(step)


def _together(found: Sequence[Tensor]) -> Tensor:
    """Logarithms of the largest range of each channel; -inf for those of no op.

    Of ops that share channels only ratios count: they are equal on average on what they share. Where they share none,
    as what is concatenated, their ranges are compared as they are.
    """
    first, *others = sorted((each.log() for each in found), key=lambda each: -int(torch.isfinite(each).sum()))
    level, largest_yet = first, first
    for each in others:
        shared = torch.isfinite(each) & torch.isfinite(level)
        moved = each + (level[shared] - each[shared]).mean() if bool(shared.any()) else each
        level = torch.where(torch.isfinite(level), level, moved)
        largest_yet = torch.maximum(largest_yet, moved)
    return largest_yet


def _line(scaling: ChannelScaling, group: ChannelGroup, factors: Tensor) -> str:
    """What was done to a group; empty when nothing was."""
    own = factors[group.channels]
    if bool((own == 1.0).all()):
        return ""
    bounds = scaling.clamped(group)
    names = ", ".join(f"'{node.name}'" for node in bounds)
    note = f"; bounds of {names} are one for each channel now" if bounds else ""
    return f"{group}: {own.numel()} channels, factors from {float(own.min()):.3g} to {float(own.max()):.3g}{note}"
