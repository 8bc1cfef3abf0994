"""Tensor encodings: how each observed tensor is quantized, as values that calibration hands to conversion.

`encode` reads one observer, ours or another library's, and returns its encoding, or None when the tensor stays float.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant2e.annotation.granularity import Granularity, PerTensor
from quant2e.annotation.specs import INTEGER_BOUNDS, PER_CHANNEL_SCHEMES
from quant2e.errors import CalibrationError
from quant2e.observers.base import inner_observer

_STORAGE = {torch.quint8: torch.uint8, torch.qint8: torch.int8, torch.qint32: torch.int32}
_WHOLE = PerTensor()
_FLOAT8 = (torch.float8_e5m2, torch.float8_e4m3fn)


@dataclass(frozen=True, kw_only=True)
class PerTensorEncoding:
    """One scale and zero point for the whole tensor: ``x ≈ (q - zero_point) * scale``."""

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class PerChannelEncoding:
    """One scale and zero point per index of ``axis``: 1-D tensors, scale in float, zero point in int64.

    The zero point is float too under ``per_channel_affine_float_qparams``.
    """

    scale: Tensor
    zero_point: Tensor
    axis: int
    quant_min: int
    quant_max: int
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class PerGroupEncoding:
    """One scale and zero point per ``group_size`` neighbours along the last dimension of a matrix.

    ``scale`` (float) and ``zero_point`` (int32: there are many): ``[rows, groups]``.
    """

    scale: Tensor
    zero_point: Tensor
    group_size: int
    quant_min: int
    quant_max: int
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class DynamicEncoding:
    """Scales and zero points found at run time; ``eps`` is the smallest scale.

    ``granularity``: which elements share a scale, one of `granularity.DYNAMIC`.
    """

    symmetric: bool
    eps: float
    quant_min: int
    quant_max: int
    dtype: torch.dtype
    granularity: Granularity = _WHOLE


@dataclass(frozen=True, kw_only=True)
class Float16Encoding:
    """The tensor goes through float16 and back."""


@dataclass(frozen=True, kw_only=True)
class RoundedConstant:
    """A constant that stays float, rounded to multiples of ``scale``: a bias as an int32 accumulator holds it.

    ``scale``: one value, or a 1-D tensor with one per channel of the last (only) dimension.
    """

    scale: Tensor


@dataclass(frozen=True, kw_only=True)
class CustomEncoding:
    """An observer that writes its own nodes, by a method ``convert(model, node)``."""

    observer: Any


Encoding = (
    PerTensorEncoding
    | PerChannelEncoding
    | PerGroupEncoding
    | DynamicEncoding
    | Float16Encoding
    | RoundedConstant
    | CustomEncoding
)


def integer_range(observer: Any) -> tuple[int, int]:
    """The integers that an observer asks for: its own bounds, or those of its dtype."""
    dtype = _STORAGE.get(observer.dtype, observer.dtype)
    low, high = INTEGER_BOUNDS.get(dtype, (0, 0))
    quant_min, quant_max = getattr(observer, "quant_min", None), getattr(observer, "quant_max", None)
    return (low if quant_min is None else int(quant_min)), (high if quant_max is None else int(quant_max))


def saw_no_data(observer: Any) -> bool:
    """Whether an observer that learns its range from data was never given any.

    Ours say so; of others, an empty or infinite range tells.
    """
    sources = getattr(observer, "sources", None)
    if isinstance(sources, list):
        return any(saw_no_data(source) for source in sources)
    for one in (observer, inner_observer(observer)):
        if isinstance(observed := getattr(one, "observed", None), bool):
            return not observed
    observer = inner_observer(observer)
    low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
    if not isinstance(low, Tensor) or not isinstance(high, Tensor):
        return False
    return low.numel() == 0 or bool((torch.isinf(low) & torch.isinf(high) & (low > high)).all())


def encode(observer: Any) -> Encoding | None:
    """The encoding an observer asks for; None when its tensor stays float.

    What was given (`quant2e.observers.given`) is returned as it is. Raises `CalibrationError` when a static observer
    saw no data, or found no usable scale; the caller adds the place.
    """
    if callable(told := getattr(observer, "given_encoding", None)):
        given: Encoding | None = told()
        return given
    if callable(getattr(observer, "convert", None)):
        return CustomEncoding(observer=observer)
    dtype = getattr(observer, "dtype", None)
    if not isinstance(dtype, torch.dtype):
        return None
    dtype = _STORAGE.get(dtype, dtype)
    if dtype == torch.float16:
        return Float16Encoding()
    if dtype == torch.float32 and isinstance(getattr(observer, "sources", None), list):
        return _on_grid(observer)
    if dtype not in INTEGER_BOUNDS and dtype not in _FLOAT8:
        return None
    quant_min, quant_max = integer_range(observer)
    if getattr(observer, "is_dynamic", False):
        return _dynamic(observer, dtype, quant_min, quant_max)
    if not callable(getattr(observer, "calculate_qparams", None)):
        return None
    return _static(observer, dtype, quant_min, quant_max)


def _on_grid(observer: Any) -> RoundedConstant:
    """A float tensor whose scale is derived from those of others."""
    if saw_no_data(observer):
        raise CalibrationError(
            "the tensors its scale is derived from saw no data; run calibration batches that reach them"
        )
    scale = torch.as_tensor(observer.calculate_qparams()[0]).detach().flatten()
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CalibrationError(f"its derived scale is {_extreme(scale)}, which is not a positive, finite number")
    return RoundedConstant(scale=scale.clone())


def _dynamic(observer: Any, dtype: torch.dtype, quant_min: int, quant_max: int) -> DynamicEncoding:
    if dtype not in (torch.int8, torch.uint8):
        raise CalibrationError(
            f"dynamic quantization to {dtype}: the ops that find scales at run time know int8 and uint8"
        )
    qscheme = getattr(observer, "qscheme", None)
    if qscheme in PER_CHANNEL_SCHEMES:
        raise CalibrationError(f"dynamic quantization with {qscheme}: scales found at run time are per tensor")
    eps = getattr(observer, "eps", None)
    return DynamicEncoding(
        symmetric=qscheme == torch.per_tensor_symmetric,
        eps=float(torch.finfo(torch.float32).eps if eps is None else eps),
        quant_min=quant_min,
        quant_max=quant_max,
        dtype=dtype,
        granularity=getattr(observer, "granularity", PerTensor()),
    )


def _static(
    observer: Any, dtype: torch.dtype, quant_min: int, quant_max: int
) -> PerTensorEncoding | PerChannelEncoding | PerGroupEncoding:
    # An observer that saw NaN only has words of its own for it.
    if saw_no_data(observer) and not getattr(inner_observer(observer), "total", 0):
        raise CalibrationError("it saw no data, so its range is unknown; run calibration batches that reach it")
    scale, zero_point = observer.calculate_qparams()
    scale = torch.as_tensor(scale).detach()
    zero_point = torch.as_tensor(zero_point).detach()
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise CalibrationError(
            f"its range gives a scale of {_extreme(scale)}, which is not a positive, finite number; "
            "look for NaN or infinity in the calibration data or the weights"
        )
    if group_size := getattr(inner_observer(observer), "group_size", None):
        return PerGroupEncoding(
            scale=scale.clone(),
            zero_point=zero_point.to(torch.int32, copy=True),
            group_size=int(group_size),
            quant_min=quant_min,
            quant_max=quant_max,
            dtype=dtype,
        )
    if getattr(observer, "qscheme", None) in PER_CHANNEL_SCHEMES:
        return PerChannelEncoding(
            scale=scale.flatten().clone(),
            zero_point=zero_point.flatten().clone()
            if observer.qscheme == torch.per_channel_affine_float_qparams
            else zero_point.flatten().to(torch.int64, copy=True),
            axis=int(observer.ch_axis),
            quant_min=quant_min,
            quant_max=quant_max,
            dtype=dtype,
        )
    if scale.numel() != 1 or zero_point.numel() != 1:
        raise CalibrationError(f"its scheme is per tensor, but its observer returned {scale.numel()} scales")
    return PerTensorEncoding(
        scale=float(scale), zero_point=int(zero_point), quant_min=quant_min, quant_max=quant_max, dtype=dtype
    )


def _extreme(scale: Tensor) -> float:
    bad = scale[~(torch.isfinite(scale) & (scale > 0))]
    return float(bad.flatten()[0]) if bad.numel() else math.nan
