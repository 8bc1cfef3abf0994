"""Histograms with exact counts, whatever the order, the batches and the shards of the data.

Bins are ``2**k`` wide and lie on the grid of multiples of their width: value ``x`` belongs to bin
``trunc(x / 2**k)``. The bin around zero therefore covers ``(-width, width)`` and every other bin one width. When the
range of the data grows, ``k`` grows, and bins ``2i`` and ``2i + 1`` become bin ``i``: no count is ever split or
interpolated, because ``trunc(trunc(y) / 2) == trunc(y / 2)``. (Rounding down would have this property too, but not
for values so small that ``x / width`` underflows to zero.) ``k`` and the first bin are a function of the total
minimum and maximum alone, so two states over the same data are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quant2e.errors import AnnotationError, CalibrationError
from quant2e.ranges.minmax import (
    by_row,
    check_channels,
    check_floating,
    check_layout,
    look,
    on_host,
    state_without_data,
    without_zeros,
)

_EXACT_BITS = 24
"""Bin numbers stay below ``2**24``, where float32 holds every integer."""

_SMALLEST_EXPONENT = -120
"""Narrowest bin; ``2**120`` is still a float32. All values below one width share the bin of zero."""

_DOUBLINGS = 4
"""Doublings of the width, from the first guess, after which every range fits: three, and one to spare."""

_CHUNK = 1 << 16
"""Values binned at a time, so that the temporaries stay in the cache."""


def _power(exponent: Tensor) -> Tensor:
    """``2.0**exponent`` in float64, exactly, from its bits; int64 within the normal exponents."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _number(x: Tensor, exponent: Tensor) -> Tensor:
    return torch.trunc(x * _power(-exponent)).to(torch.int64)


@dataclass(frozen=True)
class Windows:
    """The bins in use, for each row: of width ``2**exponent``, the first one having number ``first``; int64 ``[R]``."""

    exponent: Tensor
    first: Tensor

    @property
    def width(self) -> Tensor:
        """Float64 ``[R]``."""
        return _power(self.exponent)

    def edges(self, index: Tensor) -> Tensor:
        """Where bins begin, float64 ``[R, n]``; ``index``: int64, which of the bins in use, ``[n]`` or ``[R, n]``."""
        number = (self.first.unsqueeze(1) + index).to(torch.float64)
        return torch.where(number > 0, number, number - 1) * self.width.unsqueeze(1)


def windows(low: Tensor, high: Tensor, bins: int) -> Windows:
    """The narrowest bins with which ``bins`` of them cover ``[low, high]``, row by row, bin numbers being exact.

    ``low``, ``high``: float32 ``[R]``. Rows without values (``low > high``) get a window around zero.
    """
    none = low > high
    a = torch.where(none, 0.0, low).to(torch.float64)
    b = torch.where(none, 0.0, high).to(torch.float64)
    largest = torch.maximum(a.abs(), b.abs())
    exact = torch.frexp(largest).exponent.to(torch.int64) - _EXACT_BITS
    exponent = torch.where(largest > 0, exact, _SMALLEST_EXPONENT).clamp(min=_SMALLEST_EXPONENT)
    wide = torch.frexp((b - a) / (bins + 1)).exponent.to(torch.int64) - 2  # narrower bins cannot do
    exponent = torch.where(b > a, torch.maximum(exponent, wide), exponent)
    for _ in range(_DOUBLINGS):
        exponent = exponent + (_number(b, exponent) - _number(a, exponent) >= bins)
    return Windows(exponent, _number(a, exponent))


@dataclass(frozen=True)
class HistogramState:
    """``histogram``: int64 ``[bins]`` over the `windows` of ``min_val`` and ``max_val``; the rest as in `MinMaxState`.

    Per channel or group: ``[*channels, bins]``, each row with the window of its own range.
    """

    min_val: Tensor
    max_val: Tensor
    counts: Tensor
    histogram: Tensor

    @property
    def empty(self) -> bool:
        """No value has been counted."""
        return bool((self.min_val > self.max_val).all())

    @property
    def windows(self) -> Windows:
        """The bins that each row of ``histogram`` counts; those of a row without values mean nothing."""
        return windows(self.min_val.reshape(-1), self.max_val.reshape(-1), self.histogram.shape[-1])

    def rows(self) -> list[HistogramState]:
        """The state of each channel or group, as one of a whole tensor. ``counts`` are those of all together."""
        histogram = self.histogram.reshape(-1, self.histogram.shape[-1])
        parts = zip(self.min_val.reshape(-1), self.max_val.reshape(-1), histogram, strict=True)
        return [HistogramState(low, high, self.counts, counts) for low, high, counts in parts]


def count(rows: Tensor, usable: Tensor | None, win: Windows, bins: int) -> Tensor:
    """Int64 ``[R, bins]``: how many usable values of each row, ``[R, N]``, fall into each of its bins."""
    # In one dimension: along the second of two, torch counts several times slower.
    histogram = torch.zeros(rows.shape[0] * bins, dtype=torch.int64, device=rows.device)
    begin = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1) * bins
    inverse, first = _power(-win.exponent).to(torch.float32).unsqueeze(1), win.first.unsqueeze(1)
    for chunk, kept in _chunks(rows, usable):
        values = (chunk if kept is None else torch.where(kept, chunk, 0.0)).to(torch.float32)
        # Converting to int32 truncates. Products are exact: the factor is a power of two.
        number = ((values * inverse).to(torch.int32).to(torch.int64) - first).clamp_(0, bins - 1)
        each = torch.ones_like(number) if kept is None else kept.to(torch.int64)
        histogram.scatter_add_(0, number.add_(begin).flatten(), each.flatten())
    return histogram.reshape(-1, bins)


def _chunks(rows: Tensor, usable: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Columns of both: all at once where a device or a compiled graph sees to it, few enough for the cache else."""
    size = max(1, _CHUNK // rows.shape[0])
    if not on_host(rows) or rows.shape[1] <= size:
        yield rows, usable
        return
    parts = rows.split(size, 1)
    yield from zip(parts, [None] * len(parts) if usable is None else usable.split(size, 1), strict=True)


def widen(histogram: Tensor, old: Windows, new: Windows) -> Tensor:
    """The counts of ``old``, ``[R, bins]``, as counts of ``new``, whose bins are as wide or wider and cover it."""
    bins = histogram.shape[1]
    # Bin numbers have 24 bits: a larger shift would give 0 as well, but 2**63 is no int64.
    factor = torch.ones_like(old.exponent) << (new.exponent - old.exponent).clamp(0, 62)
    number = torch.arange(bins, device=histogram.device) + old.first.unsqueeze(1)
    moved = torch.div(number, factor.unsqueeze(1), rounding_mode="trunc") - new.first.unsqueeze(1)
    # Bins outside the new window are empty, so it does not matter where they are added.
    return torch.zeros_like(histogram).scatter_add(1, moved.clamp(0, bins - 1), histogram)


@dataclass(frozen=True)
class Histogram:
    """Counts of values in a fixed number of bins, with the exact minimum and maximum.

    Per tensor, per channel or per group, as `MinMax`. `merge` is exact, associative and commutative. ``skip_zeros``:
    zeros are not counted at all, as if they were not there. Raises `AnnotationError` unless ``2 <= bins <= 2**20``.
    """

    bins: int = 2048
    axis: int | None = None
    group_size: int | None = None
    skip_zeros: bool = False

    def __post_init__(self) -> None:
        check_layout(self.axis, self.group_size)
        if not 2 <= self.bins <= 1 << 20:
            raise AnnotationError(f"bins={self.bins}: a histogram has between 2 and {1 << 20} bins")

    def __repr__(self) -> str:
        # Statistics are bound to this text: files written before zeros could be skipped hold the shorter one.
        skipped = ", skip_zeros=True" if self.skip_zeros else ""
        return f"Histogram(bins={self.bins}, axis={self.axis}, group_size={self.group_size}{skipped})"

    @property
    def _whole(self) -> bool:
        return self.axis is None and self.group_size is None

    def init(self, like: Tensor | None = None) -> HistogramState:
        none = state_without_data(like, self._whole)
        shape = (self.bins,) if self._whole else (0, self.bins)
        histogram = torch.zeros(shape, dtype=torch.int64, device=none.counts.device)
        return HistogramState(none.min_val, none.max_val, none.counts, histogram)

    def update(self, state: HistogramState, x: Tensor) -> HistogramState:
        check_floating(x)
        if x.numel() == 0:
            return state
        rows, shape = by_row(x.detach(), self.axis, self.group_size)
        seen = without_zeros(rows) if self.skip_zeros else look(rows)
        if state.min_val.numel() == 0:
            none = torch.full(shape, float("inf"), device=x.device)
            bins = torch.zeros((*shape, self.bins), dtype=torch.int64, device=x.device)
            state = HistogramState(none, -none, state.counts, bins)
        low, high = seen.min_val.reshape(shape), seen.max_val.reshape(shape)
        check_channels(state.min_val, low)
        low, high = torch.minimum(state.min_val, low), torch.maximum(state.max_val, high)
        win = windows(low.reshape(-1), high.reshape(-1), self.bins)
        histogram = _widened(state, win) + count(rows, seen.usable, win, self.bins)
        return HistogramState(low, high, state.counts + seen.counts, histogram.reshape(*shape, self.bins))

    def merge(self, a: HistogramState, b: HistogramState) -> HistogramState:
        if a.histogram.shape[-1] != b.histogram.shape[-1]:
            raise CalibrationError(
                f"histograms with {a.histogram.shape[-1]} and {b.histogram.shape[-1]} bins cannot be merged; "
                "calibrate every shard with the same number of bins"
            )
        if a.min_val.numel() == 0 or b.min_val.numel() == 0:
            seen = a if b.min_val.numel() == 0 else b
            return HistogramState(seen.min_val, seen.max_val, a.counts + b.counts, seen.histogram)
        check_channels(a.min_val, b.min_val)
        low, high = torch.minimum(a.min_val, b.min_val), torch.maximum(a.max_val, b.max_val)
        win = windows(low.reshape(-1), high.reshape(-1), a.histogram.shape[-1])
        histogram = (_widened(a, win) + _widened(b, win)).reshape(a.histogram.shape)
        return HistogramState(low, high, a.counts + b.counts, histogram)

    def range(self, state: HistogramState) -> tuple[Tensor, Tensor]:
        """The exact extremes. `quant2e.ranges.search` derives other ranges from the same state."""
        return state.min_val, state.max_val


def _widened(state: HistogramState, win: Windows) -> Tensor:
    return widen(state.histogram.reshape(-1, state.histogram.shape[-1]), state.windows, win)
