"""Mixtures of experts in plain ops: the same numbers, and programs where there were refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowering
from lowering.rewrites import apply
from lowering.rewrites.experts import EXPERTS, count_by_comparison, order_by_topk, product_of_every_expert
from quant2e import capture, quantize
from quantizers import XNNPACKQuantizer


class Of(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> object:
        return self.function(*inputs)


IDS = torch.randint(0, 4, (24,), generator=torch.Generator().manual_seed(0))
REALS = torch.randn(200, generator=torch.Generator().manual_seed(1))
ODD = torch.tensor([-1.0, 0.0, 0.999999, 1.0, 2.5, 3.0, 3.0001, float("nan"), float("inf")])

CASES = {
    "counts of ids": (count_by_comparison, lambda x: torch.histc(x, bins=4, min=0, max=3), IDS.float()),
    "counts of anything": (count_by_comparison, lambda x: torch.histc(x, bins=7, min=-1, max=2), REALS.view(10, 20)),
    "bounds": (count_by_comparison, lambda x: torch.histc(x, bins=3, min=0, max=3), ODD),
    "order": (order_by_topk, lambda x: x.argsort(stable=True), IDS),
    "order, int32, descending": (order_by_topk, lambda x: x.argsort(stable=True, descending=True), IDS.int()),
    "order of rows": (order_by_topk, lambda x: x.argsort(dim=0, stable=True), IDS.view(6, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_in_plain_ops(name):
    rewrite, function, x = CASES[name]
    gm = capture(Of(function), (x,))
    assert apply(gm, (rewrite,)) == {rewrite.__name__: 1}
    assert torch.equal(gm(x), function(x))


def test_a_product_for_the_rows_of_each_expert():
    a = torch.randn(24, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    b = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    ends = torch.tensor([5, 5, 20, 24], dtype=torch.int32)
    gm = capture(Of(lambda a, b: torch._grouped_mm(a, b, offs=ends)), (a, b))
    assert apply(gm, (product_of_every_expert,)) == {"product_of_every_expert": 1}
    expected = torch.cat([a[:5] @ b[0], a[5:20] @ b[2], a[20:] @ b[3]])
    torch.testing.assert_close(gm(a, b), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("function", "x", "reason"),
    [
        (lambda x: torch.histc(x, bins=4), REALS, "takes its bounds from the data"),
        (lambda x: x.argsort(), REALS, "sorts no integers"),
    ],
)
def test_what_cannot_be_rewritten_stays_and_says_why(function, x, reason):
    gm = capture(Of(function), (x,))
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    assert apply(gm, EXPERTS) == {}
    assert any(reason in str(rewrite.explain(node)) for rewrite in EXPERTS)


class Experts(nn.Module):
    """Tokens go to one expert each, sorted by expert, as libraries write it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.weight = nn.Parameter(0.1 * torch.randn(4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        share, expert = self.gate(x).softmax(-1).topk(1, -1)
        order = expert.flatten().argsort()
        ends = torch.histc(expert.flatten().float(), bins=4, min=0, max=3).cumsum(0).to(torch.int32)
        y = torch._grouped_mm(x[order].bfloat16(), self.weight.bfloat16(), offs=ends).float()
        return torch.zeros_like(y).index_copy(0, order, y) * share


@pytest.mark.slow
@pytest.mark.parametrize("target", ["executorch", "onnxruntime"])
def test_a_mixture_of_experts_runs(target, tmp_path):
    pytest.importorskip(target)
    torch.manual_seed(0)
    model, x = Experts().eval(), torch.randn(8, 16)
    data = [(torch.randn(8, 16),) for _ in range(6)]
    # One token of the held-out eight goes to another expert, as 2 in 100 do, and owns the SQNR.
    quantized = quantize(model, (x,), XNNPACKQuantizer().set_global("w8a8"), data, min_sqnr_db=None)
    if target == "executorch":
        program = lowering.to_executorch(quantized, (x,))
    else:
        program = lowering.to_onnx(quantized, (x,), path=tmp_path / "experts.onnx")
    torch.testing.assert_close(program(x), quantized(x), rtol=0, atol=0.02)
