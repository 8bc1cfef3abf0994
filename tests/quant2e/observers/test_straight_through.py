"""Fake quantization and its gradients: values of the q/dq ops, gradients of torch's kernels and of the papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant2e.errors import AnnotationError, CalibrationError
from quant2e.graph.qdq_ops import qd
from quant2e.observers.straight_through import fake_quantize, learned_fake_quantize, round_to_grid

RANGES = [(-128, 127), (-127, 127), (0, 255), (0, 127), (-8, 7), (0, 15)]


def qparams(low, high, channels=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(channels, generator=g) * 0.1 + 1e-3, torch.randint(low, high + 1, (channels,), generator=g)


def data(scale, dtype=torch.float32, seed=0):
    """Values inside, outside, and halfway between two steps."""
    g = torch.Generator().manual_seed(seed)
    halves = torch.randint(-600, 600, (4, 6, 8), generator=g) * 0.5
    return ((halves + torch.randint(0, 2, (4, 6, 8), generator=g) * 0.3) * scale.mean()).to(dtype)


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_values_are_those_of_the_quantize_ops_and_of_torch(low, high, axis):
    channels = 1 if axis is None else (4, 6)[axis]
    scale, zero = qparams(low, high, channels)
    x = data(scale)
    y = fake_quantize(x, scale, zero, low, high, axis=axis)
    dtype = torch.uint8 if low == 0 else torch.int8
    if axis is None:
        tail = (float(scale), int(zero), low, high, dtype)
        expected = qd.dequantize_per_tensor(qd.quantize_per_tensor(x, *tail), *tail)
        kernel = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero), low, high)
    else:
        tail = (scale, zero, axis, low, high, dtype)
        expected = qd.dequantize_per_channel(qd.quantize_per_channel(x, *tail), *tail)
        kernel = torch.fake_quantize_per_channel_affine(x, scale, zero.int(), axis, low, high)
    assert torch.equal(y, expected)
    assert torch.equal(y, kernel)


@pytest.mark.parametrize("group_size", [1, 4, 8])
def test_groups_are_channels_of_a_reshaped_tensor(group_size):
    rows = 24 * 8 // group_size
    scale, zero = qparams(-8, 7, rows)
    x = data(scale).requires_grad_()
    shape = (4, 6, 8 // group_size)
    y = fake_quantize(x, scale.view(shape), zero.view(shape), -8, 7, group_size=group_size)
    flat = x.detach().reshape(rows, group_size).requires_grad_()
    expected = torch.fake_quantize_per_channel_affine(flat, scale, zero.int(), 0, -8, 7)
    assert torch.equal(y, expected.view_as(x))
    weights = torch.randn_like(x)
    y.backward(weights)
    expected.backward(weights.view_as(flat))
    assert torch.equal(x.grad, flat.grad.view_as(x))


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(CalibrationError, match="groups of 3 do not divide"):
        fake_quantize(torch.ones(2, 8), torch.ones(2, 2), torch.zeros(2, 2), -8, 7, group_size=3)


def test_several_scales_need_an_axis():
    with pytest.raises(AnnotationError, match="give the axis"):
        learned_fake_quantize(torch.ones(2, 8), torch.ones(2), torch.zeros(2), -8, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_what_convert_writes_for_it(dtype):
    scale, zero = qparams(-128, 127)
    x = data(scale, dtype)
    tail = (float(scale), int(zero), -128, 127, torch.int8)
    expected = qd.dequantize_per_tensor(qd.quantize_per_tensor(x, *tail), *tail, out_dtype=dtype)
    y = fake_quantize(x, scale, zero, -128, 127)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


def test_float_zero_points_are_those_of_the_quantize_op():
    scale, zero = torch.tensor([0.07, 0.03]), torch.tensor([11.3, 4.9])
    x = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    tail = (scale, zero, 0, 0, 255, torch.uint8)
    expected = qd.dequantize_per_channel(qd.quantize_per_channel(x, *tail), *tail)
    assert torch.equal(fake_quantize(x, scale, zero, 0, 255, axis=0), expected)


@given(st.integers(0, 10_000), st.sampled_from(RANGES), st.sampled_from([torch.float32, torch.bfloat16]))
def test_gradient_is_straight_through_inside_and_zero_outside(seed, bounds, dtype):
    scale, zero = qparams(*bounds, seed=seed)
    x = data(scale, dtype, seed).requires_grad_()
    weights = torch.randn_like(x)
    fake_quantize(x, scale, zero, *bounds).backward(weights)
    steps = torch.round(x.detach().float() / scale.double()) + zero
    at_an_edge = (steps - torch.tensor(bounds, dtype=torch.float64).view(2, 1, 1, 1)).abs().amin(0) <= 1
    expected = torch.where((steps >= bounds[0]) & (steps <= bounds[1]), weights, torch.zeros_like(weights))
    assert torch.equal(x.grad[~at_an_edge], expected[~at_an_edge])


def test_the_known_answer_of_a_symmetric_range():
    # pytorch-quantization, tensor_quant with 8 bits: ±amax in 127 steps.
    torch.manual_seed(12345)
    x = torch.rand(10).requires_grad_()
    amax = x.detach().abs().max()
    y = fake_quantize(x, (amax / 127).reshape(1), torch.zeros(1, dtype=torch.int64), -127, 127)
    published = [0.9843, 0.8828, 0.9921, 0.4609, 0.0859, 0.1797, 0.3672, 0.5703, 0.3359, 0.2109]
    torch.testing.assert_close(y.detach(), torch.tensor(published), atol=1e-4, rtol=0)
    y.sum().backward()
    assert x.grad.tolist() == [1.0] * 10
    small = torch.zeros(1, dtype=torch.int64)
    x.grad = None
    fake_quantize(x, (amax / 2 / 127).reshape(1), small, -127, 127).sum().backward()
    assert x.grad.tolist() == (x.detach() <= amax / 2 * (127.5 / 127)).float().tolist()


# ---------------------------------------------------------------- learned steps


def _by_autograd(x, scale, zero, low, high, axis):
    """The same function with the rounding detached: autograd derives the gradients of LSQ and LSQ+ from it."""
    shape = [1, 1, 1] if axis is None else [-1 if i == axis else 1 for i in range(3)]
    s, z = scale.reshape(shape), zero.reshape(shape)
    steps = x / s
    inside = (torch.round(steps.detach()) + z.detach() >= low) & (torch.round(steps.detach()) + z.detach() <= high)
    through = steps + (torch.round(steps) - steps).detach()
    return torch.where(inside, through, torch.clamp(torch.round(steps.detach()) + z.detach(), low, high) - z) * s


def _by_torch(x, scale, zero, low, high, axis):
    """ATen's kernels; right for zero points of 0, while other odd ones are off by one in their backward."""
    if axis is None:
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, low, high, 1.0)
    return torch._fake_quantize_learnable_per_channel_affine(x, scale, zero, axis, low, high, 1.0)


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("reference", [_by_autograd, _by_torch])
def test_learned_gradients(low, high, axis, reference):
    scale, zero = qparams(low, high, 1 if axis is None else 6)
    zero = zero.float() * (reference is _by_autograd)
    # No ties: torch rounds some of them the other way in backward.
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(5)) * 100 * scale.mean()
    mine = [t.clone().requires_grad_() for t in (x, scale, zero)]
    theirs = [t.clone().requires_grad_() for t in (x, scale, zero)]
    y, expected = learned_fake_quantize(*mine, low, high, axis=axis), reference(*theirs, low, high, axis)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
    y.backward(weights)
    expected.backward(weights)
    torch.testing.assert_close(mine[0].grad, theirs[0].grad, rtol=1e-6, atol=1e-6)
    for own, other in zip(mine[1:], theirs[1:], strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-2)


def test_the_gradient_of_a_step_by_hand():
    # Steps of 0.5 in -2..1: 0.6 rounds to 1 (inside), 3.0 is cut at 1, -9.0 at -2.
    x = torch.tensor([0.6, 3.0, -9.0], requires_grad=True)
    scale, zero = torch.tensor([0.5], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    y = learned_fake_quantize(x, scale, zero, -2, 1)
    assert y.tolist() == [0.5, 0.5, -1.0]
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 0.0]
    assert scale.grad.item() == pytest.approx((1 - 0.6 / 0.5) + 1 - 2)
    assert zero.grad.item() == pytest.approx(-0.5 * 2)


@pytest.mark.parametrize(("axis", "sharing"), [(None, 24), (0, 12)])
def test_lsq_scales_the_gradient_by_the_values_that_share_a_scale(axis, sharing):
    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(3))
    scale = torch.full((1 if axis is None else 2,), 0.2)
    grads = []
    for scaled in (False, True):
        own = scale.clone().requires_grad_()
        learned_fake_quantize(x, own, torch.zeros_like(own), -8, 7, axis=axis, scale_gradients=scaled).sum().backward()
        grads.append(own.grad)
    torch.testing.assert_close(grads[1], grads[0] / math.sqrt(sharing * 7))


def test_learning_a_step_finds_a_better_one():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([x.abs().max() / 7]).requires_grad_()  # 4 bits over the whole range
    zero = torch.zeros(1)

    def error():
        return ((learned_fake_quantize(x, scale, zero, -8, 7) - x) ** 2).mean()

    before = error().item()
    optimizer = torch.optim.Adam([scale], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < 0.75 * before


def test_the_grid_of_an_accumulator_is_met_at_the_nearest_multiples_ties_to_even():
    steps = torch.tensor([0.4, 0.6, 1.5, 2.5, -0.4, -0.6, -1.5, 7.0])
    nearest = torch.tensor([0.0, 1.0, 2.0, 2.0, 0.0, -1.0, -2.0, 7.0])
    assert torch.equal(round_to_grid(steps * 0.25, torch.tensor([0.25])), nearest * 0.25)
    scales = 2.0 ** -torch.arange(8)
    assert torch.equal(round_to_grid(steps * scales, scales), nearest * scales)
