"""Measuring observers: thin modules over the estimators of `ranges.minmax` and `ranges.histogram`.

Names and arguments are those of PT2E; torch's quantized dtypes (``quint8``) are read as the plain dtype that stores
them (``uint8``).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Unpack

import torch
from torch import Tensor, nn

from quant2e.annotation.specs import PER_CHANNEL_SCHEMES
from quant2e.errors import AnnotationError, CalibrationError
from quant2e.observers.base import ObserverBase, ObserverFactory
from quant2e.observers.placeholder import FixedQParamsObserver, NoopObserver, PlaceholderObserver, RecordingObserver
from quant2e.observers.uniform import ObserverOptions, UniformQuantizationObserverBase, number_format_of
from quant2e.ranges.histogram import Histogram, HistogramState
from quant2e.ranges.minmax import MinMax, MinMaxState, MovingAverage
from quant2e.ranges.qparams import FLOAT_QPARAMS, NumberFormat
from quant2e.ranges.search import check_method, search

__all__ = [
    "FixedQParamsObserver",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "NoopObserver",
    "ObserverBase",
    "ObserverFactory",
    "PerChannelHistogramObserver",
    "PerChannelMinMaxObserver",
    "PlaceholderObserver",
    "RecordingObserver",
    "UniformQuantizationObserverBase",
    "default_dynamic_quant_observer",
    "default_histogram_observer",
    "default_observer",
    "default_per_channel_weight_observer",
    "default_placeholder_observer",
    "default_weight_observer",
]

_PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)
_PER_CHANNEL = (*PER_CHANNEL_SCHEMES, FLOAT_QPARAMS)


class MinMaxObserver(UniformQuantizationObserverBase[MinMaxState]):
    """The smallest and largest value of all data, per tensor. For the arguments see `ObserverOptions`."""

    def __init__(self, **options: Unpack[ObserverOptions]) -> None:
        grid = number_format_of(options, _PER_TENSOR, torch.per_tensor_affine)
        super().__init__(MinMax(), MinMaxState, grid, options)


def _check_averaging(averaging_constant: float) -> None:
    if not 0 < averaging_constant <= 1:
        raise AnnotationError(f"averaging_constant={averaging_constant}: above 0, at most 1 (the last batch only)")


class MovingAverageMinMaxObserver(UniformQuantizationObserverBase[MinMaxState]):
    """The moving average of each batch's smallest and largest value, per tensor; see `ranges.MovingAverage`.

    Dynamic quantization needs ``averaging_constant=1``: only the present batch counts.
    """

    def __init__(self, averaging_constant: float = 0.01, **options: Unpack[ObserverOptions]) -> None:
        _check_averaging(averaging_constant)
        if options.get("is_dynamic") and averaging_constant != 1:
            raise AnnotationError(
                f"is_dynamic with averaging_constant={averaging_constant}: dynamic quantization has no history; use 1"
            )
        grid = number_format_of(options, _PER_TENSOR, torch.per_tensor_affine)
        super().__init__(MovingAverage(averaging_constant), MinMaxState, grid, options)
        self.averaging_constant = averaging_constant


def _channel_axis(options: ObserverOptions) -> int:
    axis = options.get("ch_axis")
    if axis is not None and axis < 0:
        raise AnnotationError(f"ch_axis={axis}: count the channel axis from the front, starting at 0")
    if options.get("is_dynamic"):
        raise AnnotationError("per-channel dynamic quantization does not exist; use a per-tensor PlaceholderObserver")
    return axis or 0


class PerChannelMinMaxObserver(UniformQuantizationObserverBase[MinMaxState]):
    """The smallest and largest value of each slice along ``ch_axis`` (0). For the arguments see `ObserverOptions`."""

    ch_axis: int

    def __init__(self, **options: Unpack[ObserverOptions]) -> None:
        axis = _channel_axis(options)
        grid = number_format_of(options, _PER_CHANNEL, torch.per_channel_affine)
        super().__init__(MinMax(axis), MinMaxState, grid, options)
        self.ch_axis = axis


class MovingAveragePerChannelMinMaxObserver(UniformQuantizationObserverBase[MinMaxState]):
    """The moving average of each batch's smallest and largest value, for each slice along ``ch_axis`` (0)."""

    ch_axis: int

    def __init__(self, averaging_constant: float = 0.01, **options: Unpack[ObserverOptions]) -> None:
        _check_averaging(averaging_constant)
        axis = _channel_axis(options)
        grid = number_format_of(options, _PER_CHANNEL, torch.per_channel_affine)
        super().__init__(MovingAverage(averaging_constant, axis), MinMaxState, grid, options)
        self.ch_axis = axis
        self.averaging_constant = averaging_constant


class HistogramObserver(UniformQuantizationObserverBase[HistogramState]):
    """A histogram of all data, per tensor, and the range that ``method`` derives from it (see `quant2e.ranges.search`).

    ``method``: "mse", "percentile" (of ``|x|``), "entropy" or "minmax". ``method`` and ``percentile`` are plain
    attributes: change them after calibration to derive other parameters from the same data. ``skip_zeros``: zeros are
    not counted.
    """

    histogram: Tensor

    def __init__(
        self,
        bins: int = 2048,
        *,
        method: str = "mse",
        percentile: float = 99.99,
        skip_zeros: bool = False,
        **options: Unpack[ObserverOptions],
    ) -> None:
        check_method(method, percentile)
        if options.get("is_dynamic"):
            raise AnnotationError(
                "a histogram needs calibration data: use PlaceholderObserver for dynamic quantization"
            )
        grid = number_format_of(options, _PER_TENSOR, torch.per_tensor_affine)
        super().__init__(Histogram(bins, skip_zeros=skip_zeros), HistogramState, grid, options)
        self.bins = bins
        self.method = method
        self.percentile = percentile

    def _range(self) -> tuple[Tensor, Tensor]:
        return search(self._live_state(), self.grid, self.method, self.percentile)


def searchable(modules: Iterable[nn.Module]) -> list[tuple[HistogramState, NumberFormat]]:
    """The counts and integers of every histogram observer of a whole tensor whose range `mse_ranges` finds."""
    found = []
    for observer in modules:
        if not isinstance(observer, HistogramObserver) or observer.method != "mse":
            continue
        if observer.observed and not observer.nan_count and not observer.posinf_count:
            # Whose integers cannot be known, because of another tensor's data, is left to whoever can name that tensor.
            with suppress(CalibrationError):
                found.append((observer._live_state(), observer.grid))
    return found


class PerChannelHistogramObserver(UniformQuantizationObserverBase[HistogramState]):
    """A histogram of each slice along ``ch_axis`` (0), and the range that ``method`` derives from each.

    For the arguments see `HistogramObserver`.
    """

    histogram: Tensor
    ch_axis: int

    def __init__(
        self,
        bins: int = 2048,
        *,
        method: str = "mse",
        percentile: float = 99.99,
        skip_zeros: bool = False,
        **options: Unpack[ObserverOptions],
    ) -> None:
        check_method(method, percentile)
        axis = _channel_axis(options)
        grid = number_format_of(options, PER_CHANNEL_SCHEMES, torch.per_channel_affine)
        super().__init__(Histogram(bins, axis, skip_zeros=skip_zeros), HistogramState, grid, options)
        self.ch_axis = axis
        self.bins = bins
        self.method = method
        self.percentile = percentile

    def _range(self) -> tuple[Tensor, Tensor]:
        return search(self._live_state(), self.grid, self.method, self.percentile)


default_observer = MinMaxObserver.with_args(quant_min=0, quant_max=127)
"""Activations in 7 bits, which no x86 kernel saturates on."""

default_histogram_observer = HistogramObserver.with_args(quant_min=0, quant_max=127)
"""As `default_observer`, with a histogram."""

default_weight_observer = MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
default_per_channel_weight_observer = PerChannelMinMaxObserver.with_args(
    dtype=torch.qint8, qscheme=torch.per_channel_symmetric
)
default_dynamic_quant_observer = PlaceholderObserver.with_args(
    dtype=torch.quint8, quant_min=0, quant_max=255, is_dynamic=True
)
default_placeholder_observer = PlaceholderObserver
