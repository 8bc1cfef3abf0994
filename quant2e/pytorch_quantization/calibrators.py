"""Calibrators: from all tensors that were shown to a largest magnitude, by several methods from one collection.

They are the estimators of `quant2e.ranges` under the names of NVIDIA's pytorch-quantization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from quant2e.errors import AnnotationError, CalibrationError
from quant2e.pytorch_quantization.tensor_quant import integer_bounds
from quant2e.ranges.histogram import Histogram
from quant2e.ranges.minmax import MinMax
from quant2e.ranges.qparams import NumberFormat
from quant2e.ranges.search import search

AmaxMethod = Literal["max", "entropy", "percentile", "mse"]
"""How the largest magnitude is chosen: the extreme, or from a histogram (see `quant2e.ranges.search`)."""

_METHODS = {"max": "minmax", "entropy": "entropy", "percentile": "percentile", "mse": "mse"}


def axes_of(axis: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """The axes that keep their own range, as a tuple; None for a whole tensor. Raises `AnnotationError`."""
    if axis is None:
        return None
    found = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if not found or len(set(found)) != len(found) or not all(type(each) is int for each in found):
        raise AnnotationError(f"axis={axis!r}: a number, several different ones, or None for a whole tensor")
    return found


def kept_axes(shape: Sequence[int], axis: tuple[int, ...] | None) -> tuple[int, ...]:
    """``axis`` counted from the front in a tensor of that shape, in order. Raises `AnnotationError` for one without."""
    wrong = [each for each in axis or () if not -len(shape) <= each < len(shape)]
    kept = sorted({each % len(shape) for each in axis or ()}) if not wrong else []
    if wrong or len(kept) != len(axis or ()):
        raise AnnotationError(f"axis={axis}: not {len(axis or ())} different axes of a tensor of shape {list(shape)}")
    return tuple(kept)


def channel_rows(x: Tensor, kept: Sequence[int]) -> Tensor:
    """``x`` as ``[channels, values]``, a channel for each index along the axes that are kept."""
    rest = [each for each in range(x.dim()) if each not in kept]
    channels = math.prod(x.shape[each] for each in kept)
    return x.detach().permute(*kept, *rest).reshape(channels, -1)


class _Calibrator:
    """What both calibrators do: an estimator, its state, and the shape of the result."""

    def __init__(
        self, estimator: Any, num_bits: int, axis: int | Sequence[int] | None, unsigned: bool, narrow_range: bool
    ) -> None:
        low, high = integer_bounds(num_bits, unsigned, narrow_range)
        self.num_bits, self.axis, self.unsigned = num_bits, axes_of(axis), unsigned
        self._grid = NumberFormat(
            dtype=torch.int32,
            quant_min=low,
            quant_max=high,
            qscheme=torch.per_channel_affine if unsigned else torch.per_channel_symmetric,
            from_amax=True,
        )
        self._estimator = estimator
        self._state = estimator.init()
        self._shape: tuple[int, ...] | None = None

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Take in the values of ``x``, floats of any shape whose kept axes have the sizes that they had before.

        Raises `CalibrationError` for another size, and for NaN and infinite values, and `AnnotationError` for an axis
        that ``x`` does not have.
        """
        kept = kept_axes(x.shape, self.axis)
        shape = tuple(size if each in kept else 1 for each, size in enumerate(x.shape)) if self.axis is not None else ()
        if self._shape not in (None, shape):
            raise CalibrationError(f"amax has the shape {list(self._shape or ())}, and this tensor gives {list(shape)}")
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError("the tensor holds NaN or infinity: fix the data, or leave it out")
        self._state = self._estimator.update(self._state, channel_rows(x, kept))
        self._shape = shape

    def reset(self) -> None:
        """Forget all data."""
        self._state, self._shape = self._estimator.init(), None

    def _amax(self, low: Tensor, high: Tensor) -> Tensor:
        if self._shape is None or bool((self._state.min_val > self._state.max_val).any()):
            raise CalibrationError("amax is not known: nothing was collected (or zeros only, and they are skipped)")
        if self.unsigned and float(self._state.min_val.min()) < 0:
            raise CalibrationError(
                f"unsigned integers for values from {float(self._state.min_val.min()):g} on: use signed ones"
            )
        return torch.maximum(-low, high).reshape(self._shape)


class MaxCalibrator(_Calibrator):
    """The largest magnitude of all tensors, of each index along ``axis`` (one or several), or of everything.

    Raises `AnnotationError` for bits or axes that cannot be.
    """

    def __init__(
        self,
        num_bits: int = 8,
        axis: int | Sequence[int] | None = None,
        unsigned: bool = False,
        narrow_range: bool = True,
    ) -> None:
        super().__init__(MinMax(axis=0), num_bits, axis, unsigned, narrow_range)

    def compute_amax(self) -> Tensor:
        """Float32; a scalar, or with ``axis`` of the rank of the tensors, 1 along the other axes.

        Raises `CalibrationError` when nothing was collected, or negative values for unsigned integers.
        """
        return self._amax(self._state.min_val, self._state.max_val)


class HistogramCalibrator(_Calibrator):
    """A histogram of ``num_bins`` bins, from which `compute_amax` derives the magnitude by any method, again and again.

    ``skip_zeros``: zeros are not counted. With ``axis``, a histogram of each index along it. Counts are exact in any
    order (see `quant2e.ranges.histogram`). Raises `AnnotationError` for bits, bins or axes that cannot be.
    """

    def __init__(
        self,
        num_bits: int = 8,
        axis: int | Sequence[int] | None = None,
        unsigned: bool = False,
        num_bins: int = 2048,
        skip_zeros: bool = False,
        narrow_range: bool = True,
    ) -> None:
        estimator = Histogram(num_bins, axis=0, skip_zeros=skip_zeros)
        super().__init__(estimator, num_bits, axis, unsigned, narrow_range)

    def compute_amax(self, method: AmaxMethod = "entropy", *, percentile: float = 99.99) -> Tensor:
        """As `MaxCalibrator.compute_amax`, by ``method``; ``percentile``, in percent, is for that method only.

        Raises `AnnotationError` for another method or percentage.
        """
        if method not in _METHODS:
            raise AnnotationError(f"method={method!r}: choose one of {', '.join(_METHODS)}")
        self._amax(self._state.min_val, self._state.max_val)  # says what is missing
        low, high = search(self._state, self._grid, _METHODS[method], percentile)
        return self._amax(low, high)
