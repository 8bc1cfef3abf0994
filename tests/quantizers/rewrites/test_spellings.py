"""Rewrites of quantizers: the graph before and after, and why they do not apply elsewhere."""

import pytest
import torch
from torch import nn

from quant2e import quantize
from quant2e.graph.printer import graph_text
from quant2e.passes import run
from quantizers import X86InductorQuantizer, XNNPACKQuantizer
from quantizers.rewrites.clamps import clamps_as_fused
from quantizers.rewrites.einsum_to_linear import einsums_as_linear
from quantizers.rewrites.matmul_to_linear import products_as_linear
from quantizers.rewrites.scalars import scalars_as_tensors
from tests.quantizers.models import ROWS, Of, captured


def always(node):
    return True


def rewrite_of(kind, gm):
    return kind(gm.graph, always) if kind in (products_as_linear, einsums_as_linear) else kind(always)


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
    "einsum": (einsums_as_linear, lambda m, x: torch.einsum("bi,io->ob", x, m.w)),
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


EINSUMS = {
    "oi,bi->bo": ((8, 5), (4, 5)),
    "bi,io": ((4, 5), (5, 8)),
    "bti,io->bto": ((2, 3, 5), (5, 8)),
    "...i,oi->...o": ((2, 3, 5), (8, 5)),
    "bti,ihd->bthd": ((2, 3, 5), (5, 2, 4)),
    "bti,ihd->bhtd": ((2, 3, 5), (5, 2, 4)),
    "bthd,hdo->bto": ((2, 3, 2, 4), (2, 4, 8)),
    "bhtd,hdo->bto": ((2, 2, 3, 4), (2, 4, 8)),
    "bchw,oc->bohw": ((2, 4, 3, 3), (8, 4)),
    "cbi, ioj -> ojbc": ((2, 3, 5), (5, 2, 4)),
}


@pytest.mark.parametrize("equation", EINSUMS)
def test_an_einsum_with_a_weight_is_a_linear(equation):
    sizes = EINSUMS[equation]
    first = equation.startswith("oi")
    x, weight = torch.randn(sizes[first]), torch.randn(sizes[not first])

    def function(m, x):
        return torch.einsum(equation, *((m.w, x) if first else (x, m.w)))

    model = Of(function)
    model.w = nn.Parameter(weight)
    gm = captured(model, x)
    assert run(gm, (einsums_as_linear(gm.graph, always),)) == {"einsums_as_linear": 1}
    assert [n.name for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default] == ["einsum"]
    torch.testing.assert_close(gm(x), function(model, x), rtol=1e-5, atol=1e-5)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            assert isinstance(node.meta["val"], torch.Tensor)


@pytest.mark.parametrize("quantizer", [XNNPACKQuantizer, X86InductorQuantizer])
def test_an_einsum_with_a_weight_is_quantized(quantizer):
    model = Of(lambda m, x: torch.relu(torch.einsum("bti,ihd->bthd", x, m.w)))
    model.w = nn.Parameter(torch.randn(5, 2, 4))
    x = torch.randn(40, 3, 5)
    quantized = quantize(model.eval(), (x,), quantizer().set_global("w8a8"), calibration_data=[(x,)] * 2)
    assert quantized.report.int8_mac_share == 1
    assert quantized.report.sqnr_db > 35


REFUSALS = [
    (clamps_as_fused, lambda m, x: x.clamp(max=1), "'clamp' clamps to [None, 1], which is neither relu nor hardtanh"),
    (products_as_linear, lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), "'addmm' has factors"),
    (products_as_linear, lambda m, x: x.t() @ x, "operand 'w' of 'matmul' is not constant"),
    (products_as_linear, lambda m, x: m.w.t() @ m.w, "'t' is constant as well"),
    (einsums_as_linear, lambda m, x: torch.einsum("bi,bi->b", x, x), "no operand of 'einsum' is constant"),
    (einsums_as_linear, lambda m, x: torch.einsum("bi,io->b", x, m.w), "is no product of rows and a matrix"),
    (
        einsums_as_linear,
        lambda m, x: torch.einsum("bi,io->bio", x, m.w),
        "is a product for each entry of an axis that both operands have",
    ),
    (einsums_as_linear, lambda m, x: torch.einsum("ii,io->io", x[:, :4], m.w[:4]), "takes a diagonal"),
    (einsums_as_linear, lambda m, x: torch.einsum("bi,jo->bo", x, m.w), "is no product of rows and a matrix"),
    (scalars_as_tensors, lambda m, x: x + x, "'add' does not combine a float tensor with a number alone"),
]


@pytest.mark.parametrize(("kind", "function", "reason"), REFUSALS, ids=[reason for *_, reason in REFUSALS])
def test_a_rewrite_that_does_not_apply_says_why(kind, function, reason):
    gm = captured(holding(function), ROWS)
    rewrite = rewrite_of(kind, gm)
    assert run(gm, (rewrite,)) == {}
    assert reason in rewrite.explain(next(n for n in reversed(gm.graph.nodes) if n.op == "call_function"))
