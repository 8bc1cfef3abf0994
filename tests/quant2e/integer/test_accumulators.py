"""Narrow accumulators, with overflows worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quant2e import Quant2eError, quantize
from quant2e.integer import Overflow, simulate_accumulator, to_integer
from quant2e.integer.accumulators import simulate
from quantizers import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from tests.quant2e.integer.graphs import Writer, aten
from tests.quant2e.integer.reference import Grid


def column(*values):
    return torch.tensor(values).reshape(-1, 1)


def row(*values):
    return torch.tensor([values])


def test_pairs_saturate_at_16_bits():
    # 255·127 + 255·127 = 64,770 → 32,767: 32,003 lost; 255·(−128)·2 = −65,280 → −32,768: 32,512 lost
    assert simulate(row(255, 255), column(127, 127), "pairs16") == Overflow("", 1, 1, 1, 64770, 32767, 32003)
    assert simulate(row(255, 255), column(-128, -128), "pairs16") == Overflow("", 1, 1, 1, 65280, 32767, 32512)
    # an odd last product stands alone: 255·127 = 32,385 fits
    assert simulate(row(0, 0, 255), column(127, 127, 127), "pairs16") == Overflow("", 1, 0, 0, 32385, 32767, 0)
    # two pairs, one of each sign: the losses cancel but for 509
    found = simulate(row(255, 255, 255, 255), column(127, 127, -128, -128), "pairs16")
    assert found == Overflow("", 1, 1, 1, 65280, 32767, 509)


def test_running_sums_may_overflow_and_still_end_right():
    # 3 · 12,700 = 38,100 > 32,767 on the way; the end, 25,400, fits, and wrapping gives it back
    found = simulate(row(100, 100, 100, -100), column(127, 127, 127, 127), "int16")
    assert found == Overflow("", 1, 1, 0, 38100, 32767, 0)
    found = simulate(row(100, 100, 100), column(127, 127, 127), "int16")
    assert found == Overflow("", 1, 1, 1, 38100, 32767, 65536)
    assert simulate(row(100, 100, 100), column(127, 127, 127), "int24") == Overflow("", 1, 0, 0, 38100, 8388607, 0)


def test_24_bits_overflow_beyond_eight_million():
    rows, weight = torch.full((1, 600), 127), torch.full((600, 1), 127)  # 600 · 16,129 = 9,677,400
    assert simulate(rows, weight, "int24") == Overflow("", 1, 1, 1, 9677400, 8388607, 16777216)


def written(x, grid, weight, **conv):
    writer = Writer()
    target = aten.linear.default if weight.dim() == 2 else aten.conv2d.default
    more = (None, *conv["args"]) if conv else ()
    node = writer.op(target, writer.input(x, grid), writer.weight(weight, 0.01, None), *more)
    out = Grid(1.0, 0, -128, 127)
    out.dtype = torch.int8
    return to_integer(writer.finish(writer.q(node, out)), strict=True)


def unsigned(zero_point):
    grid = Grid(0.1, zero_point, 0, 255)
    grid.dtype = torch.uint8
    return grid


def test_a_layer_is_simulated_on_its_own_integers():
    x = torch.tensor([[255, 255, 0, 0], [10, 10, 10, 10]], dtype=torch.uint8)
    weight = torch.tensor([[127, 127, 0, 0], [1, 1, 1, 1]], dtype=torch.int8)
    gm = written(x, unsigned(0), weight)
    assert simulate_accumulator(gm, [x], "pairs16") == (Overflow("linear_default", 4, 1, 1, 64770, 32767, 32003),)
    assert simulate_accumulator(gm, [(x,), {"x1": x}], "pairs16")[0].sums == 8  # tuples and dicts are batches, too
    # without its zero point 255 is 127: 2 · 127 · 127 = 32,258 fits 16 bits
    assert simulate_accumulator(written(x, unsigned(128), weight), [x], "int16")[0].overflowing == 0
    text = str(simulate_accumulator(gm, [x], "pairs16")[0])
    assert text == (
        "linear_default: 1 of 4 sums overflow (25.00%), 1 are wrong, by up to 32,003; peak 64,770 is 1.98 x the limit"
    )


def test_padding_of_a_convolution_is_the_zero_point():
    x = torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)
    weight = torch.full((1, 1, 1, 2), 127, dtype=torch.int8)
    # two outputs: (padding, 255) and (255, padding), with a padding of 200: (200 + 255) · 127 = 57,785
    gm = written(x, unsigned(200), weight, args=([1, 1], [0, 1]))
    assert simulate_accumulator(gm, [x], "pairs16")[0] == Overflow("conv2d_default", 2, 2, 2, 57785, 32767, 25018)
    # bits count from the zero point: 55 · 127 = 6,985
    assert simulate_accumulator(gm, [x], "int16")[0] == Overflow("conv2d_default", 2, 0, 0, 6985, 32767, 0)


def test_a_network_with_full_ranges_saturates_and_with_the_other_policies_does_not():
    torch.manual_seed(0)
    x = torch.rand(16, 64)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.weight.copy_(layer.weight.sign() * layer.weight.abs().max())
    overflows = {}
    for policy in ("full", "auto", "7-bit activations", "7-bit weights"):
        quantizer = X86InductorQuantizer("avx2", policy).set_global(get_default_x86_inductor_quantization_config())
        quantized = quantize(net, (x,), quantizer, [x], use_reference_representation=True)
        overflows[policy] = [o.overflowing for o in simulate_accumulator(quantized.module, [x], "pairs16")]
    assert overflows.pop("full")[0] > 0
    assert {policy: sum(found) for policy, found in overflows.items()} == dict.fromkeys(overflows, 0)


def test_another_accumulator_is_refused():
    x = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    gm = written(x, unsigned(0), torch.ones(1, 4, dtype=torch.int8))
    with pytest.raises(Quant2eError, match="choose one of pairs16, int16, int24"):
        simulate_accumulator(gm, [x], "int8")
