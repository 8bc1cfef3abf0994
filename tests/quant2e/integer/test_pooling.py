"""Pooling against the slow model: no difference, in any arithmetic."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tests.quant2e.integer import reference
from tests.quant2e.integer.graphs import CASES, Draw, Tally, Writer, aten, run_integer

AVERAGE = {1: aten.avg_pool1d.default, 2: aten.avg_pool2d.default, 3: aten.avg_pool3d.default}
MAXIMUM = {1: aten.max_pool1d.default, 2: aten.max_pool2d.default, 3: aten.max_pool3d.default}
ADAPTIVE = {
    1: aten.adaptive_avg_pool1d.default,
    2: aten.adaptive_avg_pool2d.default,
    3: aten.adaptive_avg_pool3d.default,
}


def average(values, count, a, grid, mode):
    return reference.requantize(sum(int(v) - a.zero_point for v in values), (a.scale,), grid, mode, count)


def window(draw, spatial):
    kernel = [draw.int(1, 3) for _ in range(spatial)]
    stride = [draw.int(1, 3) for _ in range(spatial)]
    padding = [draw.int(0, k // 2) for k in kernel]
    size = [draw.int(max(k - 2 * p, 1), k + 3) for k, p in zip(kernel, padding, strict=True)]
    return size, kernel, stride, padding


def taken(x, place, size, kernel, stride, padding, dilation=None):
    """The values of one window that lie inside, for one image and channel."""
    dilation = dilation or [1] * len(size)
    lines = [
        [i * s - p + t * d for t in range(k) if 0 <= i * s - p + t * d < n]
        for i, n, k, s, p, d in zip(place, size, kernel, stride, padding, dilation, strict=True)
    ]
    return [x[at] for at in itertools.product(*lines)]


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_average_pool(spatial):
    tally = Tally()
    for seed in range(CASES):
        draw = Draw(seed)
        size, kernel, stride, padding = window(draw, spatial)
        ceil, counted = draw.flag(), draw.flag()
        override = draw.pick(None, 4) if spatial > 1 else None
        if spatial == 3:  # torch averages whole windows only
            size = [max(n, k) for n, k in zip(size, kernel, strict=True)]
        if draw.mode == "power_of_two":  # a count that is a power of two
            kernel, padding, ceil, override = [2] * spatial, [0] * spatial, False, None
            size = [max(n, 2) for n in size]
        a, grid = draw.grid(), draw.grid()
        x = draw.integers([1, 2, *size], a)
        writer = Writer()
        more = (kernel, stride, padding, ceil, counted) + ((override,) if spatial > 1 else ())
        node = writer.op(AVERAGE[spatial], writer.input(x, a), *more)
        found = run_integer(writer, [writer.q(node, grid)], draw.mode)
        out = found[0]
        for at in np.ndindex(*out.shape):
            values = taken(x.numpy()[at[:2]], at[2:], size, kernel, stride, padding)
            ends = [
                min(i * s - p + k, n + p) - (i * s - p)
                for i, s, p, k, n in zip(at[2:], stride, padding, kernel, size, strict=True)
            ]
            count = override or (math.prod(ends) if counted else len(values))
            assert out[at] == average(values, count, a, grid, draw.mode), f"seed {seed} at {at}"
        tally.add(writer, found, draw.mode)
    tally.check()


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_adaptive_average_pool(spatial):
    tally = Tally()
    for seed in range(CASES):
        draw = Draw(seed)
        size = [draw.int(1, 6) for _ in range(spatial)]
        wanted = draw.pick([1] * spatial, [draw.int(1, n) for n in size])
        if draw.mode == "power_of_two":
            size, wanted = [4] * spatial, draw.pick([1] * spatial, [2] * spatial)
        a, grid = draw.grid(), draw.grid()
        x = draw.integers([1, 2, *size], a)
        writer = Writer()
        node = writer.op(ADAPTIVE[spatial], writer.input(x, a), wanted)
        found = run_integer(writer, [writer.q(node, grid)], draw.mode)
        for at in np.ndindex(*found[0].shape):
            lines = [range(i * n // o, -(-(i + 1) * n // o)) for i, n, o in zip(at[2:], size, wanted, strict=True)]
            values = [x.numpy()[at[:2]][place] for place in itertools.product(*lines)]
            assert found[0][at] == average(values, len(values), a, grid, draw.mode), f"seed {seed} at {at}"
        tally.add(writer, found, draw.mode)
    tally.check()


def test_mean():
    tally = Tally()
    for seed in range(CASES):
        draw = Draw(seed)
        size = [4, 2, 4] if draw.mode == "power_of_two" else [draw.int(1, 4) for _ in range(3)]
        dims, keep = draw.pick([0], [1, 2], [-1], [0, 1, 2]), draw.flag()
        a = draw.grid()
        grid = draw.pick(a, draw.grid())
        x = draw.integers(size, a)
        writer = Writer()
        found = run_integer(
            writer, [writer.q(writer.op(aten.mean.dim, writer.input(x, a), dims, keep), grid)], draw.mode
        )
        total = (x.numpy().astype(np.int64) - a.zero_point).sum(tuple(dims), keepdims=keep)
        count = math.prod(size[d] for d in dims)
        if grid is a and draw.mode == "float32":  # XNNPACK: zero points cancel, ties are range_tolerance by Σ q
            raw, inverse = (total + count * a.zero_point).astype(np.float32), np.float32(1) / np.float32(count)
            offset = np.float32(a.zero_point) - np.float32(count * a.zero_point) * inverse
            expected = np.clip(np.rint(raw * inverse + offset), a.low, a.high)
        else:
            expected = reference.each(total, lambda v: reference.requantize(v, (a.scale,), grid, draw.mode, count))
        np.testing.assert_array_equal(found[0], expected, err_msg=f"seed {seed}")
        if grid is not a:  # every n-th mean of n values, n even, is a tie, and float noise settles it in the Q/DQ graph
            tally.add(writer, found, draw.mode)
    tally.check()


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_max_pool(spatial):
    for seed in range(CASES):
        draw = Draw(seed)
        size, kernel, stride, padding = window(draw, spatial)
        dilation = [draw.int(1, 2) for _ in kernel]
        size = [max(n, d * (k - 1) + 1) for n, d, k in zip(size, dilation, kernel, strict=True)]
        ceil = draw.flag()
        a = draw.grid()
        grid = draw.pick(a, draw.grid(dtype=a.dtype))
        x = draw.integers([1, 2, *size], a)
        writer = Writer()
        node = writer.op(MAXIMUM[spatial], writer.input(x, a), kernel, stride, padding, dilation, ceil)
        found = run_integer(writer, [writer.q(node, grid)], draw.mode)
        for at in np.ndindex(*found[0].shape):
            values = taken(x.numpy()[at[:2]], at[2:], size, kernel, stride, padding, dilation)
            top = int(max(values))
            expected = top if grid is a else reference.requantize(top - a.zero_point, (a.scale,), grid, draw.mode)
            assert found[0][at] == expected, f"seed {seed} at {at}"


@pytest.mark.parametrize("mode", ["float32", "fixed_point_single_rounding"])
@pytest.mark.parametrize("form", ["mean", "avg_pool2d"])
def test_averages_on_the_scale_of_their_operand_differ_from_qdq_at_exact_ties_only(form, mode):
    """Of n values, n even, every n-th sum lies half-way between two outputs. What the Q/DQ graph does with it depends
    on float noise; the integer graph has a rule. Everywhere else the two agree."""
    differing = 0
    for seed in range(40):
        draw = Draw(seed)
        draw.mode = "float32"
        a = draw.grid()
        x = draw.integers([2, 8, 4, 4], a)
        writer = Writer()
        dq = writer.input(x, a)
        node = (
            writer.op(aten.mean.dim, dq, [2, 3]) if form == "mean" else writer.op(aten.avg_pool2d.default, dq, [2, 2])
        )
        (found,) = run_integer(writer, [writer.q(node, a)], mode)
        reference_out = writer.results[0].numpy().astype(np.int64)
        steps = x.numpy().astype(np.int64) - a.zero_point
        if form == "mean":
            total, count = steps.sum((2, 3)), 16
        else:
            total, count = steps.reshape(2, 8, 2, 2, 2, 2).sum((3, 5)), 4
        tie = total % count == count // 2
        assert (found == reference_out)[~tie].all()
        assert np.abs(found - reference_out).max() <= 1
        differing += int((found != reference_out).sum())
    assert differing > 0
