"""The squared error that quantization would make on the data of a histogram."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant2e.histogram import HistogramState
from quant2e.qparams import Grid

_PEAK = 4
"""A bin with more than this many times its neighbours' average is not assumed to be evenly filled."""

_PROBES = 9
"""Points of such a bin at which two grids are compared."""

QParams = tuple[Tensor, Tensor]
"""Scales (float32) and zero points (int64) of the candidates, ``[candidates]`` each."""


def _bounds(grid: Grid, qparams: QParams) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 ``[candidates, 1]``: scale, and the smallest and largest multiple of it that the grid represents."""
    scale, zero_point = (v.to(torch.float64).unsqueeze(1) for v in qparams)
    return scale, grid.quant_min - zero_point, grid.quant_max - zero_point


def pointwise(x: Tensor, grid: Grid, qparams: QParams) -> Tensor:
    """``(x - dequantize(quantize(x)))**2``, ``[candidates, points]``, for float64 points ``[points]``."""
    scale, least, most = _bounds(grid, qparams)
    t = x / scale
    return ((t - torch.clamp(torch.round(t), least, most)) * scale) ** 2


def mean_over(edges: Tensor, grid: Grid, qparams: QParams) -> Tensor:
    """Mean of `pointwise` over each interval between float64 ``edges`` ``[n + 1]``: ``[candidates, n]``.

    With ``t = x / scale`` and ``r`` the integer that ``t`` is rounded to, clamped to the grid, ``(t - r)**2`` has the
    antiderivative ``(t - r)**3 / 3 + r / 12``, which is continuous across the rounding steps and the clamping.
    An interval without width has the error of its one point.
    """
    scale, least, most = _bounds(grid, qparams)
    t = edges / scale
    r = torch.round(t).clamp_(least, most)
    width = t.diff(dim=1)
    d = t.sub_(r)
    integral = d * d
    integral.mul_(d).div_(3).add_(r.div_(12))
    narrow = width < 1e-6
    mean = integral.diff(dim=1)
    if not bool(narrow.any()):
        return mean.div_(width).mul_(scale**2)
    mean.div_(torch.where(narrow, 1.0, width)).mul_(scale**2)
    return torch.where(narrow, (d * scale)[:, :-1] ** 2, mean)


@dataclass(frozen=True)
class Filling:
    """The bins from the first to the last that counted something.

    ``edges``: float64 ``[n + 1]``, cut to the data. ``count``: float64 ``[n]``. ``peak``: bool ``[n]``, bins that
    stand out from their neighbours, whose values may all be equal.
    """

    edges: Tensor
    count: Tensor
    peak: Tensor


def filling(state: HistogramState) -> Filling:
    """What the histogram says about the distribution inside its bins."""
    used = torch.nonzero(state.histogram.cpu()).flatten()
    first, last = int(used[0]), int(used[-1])
    count = state.histogram.cpu()[first : last + 1].to(torch.float64)
    edges = state.window.edges()[first : last + 2].clamp(float(state.min_val), float(state.max_val))
    around = torch.nn.functional.pad(count, (1, 1))
    return Filling(edges, count, count > _PEAK * (around[:-2] + around[2:]) / 2)


def expected(bins: Filling, grid: Grid, qparams: QParams) -> Tensor:
    """Mean squared error of each candidate, float64 ``[candidates]``, values being spread evenly over their bin."""
    return mean_over(bins.edges, grid, qparams) @ bins.count / bins.count.sum()


@dataclass(frozen=True)
class Reference:
    """The grid that candidates have to beat, and its error on the bins of one histogram."""

    bins: Filling
    grid: Grid
    qparams: QParams
    present: Tensor
    points: Tensor
    probed: Tensor

    def advantage(self, qparams: QParams) -> Tensor:
        """By how much each candidate's mean squared error is below the reference's: float64 ``[candidates]``.

        It is a cautious number, never larger than the difference of `expected`:

        - Evenly filled bins count with the means over the bin, less three standard deviations of what the actual
          values in them may do (`_noise`).
        - In a bin that stands out from its neighbours the values may all be equal (zeros after a relu, a constant, a
          few distinct values, everything beside one outlier): it counts with the point of the bin that favours the
          candidate least, and never with more than its mean.
        """
        bins = self.bins
        gain = self.present - mean_over(bins.edges, self.grid, qparams)
        if self.points.numel():
            probed = self.probed - pointwise(self.points, self.grid, qparams)
            least = probed.unflatten(1, (-1, _PROBES)).amin(2)
            gain[:, bins.peak] = torch.minimum(gain[:, bins.peak], least)
        return (gain @ bins.count - 3 * _noise(self.present, bins)) / bins.count.sum()


def reference(bins: Filling, grid: Grid, qparams: QParams) -> Reference:
    """The error of one grid, ``qparams`` of one candidate, as the mark for others."""
    along = torch.linspace(0, 1, _PROBES, dtype=torch.float64)
    points = torch.lerp(bins.edges[:-1, None], bins.edges[1:, None], along)[bins.peak].flatten()
    present = mean_over(bins.edges, grid, qparams)
    return Reference(bins, grid, qparams, present, points, pointwise(points, grid, qparams))


def _noise(error: Tensor, bins: Filling) -> Tensor:
    """Standard deviation of the difference of two grids' summed squared errors on the values of the even bins.

    Rounding errors spread evenly over a step have mean square 1/12 and variance of squares 1/180, in steps; over
    ``n`` values the sum of two independent ones deviates by ``sqrt(2 n / 180)``, or ``sqrt(8 / 5 / n)`` of the sum.
    """
    even = bins.count * ~bins.peak
    return error @ even * torch.sqrt(1.6 / even.sum().clamp(min=1.6))
