"""Weight-only linear layers by our own kernel: its numbers, which layers it gets, and the compiled program."""

import pytest
import torch
from torch import nn

from lowering import to_inductor
from lowering.inductor.kernel_selection import choose
from lowering.inductor.kernels import few_rows
from lowering.inductor.rewrites.graph import private_copy
from lowering.inductor.rewrites.pipeline import REWRITES
from quant2e import quantize
from quant2e.errors import LoweringError
from quant2e.observers.native.build import built, compiler
from quant2e.passes import run
from quantizers import X86InductorQuantizer, recipe
from tests.lowering.graphs import Weight

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler, so there is no kernel of ours")


def parts(outputs, inputs, group, low=-128, high=127):
    generator = torch.Generator().manual_seed(outputs * inputs)
    weight = torch.randint(low, high + 1, (outputs, inputs), dtype=torch.int8, generator=generator)
    scale = torch.rand(outputs, inputs // group, generator=generator) + 0.01
    point = torch.randint(-3, 4, scale.shape, generator=generator).float()
    return weight, scale, point, torch.randn(outputs, generator=generator)


def expected(x, weight, scale, point, bias):
    """In double, as the formula says."""
    group = weight.shape[1] // scale.shape[1]
    stretched = (t.double().repeat_interleave(group, dim=1) for t in (scale, point))
    s, z = stretched
    return x.double() @ ((weight.double() - z) * s).T + bias.double()


SHAPES = [
    ((1, 64), 8, 64),
    ((64,), 3, 64),
    ((2, 3, 37), 5, 37),
    ((7, 96), 9, 32),
    ((4, 50), 6, 25),
    ((1, 7), 1, 7),
    ((0, 32), 4, 32),
]


@pytest.mark.parametrize(("x", "outputs", "group"), SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernel_computes_the_formula(x, outputs, group, threads):
    rows = torch.randn(x, generator=torch.Generator().manual_seed(1))
    weight, scale, point, bias = parts(outputs, x[-1], group)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = few_rows.load_kernel()(rows, weight, scale, point, bias, False)
    finally:
        torch.set_num_threads(before)
    wanted = expected(rows, weight, scale, point, bias)
    assert found.dtype is torch.float32
    assert found.shape == wanted.shape
    assert torch.allclose(
        found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max() if wanted.numel() else 1)
    )
    assert torch.equal(found, few_rows.load_kernel()(rows, weight, scale, point, bias, False))


@pytest.mark.parametrize(("rows", "outputs", "inputs", "group"), [(1, 5, 96, 32), (6, 8, 64, 64), (3, 2, 128, 64)])
def test_two_values_in_a_byte_count_as_each_alone(rows, outputs, inputs, group):
    x = torch.randn(rows, inputs)
    weight, scale, point, bias = parts(outputs, inputs, group, -8, 7)
    half = few_rows.packed(weight)
    assert (half.dtype, half.numel()) == (torch.uint8, weight.numel() // 2)
    alone = few_rows.load_kernel()(x, weight, scale, point, bias, False)
    assert torch.allclose(few_rows.load_kernel()(x, half, scale, point, bias, True), alone, rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------------------------------ which layers it gets


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
    gm, choices, size = chosen(result, "few_rows")
    assert [choice.engine for choice in choices.values()] == ["few_rows"] * 2
    assert size == 0
    assert torch.allclose(gm(*x)[0], result(*x), rtol=1e-5, atol=1e-5)
    packed = [n for n in gm.graph.nodes if "few_rows" in str(n.target)]
    assert [n.args[-1] for n in packed] == [str(given).strip("'").startswith("w4")] * 2


def test_what_the_kernel_cannot_compute_gets_a_float_weight(monkeypatch):
    dynamic, _ = converted(dynamic_shapes=({0: torch.export.Dim("rows", max=64)},))
    assert chosen(dynamic, "few_rows")[1] == {}  # a kernel for few rows must not meet many
    assert chosen(dynamic, "few_rows")[2] == 2 * 64 * 32 * 4
    result, x = converted()
    monkeypatch.setattr(few_rows, "load_kernel", lambda: None)
    gm, choices, size = chosen(result, "measured")
    assert [choice.engine for choice in choices.values()] == ["float"] * 2
    assert size == 2 * 64 * 32 * 4
    assert torch.allclose(gm(*x)[0], result(*x), rtol=1e-5, atol=1e-5)


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
    choices, size = choose(gm, {}, "few_rows")
    gm.recompile()
    assert [choice.engine for choice in choices.values()] == ["few_rows"] * rows
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
    program = to_inductor(result, engines="few_rows")
    assert program.verification.passed
    assert torch.allclose(program(*x), result(*x), rtol=1e-5, atol=1e-5)
    assert {op.kernel for op in program.report.ops} == {"quant2e.few_rows_linear"}
    assert "weight linear: weight-only: float rows, and a weight that is read as the integers" in str(program.report)


def test_it_compiles_where_nothing_is_cached(tmp_path, monkeypatch):
    """A cached library would hide an include that leads nowhere: the cache goes by what the files hold."""
    monkeypatch.setenv("QUANT2E_CACHE_DIR", str(tmp_path))
    library = built(few_rows.SOURCE, few_rows.OP, flags=few_rows.FLAGS)
    assert library is not None
    assert library.parent == tmp_path
