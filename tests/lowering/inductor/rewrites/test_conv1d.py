"""Quantized convolutions in one dimension become such in two, with the same bits; others are left alone."""

import pytest
import torch
import torch.nn.functional as F

from lowering.inductor.rewrites.conv1d import convolutions_in_two_dimensions
from lowering.inductor.rewrites.graph import private_copy
from lowering.inductor.rewrites.pipeline import narrow_ranges
from quant2e.graph.qdq_ops import qd
from quant2e.passes import run
from quant2e.passes.dead_code import remove_dead_code
from tests.lowering.inductor.rewrites.test_pipeline import graph, weight

aten = torch.ops.aten
LINE = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(3))


def u8(x, low=0, high=255):
    args = (0.03, 60, low, high, torch.uint8)
    return qd.dequantize_per_tensor.default(qd.quantize_per_tensor.default(x, *args), *args)


TABLE = {
    "plain": (lambda m, x: F.conv1d(u8(x), m.w()), 1),
    "stride, padding, dilation": (lambda m, x: F.conv1d(u8(x), m.w(), None, 2, 3, 2), 1),
    "same size": (lambda m, x: F.conv1d(u8(x), m.w(), padding="same", dilation=2), 1),
    "a bias": (lambda m, x: F.conv1d(u8(x), m.w(), m.b), 1),
    "groups": (lambda m, x: F.conv1d(u8(x[:, :4].repeat(1, 4, 1)), m.w(), groups=2), 1),
    "a residual": (lambda m, x: F.conv1d(u8(x), m.w(), padding=1) + x, 1),
    "two users": (lambda m, x: (lambda y: y.sigmoid() * y)(F.conv1d(u8(x), m.w())), 1),
    "an activation that writes in place": (lambda m, x: F.relu(F.conv1d(u8(x), m.w()), inplace=True), 1),
    "two of them, clamped": (lambda m, x: F.conv1d(u8(F.relu6(F.conv1d(u8(x), m.w())), 0, 127), m.w()), 1),
        # integers stay unsqueezed
    "a float input": (lambda m, x: F.conv1d(x, m.w()), 0),
    "two dimensions": (lambda m, x: F.conv2d(u8(x)[None], m.w()[None, :, :2].repeat(8, 1, 1, 1)[:, :2]), 0),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_same_bits(case):
    function, expected = TABLE[case]
    model = graph(function, LINE, w=weight(8, 8, 3), b=torch.randn(8))
    copy = private_copy(model)
    narrow_ranges(copy)
    run(copy, (convolutions_in_two_dimensions, remove_dead_code), compiled=False)
    copy.graph.lint()
    copy.recompile()
    assert torch.equal(copy(LINE)[0], model(LINE))
    found = [node.target for node in copy.graph.nodes]
    assert found.count(aten.squeeze.dim) == expected
    assert (aten.conv1d.default in found or aten.conv1d.padding in found) is (
        expected == 0 and case != "two dimensions"
    )


def test_what_is_fused_stays_next_to_its_convolution():
    model = graph(lambda m, x: F.conv1d(u8(F.relu6(F.conv1d(u8(x), m.w())), 0, 127), m.w()), LINE, w=weight(8, 8, 3))
    copy = private_copy(model)
    narrow_ranges(copy)
    run(copy, (convolutions_in_two_dimensions, remove_dead_code), compiled=False)
    node = next(n for n in copy.graph.nodes if n.target is aten.conv2d.default)
    chain = []
    while node.target is not qd.dequantize_per_tensor.default:
        (node,) = node.users
        chain.append(node.target)
    assert chain[0] in (aten.relu6.default, aten.hardtanh.default)
    assert chain[1:] == [qd.quantize_per_tensor.default, aten.minimum.default, node.target]
