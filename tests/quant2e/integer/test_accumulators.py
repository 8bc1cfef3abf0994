"""Narrow accumulators, with overflows worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quant2e import Quant2eError, integer_report, quantize
from quant2e.graph.qdq_ops import qd
from quant2e.integer import Overflow, simulate_accumulator, to_integer
from quant2e.integer.accumulators import matrices, simulate
from quant2e.integer.trace import tensors
from quantizers import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from tests.quant2e.integer.graphs import Draw, Writer, aten
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


def written(x, grid, weight, *, transposed=False, **conv):
    writer = Writer()
    target = aten.linear.default if weight.dim() == 2 else aten.conv2d.default
    target = aten.conv_transpose2d.input if transposed else target
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


def test_a_transposed_convolution_is_simulated():
    x = torch.tensor([[[[255, 255], [0, 0]]]], dtype=torch.uint8)
    weight = torch.full((1, 1, 1, 2), 127, dtype=torch.int8)
    # rows of three outputs: 255·127, (255 + 255)·127 = 64,770, 255·127; and three zeros
    gm = written(x, unsigned(0), weight, transposed=True, args=([1, 1], [0, 0]))
    found = simulate_accumulator(gm, [x], "pairs16")
    assert found == (Overflow("conv_transpose2d_input", 6, 1, 1, 64770, 32767, 32003),)
    # without its zero point 255 is 55 and 0 is −200: 400 · 127 = 50,800 in one output, 110 · 127 in another
    gm = written(x, unsigned(200), weight, transposed=True, args=([1, 1], [0, 0]))
    assert simulate_accumulator(gm, [x], "int16") == (Overflow("conv_transpose2d_input", 6, 1, 1, 50800, 32767, 65536),)


def test_the_sums_simulated_are_those_of_the_graph():
    """Rows times weights, without an accumulator's limits, are the accumulators:
    over strides, groups, dilations, crops.
    """
    for seed in range(60):
        draw = Draw(seed)
        transposed, groups = seed % 2 == 1, draw.pick(1, 2)
        stride, dilation, kernel, padding = (
            [draw.int(lo, hi), draw.int(lo, hi)] for lo, hi in ((1, 3), (1, 2), (1, 3), (0, 1))
        )
        extra = [draw.int(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)]
        a, grid = draw.grid(), draw.grid()
        x = draw.integers([2, 2 * groups, 5, 6], a)
        w = draw.weight([2 * groups, 3, *kernel] if transposed else [3 * groups, 2, *kernel])
        axis, channels = (1, 3) if transposed else (0, 3 * groups)
        zeros = torch.from_numpy(draw.rng.integers(-9, 9, channels))
        writer = Writer()
        weight = writer.weight(w, torch.full([channels], 2.0**-7), axis, zeros)
        dq = writer.input(x, a)
        if transposed:
            node = writer.op(aten.conv_transpose2d.input, dq, weight, None, stride, padding, extra, groups, dilation)
        else:
            node = writer.op(aten.conv2d.default, dq, weight, None, stride, padding, dilation, groups)
        gm = to_integer(writer.finish(writer.q(node, grid)))
        (record,) = [r for r in integer_report(gm).records if r.kind == "convolution"]
        seen = tensors(gm, {record.inputs["x"], record.accumulator}, x)
        acc = seen[record.accumulator].long()
        sums = torch.cat([r @ w for r, w in matrices(record, {"x": seen[record.inputs["x"]]}, "int24")], 1)
        assert torch.equal(sums.reshape(acc.shape[0], *acc.shape[2:], -1).movedim(-1, 1), acc), seed


def test_two_activations_are_simulated_matrix_by_matrix():
    x, y = torch.full([2, 1, 3], 255, dtype=torch.uint8), torch.full([2, 3, 1], 227, dtype=torch.uint8)
    y[1] = 0
    writer = Writer()
    node = writer.op(aten.matmul.default, writer.input(x, unsigned(0)), writer.input(y, unsigned(100)))
    gm = to_integer(writer.finish(writer.q(node, unsigned(0))), strict=True)
    # as s8 227 is 99 and 0 is −128: 255 · 99 · 2 = 50,490 and −255 · 128 · 2 = −65,280; the third product stands alone
    assert simulate_accumulator(gm, [(x, y)], "pairs16") == (Overflow("matmul_default", 2, 2, 2, 65280, 32767, 32512),)
    # without zero points 127 and −100: 3 · 255 · 127 = 97,155, 3 · 25,500 = 76,500
    assert simulate_accumulator(gm, [(x, y)], "int16") == (Overflow("matmul_default", 2, 2, 2, 97155, 32767, 65536),)


def test_each_group_of_a_group_wise_layer_has_its_own_accumulator():
    x = torch.full([1, 4], 255, dtype=torch.uint8)
    w = torch.tensor([[7, 7, -8, -8]], dtype=torch.int8)
    writer = Writer()
    scales, zeros = torch.full([1, 2], 0.5), torch.zeros([1, 2], dtype=torch.int64)
    dw = writer.op(
        qd.dequantize_per_channel_group.default, writer.constant(w), writer.constant(scales), writer.constant(zeros),
        -8, 7, torch.int8, 2, torch.float32,
    )  # fmt: skip
    node = writer.op(aten.linear.default, writer.input(x, unsigned(0)), dw)
    gm = to_integer(writer.finish(writer.q(node, unsigned(0))), strict=True)
    # two sums, 255 · 14 and −255 · 16 = −4,080
    assert simulate_accumulator(gm, [x], "int16") == (Overflow("linear_default", 2, 0, 0, 4080, 32767, 0),)


@pytest.mark.parametrize("is_dynamic", [True, False])
def test_layers_that_answer_in_float_are_simulated_too(is_dynamic):
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic))
    net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4)).eval()
    quantized = quantize(net, (x,), quantizer, None if is_dynamic else [x], use_reference_representation=True)
    found = simulate_accumulator(quantized.module, [x], "int24")
    assert [(o.name, o.sums, o.overflowing) for o in found] == [("linear", 128, 0), ("linear_1", 16, 0)]
    assert all(o.peak > 1000 for o in found)
