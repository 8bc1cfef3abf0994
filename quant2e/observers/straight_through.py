"""Straight-through estimators: fake quantization, in the rounding of `ranges.qparams`, that can be trained through.

    y = (clamp(round(x / s) + z, low, high) - z) · s
    dy/dx = 1 where round(x / s) + z lies in [low, high], 0 elsewhere

Values are those that convert's quantize/dequantize pairs compute, bit for bit. Straight-through: Bengio et al.,
arXiv:1308.3432; Jacob et al., arXiv:1712.05877, section 3. Learned steps: Esser et al., arXiv:1902.08153 (LSQ),
equation 3; learned zero points: Bhalgat et al., arXiv:2004.09576 (LSQ+), equation 5; learned clipping: Choi et al.,
arXiv:1805.06085 (PACT), equations 1 to 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quant2e.annotation.granularity import Granularity, PerTensor, PerToken
from quant2e.annotation.specs import INTEGER_BOUNDS
from quant2e.errors import AnnotationError
from quant2e.graph.qdq_ops import qd
from quant2e.ranges.minmax import as_rows
from quant2e.ranges.qparams import FLOAT32_EPS


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """``x`` as it comes back from integers, of the shape and dtype of ``x``, differentiable in ``x``.

    ``scale``, ``zero_point``: ``[1]``; with ``axis`` ``[x.shape[axis]]``; with ``group_size`` one for each run of so
    many neighbours along the last dimension, ``[*x.shape[:-1], x.shape[-1] // group_size]``. Zero points are integers;
    float ones (``per_channel_affine_float_qparams``) are used as they are.
    """
    if x.dtype == torch.float32 and group_size is None and not zero_point.is_floating_point():
        # ATen's kernels compute the same bits in one pass, and keep only the mask for backward.
        zero = zero_point.to(torch.int32)
        if axis is None:
            return torch.fake_quantize_per_tensor_affine(x, scale, zero, quant_min, quant_max)
        return torch.fake_quantize_per_channel_affine(x, scale, zero, axis, quant_min, quant_max)
    scales, zeros, rows = _broadcast(x, scale, zero_point, axis, group_size)
    return _apply(_Through, rows, scales, zeros, quant_min, quant_max).reshape(x.shape)


def learned_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    axis: int | None = None,
    smallest_scale: float = 0.0,
    scale_gradients: bool = False,
) -> Tensor:
    """As `fake_quantize`, differentiable in ``scale`` and ``zero_point`` (float, rounded where it is used) as well.

    ``smallest_scale``: used in place of smaller scales; a bound, not a barrier: gradients pass.
    ``scale_gradients``: gradients of both are multiplied by ``1 / sqrt(values per scale · quant_max)`` (LSQ, section
    2.2), which brings a step's updates to the relative size of the weights' own.
    """
    scales, zeros, rows = _broadcast(x, scale, zero_point, axis, None)
    numbers = (quant_min, quant_max, smallest_scale)
    factor = 1.0
    if scale_gradients:
        factor = 1.0 / math.sqrt(max(1, x.numel() // scale.numel()) * max(1, quant_max))
    return _apply(_Learned, rows, scales, zeros, numbers, factor)


def clipped_fake_quantize(
    x: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    axis: int | None = None,
) -> Tensor:
    """As `fake_quantize`, differentiable in the clipping values from which scale and zero point were made as well.

    ``alpha``: the upper one; ``beta``: minus the lower one, or None where that is ``-alpha`` too. Shapes as ``scale``.
    With ``top`` and ``bottom`` for the largest and the smallest value that the integers stand for::

        dy/dalpha = 1 where x >= top, -1 where x < bottom (of beta, where there is one), 0 between
        dy/dx     = 1 where bottom <= x < top, 0 elsewhere
    """
    scales, zeros, rows = _broadcast(x, scale, zero_point, axis, None)
    shape = scales.shape
    upper, lower = alpha.reshape(shape), None if beta is None else beta.reshape(shape)
    return _apply(_Clipped, rows, upper, lower, scales, zeros, (quant_min, quant_max))


def fake_quantize_dynamic(x: Tensor, granularity: Granularity) -> Tensor:
    """``x`` as it comes back from int8 with scales of its own: same shape and dtype, differentiable in ``x``.

    ``granularity``: one scale (`PerTensor`), or one for each token (`PerToken`) or image (``PerAxis(0)``). The bits are
    those of the ops that convert writes.
    """
    return _apply(_Dynamic, x, granularity)


def round_to_grid(x: Tensor, scale: Tensor) -> Tensor:
    """The nearest multiples of ``scale`` that an int32 accumulator holds, ties to even; differentiable in ``x``.

    ``scale``: one value, or one for each value of the last dimension. Quotients are rounded as ExecuTorch rounds a bias
    for XNNPACK: ``x * (1 / scale)`` in float32. Same shape and dtype as ``x``.
    """
    return _apply(_Grid, x, scale)


def _broadcast(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, group_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and zero points in a shape that meets ``x``, and ``x`` in the shape that they meet."""
    if group_size is not None:
        return scale.unsqueeze(-1), zero_point.unsqueeze(-1), as_rows(x, None, group_size)
    if axis is None:
        if scale.numel() != 1:
            raise AnnotationError(f"{scale.numel()} scales for a whole tensor: give the axis of the channels")
        return scale.reshape(()), zero_point.reshape(()), x
    shape = [1] * x.dim()
    shape[axis] = -1
    return scale.reshape(shape), zero_point.reshape(shape), x


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    run: Any = function.apply  # untyped in torch
    made: Tensor = run(*args)
    return made


class _Through(torch.autograd.Function):
    """Straight through inside the range, zero outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
        steps = torch.round(x.to(torch.float32) * (1.0 / scale)) + zero_point
        if zero_point.is_floating_point():
            steps = torch.trunc(steps)  # as the quantize op does, by storing an integer
        ctx.save_for_backward((steps >= quant_min) & (steps <= quant_max))
        return ((torch.clamp(steps, quant_min, quant_max) - zero_point) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None, None


class _Dynamic(torch.autograd.Function):
    """Straight through inside of -128..127, zero outside, where rounding the zero point put an extreme."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, granularity: Granularity) -> Tensor:
        if granularity == PerToken():
            scale, zero = qd.choose_qparams_per_token_asymmetric.default(x, torch.int8)
            steps = torch.round(x * (1.0 / scale) + zero)
        elif granularity == PerTensor():
            scale, zero = qd.choose_qparams.tensor(x, -128, 127, FLOAT32_EPS, torch.int8)
            steps = torch.round(x.to(torch.float32) * (1.0 / scale).to(torch.float32)) + zero
            scale = scale.to(torch.float32)
        else:
            shape = (-1, *(1,) * (x.dim() - 1))
            found = qd.choose_qparams_per_token_asymmetric.default(x.flatten(1), torch.int8)
            scale, zero = (each.reshape(shape) for each in found)
            steps = torch.round(x * (1.0 / scale)) + zero
        ctx.save_for_backward((steps >= -128) & (steps <= 127))
        made: Tensor = (steps.clamp(-128, 127) - zero) * scale
        return made.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None


class _Grid(torch.autograd.Function):
    """Straight through where the multiple fits int32, zero outside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        low, high = INTEGER_BOUNDS[torch.int32]
        steps = torch.round(x.to(torch.float32) * (1.0 / scale)).to(torch.float64)
        ctx.save_for_backward((steps >= low) & (steps <= high))
        return (steps.clamp(low, high) * scale.to(torch.float64)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None


class _Learned(torch.autograd.Function):
    """LSQ's and LSQ+'s gradients, for scales and zero points of a shape that broadcasts."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, numbers: tuple[int, int, float], factor: float
    ) -> Tensor:
        quant_min, quant_max, smallest = numbers
        scale = torch.clamp(scale, min=smallest)
        zero = torch.clamp(torch.round(zero_point), quant_min, quant_max)
        steps = torch.round(x.to(torch.float32) * (1.0 / scale)) + zero
        clamped = torch.clamp(steps, quant_min, quant_max)
        ctx.save_for_backward(x, scale, zero, steps)
        ctx.range, ctx.factor, ctx.shapes = (quant_min, quant_max), factor, (scale.shape, zero_point.shape)
        return ((clamped - zero) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, scale, zero, steps = ctx.saved_tensors
        low, high = ctx.range
        inside = (steps >= low) & (steps <= high)
        grad = grads[0].to(torch.float32)
        by_scale = torch.clamp(steps, low, high) - zero - torch.where(inside, x.to(torch.float32) / scale, 0.0)
        by_zero = torch.where(inside, torch.zeros_like(scale), -scale)
        return (
            grads[0] * inside,
            (grad * by_scale * ctx.factor).sum_to_size(ctx.shapes[0]),
            (grad * by_zero * ctx.factor).sum_to_size(ctx.shapes[1]),
            None,
            None,
        )


class _Clipped(torch.autograd.Function):
    """PACT's gradients, for clipping values of a shape that broadcasts; ``beta`` is None where ``alpha`` is both."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        beta: Tensor | None,
        scale: Tensor,
        zero_point: Tensor,
        bounds: tuple[int, int],
    ) -> Tensor:
        low, high = bounds
        values = x.to(torch.float32)
        steps = torch.round(values * (1.0 / scale)) + zero_point
        over, under = values >= (high - zero_point) * scale, values < (low - zero_point) * scale
        moved = under & (zero_point != low)  # where the integers begin at zero, alpha does not move the lower end
        ctx.save_for_backward(over, under, moved)
        ctx.shape, ctx.both = alpha.shape, beta is None
        return ((torch.clamp(steps, low, high) - zero_point) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        over, under, moved = ctx.saved_tensors
        grad = grads[0].to(torch.float32)
        by_upper = (grad * over).sum_to_size(ctx.shape)
        by_lower = -(grad * (moved if ctx.both else under)).sum_to_size(ctx.shape)
        alone = (by_upper + by_lower, None) if ctx.both else (by_upper, by_lower)
        return (grads[0] * ~(over | under), *alone, None, None, None)
