"""Quantization error: the squared error that a grid would make on the data of a histogram."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant2e.ranges.histogram import HistogramState, windows
from quant2e.ranges.qparams import NumberFormat

_PEAK = 4
"""A bin with more than this many times its neighbours' average is not assumed to be evenly filled."""

_PROBES = 9
"""Points of such a bin at which two grids are compared."""

QParams = tuple[Tensor, Tensor]
"""Scales (float32) and zero points (int64) of the candidates, ``[*, candidates]`` each: alike for, or per histogram."""


def _bounds(grid: NumberFormat, qparams: QParams) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 ``[*, candidates, 1]``: scale, and the smallest and largest multiple of it that the grid represents."""
    scale, zero_point = (v.to(torch.float64).unsqueeze(-1) for v in qparams)
    return scale, grid.quant_min - zero_point, grid.quant_max - zero_point


def pointwise(x: Tensor, grid: NumberFormat, qparams: QParams) -> Tensor:
    """``(x - dequantize(quantize(x)))**2``, ``[*, candidates, points]``, for float64 points ``[*, points]``."""
    scale, least, most = _bounds(grid, qparams)
    t = x.unsqueeze(-2) / scale
    return ((t - torch.clamp(torch.round(t), least, most)) * scale) ** 2


def mean_over(edges: Tensor, grid: NumberFormat, qparams: QParams) -> Tensor:
    """Mean of `pointwise` over each interval between float64 ``edges`` ``[*, n + 1]``: ``[*, candidates, n]``.

    With ``t = x / scale`` and ``r`` the integer that ``t`` is rounded to, clamped to the grid, ``(t - r)**2`` has the
    antiderivative ``(t - r)**3 / 3 + r / 12``, which is continuous across the rounding steps and the clamping.
    An interval without width has the error of its one point.
    """
    scale, least, most = _bounds(grid, qparams)
    t = edges.unsqueeze(-2) / scale
    r = torch.round(t).clamp_(least, most)
    width = t.diff(dim=-1)
    d = t.sub_(r)
    integral = d * d
    integral.mul_(d).div_(3).add_(r.div_(12))
    narrow = width < 1e-6
    mean = integral.diff(dim=-1)
    if not bool(narrow.any()):
        return mean.div_(width).mul_(scale**2)
    mean.div_(torch.where(narrow, 1.0, width)).mul_(scale**2)
    return torch.where(narrow, (d * scale)[..., :-1] ** 2, mean)


@dataclass(frozen=True)
class Filling:
    """The bins of histograms, from the first to the last that counted something.

    ``edges``: float64 ``[*, n + 1]``, cut to the data. ``count``: float64 ``[*, n]``. ``peak``: bool ``[*, n]``, bins
    that stand out from their neighbours, whose values may all be equal.
    """

    edges: Tensor
    count: Tensor
    peak: Tensor


def filling(state: HistogramState) -> Filling:
    """What one histogram says about the distribution inside its bins."""
    used = torch.nonzero(state.histogram.cpu()).flatten()
    first, last = int(used[0]), int(used[-1])
    bins = fillings([state], [first], last - first + 1)
    return Filling(bins.edges[0], bins.count[0], bins.peak[0])


def fillings(states: Sequence[HistogramState], first: Sequence[int], n: int) -> Filling:
    """As `filling`, for several histograms of the same number of bins: ``n`` bins of each, the ones from its ``first``
    on.

    Bins behind the last one that counted something are empty, whole, and may lie outside the histogram.
    """
    extremes = torch.stack([torch.stack([state.min_val, state.max_val]) for state in states]).cpu().to(torch.float64)
    low, high = extremes.unsqueeze(-1).unbind(1)
    begin, along = torch.tensor(first).unsqueeze(1), torch.arange(n + 1)
    every = torch.stack([state.histogram.cpu() for state in states])
    size = every.shape[1]
    starts = windows(low.flatten(), high.flatten(), size).edges(begin + along)
    at = (begin + along[:-1]).clamp(max=size - 1)
    count = (every.gather(1, at) * (begin + along[:-1] < size)).to(torch.float64)
    ends = ((count > 0) * along[1:]).amax(1, keepdim=True)  # the edge at which each one's data ends
    edges = torch.where(along > ends, starts, torch.minimum(starts, high)).maximum(low)
    around = torch.nn.functional.pad(count, (1, 1))
    return Filling(edges, count, count > _PEAK * (around[:, :-2] + around[:, 2:]) / 2)


def expected(bins: Filling, grid: NumberFormat, qparams: QParams) -> Tensor:
    """Mean squared error of each candidate, float64 ``[*, candidates]``, values being spread evenly over their bin."""
    return _summed(mean_over(bins.edges, grid, qparams), bins.count) / bins.count.sum(-1, keepdim=True)


def _summed(values: Tensor, weights: Tensor) -> Tensor:
    """``[*, candidates]`` from ``[*, candidates, n]`` and ``[*, n]``.

    Not a product of matrices: the order in which those add depends on how many there are.
    """
    return (values * weights.unsqueeze(-2)).sum(-1)


@dataclass(frozen=True)
class Reference:
    """The grid that candidates have to beat, and its error on the bins of several histograms.

    ``present``: ``[histograms, 1, n]``. ``rows``, ``columns``: ``[peaks]``, the histogram and the bin of each one that
    stands out. ``points``, ``probed``: ``[peaks, 9]`` and ``[peaks, 1, 9]``, places in it and the errors there.
    """

    bins: Filling
    grid: NumberFormat
    present: Tensor
    rows: Tensor
    columns: Tensor
    points: Tensor
    probed: Tensor

    def advantage(self, qparams: QParams) -> Tensor:
        """By how much each candidate's mean squared error is below the reference's: float64
        ``[histograms, candidates]``.

        ``qparams``: ``[histograms, candidates]``. It is a cautious number, never larger than the difference of
        `expected`:

        - Evenly filled bins count with the means over the bin, less three standard deviations of what the actual
          values in them may do (`_noise`).
        - In a bin that stands out from its neighbours the values may all be equal (zeros after a relu, a constant, a
          few distinct values, everything beside one outlier): it counts with the point of the bin that favours the
          candidate least, and never with more than its mean.
        """
        bins = self.bins
        gain = self.present - mean_over(bins.edges, self.grid, qparams)
        if self.rows.numel():
            scale, zero_point = qparams
            probed = self.probed - pointwise(self.points, self.grid, (scale[self.rows], zero_point[self.rows]))
            at = self.rows, slice(None), self.columns
            gain[at] = torch.minimum(gain[at], probed.amin(-1))
        return (_summed(gain, bins.count) - 3 * _noise(self.present, bins)) / bins.count.sum(-1, keepdim=True)


def reference(bins: Filling, grid: NumberFormat, qparams: QParams) -> Reference:
    """The error of one grid per histogram, ``qparams`` being ``[histograms, 1]``, as the mark for others."""
    rows, columns = torch.nonzero(bins.peak, as_tuple=True)
    along = torch.linspace(0, 1, _PROBES, dtype=torch.float64)
    left, right = bins.edges[rows, columns, None], bins.edges[rows, columns + 1, None]
    points = torch.lerp(left, right, along)
    probed = pointwise(points, grid, (qparams[0][rows], qparams[1][rows]))
    return Reference(bins, grid, mean_over(bins.edges, grid, qparams), rows, columns, points, probed)


def _noise(error: Tensor, bins: Filling) -> Tensor:
    """Standard deviation of the difference of two grids' summed squared errors on the values of the even bins.

    Rounding errors spread evenly over a step have mean square 1/12 and variance of squares 1/180, in steps; over
    ``n`` values the sum of two independent ones deviates by ``sqrt(2 n / 180)``, or ``sqrt(8 / 5 / n)`` of the sum.
    """
    even = bins.count * ~bins.peak
    return _summed(error, even) * torch.sqrt(1.6 / even.sum(-1, keepdim=True).clamp(min=1.6))
