"""Rewrites of quantizers: the graph before and after, and why they do not apply elsewhere."""

import pytest
import torch
from torch import nn

from quant2e.graph.printer import graph_text
from quant2e.passes import run
from quantizers.rewrites.clamps import clamps_as_fused
from quantizers.rewrites.matmul_to_linear import products_as_linear
from quantizers.rewrites.scalars import scalars_as_tensors
from tests.quantizers.models import ROWS, Of, captured


def always(node):
    return True


def rewrite_of(kind, gm):
    return products_as_linear(gm.graph, always) if kind is products_as_linear else kind(always)


def holding(function):
    model = Of(function)
    model.w, model.b = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))
    return model


REWRITES = {
    "relu": (clamps_as_fused, lambda m, x: x.clamp_min(0)),
    "hardtanh": (clamps_as_fused, lambda m, x: x.clamp(-1, 6)),
    "hardtanh_in_place": (clamps_as_fused, lambda m, x: x.neg().clamp_(-1, 6)),
    "addmm": (products_as_linear, lambda m, x: torch.addmm(m.b, x, m.w)),
    "matmul": (products_as_linear, lambda m, x: x @ m.w),
    "add": (scalars_as_tensors, lambda m, x: x + 3),
    "rsub": (scalars_as_tensors, lambda m, x: 3 - x),
}


@pytest.mark.parametrize("name", REWRITES)
def test_before_and_after(name, golden):
    kind, function = REWRITES[name]
    gm = captured(holding(function), ROWS)
    before = graph_text(gm.graph)
    assert run(gm, (rewrite_of(kind, gm),)) == {kind.__name__: 1}
    golden(f"rewrites/quantizers/{name}", f"{before}\n\n=>\n\n{graph_text(gm.graph)}")


REFUSALS = [
    (clamps_as_fused, lambda m, x: x.clamp(max=1), "'clamp' clamps to [None, 1], which is neither relu nor hardtanh"),
    (products_as_linear, lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), "'addmm' has factors"),
    (products_as_linear, lambda m, x: x.t() @ x, "operand 'w' of 'matmul' is not constant"),
    (products_as_linear, lambda m, x: m.w.t() @ m.w, "'t' is constant as well"),
    (scalars_as_tensors, lambda m, x: x + x, "'add' does not combine a float tensor with a number alone"),
]


@pytest.mark.parametrize(("kind", "function", "reason"), REFUSALS, ids=[reason for *_, reason in REFUSALS])
def test_a_rewrite_that_does_not_apply_says_why(kind, function, reason):
    gm = captured(holding(function), ROWS)
    rewrite = rewrite_of(kind, gm)
    assert run(gm, (rewrite,)) == {}
    assert reason in rewrite.explain(next(n for n in reversed(gm.graph.nodes) if n.op == "call_function"))
