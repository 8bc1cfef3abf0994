"""Pools of one and three dimensions: the same bits as pools of integers in two, and which are left alone."""

import pytest
import torch
import torch.nn.functional as F

from lowering import to_inductor
from lowering.inductor.rewrites.graph import private_copy
from lowering.inductor.rewrites.pools import pools_in_two_dimensions
from quant2e.graph.qdq_ops import qd
from quant2e.passes import run
from quant2e.passes.dead_code import remove_dead_code
from tests.lowering.inductor.rewrites.test_conv1d import LINE, u8
from tests.lowering.inductor.rewrites.test_pipeline import graph, targets

GENERATOR = torch.Generator().manual_seed(5)
VOLUME = torch.randn(2, 3, 7, 8, 9, generator=GENERATOR)
EVEN = VOLUME[:, :, :6]


def wider(x):
    args = (0.06, 60, 0, 255, torch.uint8)
    return qd.dequantize_per_tensor.default(qd.quantize_per_tensor.default(x, *args), *args)


POOLED = {
    "line": (lambda m, x: u8(F.max_pool1d(u8(x), 3)), LINE, 1),
    "line, all sizes": (lambda m, x: u8(F.max_pool1d(u8(x), 3, 2, 1, 2, ceil_mode=True)), LINE, 1),
    "volume": (lambda m, x: u8(F.max_pool3d(u8(x), 2)), VOLUME, 2),
    "volume, all sizes": (
        lambda m, x: u8(F.max_pool3d(u8(x), (3, 2, 3), (2, 1, 2), (1, 0, 1), (1, 2, 1), ceil_mode=True)), VOLUME, 2,
    ),
}  # fmt: skip


def rewritten(function, x):
    model = graph(function, x)
    copy = private_copy(model)
    count = run(copy, (pools_in_two_dimensions, remove_dead_code)).get("pools_in_two_dimensions", 0)
    return model, copy, count


@pytest.mark.parametrize("case", POOLED)
def test_same_bits(case):
    function, x, pools = POOLED[case]
    model, copy, count = rewritten(function, x)
    assert count == 1
    assert targets(copy).count("aten.max_pool2d.default") == pools
    assert not {"aten.max_pool1d.default", "aten.max_pool3d.default"} & {*targets(copy)}
    assert torch.equal(copy(x)[0], model(x))


AVERAGES = {
    "one voxel": (lambda m, x: F.adaptive_avg_pool3d(x, 1), VOLUME, "aten.mean.dim"),
    "boxes": (lambda m, x: F.adaptive_avg_pool3d(x, (3, 2, None)), EVEN, "aten.avg_pool3d.default"),
}


@pytest.mark.parametrize("case", AVERAGES)
def test_averages(case):
    function, x, target = AVERAGES[case]
    model, copy, _ = rewritten(function, x)
    assert targets(copy) == [target]
    torch.testing.assert_close(copy(x)[0], model(x))


LEFT = {
    "another scale": (lambda m, x: wider(F.max_pool1d(u8(x), 3)), LINE, "has other parameters than"),
    "no batch": (lambda m, x: u8(F.max_pool1d(u8(x), 3)), LINE[0], "has no batch"),
    "windows that differ": (lambda m, x: F.adaptive_avg_pool3d(x, 2), VOLUME, "differ in size"),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_alone(case):
    function, x, reason = LEFT[case]
    _, copy, count = rewritten(function, x)
    assert count == 0
    roots = [node for node in copy.graph.nodes if node.op == "call_function"]
    reasons = [rewrite.explain(node) or "" for rewrite in pools_in_two_dimensions.rewrites for node in roots]
    assert any(reason in each for each in reasons)


@pytest.mark.slow
@pytest.mark.inductor
def test_compiled():
    def function(m, line, volume):
        return (
            u8(F.max_pool1d(u8(line.sin()), 3, 2)),
            u8(F.max_pool3d(u8(volume.sin()), 2)),
            F.adaptive_avg_pool3d(u8(volume), 1),
        )

    batch = torch.export.Dim("batch", min=2, max=8)
    model = graph(function, LINE, VOLUME, dynamic_shapes=(({0: batch}, {0: batch}),))
    program = to_inductor(model, (LINE, VOLUME))
    assert [op.kernel for op in program.report.ops] == ["quantized.max_pool2d"] * 2
    assert program.report.notes == ()
    assert program.verification.sqnr_db > 80
