"""Quantization parameters: from a range of real numbers to a scale and a zero point, and the arithmetic with them.

A quantized tensor stores integers ``q``; the real number is ``(q - zero_point) * scale``. The formulas are those of
Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
(arXiv:1712.05877, section 2.1 and equation 12), evaluated in float32 in the order PT2E's observers use, so that the
numbers agree with theirs bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quant2e.annotation.specs import INTEGER_BOUNDS
from quant2e.errors import AnnotationError

FLOAT32_EPS = torch.finfo(torch.float32).eps
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""The smallest normal float32: kernels flush denormal scales, or refuse them."""

SYMMETRIC_SCHEMES = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
AFFINE_SCHEMES = (torch.per_tensor_affine, torch.per_channel_affine)
FLOAT_QPARAMS = torch.per_channel_affine_float_qparams

_PLAIN_DTYPE = {
    torch.qint8: torch.int8,
    torch.quint8: torch.uint8,
    torch.qint32: torch.int32,
    torch.quint4x2: torch.uint8,
}
_SYMMETRIC_MIDDLE = {torch.uint8: 2**7, torch.uint16: 2**15}
"""Zero point of symmetric unsigned numbers that use their whole storage range."""


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """The storage dtype behind one of torch's quantized dtypes (``qint8`` is stored as ``int8``);
    others as they are.
    """
    return _PLAIN_DTYPE.get(dtype, dtype)


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """The integers that a tensor is rounded to, and where zero lies among them.

    - ``dtype`` is one of `INTEGER_BOUNDS`; ``quant_min <= 0 <= quant_max``, ``quant_min < quant_max``, both within it.
    - ``qscheme`` says symmetric or affine; per tensor or per channel makes no difference to the formulas.
    - ``eps``: no scale is smaller than this; finite and not negative.
    - ``custom_range``: the bounds were given by the author of a spec. A symmetric uint8 grid then has its zero point
      at ``(quant_min + quant_max) // 2`` instead of at 128, as in PT2E.
    - ``power_of_two``: every scale is rounded up to a power of two, for hardware that requantizes by shifts.
    - ``from_amax``: the scale is ``max|x| / quant_max`` and the zero point 0, as in TensorRT (H. Wu et al.,
      arXiv:2004.09602, equations 8 and 9), also where the bounds are not symmetric: -128..127, or 0..255 for what has
      no negative values. Not with float zero points.

    Raises `AnnotationError` when one of these does not hold.
    """

    dtype: torch.dtype
    quant_min: int
    quant_max: int
    qscheme: torch.qscheme = torch.per_tensor_affine
    eps: float = FLOAT32_EPS
    custom_range: bool = False
    power_of_two: bool = False
    from_amax: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in INTEGER_BOUNDS:
            known = ", ".join(str(d) for d in INTEGER_BOUNDS)
            raise AnnotationError(f"dtype={self.dtype}: an observed range becomes integers of one of {known}")
        if self.qscheme not in (*SYMMETRIC_SCHEMES, *AFFINE_SCHEMES, FLOAT_QPARAMS):
            raise AnnotationError(f"qscheme={self.qscheme}: use one of the per_tensor or per_channel schemes of torch")
        low, high = INTEGER_BOUNDS[self.dtype]
        if not low <= self.quant_min < self.quant_max <= high:
            raise AnnotationError(
                f"quant_min={self.quant_min}, quant_max={self.quant_max}: "
                f"need {low} <= quant_min < quant_max <= {high} for {self.dtype}"
            )
        if not self.quant_min <= 0 <= self.quant_max:
            raise AnnotationError(
                f"the range [{self.quant_min}, {self.quant_max}] must include 0; use zero points to shift real values"
            )
        if self.power_of_two and self.qscheme == FLOAT_QPARAMS:
            raise AnnotationError(f"power_of_two with {self.qscheme}: its zero points would lose their exact place")
        if self.from_amax and (self.qscheme == FLOAT_QPARAMS or self.quant_max < 1):
            raise AnnotationError(
                f"from_amax with {self.qscheme} and quant_max={self.quant_max}: it needs integer zero points, and "
                "positive integers"
            )
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise AnnotationError(f"eps={self.eps}: the smallest scale is a finite number, 0 or larger")

    @property
    def symmetric(self) -> bool:
        """Whether zero lies in the middle."""
        return self.qscheme in SYMMETRIC_SCHEMES

    def qparams(self, min_val: Tensor, max_val: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each range ``[min_val, max_val]``, extended to include zero.

        ``min_val``, ``max_val``: same shape, finite, of any floating dtype (computed in float32).
        Returns float32 scales (finite, normal, at least ``eps``) and int64 zero points within the grid, of that shape;
        ``[1]`` for a scalar. For `per_channel_affine_float_qparams` the range is taken as it is and zero points are
        float32. Where PT2E's int32 zero point would overflow (grids of more than 2**31 steps) ours is the exact one.
        """
        low, high = torch.atleast_1d(min_val).to(torch.float32), torch.atleast_1d(max_val).to(torch.float32)
        steps = float(self.quant_max - self.quant_min)
        if self.qscheme == FLOAT_QPARAMS:
            scale = _finite((high - low) / steps, low, high, steps)
            scale = torch.where(scale > max(self.eps, SMALLEST_SCALE), scale, torch.ones_like(scale))
            return scale, -1 * low / scale
        low, high = torch.clamp(low, max=0.0), torch.clamp(high, min=0.0)
        if self.from_amax:
            scale = self._at_least_eps(torch.maximum(-low, high) / float(self.quant_max))
            return scale, torch.zeros_like(scale, dtype=torch.int64)
        if self.symmetric:
            scale = self._at_least_eps(torch.maximum(-low, high) / (steps / 2))
            return scale, torch.full_like(scale, self._symmetric_zero_point(), dtype=torch.int64)
        scale = self._at_least_eps(_finite((high - low) / steps, low, high, steps))
        zero_point = self.quant_min - torch.round(low / scale).to(torch.int64)
        return scale, torch.clamp(zero_point, self.quant_min, self.quant_max)

    def _at_least_eps(self, scale: Tensor) -> Tensor:
        # As a tensor, so that the comparison happens in float32 as in PT2E.
        smallest = torch.tensor(max(self.eps, SMALLEST_SCALE), dtype=torch.float32, device=scale.device)
        scale = torch.maximum(scale, smallest)
        return _next_power_of_two(scale) if self.power_of_two else scale

    def _symmetric_zero_point(self) -> int:
        middle = _SYMMETRIC_MIDDLE.get(self.dtype, 0)
        custom = self.custom_range and self.dtype == torch.uint8
        if custom or not self.quant_min <= middle <= self.quant_max:
            return (self.quant_min + self.quant_max) // 2
        return middle


def _next_power_of_two(scale: Tensor) -> Tensor:
    """The smallest power of two that is not below ``scale``: up, so that the range still fits."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))


def _finite(scale: Tensor, low: Tensor, high: Tensor, steps: float) -> Tensor:
    """``scale``, recomputed in float64 where ``high - low`` does not fit float32."""
    exact = (high.to(torch.float64) - low.to(torch.float64)) / steps
    return torch.where(torch.isfinite(scale), scale, exact.to(torch.float32))


def _as_float32(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"only floating-point tensors are quantized, not {x.dtype}")
    return x.to(torch.float32)


def _along(values: Tensor, axis: int, dim: int) -> Tensor:
    """``values`` (one per channel) shaped to broadcast along ``axis`` of a tensor with ``dim`` dimensions."""
    shape = [1] * dim
    shape[axis] = -1
    return values.view(shape)


def quantize_per_tensor(
    x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    """``clamp(round(x / scale) + zero_point)``, ties to even; floating ``x`` of any shape, result of ``dtype``."""
    q = _as_float32(x) * (1.0 / scale)
    return q.round_().add_(zero_point).clamp_(quant_min, quant_max).to(dtype)


def dequantize_per_tensor(q: Tensor, scale: float, zero_point: int, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """``(q - zero_point) * scale`` in ``out_dtype``, for integers ``q`` of any shape."""
    return (q.to(out_dtype) - zero_point) * scale


def fake_quantize_per_tensor(
    x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    """What is left of ``x`` after quantizing and dequantizing it; float32, shape of ``x``."""
    q = quantize_per_tensor(x, scale, zero_point, quant_min, quant_max, dtype)
    return dequantize_per_tensor(q, scale, zero_point)


def quantize_per_channel(
    x: Tensor, scales: Tensor, zero_points: Tensor, axis: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    """As `quantize_per_tensor`, with ``scales`` and ``zero_points`` of shape ``[x.shape[axis]]``."""
    q = _as_float32(x) * _along(1.0 / scales, axis, x.dim())
    return q.round_().add_(_along(zero_points, axis, x.dim())).clamp_(quant_min, quant_max).to(dtype)


def dequantize_per_channel(
    q: Tensor, scales: Tensor, zero_points: Tensor | None, axis: int, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """As `dequantize_per_tensor`, with one scale and zero point per channel; no zero points means all are 0."""
    if zero_points is not None:
        q = q.to(zero_points.dtype) - _along(zero_points, axis, q.dim())
    return (q.to(scales.dtype) * _along(scales, axis, q.dim())).to(out_dtype)
