"""What is known at run time only: sizes of pooled images, scales of tokens."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quant2e import integer_report, quantize, to_integer
from quant2e.graph.qdq_ops import qd
from quant2e.integer.ops import pooling
from quantizers import (
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)
from tests.quant2e.integer import reference
from tests.quant2e.integer.graphs import CASES, Draw, Tally, Writer, aten, run_integer


def case(seed):
    draw = Draw(seed)
    draw.mode = ("float32", "fixed_point", "fixed_point_single_rounding")[seed % 3]
    return draw


def off_ties(scale, grid):
    """Scales equal or a small ratio apart make ties of many averages, which float noise settles in the Q/DQ graph."""
    return abs(math.log2(scale / grid.scale)) % 1 > 0.01


@pytest.mark.parametrize("form", ["mean", "adaptive", "avg_pool1d", "avg_pool2d", "avg_pool3d"])
def test_pooling_over_sizes_that_vary(form, monkeypatch):
    monkeypatch.setattr(pooling, "_static", lambda sizes: None)
    tally = Tally()
    for seed in range(CASES):
        draw = case(seed)
        a, grid = draw.grid(), draw.grid()
        spatial = int(form[-2]) if form.startswith("avg") else 2
        size = [draw.int(3, 6) for _ in range(spatial)]
        x = draw.integers([1, 2, *size], a)
        writer = Writer()
        dq = writer.input(x, a)
        if form == "mean":
            node = writer.op(aten.mean.dim, dq, [2, 3], draw.flag())
            places = [[range(n)] for n in size]
        elif form == "adaptive":
            wanted = [draw.int(1, n) for n in size]
            wanted[0] = max(wanted[0], 2)
            node = writer.op(aten.adaptive_avg_pool2d.default, dq, wanted)
            places = [
                [range(i * n // o, -(-(i + 1) * n // o)) for i in range(o)] for n, o in zip(size, wanted, strict=True)
            ]
        else:
            kernel, stride = draw.int(2, 3), draw.int(1, 2)
            more = ([kernel] * spatial, [stride] * spatial, [1] * spatial, False, False)
            node = writer.op(getattr(aten, form).default, dq, *more)
            ends = [(n + 2 - kernel) // stride + 1 for n in size]
            places = [
                [range(max(i * stride - 1, 0), min(i * stride - 1 + kernel, n)) for i in range(o)]
                for n, o in zip(size, ends, strict=True)
            ]
        found = run_integer(writer, [writer.q(node, grid)], draw.mode)
        out = found[0].reshape([1, 2, *map(len, places)])
        for at in np.ndindex(*out.shape):
            lines = [line[i] for line, i in zip(places, at[2:], strict=True)]
            values = [int(x[(*at[:2], *place)]) - a.zero_point for place in itertools.product(*lines)]
            assert out[at] == reference.divided(sum(values), a.scale, len(values), grid), f"seed {seed} at {at}"
        if off_ties(a.scale, grid):
            tally.add(writer, found, "any")
    tally.check()


class Varying(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = F.avg_pool2d(F.relu(self.a(x)), 3, 2, 1, count_include_pad=False)
        return self.b(F.adaptive_avg_pool2d(x, 3))


def test_a_network_takes_images_of_any_size():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, 12)
    sizes = {2: torch.export.Dim("h", min=8, max=64), 3: torch.export.Dim("w", min=8, max=64)}
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    quantized = quantize(Varying().eval(), (x,), quantizer, [x], dynamic_shapes=(sizes,))
    gm = to_integer(quantized.module, strict=True)
    assert integer_report(gm).of("avg_pool2d").reason == "average by an integer division, int64 accumulator"
    exported = torch.export.export(gm, (x,), dynamic_shapes=(sizes,))
    for shape in ((10, 12), (17, 9), (33, 24)):
        other = torch.randn(2, 3, *shape)
        step = gm(other) - quantized(other)
        assert step.abs().max() < 0.03  # ties of averages: a step of one or two inputs of the last layer
        assert torch.equal(exported.module()(other), gm(other))


class Resized(nn.Module):
    """What XNNPACK's quantizer annotates although only portable kernels have it: upsampling, borders, columns."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = F.interpolate(F.relu(self.a(x)), scale_factor=1.7)
        x = self.b(F.pad(x, (2, 1, 1, 2), mode="replicate"))
        return F.unfold(x, 2, padding=1) + 0.0


def test_places_of_upsampling_follow_the_sizes():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 10, 12)
    sizes = {2: torch.export.Dim("h", min=8, max=64), 3: torch.export.Dim("w", min=8, max=64)}
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    quantized = quantize(Resized().eval(), (x,), quantizer, [x], dynamic_shapes=(sizes,))
    gm = to_integer(quantized.module, strict=True)
    reasons = {v.op.split(".")[1]: v.reason for v in integer_report(gm).verdicts if v.integer}
    assert {name: reasons[name] for name in ("pad", "upsample_nearest2d", "im2col")} == {
        "pad": "moves integers",
        "upsample_nearest2d": "picks integers",
        "im2col": "moves integers",
    }
    exported = torch.export.export(gm, (x,), dynamic_shapes=(sizes,))
    for shape in ((10, 12), (17, 9), (33, 24)):
        other = torch.randn(2, 3, *shape)
        assert torch.equal(gm(other), quantized(other))
        assert torch.equal(exported.module()(other), gm(other))


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("grouped", [False, True], ids=["per channel", "group-wise"])
def test_a_scale_for_each_token(scheme, grouped):
    for seed in range(CASES):
        draw = Draw(seed, (torch.int8,))
        size, groups, n = draw.int(2, 4), draw.int(1, 3) if grouped else 1, draw.int(1, 4)
        k = size * groups
        x = torch.from_numpy(draw.rng.normal(0.3, 2, [draw.int(1, 2), draw.int(1, 4), k])).float()
        writer = Writer()
        real = writer.plain(x)
        if scheme == "symmetric":
            chosen = writer.op(qd.choose_qparams_per_token.default, real, torch.int8)
        else:
            chosen = writer.op(qd.choose_qparams_per_token_asymmetric.default, real, torch.int8)
        scale, zero = (writer.pick(chosen, i) for i in range(2))
        low = -127 if scheme == "symmetric" else -128
        q = writer.op(qd.quantize_per_token.default, real, scale, zero, low, 127, torch.int8)
        dq = writer.op(qd.dequantize_per_token.default, q, scale, zero, low, 127, torch.int8, torch.float32)
        w, scales = draw.weight([n, k], -8, 7), draw.scales(n * groups)
        if grouped:
            zeros = writer.constant(torch.zeros(n, groups, dtype=torch.int64))
            dw = writer.op(
                qd.dequantize_per_channel_group.default, writer.constant(w), writer.constant(scales.reshape(n, groups)),
                zeros, -8, 7, torch.int8, size, torch.float32,
            )  # fmt: skip
        else:
            dw = writer.weight(w, scales, 0)
        bias = torch.from_numpy(draw.rng.normal(0, 1, n)).float() if draw.flag() else None
        y = writer.op(aten.linear.default, dq, dw, None if bias is None else writer.constant(bias))
        gm = to_integer(writer.finish(y, q), strict=True)
        assert all(str(node.target).startswith("aten.") for node in gm.graph.nodes if node.op == "call_function")
        ours, integers = gm(x)
        assert torch.equal(integers, q.meta["val"])
        steps = integers.long() - zero.meta["val"].long()
        expected = torch.zeros_like(ours, dtype=torch.float64)
        for g in range(groups):
            part = slice(g * size, (g + 1) * size)
            sums = steps[..., part] @ w[:, part].long().t()
            expected += sums.double() * scales.reshape(n, groups)[:, g].double()
        expected = expected * scale.meta["val"].double() + (0 if bias is None else bias.double())
        torch.testing.assert_close(ours.double(), expected, rtol=2e-6, atol=2e-6)
