"""Which engine computes a product: the choice from times, the products of a graph, and what a choice does to it."""

import re
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from lowering import to_inductor
from lowering.inductor.guard import keep_from_patterns
from lowering.inductor.kernel_selection import choose, product_of
from lowering.inductor.kernels import engines
from lowering.inductor.kernels.engines import ENGINES, KernelChoice, Product, fastest
from lowering.inductor.report import Kernel, build_report
from lowering.inductor.rewrites.graph import private_copy
from quant2e.cpu import TARGETS
from quant2e.errors import LoweringError
from quant2e.graph.qdq_ops import qd
from tests.lowering.graphs import Weight, on_dynamic_grid, on_grid

F = torch.nn.functional


class Fn(nn.Module):
    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args):
        return self.function(self, *args)


def capture(function, *args, **parts):
    return torch.export.export(Fn(function, **parts).eval(), args, strict=False).module()


def u8(x):
    return on_grid(x, (0.03, 128), torch.uint8)


def only(gm, name):
    return next(node for node in gm.graph.nodes if node.name == name)


# ------------------------------------------------------------------------------------------------------ choosing


@dataclass(frozen=True)
class Fake:
    """An engine that takes a fixed time, on a clock of the test's."""

    name: str
    seconds: float | None
    clock: list = field(compare=False, hash=False)

    def prepare(self, product):
        return None if self.seconds is None else lambda: self.clock.__setitem__(0, self.clock[0] + self.seconds)


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        (100e-6, 49e-6, "second"),
        (100e-6, 150e-6, "first"),
        (100e-6, 95e-6, "first"),  # not clearly faster
        (49e-6, 1e-6, "first"),  # too little to gain
        (1e-3, 880e-6, "second"),
        (1e-3, None, "first"),
        (None, 1e-3, "second"),
    ],
)
def test_another_engine_has_to_be_clearly_faster(monkeypatch, first, second, winner):
    clock = [0.0]
    monkeypatch.setattr(engines.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(engines.time, "thread_time", lambda: clock[0])
    monkeypatch.setattr(engines, "_KNOWN", {})
    candidates = (Fake("first", first, clock), Fake("second", second, clock))
    choice = fastest(Product(x=(1, 8), weight=(8, 8)), candidates)
    assert choice.engine == winner
    assert choice.seconds == pytest.approx({c.name: c.seconds for c in candidates if c.seconds is not None})


def test_a_shape_is_measured_once(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(engines, "_KNOWN", {})
    monkeypatch.setattr(engines, "timed", lambda given, product: calls.append(product) or {"onednn": 1.0})
    a, b = Product(x=(1, 8), weight=(8, 8)), Product(x=(2, 8), weight=(8, 8))
    for product in (a, b, a):
        fastest(product, (Fake("onednn", 1.0, clock),))
    assert calls == [a, b]


@pytest.mark.parametrize(("again", "winner"), [(40e-6, "first"), (1e-3, "second")])
def test_one_slow_measurement_of_the_preferred_engine_decides_nothing(monkeypatch, again, winner):
    measured = [{"first": 1e-3, "second": 50e-6}, {"first": again, "second": 60e-6}]
    monkeypatch.setattr(engines, "_KNOWN", {})
    monkeypatch.setattr(engines, "timed", lambda given, product: measured.pop(0))
    choice = fastest(Product(x=(1, 8), weight=(8, 8)), ())
    assert choice.engine == winner
    assert choice.seconds == {"first": again, "second": 50e-6}


PRODUCTS = [
    Product(x=(3, 16), weight=(8, 16)),
    Product(x=(3, 16), weight=(8, 16), bias=False, integers=True),
    Product(x=(2, 8, 9, 9), weight=(8, 1, 3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=8),
    Product(x=(1, 4, 9, 9), weight=(8, 4, 3, 3), stride=(1, 1), padding=(0, 1), dilation=(2, 2), integers=True),
    Product(x=(1, 4, 3, 5, 5), weight=(8, 4, 3, 3, 3), stride=(1, 1, 1), padding=(1, 1, 1), dilation=(1, 1, 1)),
    Product(
        x=(1, 4, 5, 6),
        weight=(4, 3, 3, 3),
        stride=(2, 2),
        padding=(1, 1),
        dilation=(1, 1),
        groups=2,
        output_padding=(1, 1),
        integers=True,
    ),
    Product(x=(3, 64), weight=(8, 64), float_rows=True, group=64),
    Product(x=(1, 64), weight=(8, 64), float_rows=True, group=32, bits=4, bias=False),
    Product(x=(9, 64), weight=(8, 64), float_rows=True, group=16, group_bytes=3, bits=4),
]


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_engines_compute_what_they_say(engine, product):
    run = engine.prepare(product)
    assert (run is not None) == engine.computes(product)
    if run is not None:
        run()


# ------------------------------------------------------------------------------------------------------ products


CASES = {
    "linear": (lambda m, x: F.linear(u8(x), m.w()), (3, 5, 16), (8, 16),
        Product(x=(15, 16), weight=(8, 16), bias=False)),
    "product": (lambda m, x: u8(x) @ m.w().t(), (5, 16), (8, 16), Product(x=(5, 16), weight=(8, 16), bias=False)),
    "to integers": (
        lambda m, x: u8(F.relu(F.linear(u8(x), m.w()))), (5, 16), (8, 16),
        Product(x=(5, 16), weight=(8, 16), bias=False, integers=True),
    ),
    "convolution": (
        lambda m, x: F.conv2d(u8(x), m.w(), stride=2, padding=(0, 1), groups=2), (2, 8, 9, 9), (6, 4, 3, 3),
        Product(x=(2, 8, 9, 9), weight=(6, 4, 3, 3), stride=(2, 2), padding=(0, 1), dilation=(1, 1), groups=2,
            bias=False),
    ),
    "one dimension": (
        lambda m, x: F.conv1d(u8(x), m.w(), None, 2, 1), (2, 8, 9), (6, 8, 3),
        Product(x=(2, 8, 1, 9), weight=(6, 8, 1, 3), stride=(1, 2), padding=(0, 1), dilation=(1, 1), bias=False),
    ),
    "three dimensions": (lambda m, x: F.conv3d(u8(x), m.w(), padding=1), (1, 8, 3, 4, 5), (6, 8, 3, 3, 3),
        Product(x=(1, 8, 3, 4, 5), weight=(6, 8, 3, 3, 3), stride=(1, 1, 1), padding=(1, 1, 1), dilation=(1, 1, 1),
            bias=False)),
    "transposed, in one dimension": (
        lambda m, x: F.conv_transpose1d(u8(x), m.w(), None, 3, 1, 2), (2, 8, 9), (8, 6, 4),
        Product(x=(2, 8, 1, 9), weight=(8, 6, 1, 4), stride=(1, 3), padding=(0, 1), dilation=(1, 1),
            output_padding=(0, 2), bias=False),
    ),
    "padding by name": (lambda m, x: F.conv2d(u8(x), m.w(), padding="same"), (2, 8, 9, 9), (6, 8, 3, 3), None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_product_of_a_node(case):
    function, x, w, product = CASES[case]
    gm = private_copy(capture(function, torch.randn(x), w=Weight(torch.randn(w))))
    node = next(n for n in gm.graph.nodes if any(k in str(n.target) for k in ("linear", "matmul", "conv")))
    assert product_of(node) == product


def test_a_float_engine_gets_a_float_weight_and_the_same_numbers():
    x = torch.randn(4, 16)
    model = capture(
        lambda m, x: F.linear(u8(F.relu(F.linear(u8(x), m.a()))), m.b()),
        x,
        a=Weight(torch.randn(8, 16)),
        b=Weight(torch.randn(4, 8)),
    )
    gm = private_copy(model)
    choices, size = choose(gm, {}, {"linear": "float", "linear_1": "onednn"})
    gm.recompile()
    assert [choice.engine for choice in choices.values()] == ["float", "onednn"]
    assert [choice.reason for choice in choices.values()] == ["chosen by the caller"] * 2
    assert size == 8 * 16 * 4
    assert only(gm, "linear").args[1].op == "get_attr"
    assert only(gm, "linear_1").args[1].target is qd.dequantize_per_channel.default
    assert torch.equal(gm(x)[0], model(x))


def test_one_weight_with_two_users_is_float_for_one_and_integers_for_the_other():
    x = torch.randn(4, 8)

    def twice(m, x):
        w = m.w()
        return F.linear(u8(F.linear(u8(x), w)), w)

    model = capture(twice, x, w=Weight(torch.randn(8, 8)))
    gm = private_copy(model)
    choose(gm, {}, {"linear": "float", "linear_1": "onednn"})
    gm.recompile()
    assert only(gm, "linear").args[1].op == "get_attr"
    assert only(gm, "linear_1").args[1].target is qd.dequantize_per_channel.default
    assert torch.equal(gm(x)[0], model(x))


def test_weights_without_a_kernel_are_not_dequantized_at_each_call():
    x = torch.randn(4, 16)
    model = capture(
        lambda m, x: F.linear(x, m.w()) @ m.v().t(), x, w=Weight(torch.randn(8, 16)), v=Weight(torch.randn(3, 8), None)
    )
    gm = private_copy(model)
    choices, size = choose(gm, {}, "float")
    gm.recompile()
    assert ({n: c.engine for n, c in choices.items()}, size) == ({"linear": "float"}, (8 * 16 + 3 * 8) * 4)
    assert not [node for node in gm.graph.nodes if "dequantize" in str(node.target)]
    assert torch.equal(gm(x)[0], model(x))


def weight_from_input(m, x):
    scales, points, grid = torch.ones(4), torch.zeros(4, dtype=torch.int64), (0, -127, 127, torch.int8)
    integers = qd.quantize_per_channel.default(x, scales, points, *grid)
    return F.linear(u8(x), qd.dequantize_per_channel.default(integers, scales, points, *grid))


def test_a_weight_that_is_computed_from_an_input_stays():
    x = torch.randn(4, 16)
    model = capture(weight_from_input, x)
    gm = private_copy(model)
    refused = keep_from_patterns(gm)
    assert refused == {"linear": "the weight is not a constant"}
    assert choose(gm, refused, "float") == ({}, 0)
    gm.recompile()
    assert torch.equal(gm(x)[0], model(x))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("fbgemm", "no engine 'fbgemm': give 'measured', or one of onednn, weight_only, float"),
        ({"lin": "float"}, "names the op 'lin'.*it has linear"),
    ],
)
def test_unknown_names(wanted, message):
    gm = private_copy(capture(lambda m, x: F.linear(u8(x), m.w()), torch.randn(4, 16), w=Weight(torch.randn(8, 16))))
    with pytest.raises(LoweringError, match=message):
        choose(gm, {}, wanted)


def timed_report(*times, chosen="onednn"):
    """The report on one linear per entry of ``times``: seconds of onednn and of float; None: not timed."""
    layers = {f"l{i}": Weight(torch.randn(16, 16)) for i in range(len(times))}

    def chain(m, x):
        for name in layers:
            x = F.linear(u8(x), getattr(m, name)())
        return x

    model = private_copy(capture(chain, torch.randn(2, 16), **layers))
    names = [node.name for node in model.graph.nodes if "linear" in str(node.target)]
    product = Product(x=(2, 16), weight=(16, 16))
    choices = {
        name: KernelChoice(engine=chosen, product=product, seconds=dict(zip(("onednn", "float"), each or ())))  # noqa: B905
        for name, each in zip(names, times, strict=True)
    }
    kernels = [Kernel("onednn.qlinear", name) for name in names if chosen == "onednn"]
    return build_report(model, kernels, {}, choices, 0)


@pytest.mark.parametrize(
    ("times", "chosen", "note"),
    [
        (
            [(2e-6, 1e-6), (1e-6, 1.5e-6)],
            "onednn",
            "slower than float, by the times of its products: 3 microseconds, and 2 in",
        ),
        ([(2e-6, 1e-6), (1e-6, 4e-6)], "onednn", ""),
        ([(2e-6, 1e-6)], "float", "slower than float: no product runs on integers here"),
        ([None, (1e-6, 2e-6)], "onednn", r"1 product\(s\) were given to an engine by the caller: not timed"),
    ],
)
def test_a_program_that_is_slower_than_float_is_flagged(times, chosen, note):
    notes = [text for text in timed_report(*times, chosen=chosen).notes if "float" in text]
    assert bool(notes) == bool(note)
    assert re.match(note, "".join(notes))


@pytest.mark.inductor
def test_the_report_has_the_choice_and_its_times(monkeypatch):
    def slow(product, candidates):
        return KernelChoice(engine="float", product=product, seconds={"onednn": 2e-3, "float": 1e-3})

    monkeypatch.setattr("lowering.inductor.kernel_selection.fastest", slow)
    monkeypatch.setattr("lowering.inductor.guard.detect", lambda: TARGETS["avx512_vnni"])  # on every machine
    x = torch.randn(1, 16)
    model = capture(lambda m, x: F.linear(on_dynamic_grid(x), m.w()), x, w=Weight(torch.randn(8, 16)))
    report = to_inductor(model, (x,)).report
    assert report.of("linear").reason.startswith("float is faster here: microseconds for linear 1x16x8")
    assert report.engines["linear"].seconds == {"onednn": 2e-3, "float": 1e-3}
    assert "float copies of weights" in str(report)
    assert to_inductor(model, (x,), engines="onednn", verify=False).report.of("linear").int8
