"""Losses of single tensors: how many values integers turn into zero, and how many they clip.

Counted exactly in constants, per tensor and per channel or group; in activations from the bins of their histograms,
where they have one. A bin around zero that also holds exact zeros says nothing about the values beside these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant2e.observers.encodings import PerChannelEncoding, PerGroupEncoding, PerTensorEncoding
from quant2e.ranges.blocks import row_blocks
from quant2e.ranges.histogram import HistogramState
from quant2e.ranges.qparams import FLOAT_QPARAMS

MANY = 0.5
"""Share of a tensor's values that become zero from which on it is worth a word."""

CLIPPED = 0.01
"""Share of a tensor's values outside of its range from which on it is worth a word."""

_NEARLY_ALL = 0.999

_Static = PerTensorEncoding | PerChannelEncoding | PerGroupEncoding


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What integers do to the values of one tensor.

    ``flushed``, ``clipped``: shares of all values that become zero, or lie outside of the range. ``lost``: which of
    ``parts`` channels or groups keep nothing but zeros, although they held other values. ``gone``: the same of the
    whole tensor. ``kind``: "tensor", "channel" or "group", what has a scale of its own.
    """

    flushed: float
    clipped: float
    lost: tuple[int, ...] = ()
    parts: int = 1
    gone: bool = False
    kind: str = "tensor"
    constant: bool = False

    @property
    def severity(self) -> tuple[float, float, float]:
        """Larger is worse."""
        return len(self.lost) / self.parts, self.flushed, self.clipped

    @property
    def worth_a_word(self) -> bool:
        """Whether somebody should know."""
        return bool(self.lost) or self.flushed >= MANY or self.clipped >= CLIPPED

    def __str__(self) -> str:
        """What is lost, and what helps."""
        said = []
        if self.lost:
            which = ", ".join(map(str, self.lost[:5])) + (", …" if len(self.lost) > 5 else "")
            part = "group" if self.kind == "group" else "channel"
            verb = "becomes" if len(self.lost) == 1 else "become"
            said.append(f"{len(self.lost)} of {self.parts} {part}s ({which}) {verb} all zero")
        if self.flushed >= MANY or self.lost:
            said.append(f"{self.flushed:.1%} of its values become zero")
        if self.clipped >= CLIPPED:
            said.append(f"{self.clipped:.1%} of its values are clipped")
        return f"{', '.join(said)}; {self._help()}"

    def _help(self) -> str:
        if not self.constant:
            return "a few values own its range: look at the data, or leave its readers float"
        if self.kind == "tensor":
            return "a scale per channel keeps them (is_per_channel=True)"
        if self.kind == "channel":
            return "a scale per group, or more bits, keep them; those below the smallest scale need a smaller eps"
        return "smaller groups, or more bits, keep them"


def constant_loss(value: Tensor, encoding: _Static) -> Loss:
    """The loss of a weight ``value``, float of any shape, under ``encoding``. Channels of a tensor with one scale are
    those of its first dimension.
    """
    rows, scale, zero = _rows(value.detach(), encoding)
    blocks = list(row_blocks(rows.shape[0], rows.numel()))
    counts = [_counts(rows[at], _rows_of(scale, at), _rows_of(zero, at), encoding) for at in blocks]
    flushed, kept, clipped = (torch.cat(parts) for parts in zip(*counts, strict=True))
    lost = (flushed > 0) & (kept == 0)
    total = max(rows.numel(), 1)
    return Loss(
        flushed=int(flushed.sum()) / total,
        clipped=int(clipped.sum()) / total,
        lost=tuple(torch.nonzero(lost).flatten().tolist()),
        parts=rows.shape[0],
        gone=bool(lost.any()) and not bool(kept.any()),
        kind=_kind(encoding),
        constant=True,
    )


def _counts(rows: Tensor, scale: Any, zero: Any, encoding: _Static) -> tuple[Tensor, Tensor, Tensor]:
    """For each row, how many of its values become zero, are others than zero and stay so, and are clipped."""
    rows, half = rows.float(), scale / 2
    exact = not torch.is_floating_point(torch.as_tensor(zero))  # else zero may lie between two integers
    there = (rows != 0) if exact else torch.zeros_like(rows, dtype=torch.bool)
    small = there & (rows.abs() <= half)  # ties go to zero, which is even
    low, high = (encoding.quant_min - zero) * scale - half, (encoding.quant_max - zero) * scale + half
    clipped = (rows < low) | (rows > high)
    return small.sum(1), (there & ~small).sum(1), clipped.sum(1)


def _rows_of(parameter: Any, block: slice) -> Any:
    return parameter[block] if isinstance(parameter, Tensor) and parameter.dim() else parameter


def _kind(encoding: _Static) -> str:
    if isinstance(encoding, PerGroupEncoding):
        return "group"
    return "channel" if isinstance(encoding, PerChannelEncoding) else "tensor"


def _rows(x: Tensor, encoding: _Static) -> tuple[Tensor, Any, Any]:
    """A row for each channel or group, ``[rows, values]``, and the scale and zero point of each, ``[rows, 1]``."""
    if isinstance(encoding, PerTensorEncoding):
        return (x.flatten(1) if x.dim() > 1 else x.reshape(1, -1)), encoding.scale, encoding.zero_point
    scale, zero = encoding.scale.reshape(-1, 1).to(x.device), encoding.zero_point.reshape(-1, 1).to(x.device)
    if isinstance(encoding, PerGroupEncoding):
        return x.reshape(-1, encoding.group_size), scale, zero
    return x.movedim(encoding.axis, 0).reshape(scale.shape[0], -1), scale, zero


def activation_loss(observer: Any, encoding: _Static) -> Loss | None:
    """The loss of what a histogram observer counted, under ``encoding``; None when it counted nothing."""
    state = getattr(observer, "state", None)
    if not isinstance(state, HistogramState) or state.empty or isinstance(encoding, PerGroupEncoding):
        return None
    counts = state.histogram.reshape(-1, state.histogram.shape[-1]).double().cpu()
    bins = state.windows
    index = torch.arange(counts.shape[1] + 1, device=bins.first.device)
    edges = bins.edges(index).cpu()
    scale = torch.as_tensor(encoding.scale).double().reshape(-1, 1).cpu()
    zero = torch.as_tensor(encoding.zero_point).double().reshape(-1, 1).cpu()
    left, right, half = edges[:, :-1], edges[:, 1:], scale / 2
    around_zero = (left < 0) & (right > 0)
    near = (left >= -half) & (right <= half)
    low, high = (encoding.quant_min - zero) * scale - half, (encoding.quant_max - zero) * scale + half
    outside = (right <= low) | (left >= high)
    total = counts.sum().clamp(min=1)
    at_zero, beside = (counts * around_zero).sum(1), (counts * (near & ~around_zero)).sum(1)
    certain = float(beside.sum() / total)
    nearly = float((at_zero + beside).sum() / total)
    some = bool((counts.sum(1) > at_zero).any())
    return Loss(
        flushed=nearly if certain >= MANY or (some and nearly >= _NEARLY_ALL) else certain,
        clipped=float((counts * outside).sum() / total),
        kind=_kind(encoding),
    )


def vanishes(observer: Any, encoding: _Static) -> bool:
    """Whether every value that an observer saw becomes zero, though not all were: the largest is below half a step."""
    low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
    if not isinstance(low, Tensor) or not isinstance(high, Tensor) or low.numel() == 0:
        return False
    if getattr(observer, "qscheme", None) == FLOAT_QPARAMS:
        return False
    peak = torch.maximum(low.abs(), high.abs()).flatten()
    half = torch.as_tensor(encoding.scale).flatten().to(peak) / 2
    return bool((peak > 0).any()) and bool((peak < half).all())
