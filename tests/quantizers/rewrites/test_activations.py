"""Activations spelled out: every spelling is found by its values, and nothing else is."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lowering
from quant2e import quantize
from quant2e.graph.effects import is_in_place
from quant2e.passes import run
from quantizers import X86InductorQuantizer
from quantizers.rewrites.activations import ActivationsAsFused
from tests.quantizers.models import IMAGE, ROWS, Of, captured

aten = torch.ops.aten
EVERY = ("relu", "relu6", "silu", "hardswish", "gelu", "tanh", "leaky_relu")
SPELLINGS = {
    "silu": (lambda x: x * torch.sigmoid(x), "silu", ()),
    "silu, divided": (lambda x: x / (1 + torch.exp(-x)), "silu", ()),
    "hardswish": (lambda x: x * F.relu6(x + 3) / 6, "hardswish", ()),
    "hardswish, clamped": (lambda x: x * (x + 3).clamp(0, 6) * (1 / 6), "hardswish", ()),
    "hardswish, hardsigmoid": (lambda x: F.hardsigmoid(x) * x, "hardswish", ()),
    "hardswish, in place": (lambda x: x * F.relu6(x + 3, inplace=True).div_(6), "hardswish", ()),
    "gelu": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), "gelu", {}),
    "gelu, halves last": (lambda x: x * (torch.erf(x * 0.70710678) + 1) * 0.5, "gelu", {}),
    "gelu, tanh": (
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3)))),
        "gelu", {"approximate": "tanh"},
    ),
    "gelu, tanh of products": (
        lambda x: x * 0.5 * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))),
        "gelu", {"approximate": "tanh"},
    ),
    "relu6": (lambda x: x.relu().clamp(max=6), "relu6", ()),
    "tanh": (lambda x: 2 * torch.sigmoid(2 * x) - 1, "tanh", ()),
    "leaky_relu": (lambda x: torch.maximum(x, 0.1 * x), "leaky_relu", (0.1,)),
    "relu, masked": (lambda x: x * (x > 0), "relu", ()),
    "relu, by abs": (lambda x: (x + x.abs()) / 2, "relu", ()),
    "leaky_relu, six digits": (lambda x: torch.maximum(x, 0.229167 * x), "leaky_relu", (0.229167,)),
    "leaky_relu, of a long slope": (lambda x: torch.maximum(x, x * (11 / 48)), "leaky_relu", (11 / 48,)),
    "leaky_relu, chosen": (lambda x: torch.where(x > 0, x, 0.25 * x), "leaky_relu", (0.25,)),
}  # fmt: skip


def behind_linear(function):
    torch.manual_seed(0)
    return Of(lambda m, x: function(m.l(x)), l=nn.Linear(8, 8))


def respelled(function, names=EVERY):
    model = behind_linear(function)
    gm = captured(model, ROWS)
    count = run(gm, (ActivationsAsFused(lambda node: names if node.target is aten.linear.default else ()),))
    return model, gm, count.get("activations_as_fused", 0)


@pytest.mark.parametrize("name", SPELLINGS)
def test_found(name):
    function, op, further = SPELLINGS[name]
    model, gm, count = respelled(function)
    assert count == 1
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [aten.linear.default, getattr(aten, op).default]
    args, keywords = ((), further) if isinstance(further, dict) else (further, {})
    assert calls[1].args[1:] == args
    assert calls[1].kwargs == keywords
    torch.testing.assert_close(gm(*ROWS), model(*ROWS), rtol=0, atol=1e-5)


OTHERS = {
    "another factor": lambda x: x * torch.sigmoid(1.5 * x),
    "another function": lambda x: x * torch.tanh(F.softplus(x)),
    "something is read elsewhere": lambda x: (lambda gate: (x * gate, gate))(torch.sigmoid(x)),
    "the sum as well": lambda x: x * torch.sigmoid(x) + x.sum(),
    "two tensors": lambda x: x * torch.sigmoid(x.flip(0)),
    "one op": torch.sigmoid,
    "random": lambda x: x * torch.rand_like(x),
    "cut far above": lambda x: x.relu().clamp(max=20.0),
    "cut far below": lambda x: torch.clamp(torch.clamp(x, min=-30.0), max=20.0),
    "a gap at zero": lambda x: F.relu(F.hardshrink(x, 0.2)),
    "a narrow gap at zero": lambda x: F.relu(F.threshold(x, 1e-4, 0.0)),
    "a narrow gap": lambda x: torch.where((x > 5.0) & (x < 5.001), 0.0, x.relu()),
    "a gap between switches": lambda x: torch.where(x * 3 > 7.0001, x, torch.where(x * 3 > 7.0, 0.0, x.relu())),
    "a single number": lambda x: torch.where(x == 3.3, 0.0, x.relu()),
    "shrunk": lambda x: F.relu(F.softshrink(x, 1e-3)) + 1e-3,
    "rounded far out": lambda x: F.relu(x / 1024).round() * 1024,
    "rounded by a division": lambda x: torch.div(x.relu(), 1e-6, rounding_mode="floor") * 1e-6,
    "an offset": lambda x: x.relu() + 1e-7,
    "the same": lambda x: torch.maximum(x, 1.0 * x),
    "the same, by products": lambda x: x * 2 / 2,
    "the same, clamped out of sight": lambda x: x.clamp(min=-1e5).clamp(max=1e5),
    "another slope far out": lambda x: torch.where(x < -100, 0.2 * x, torch.maximum(x, 0.1 * x)),
    "relu6, with another limit": lambda x: x.relu().clamp(max=6.001),
    "in another dtype": lambda x: x * torch.sigmoid(x.bfloat16()).float(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_left_alone(name):
    _, gm, count = respelled(OTHERS[name])
    assert count == 0


CUT = {
    "silu": lambda x: (x * torch.sigmoid(x)).clamp(max=3e5),
    "leaky_relu": lambda x: torch.maximum(x, 0.1 * x).clamp(min=-500.0),
    "hardswish": lambda x: (x * F.relu6(x + 3) / 6).clamp(max=50),
    "tanh": lambda x: (2 * torch.sigmoid(2 * x) - 1).clamp(max=0.9999),
}


@pytest.mark.parametrize("name", CUT)
def test_what_cuts_an_activation_stays_behind_it(name):
    model, gm, _ = respelled(CUT[name])
    calls = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert calls == [aten.linear.default, getattr(aten, name).default, aten.clamp.default]
    x = ROWS[0] * 1e7
    torch.testing.assert_close(gm(x), model(x))


def test_a_slope_that_is_trained_is_left_alone():
    model = Of(lambda m, x: (lambda y: torch.where(y > 0, y, m.slope * y))(m.l(x)), l=nn.Linear(8, 8))
    model.slope = nn.Parameter(torch.tensor([0.25]))
    gm = captured(model, ROWS)
    assert run(gm, (ActivationsAsFused(lambda node: EVERY if node.target is aten.linear.default else ()),)) == {}


def test_what_a_kernel_does_not_take_is_left_alone():
    _, _, count = respelled(SPELLINGS["gelu"][0], ("relu", "silu"))
    assert count == 0


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic"])
@pytest.mark.parametrize("kind", ["linear", "conv with a norm"])
def test_quantized_as_one(kind, recipe):
    silu = SPELLINGS["silu"][0]
    if kind == "linear":
        model, example = behind_linear(silu), ROWS
    else:
        model, example = Of(lambda m, x: silu(m.n(m.c(x))), c=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4)), IMAGE
    result = quantize(model.eval(), example, X86InductorQuantizer().set_global(recipe), [example])
    verdicts = {verdict.op.name: verdict.kind for verdict in result.report.verdicts}
    assert verdicts["sigmoid"] == "folded"
    assert "float" not in verdicts.values()
    assert result.report.sqnr_db > 30
    targets = [node.target for node in result.module.graph.nodes if node.op == "call_function"]
    assert targets.count(aten.silu.default) == 1
    assert not any(is_in_place(node) for node in result.module.graph.nodes)


@pytest.mark.slow
@pytest.mark.inductor
def test_compiled_as_one_kernel():
    names = ("silu", "gelu, tanh", "hardswish, in place", "leaky_relu")
    model = Of(
        lambda m, x: [SPELLINGS[name][0](getattr(m, f"l{i}")(x)) for i, name in enumerate(names)],
        **{f"l{i}": nn.Linear(8, 8) for i in range(len(names))},
    ).eval()
    result = quantize(model, ROWS, X86InductorQuantizer().set_global("w8a8"), [ROWS])
    program = lowering.to_inductor(result, engines="onednn")
    assert [op.post_op for op in program.report.ops] == ["swish", "gelu", "hardswish", "leaky_relu"]
    assert program.verification.sqnr_db > 50
