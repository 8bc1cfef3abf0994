"""Convolutions and matrix products against the slow model: no difference, in any arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant2e import Quant2eError, integer_report, to_integer
from quant2e.graph.qdq_ops import qd
from quant2e.integer.arithmetic.bias import bias_fraction, bias_integers
from tests.quant2e.integer import reference
from tests.quant2e.integer.graphs import CASES, Draw, Tally, Writer, aten, run_integer

CONVS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
DECONVS = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}


def clamp_bounds(kind):
    return {
        "none": (-np.inf, np.inf),
        "relu": (0.0, np.inf),
        "relu6": (0.0, 6.0),
        "hardtanh": (-1.0, 1.0),
        "clamp": (-0.3, 0.7),
    }[kind]


def fused(writer, node, kind):
    low, high = clamp_bounds(kind)
    match kind:
        case "relu":
            return writer.op(aten.relu.default, node)
        case "relu6" | "hardtanh":
            return writer.op(aten.hardtanh.default, node, low, high)
        case "clamp":
            return writer.op(aten.clamp.default, node, low, high)
    return node


def clamped(values, grid, kind):
    low, high = clamp_bounds(kind)
    low = grid.low if np.isinf(low) else grid.quantize(low)
    high = grid.high if np.isinf(high) else grid.quantize(high)
    return np.clip(values, low, high)


def weight_and_scale(draw, shape, axis, outputs):
    """Integers, what Writer.weight takes, integers without zero points, and the scale of each output."""
    w = draw.weight(shape, *draw.pick((-127, 127), (-128, 127), (-8, 7)))
    kind = draw.pick("tensor", "tensor affine", "channel", "channel", "channel affine")
    if kind.startswith("tensor"):
        scale, zero = draw.scale(2**-10, 2**-6), draw.int(-20, 20) if "affine" in kind else 0
        return w, (scale, None, zero), w.numpy().astype(np.int64) - zero, [scale] * outputs
    scales = draw.scales(shape[axis])
    zeros = torch.tensor([draw.int(-20, 20) if "affine" in kind else 0 for _ in range(shape[axis])])
    along = [-1 if i == axis else 1 for i in range(len(shape))]
    centred = w.numpy().astype(np.int64) - zeros.numpy().reshape(along)
    per_output = [float(s) for s in scales] * (outputs // shape[axis])
    return w, (scales, axis, zeros), centred, per_output


def bias_for(draw, x_scale, scales, per_channel):
    """A float bias, and its integers at scale_x · scale_w: what ExecuTorch hands to XNNPACK."""
    kind = draw.pick("none", "any", "on the grid")
    if kind == "none":
        return None, np.zeros(len(scales), dtype=np.int64)
    step = np.array(scales, dtype=np.float64) * x_scale
    values = draw.rng.normal(0, 0.3, len(scales)) if kind == "any" else draw.rng.integers(-300, 300, len(scales)) * step
    values = torch.from_numpy(values).to(torch.float32)
    if per_channel:  # a tensor of scales: every step in float32
        inverse = np.float32(1) / (np.array(scales, dtype=np.float32) * np.float32(x_scale))
    else:  # numbers: the reciprocal in float64
        inverse = np.array([np.float32(1.0 / (s * x_scale)) for s in scales], dtype=np.float32)
    return values, np.rint(values.numpy() * inverse).astype(np.int64)


def fraction_bits(writer):
    """Fraction bits of the bias, as the graph says."""
    return integer_report(writer.integer).records[0].attributes["bias_fraction_bits"]


def requantized(acc, x_scale, scales, grid, mode, axis, bias, bias_q, bits):
    """Outputs of sums ``acc``; with ``bits``, what the integers of the bias leave of it is added in that many bits."""
    acc = np.moveaxis(acc, axis, 0)
    left = np.zeros(len(scales)) if bias is None else bias.numpy() / (np.array(scales) * x_scale) - bias_q
    assert bits > 0 or (np.abs(left) < 2.0**-9 + np.abs(bias_q) * 2.0**-20).all()
    fractions = np.rint(left * 2**bits).astype(np.int64) if bits else np.zeros(len(scales), dtype=np.int64)
    out = np.stack(
        [
            reference.each(
                (a << bits) + f, lambda v, s=s: reference.requantize(v, (x_scale, s, 2.0**-bits), grid, mode)
            )
            for a, s, f in zip(acc, scales, fractions, strict=True)
        ]
    )
    return np.moveaxis(out, 0, axis)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "conv_transpose"])
def test_convolution(spatial, transposed):
    tally = Tally()
    for seed in range(CASES):
        draw = Draw(seed)
        groups = draw.pick(1, 1, 2, 3)
        per_in, per_out = (1, draw.pick(1, 2)) if draw.flag() and groups > 1 else (draw.int(1, 3), draw.int(1, 3))
        stride, padding, dilation = ([draw.int(lo, hi) for _ in range(spatial)] for lo, hi in ((1, 2), (0, 1), (1, 2)))
        kernel = [draw.int(1, 3) for _ in range(spatial)]
        size = [draw.int(d * (k - 1) + 1, d * (k - 1) + 3) for d, k in zip(dilation, kernel, strict=True)]
        extra = (
            [draw.int(0, 1) if max(s, d) > 1 else 0 for s, d in zip(stride, dilation, strict=True)]
            if transposed
            else [0] * spatial
        )
        if transposed:
            padding = [
                min(p, (n - 1) * s + d * (k - 1) - 1) if (n - 1) * s + d * (k - 1) else 0
                for p, n, s, d, k in zip(padding, size, stride, dilation, kernel, strict=True)
            ]
            padding = [max(p // 2, 0) for p in padding]
        outputs = per_out * groups
        shape = [per_in * groups, per_out, *kernel] if transposed else [outputs, per_in, *kernel]
        x_grid, grid = draw.grid(), draw.grid()
        x = draw.integers([draw.int(1, 2), per_in * groups, *size], x_grid)
        w, weight, centred, scales = weight_and_scale(draw, shape, 1 if transposed else 0, outputs)
        bias, bias_q = bias_for(draw, x_grid.scale, scales, weight[1] is not None)
        activation = draw.pick("none", "relu", "relu6", "hardtanh", "clamp")

        writer = Writer()
        dq, dw = writer.input(x, x_grid), writer.weight(w, *weight)
        b = None if bias is None else writer.constant(bias)
        if transposed:
            y = writer.op(DECONVS[spatial], dq, dw, b, stride, padding, extra, groups, dilation)
        elif draw.flag():
            y = writer.op(CONVS[spatial], dq, dw, b, stride, padding, dilation, groups)
        else:
            y = writer.op(aten.convolution.default, dq, dw, b, stride, padding, dilation, False, [0] * spatial, groups)
        found = run_integer(writer, [writer.q(fused(writer, y, activation), grid)], draw.mode)

        centred_x = x.numpy().astype(np.int64) - x_grid.zero_point
        if transposed:
            acc = reference.transposed_convolution(centred_x, centred, stride, padding, extra, dilation, groups)
        else:
            acc = reference.convolution(centred_x, centred, stride, padding, dilation, groups)
        acc = acc + bias_q.reshape([1, -1] + [1] * spatial)
        steps = requantized(acc, x_grid.scale, scales, grid, draw.mode, 1, bias, bias_q, fraction_bits(writer))
        expected = clamped(steps, grid, activation)
        np.testing.assert_array_equal(found[0], expected, err_msg=f"seed {seed}")
        tally.add(writer, found, draw.mode)
    tally.check()


@pytest.mark.parametrize("form", ["linear", "linear on s16", "addmm", "mm", "matmul"])
def test_linear(form):
    tally = Tally()
    for seed in range(CASES):
        draw = Draw(seed, (torch.int16,) if "s16" in form else (torch.int8, torch.uint8))
        k, n = draw.int(1, 9), draw.int(1, 6)
        lead = {"linear": draw.pick([], [3], [2, 2], [1, 2, 3]), "matmul": draw.pick([3], [2, 2])}.get(form, [3])
        right = form in ("addmm", "mm", "matmul")
        x_grid = draw.grid(draw.scale(2**-14, 2**-10) if "s16" in form else None)
        grid = draw.grid(draw.scale(2**-14, 2**-10) if "s16" in form else None)
        x = draw.integers([*lead, k], x_grid)
        w, weight, centred, scales = weight_and_scale(draw, [n, k], 0, n)
        bias, bias_q = bias_for(draw, x_grid.scale, scales, weight[1] is not None)
        activation = draw.pick("none", "relu", "clamp")
        writer = Writer()
        dq, dw = writer.input(x, x_grid), writer.weight(w, *weight)
        if right:
            dw = writer.op(aten.t.default, dw)
        if form == "addmm" and bias is None:
            bias, bias_q = torch.zeros(n), np.zeros(n, dtype=np.int64)
        if form in ("mm", "matmul"):
            bias, bias_q = None, np.zeros(n, dtype=np.int64)
        b = None if bias is None else writer.constant(bias)
        y = {
            "addmm": lambda: writer.op(aten.addmm.default, b, dq, dw),
            "mm": lambda: writer.op(aten.mm.default, dq, dw),
            "matmul": lambda: writer.op(aten.matmul.default, dq, dw),
        }.get(form, lambda: writer.op(aten.linear.default, dq, dw, b))()
        found = run_integer(writer, [writer.q(fused(writer, y, activation), grid)], draw.mode)
        acc = (x.numpy().astype(np.int64) - x_grid.zero_point) @ centred.T + bias_q
        bits = fraction_bits(writer)
        steps = requantized(acc, x_grid.scale, scales, grid, draw.mode, acc.ndim - 1, bias, bias_q, bits)
        expected = clamped(steps, grid, activation)
        np.testing.assert_array_equal(found[0], expected, err_msg=f"seed {seed}")
        tally.add(writer, found, draw.mode)
    tally.check()


@pytest.mark.parametrize("form", ["matmul", "bmm"])
def test_product_of_two_activations(form):
    tally = Tally()
    for seed in range(CASES):
        draw = Draw(seed)
        a, b, grid = draw.grid(), draw.grid(), draw.grid()
        m, k, n = draw.int(1, 4), draw.int(1, 9), draw.int(1, 4)
        lead = [2] if form == "bmm" else draw.pick([], [2], [2, 3])
        x, y = draw.integers([*lead, m, k], a), draw.integers([*lead, k, n], b)
        writer = Writer()
        target = aten.bmm.default if form == "bmm" else aten.matmul.default
        node = writer.op(target, writer.input(x, a), writer.input(y, b))
        found = run_integer(writer, [writer.q(node, grid)], draw.mode)
        acc = (x.numpy().astype(np.int64) - a.zero_point) @ (y.numpy().astype(np.int64) - b.zero_point)
        expected = reference.each(acc, lambda v: reference.requantize(v, (a.scale, b.scale), grid, draw.mode))
        np.testing.assert_array_equal(found[0], expected, err_msg=f"seed {seed}")
        tally.add(writer, found, draw.mode)
    tally.check()


def test_linear_with_group_wise_weights():
    tally = Tally()
    for seed in range(CASES):
        draw = Draw(seed)
        size, groups, n = draw.int(2, 4), draw.int(1, 4), draw.int(1, 4)
        a, grid = draw.grid(), draw.grid()
        x = draw.integers([3, size * groups], a)
        w = draw.weight([n, size * groups], -8, 7)
        scales = draw.scales(n * groups).reshape(n, groups)
        writer = Writer()
        bias = None
        bias_q = np.zeros(n, dtype=np.int64)
        if draw.flag():
            bias = torch.from_numpy(draw.rng.normal(0, 0.3, n)).to(torch.float32)
            inverse = np.float32(1) / (scales[:, 0].numpy() * np.float32(a.scale))
            bias_q = np.rint(bias.numpy() * inverse).astype(np.int64)
        zeros = writer.constant(torch.zeros(n, groups, dtype=torch.int64))
        dw = writer.op(
            qd.dequantize_per_channel_group.default,
            writer.constant(w),
            writer.constant(scales),
            zeros,
            -8,
            7,
            torch.int8,
            size,
            torch.float32,
        )
        y = writer.op(aten.linear.default, writer.input(x, a), dw, None if bias is None else writer.constant(bias))
        found = run_integer(writer, [writer.q(y, grid)], draw.mode)
        centred = x.numpy().astype(np.int64) - a.zero_point
        expected = np.zeros([3, n], dtype=np.int64)
        reach = np.abs(w.numpy().astype(np.int64)).reshape(n, groups, size).sum(2)
        span = max(a.high - a.zero_point, a.zero_point - a.low)
        spans = [int(reach[:, g].max()) * span + (int(np.abs(bias_q).max()) if g == 0 else 0) for g in range(groups)]
        top = [float(scales[:, g].max()) * a.scale / grid.scale for g in range(groups)]
        bits = fraction_bits(writer)
        left = np.zeros(n)
        if bits:
            left = bias.numpy() / (scales[:, 0].double().numpy() * a.scale) - bias_q
            spans[0], top[0] = (spans[0] + 1) << bits, top[0] / 2**bits
        fractions = np.rint(left * 2**bits).astype(np.int64)
        for row in range(3):
            for o in range(n):
                sums = [
                    int(
                        (
                            centred[row, g * size : (g + 1) * size]
                            * w[o, g * size : (g + 1) * size].numpy().astype(np.int64)
                        ).sum()
                    )
                    + (int(bias_q[o]) if g == 0 else 0)
                    for g in range(groups)
                ]
                sums[0] = (sums[0] << bits) + int(fractions[o])
                units = [a.scale * float(s) / (2**bits if g == 0 else 1) for g, s in enumerate(scales[o])]
                expected[row, o] = grouped(sums, units, top, spans, grid, draw.mode)
        np.testing.assert_array_equal(found[0], expected, err_msg=f"seed {seed}")
        tally.add(writer, found, draw.mode)
    tally.check()


def grouped(sums, scales, top, spans, grid, mode):
    """One group is a plain product; several are a sum whose shift fits the largest ratio of any channel."""
    if len(sums) == 1:
        return reference.requantize(sums[0], scales, grid, mode)
    if mode == "power_of_two":
        return reference.exact_add(sums, [s / grid.scale for s in scales], [1] * len(sums), grid)
    shift = reference.general_shift(top, spans)
    total = 2 ** (shift - 1) + sum(v * round(s / grid.scale * 2.0**shift) for v, s in zip(sums, scales, strict=True))
    return grid.saturate(total >> shift)


def test_a_wide_sum_is_kept_in_64_bits_and_reported():
    draw = Draw(0, (torch.int16,))
    a = draw.grid(2.0**-12)
    x = torch.full([1, 1000], 32767, dtype=torch.int16)
    writer = Writer()
    w = writer.weight(torch.full([1, 1000], 127, dtype=torch.int8), 2.0**-10, None)
    grid = draw.grid(2.0)
    gm = to_integer(writer.finish(writer.q(writer.op(aten.linear.default, writer.input(x, a), w, None), grid)))
    assert int(gm(x)[0]) == round(1000 * 32767 * 127 * 2.0**-22 / 2) + grid.zero_point
    assert integer_report(gm).of("linear_default").reason == "linear, int64 accumulator (int32 could overflow)"
    assert integer_report(gm).notes == (
        "'linear_default': sums in int64: they can reach 4.162e+09, and int32 holds 2.147e+09",
    )


def test_power_of_two_does_not_round_a_scale_silently():
    draw = Draw(0)
    a, grid = draw.grid(0.1), draw.grid(0.25)
    x = draw.integers([2, 3], a)
    writer = Writer()
    w = writer.weight(draw.weight([2, 3]), 0.01, None)
    gm = writer.finish(writer.q(writer.op(aten.linear.default, writer.input(x, a), w, None), grid))
    with pytest.raises(Quant2eError, match=r"linear_default.*its scale changes by 0.004, which is not a power of two"):
        to_integer(gm, requantization="power_of_two", strict=True)
    left = integer_report(to_integer(gm, requantization="power_of_two")).left
    assert [(v.name, v.reason) for v in left] == [
        ("linear_default", "its scale changes by 0.004, which is not a power of two")
    ]


def test_a_bias_has_fraction_bits_where_it_needs_them_and_there_is_room():
    scale = torch.tensor([2.0**-10, 2.0**-12])
    bias = torch.tensor([3.0 * 2**-10, 5.25 * 2**-12])  # with s_x = 1: 3 and 5.25 units
    integers = bias_integers(bias, 1.0, scale)
    assert integers.tolist() == [3, 5]
    few = bias_fraction(bias, integers, 1.0, scale, span=1000)  # 10 bits; 2**31 leaves 21, and 16 are enough
    assert (few.bits, few.integers.tolist()) == (16, [0, 2**14])
    many = bias_fraction(bias, integers, 1.0, scale, span=2**26)
    assert (many.bits, many.integers.tolist()) == (4, [0, 4])
    wide = bias_fraction(bias, integers, 1.0, scale, span=2**40)  # an int64 accumulator
    assert wide.bits == 16
    assert bias_fraction(bias, integers, 1.0, scale, span=2**31 - 2) is None  # no room
    on_grid = torch.tensor([7.0, -123456.0]) * scale
    assert bias_fraction(on_grid, bias_integers(on_grid, 1.0, scale), 1.0, scale, span=1000) is None
