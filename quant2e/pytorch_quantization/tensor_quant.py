"""Quantization by the largest magnitude, with its straight-through gradient: `tensor_quant`, `fake_tensor_quant`.

    q = clamp(round(x · s), low, high),  s = high / amax         high = 2**(bits - 1) - 1, or 2**bits - 1 if unsigned
    dy/dx = 1 where |x| <= amax, 0 elsewhere                     low = -high, -high - 1 or 0

Names, arguments and results are those of NVIDIA's pytorch-quantization. H. Wu et al., "Integer Quantization for Deep
Learning Inference: Principles and Empirical Evaluation", arXiv:2004.09602, section 3.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant2e.errors import AnnotationError, CalibrationError

SMALLEST_AMAX = 2.0**-24
"""The smallest number of float16: what has no larger magnitude becomes 0."""

MOST_BITS = 24
"""Float32 holds every integer of so many bits."""


def integer_bounds(num_bits: Any, unsigned: bool, narrow_range: bool) -> tuple[int, int]:
    """The smallest and the largest integer. Raises `AnnotationError` for a number of bits that cannot be."""
    if isinstance(num_bits, bool) or not isinstance(num_bits, int) or not 2 - int(unsigned) <= num_bits <= MOST_BITS:
        floats = "; (4, 3), floats of 8 bits, have no integers" if isinstance(num_bits, tuple) else ""
        raise AnnotationError(f"num_bits={num_bits!r}: a whole number from {2 - int(unsigned)} to {MOST_BITS}{floats}")
    high = int(2 ** (num_bits - 1 + int(unsigned))) - 1
    return (0 if unsigned else -high if narrow_range else -high - 1), high


def tensor_quant(
    x: Tensor, amax: Tensor | float, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> tuple[Tensor, Tensor]:
    """The integers of ``x``, as floats of its shape and dtype, and the scale that they were **multiplied** by.

    ``amax``: the largest magnitude that integers stand for; a number, or a tensor that broadcasts against ``x``.
    ``integers / scale`` is what `fake_tensor_quant` returns. The scale has the shape of ``amax``, in float32 (float64
    for float64); where ``amax <= 2**-24`` all integers are 0 and the scale is 1. Signed integers lie in
    ``[-127, 127]`` for 8 bits, in ``[-128, 127]`` without ``narrow_range``, unsigned ones in ``[0, 255]``.

    The gradient of the integers passes straight through where ``|x| <= amax``, and is 0 elsewhere.
    Raises `AnnotationError` for bits, or a negative or NaN ``amax``, or one that does not broadcast, and
    `CalibrationError` for negative values with ``unsigned``.
    """
    bounds = integer_bounds(num_bits, unsigned, narrow_range)
    limit = checked_amax(x, amax)
    if unsigned and x.numel() and float(x.detach().amin()) < 0:
        raise CalibrationError(f"unsigned integers for values from {float(x.detach().amin()):g} on: use signed ones")
    made: Any = _MaxQuant.apply(x, limit, *bounds)  # type: ignore[no-untyped-call]
    integers, scale = made
    return integers, scale


def fake_tensor_quant(
    x: Tensor, amax: Tensor | float, num_bits: int = 8, unsigned: bool = False, narrow_range: bool = True
) -> Tensor:
    """``x`` as it comes back from integers: same shape and dtype. Arguments, gradient and errors: `tensor_quant`."""
    integers, scale = tensor_quant(_wide(x), amax, num_bits, unsigned, narrow_range)
    return _Divided.apply(integers, scale).to(x.dtype)  # type: ignore[no-untyped-call, no-any-return]


def checked_amax(x: Tensor, amax: Tensor | float) -> Tensor:
    """``amax`` as a tensor beside ``x``; raises `AnnotationError` for what is none of its magnitudes."""
    if not x.is_floating_point():
        raise AnnotationError(f"a tensor of {x.dtype}: only floats are quantized")
    limit = torch.as_tensor(amax, device=x.device).detach()
    limit = limit.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    try:
        shape = torch.broadcast_shapes(limit.shape, x.shape)
    except RuntimeError:
        shape = None
    if shape != x.shape:
        raise AnnotationError(f"amax of shape {list(limit.shape)} does not broadcast against {list(x.shape)}")
    if not bool((limit >= 0).all()):  # false for NaN
        raise AnnotationError(f"amax holds {float(limit[~(limit >= 0)].flatten()[0]):g}: magnitudes are 0 or larger")
    return limit


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class _MaxQuant(torch.autograd.Function):
    """Integers and scale; the gradient of the integers passes where the magnitude is no larger than ``amax``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, amax)
        scale = high / amax
        nothing = amax <= SMALLEST_AMAX
        steps = torch.round(_wide(x) * torch.where(nothing, 0.0, scale))
        scale = torch.where(nothing, 1.0, scale)
        ctx.mark_non_differentiable(scale)
        return torch.clamp(steps, low, high).to(x.dtype), scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, amax = ctx.saved_tensors
        return torch.where(x.abs() <= amax, grads[0], 0.0), None, None, None


class _Divided(torch.autograd.Function):
    """``integers / scale``, with the gradient that the integers had: straight through."""

    @staticmethod
    def forward(_ctx: Any, integers: Tensor, scale: Tensor) -> Tensor:
        return integers / scale

    @staticmethod
    def backward(_ctx: Any, *grads: Any) -> Any:
        return grads[0], None
