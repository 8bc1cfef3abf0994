"""Sums behind convolutions: what becomes one kernel, and that it writes over nothing that others read."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowering import package_inductor, to_inductor, verify
from lowering.inductor.pipeline import AS_CALLS
from lowering.inductor.rewrites.graph import private_copy
from lowering.inductor.rewrites.pipeline import REWRITES
from quant2e.passes import run
from tests.lowering.inductor.rewrites.test_kernel_calls import u8
from tests.lowering.inductor.rewrites.test_pipeline import graph, weight

GENERATOR = torch.Generator().manual_seed(8)
IMAGE = torch.randn(2, 8, 6, 5, generator=GENERATOR)
PARTS = {
    "w": weight(8, 8, 3, 3), "one": weight(1, 8, 3, 3), "b": torch.randn(8),
    "constant": torch.randn(2, 8, 6, 5), "integers": torch.randint(0, 255, (2, 8, 6, 5), dtype=torch.uint8),
}  # fmt: skip
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default


def conv(m, x):
    return F.conv2d(u8(x), m.w(), m.b, padding=1)


SUMS = {
    "relu": (lambda m, x: u8(F.relu(conv(m, x) + u8(x.sin())), 0.05, 3), True),
    "no relu": (lambda m, x: u8(u8(x, 0.02, 7).add_(conv(m, x)), 0.05, 100), True),
    "relu in place": (lambda m, x: u8((conv(m, x) + u8(x.cos())).relu_(), 0.05, 0), True),
    "what is added is read later": (
        lambda m, x: (lambda y: u8(conv(m, x) + y, 0.05, 100) * y.sin())(u8(x.cos())), True,
    ),
    "what is added is an input": (lambda m, x: u8(conv(m, x) + u8(x), 0.05, 100), True),
    "a constant": (
        lambda m, x: u8(conv(m, x) + DEQUANTIZE(m.integers, 0.01, 9, 0, 255, torch.uint8), 0.05, 100), True,
    ),
    "one is added to each channel": (lambda m, x: u8(conv(m, x) + u8(F.conv2d(x, m.one(), padding=1)), 0.05, 9), False),
    "the sum is float": (lambda m, x: conv(m, x) + u8(x.sin()), False),
    "what is added is float": (lambda m, x: u8(conv(m, x) + x.sin(), 0.05, 100), False),
    "a float constant": (lambda m, x: u8(conv(m, x) + m.constant, 0.05, 100), False),
    "a factor": (lambda m, x: u8(torch.add(conv(m, x), u8(x.sin()), alpha=2), 0.05, 100), False),
    "itself": (lambda m, x: (lambda y: u8(y + y, 0.05, 100))(conv(m, x)), False),
    "two products": (lambda m, x: u8(conv(m, x) + conv(m, x.sin()), 0.05, 100), False),
    "another activation": (lambda m, x: u8(F.silu(conv(m, x) + u8(x.sin())), 0.05, 100), False),
    "the product is read as well": (lambda m, x: (lambda y: u8(y + u8(x), 0.05, 3) + y)(conv(m, x)), False),
}  # fmt: skip


@pytest.mark.parametrize("case", SUMS)
def test_which_sums_are_part_of_a_kernel(case):
    function, fused = SUMS[case]
    model = graph(function, IMAGE, **PARTS)
    copy = private_copy(model)
    run(copy, REWRITES, compiled=False)
    run(copy, AS_CALLS, compiled=False)
    copy.recompile()
    assert ("quant2e.convolution_sum" in str(copy.graph)) is fused
    for _ in range(2):  # a constant that was written to would show in the second call
        assert (copy(IMAGE)[0] - model(IMAGE)).abs().max() < 0.0501  # a sum on the edge between two integers


class Together(nn.Module):
    def __init__(self):
        super().__init__()
        for name, part in PARTS.items():
            self.register_buffer(name, part) if isinstance(part, torch.Tensor) else self.add_module(name, part)

    def forward(self, x):
        seen = u8(x.cos())
        first = u8(F.relu(conv(self, x) + seen), 0.05, 3)
        second = u8(F.relu(conv(self, first) + first), 0.05, 3)
        return second.flatten(1), first.mean((2, 3)) + seen.amax((2, 3)), u8(conv(self, second) + u8(x), 0.05, 100)


@pytest.mark.inductor
def test_compiled_for_any_batch():
    batch = torch.export.Dim("batch", min=1, max=64)
    model = torch.export.export(Together().eval(), (IMAGE,), strict=False, dynamic_shapes=({0: batch},)).module()
    program = to_inductor(model, (IMAGE,), engines="onednn")
    assert [op.kernel for op in program.report.ops] == ["onednn.qconv_binary"] * 3
    assert [op.post_op for op in program.report.ops] == ["relu", "relu", ""]
    for size in (1, 2, 5):
        found = verify(program, model, [(torch.randn(size, 8, 6, 5, generator=GENERATOR),)] * 2)
        assert found.sqnr_db > 45  # steps on the edge travel


@pytest.mark.slow
@pytest.mark.inductor
def test_packaged(tmp_path):
    model = torch.export.export(Together().eval(), (IMAGE,), strict=False).module()
    package = package_inductor(model, (IMAGE,), path=tmp_path / "model.pt2", engines="onednn")
    assert [op.kernel for op in package.report.ops] == ["onednn.qconv_binary"] * 3
    assert package.verification.sqnr_db > 45
