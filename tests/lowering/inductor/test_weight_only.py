"""Weight-only linear layers by our own kernels: which layers they get, and the compiled program."""

import pytest
import torch
from torch import nn

from lowering import to_inductor
from lowering.inductor.kernel_selection import choose
from lowering.inductor.kernels import weight_only
from lowering.inductor.rewrites.graph import private_copy
from lowering.inductor.rewrites.pipeline import REWRITES
from quant2e import quantize
from quant2e.errors import LoweringError
from quant2e.graph.attributes import tensor_at
from quant2e.observers.native.build import built, compiler
from quant2e.passes import run
from quantizers import X86InductorQuantizer, XNNPACKQuantizer, recipe
from tests.lowering.graphs import Weight

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler, so there is no kernel of ours")


class Products(nn.Module):
    """The ways to write a linear layer, and two that the kernel cannot compute."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(64, 32)
        self.bare = nn.Linear(32, 64, bias=False)

    def forward(self, x):
        return self.bare(torch.relu(self.plain(x)))


def converted(given="w8", model=None, x=None, **options):
    torch.manual_seed(0)
    x = (torch.randn(2, 64),) if x is None else x
    return quantize(model or Products().eval(), x, X86InductorQuantizer().set_global(given), **options), x


def chosen(result, wanted):
    gm = private_copy(result.module)
    run(gm, REWRITES, compiled=False)
    choices, size = choose(gm, {}, wanted)
    gm.recompile()
    return gm, choices, size


@pytest.mark.parametrize("given", ["w8", "w4-g32", "w4", recipe("w8", weight={"symmetric": False})], ids=str)
def test_the_graph_computes_the_same_with_the_kernel(given):
    result, x = converted(given)
    gm, choices, size = chosen(result, "weight_only")
    assert [choice.engine for choice in choices.values()] == ["weight_only"] * 2
    assert size == 0
    assert torch.allclose(gm(*x)[0], result(*x), rtol=1e-5, atol=1e-5)
    calls = [n for n in gm.graph.nodes if "weight_only" in str(n.target)]
    four = str(given).strip("'").startswith("w4")
    assert [tensor_at(gm, n.args[1]).dtype for n in calls] == [torch.uint8 if four else torch.int8] * 2


@pytest.mark.parametrize("of", [X86InductorQuantizer, XNNPACKQuantizer])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64)], ids=str)
def test_int8_rows_with_a_scale_each_meet_4_bits_as_integers(of, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    result = quantize(Products().eval(), (x,), of().set_global("w4a8-dynamic-g32"))
    gm, choices, size = chosen(result, "weight_only")
    assert [str(choice.product) for choice in choices.values()] == [
        f"4-bit int8-row linear {x.numel() // 64}x64x32",
        f"4-bit int8-row linear {x.numel() // 64}x32x64",
    ]
    assert size == 0
    assert torch.allclose(gm(x)[0], result(x), rtol=1e-5, atol=1e-5)
    calls = [n for n in gm.graph.nodes if "int8_rows" in str(n.target)]
    assert [n.args[0].args[0].meta["val"].dtype for n in calls] == [torch.int8] * 2


def test_rows_of_other_weights_stay_float():
    """8-bit weights: by rows with a scale each there is the kernel of float rows."""
    torch.manual_seed(0)
    x = torch.randn(2, 64)
    result = quantize(Products().eval(), (x,), XNNPACKQuantizer().set_global("w8a8-dynamic"))
    gm, choices, _ = chosen(result, "weight_only")
    assert [choice.product.int8_rows for choice in choices.values()] == [False] * 2
    assert torch.allclose(gm(x)[0], result(x), rtol=1e-5, atol=1e-5)


def test_what_the_kernel_cannot_compute_gets_a_float_weight(monkeypatch):
    result, x = converted()
    monkeypatch.setattr(weight_only, "load_kernel", lambda *_: None)
    gm, choices, size = chosen(result, "measured")
    assert [choice.engine for choice in choices.values()] == ["float"] * 2
    assert size == 2 * 64 * 32 * 4
    assert torch.allclose(gm(*x)[0], result(*x), rtol=1e-5, atol=1e-5)


def test_a_number_of_rows_that_varies_needs_no_float_weight():
    result, x = converted("w4-g32", dynamic_shapes=({0: torch.export.Dim("rows", max=64)},))
    gm, choices, size = chosen(result, "measured")
    assert [(choice.engine, choice.reason) for choice in choices.values()] == [
        ("weight_only", "the number of rows varies")
    ] * 2
    assert size == 0
    assert torch.allclose(gm(*x)[0], result(*x), rtol=1e-5, atol=1e-5)
    named = chosen(result, "float")
    assert [choice.engine for choice in named[1].values()] == ["float"] * 2
    assert named[2] == 2 * 64 * 32 * 4


class Turned(nn.Module):
    def __init__(self, turn):
        super().__init__()
        self.turn, self.weight = turn, Weight(torch.randn(64, 64))

    def forward(self, x):
        return x @ self.turn(self.weight())


# how a square weight is turned, and whether its rows are the outputs then
TURNS = {
    "t": (lambda w: w.t(), True),
    "permute": (lambda w: w.permute(-1, 0), True),
    "movedim": (lambda w: w.movedim(0, 1), True),
    "permute, not": (lambda w: w.permute(0, 1), False),
    "transpose, not": (lambda w: w.transpose(1, -1), False),
    "movedim, not": (lambda w: w.movedim(1, 1), False),
}


@pytest.mark.parametrize("case", TURNS)
def test_axes_that_stay_in_their_places_are_no_transposition(case):
    turn, rows = TURNS[case]
    x = torch.randn(2, 64)
    model = torch.export.export(Turned(turn).eval(), (x,), strict=False).module()
    gm = private_copy(model)
    run(gm, REWRITES, compiled=False)
    choices, size = choose(gm, {}, "weight_only")
    gm.recompile()
    assert [choice.engine for choice in choices.values()] == ["weight_only"] * rows
    assert size == 64 * 64 * 4 * (not rows)
    assert torch.allclose(gm(x)[0], model(x), rtol=1e-5, atol=1e-4)


def test_an_engine_named_for_an_op_must_be_able_to_compute_it():
    result, _ = converted()
    with pytest.raises(
        LoweringError,
        match=r"engines gives 'linear' to 'onednn', which cannot compute a 8-bit weight-only linear 2x64x32",
    ):
        chosen(result, {"linear": "onednn"})


@pytest.mark.inductor
def test_the_compiled_program():
    result, x = converted("w4-g32")
    program = to_inductor(result, engines="weight_only")
    assert program.verification.passed
    assert torch.allclose(program(*x), result(*x), rtol=1e-5, atol=1e-5)
    assert {op.kernel for op in program.report.ops} == {"quant2e.weight_only_linear"}
    assert "weight linear: weight-only: float rows, and a weight that is read as the integers" in str(program.report)


@pytest.mark.inductor
def test_the_compiled_program_takes_any_number_of_rows():
    x = torch.randn(3, 5, 64)
    dims = {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("tokens", max=64)}
    result, _ = converted("w4-g32", x=(x,), dynamic_shapes=(dims,))
    program = to_inductor(result)
    assert {op.kernel for op in program.report.ops} == {"quant2e.weight_only_linear"}
    for shape in ((1, 1, 64), (1, 33, 64), (8, 64, 64)):
        x = torch.randn(shape)
        assert torch.allclose(program(x), result(x), rtol=1e-5, atol=1e-5)


@pytest.mark.inductor
def test_the_compiled_program_of_int8_rows():
    result, x = converted("w4a8-dynamic-g32", dynamic_shapes=({0: torch.export.Dim("rows", max=64)},))
    program = to_inductor(result)
    assert [(op.kernel, op.int8) for op in program.report.ops] == [("quant2e.int8_rows_linear", True)] * 2
    for rows in (1, 7, 64):
        x = torch.randn(rows, 64)
        assert torch.allclose(program(x), result(x), rtol=1e-5, atol=1e-5)


def test_it_compiles_where_nothing_is_cached(tmp_path, monkeypatch):
    """A cached library would hide an include that leads nowhere: the cache goes by what the files hold."""
    monkeypatch.setenv("QUANT2E_CACHE_DIR", str(tmp_path))
    library = built(weight_only.SOURCE, weight_only.LANES, weight_only.OP)
    assert library is not None
    assert library.parent == tmp_path
