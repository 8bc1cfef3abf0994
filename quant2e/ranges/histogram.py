"""A histogram whose counts are exact whatever the order, the batches and the shards of the data.

Bins are ``2**k`` wide and lie on the grid of multiples of their width: value ``x`` belongs to bin
``trunc(x / 2**k)``. The bin around zero therefore covers ``(-width, width)`` and every other bin one width. When the
range of the data grows, ``k`` grows, and bins ``2i`` and ``2i + 1`` become bin ``i``: no count is ever split or
interpolated, because ``trunc(trunc(y) / 2) == trunc(y / 2)``. (Rounding down would have this property too, but not
for values so small that ``x / width`` underflows to zero.) ``k`` and the first bin are a function of the total
minimum and maximum alone, so two states over the same data are equal bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quant2e.errors import AnnotationError, CalibrationError
from quant2e.ranges import streaming
from quant2e.ranges.minmax import (
    Batch,
    MinMax,
    MinMaxState,
    check_channels,
    check_floating,
    check_layout,
    empty_like,
    look,
    on_host,
    rows_of,
    sentinel_of,
)

_EXACT_BITS = 24
"""Bin numbers stay below ``2**24``, where float32 holds every integer."""

_SMALLEST_EXPONENT = -120
"""Narrowest bin; ``2**120`` is still a float32. All values below one width share the bin of zero."""

_CHUNK = 1 << 16
"""Values binned at a time, so that the temporaries stay in the cache."""


@dataclass(frozen=True)
class Window:
    """The bins in use: ``bins`` bins of width ``2**exponent``, the first one having number ``first``."""

    exponent: int
    first: int
    bins: int

    @property
    def width(self) -> float:
        return math.ldexp(1.0, self.exponent)

    def edges(self) -> Tensor:
        """Float64 ``[bins + 1]``: bin ``i`` of the window covers ``edges[i]`` to ``edges[i + 1]``."""
        number = torch.arange(self.first, self.first + self.bins + 1, dtype=torch.float64)
        return torch.where(number > 0, number, number - 1) * self.width


def _bin_number(x: float, exponent: int) -> int:
    return math.trunc(math.ldexp(x, -exponent))


def window(low: float, high: float, bins: int) -> Window:
    """The narrowest bins with which ``bins`` of them cover ``[low, high]``, bin numbers being exact."""
    largest = max(abs(low), abs(high))
    exponent = max(_SMALLEST_EXPONENT, math.frexp(largest)[1] - _EXACT_BITS) if largest else _SMALLEST_EXPONENT
    if high > low:  # narrower bins cannot do; from here the loop takes two or three turns
        exponent = max(exponent, math.frexp((high - low) / (bins + 1))[1] - 2)
    while _bin_number(high, exponent) - _bin_number(low, exponent) >= bins:
        exponent += 1
    return Window(exponent, _bin_number(low, exponent), bins)


@dataclass(frozen=True)
class HistogramState:
    """``histogram``: int64 ``[bins]`` over ``window(min_val, max_val, bins)``; the rest as in `MinMaxState`.
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
    def window(self) -> Window:
        """The bins that ``histogram``, of a whole tensor, counts; undefined while `empty`."""
        return window(float(self.min_val), float(self.max_val), self.histogram.shape[-1])

    def rows(self) -> list[HistogramState]:
        """The state of each channel or group, as one of a whole tensor. ``counts`` are those of all together."""
        histogram = self.histogram.reshape(-1, self.histogram.shape[-1])
        parts = zip(self.min_val.reshape(-1), self.max_val.reshape(-1), histogram, strict=True)
        return [HistogramState(low, high, self.counts, counts) for low, high, counts in parts]


def _flat(x: Tensor) -> Tensor:
    """The values of ``x`` in any order, as a view when memory holds each of them once."""
    order = sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True)
    return x.permute(order).reshape(-1)


def count(x: Tensor, win: Window) -> Tensor:
    """Int64 ``[bins]``: how many values of ``x``, all of which lie in the window, fall into each bin."""
    flat, inverse = _flat(x), math.ldexp(1.0, -win.exponent)
    histogram = torch.zeros(win.bins, dtype=torch.int64, device=x.device)
    for chunk in flat.split(_CHUNK):
        # Converting to int32 truncates. Products are exact: the factor is a power of two.
        number = (chunk.to(torch.float32) * inverse).to(torch.int32).sub_(win.first)
        histogram += torch.bincount(number, minlength=win.bins)
    return histogram


def widen(histogram: Tensor, old: Window, new: Window) -> Tensor:
    """The counts of ``old`` as counts of ``new``, whose bins are as wide or wider and cover it."""
    if old == new:
        return histogram
    used = torch.nonzero(histogram).flatten()
    # Bin numbers have 24 bits: a larger shift would give 0 as well, but 2**63 is no int64.
    factor = 1 << min(new.exponent - old.exponent, 62)
    number = torch.div(used + old.first, factor, rounding_mode="trunc") - new.first
    return torch.zeros_like(histogram).index_add_(0, number, histogram[used])


@dataclass(frozen=True)
class Histogram:
    """Counts of values in a fixed number of bins, with the exact minimum and maximum.

    Per tensor, per channel or per group, as `MinMax`. `merge` is exact, associative and commutative. Raises
    `AnnotationError` unless ``2 <= bins <= 2**20``.
    """

    bins: int = 2048
    axis: int | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        check_layout(self.axis, self.group_size)
        if not 2 <= self.bins <= 1 << 20:
            raise AnnotationError(f"bins={self.bins}: a histogram has between 2 and {1 << 20} bins")

    @property
    def _whole(self) -> bool:
        return self.axis is None and self.group_size is None

    def init(self, like: Tensor | None = None) -> HistogramState:
        none = empty_like(like, self._whole)
        shape = (self.bins,) if self._whole else (0, self.bins)
        histogram = torch.zeros(shape, dtype=torch.int64, device=none.counts.device)
        return HistogramState(none.min_val, none.max_val, none.counts, histogram)

    def update(self, state: HistogramState, x: Tensor) -> HistogramState:
        check_floating(x)
        if x.numel() == 0:
            return state
        x = x.detach()
        if not self._whole or not on_host(x):
            return self._update_rows(state, x)
        batch = look(x, axis=None)
        low, high = torch.minimum(state.min_val, batch.min_val), torch.maximum(state.max_val, batch.max_val)
        histogram = self._recount(state, batch, x, float(low), float(high))
        return HistogramState(low, high, state.counts + batch.counts, histogram)

    def _update_rows(self, state: HistogramState, x: Tensor) -> HistogramState:
        rows = rows_of(x, self.axis, self.group_size)
        shape = () if self._whole else rows.shape[:-1]
        flat = rows.flatten(0, -2)
        seen = streaming.look(flat, sentinel_of(x.dtype))
        before = state
        if state.min_val.numel() == 0:
            none = torch.full(shape, float("inf"), device=x.device)
            bins = torch.zeros((*shape, self.bins), dtype=torch.int64, device=x.device)
            before = HistogramState(none, -none, state.counts, bins)
        check_channels(before.min_val, seen.low.reshape(shape))
        made = streaming.update(_as_rows(before), flat, seen)
        return _from_rows(made, shape, state.counts + seen.counts)

    def _recount(self, state: HistogramState, batch: Batch, x: Tensor, low: float, high: float) -> Tensor:
        values = x if batch.usable is None else x[batch.usable]
        if values.numel() == 0:
            return state.histogram
        total = window(low, high, self.bins)
        new = count(values, total)
        return new if state.empty else new + widen(state.histogram, state.window, total)

    def merge(self, a: HistogramState, b: HistogramState) -> HistogramState:
        if a.histogram.shape[-1] != b.histogram.shape[-1]:
            raise CalibrationError(
                f"histograms with {a.histogram.shape[-1]} and {b.histogram.shape[-1]} bins cannot be merged; "
                "calibrate every shard with the same number of bins"
            )
        if a.min_val.numel() == 0 or b.min_val.numel() == 0:
            seen = a if b.min_val.numel() == 0 else b
            return HistogramState(seen.min_val, seen.max_val, a.counts + b.counts, seen.histogram)
        if a.min_val.dim() or a.counts.device.type != "cpu":
            check_channels(a.min_val, b.min_val)
            made = streaming.merge(_as_rows(a), _as_rows(b))
            return _from_rows(made, a.min_val.shape, a.counts + b.counts)
        total = MinMax().merge(MinMaxState(a.min_val, a.max_val, a.counts), MinMaxState(b.min_val, b.max_val, b.counts))
        histogram = a.histogram if b.empty else b.histogram
        if not (a.empty or b.empty):
            win = window(float(total.min_val), float(total.max_val), self.bins)
            histogram = widen(a.histogram, a.window, win) + widen(b.histogram, b.window, win)
        return HistogramState(total.min_val, total.max_val, total.counts, histogram)

    def range(self, state: HistogramState) -> tuple[Tensor, Tensor]:
        """The exact extremes. `range_search.search` derives other ranges from the same state."""
        return state.min_val, state.max_val


def _as_rows(state: HistogramState) -> streaming.Rows:
    bins = state.histogram.shape[-1]
    return streaming.Rows(state.min_val.reshape(-1), state.max_val.reshape(-1), state.histogram.reshape(-1, bins))


def _from_rows(rows: streaming.Rows, shape: tuple[int, ...], counts: Tensor) -> HistogramState:
    histogram = rows.histogram.reshape(*shape, rows.histogram.shape[-1])
    return HistogramState(rows.low.reshape(shape), rows.high.reshape(shape), counts, histogram)
