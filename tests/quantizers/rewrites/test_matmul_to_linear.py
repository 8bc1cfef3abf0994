"""Other spellings of linear: rewritten where they are quantized, bit-equal, and still found by their own name."""

import pytest
import torch
from torch import nn

from quant2e.passes import run
from quantizers import X86InductorQuantizer, XNNPACKQuantizer, get_symmetric_quantization_config
from quantizers.rewrites.matmul_to_linear import products_as_linear
from tests.quantizers.models import ROWS, Of, annotations, captured

aten = torch.ops.aten
CONFIG = get_symmetric_quantization_config(is_per_channel=True)
W, B = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))


def always(node):
    return True


def holding(function):
    model = Of(function)
    model.w, model.b = W, B
    return model


PRODUCTS = {
    "addmm": lambda m, x: torch.addmm(m.b, x, m.w),
    "mm": lambda m, x: torch.mm(x, m.w),
    "matmul": lambda m, x: x.view(2, 2, 8) @ m.w,
    "matmul of a row": lambda m, x: x[0] @ m.w,
}

OTHERS = {
    "alpha": lambda m, x: torch.addmm(m.b, x, m.w, alpha=2),
    "beta": lambda m, x: torch.addmm(m.b, x, m.w, beta=0),
    "bias of two dimensions": lambda m, x: torch.addmm(x[:, :6], x, m.w),
    "no constant": lambda m, x: x.t() @ x,
    "constant on the left": lambda m, x: m.w.t() @ x.t(),
    "vector": lambda m, x: x @ m.w[:, 0],
    "batch of matrices": lambda m, x: x @ m.w.expand(3, 8, 6),
    "two constants": lambda m, x: m.w.t() @ m.w,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_a_constant_matrix_are_linear(name):
    gm = captured(holding(PRODUCTS[name]), ROWS)
    names = [n.name for n in gm.graph.nodes]
    expected = gm(*ROWS)
    assert run(gm, (products_as_linear(gm.graph, always),))
    assert torch.equal(gm(*ROWS), expected)
    (linear,) = (n for n in gm.graph.nodes if n.target is aten.linear.default)
    assert linear.name in names
    assert tuple(linear.args[1].meta["val"].shape) == (6, 8)
    assert not run(gm, (products_as_linear(gm.graph, always),))


@pytest.mark.parametrize("name", OTHERS)
def test_other_products_are_left_alone(name):
    gm = captured(holding(OTHERS[name]), ROWS)
    code = gm.code
    assert not run(gm, (products_as_linear(gm.graph, always),))
    assert gm.code == code


def test_only_what_a_configuration_covers_is_rewritten():
    model = holding(lambda m, x: torch.mm(x, m.w) + torch.addmm(m.b, x, m.w))
    text = annotations(model, ROWS, XNNPACKQuantizer().set_global(CONFIG).set_operator_type(torch.mm, None))
    assert [line.split(":")[0] for line in text.splitlines()] == ["addmm", "add"]
    text = annotations(model, ROWS, XNNPACKQuantizer().set_operator_type(aten.addmm, CONFIG))
    operands = "inputs_0 s8[-128,127], t_default s8[-127,127] symmetric axis 0, b f32 derived"
    assert text == f"addmm: {operands} -> s8[-128,127]  [linear]"
    gm = captured(model, ROWS)
    code = gm.code
    X86InductorQuantizer().transform_for_annotation(gm)
    assert gm.code == code
