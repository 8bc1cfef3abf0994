"""Masks among observed tensors: what stays float by what the data shows, whatever observed it, and what does not."""

import math

import pytest
import torch
from torch import nn

import quant2e
from quant2e.annotation.specs import QuantizationAnnotation, QuantizationSpec, SharedQuantizationSpec
from quant2e.convert.legality import problems
from quant2e.graph.qdq_ops import DEQUANTIZE
from quant2e.observers.fake_quant import FakeQuantize, FusedMovingAvgObsFakeQuantize
from quant2e.observers.measuring import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelHistogramObserver,
    PerChannelMinMaxObserver,
)
from quant2e.ranges.sqnr import sqnr_db
from quant2e.report.report import FLOAT, STATIC
from tests.quant2e.annotators import WEIGHT, Annotate, aten

NEVER = [-math.inf, torch.finfo(torch.float32).min, -65504.0, -1e9, -1e4]


def activations(observer, qscheme=torch.per_tensor_affine, **options):
    return QuantizationSpec(torch.int8, observer, -128, 127, qscheme, **options)


OBSERVERS = {
    "histogram": activations(HistogramObserver),
    "percentile": activations(HistogramObserver.with_args(method="percentile")),
    "entropy": activations(HistogramObserver.with_args(method="entropy")),
    "min-max": activations(MinMaxObserver),
    "moving average": activations(MovingAverageMinMaxObserver.with_args(averaging_constant=0.5)),
    "fake-quantizer": activations(FakeQuantize.with_args(averaging_constant=0.5)),
    "fused fake-quantizer": activations(FusedMovingAvgObsFakeQuantize.with_args(averaging_constant=0.5)),
}
CHANNELS = {
    "min-max per channel": activations(PerChannelMinMaxObserver, torch.per_channel_affine, ch_axis=0),
    "histogram per channel": activations(PerChannelHistogramObserver, torch.per_channel_affine, ch_axis=0),
}


class Attention(nn.Module):
    """Written by hand, with a mask that comes in and is added; ``combine`` says how."""

    def __init__(self, combine=torch.add):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.combine = combine

    def forward(self, x, mask):
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 3.0
        return self.out(self.combine(scores, mask).softmax(-1) @ self.v(x))


def every(spec, *targets):
    """Products, with weights per channel, and every tensor operand and result of ``targets``."""

    def note(node):
        floats = [n for n in node.all_input_nodes if n.meta["val"].is_floating_point()]
        if node.target is aten.linear.default:
            x, weight = node.args[:2]
            return QuantizationAnnotation({x: spec, weight: WEIGHT}, spec, rule="linear")
        if node.target in targets:
            return QuantizationAnnotation(dict.fromkeys(floats, spec), spec, rule="elementwise")
        return None

    return Annotate(note)


ADDED = (aten.add.Tensor, aten.div.Tensor, aten.matmul.default)


def masks(value, batches=6, hidden=True):
    """Inputs whose masks hide about a third of the positions with ``value``; the first hides none."""
    made = []
    for i in range(batches):
        keep = torch.rand(4, 1, 6) > (0.3 if i and hidden else -1.0)
        keep[..., 0] = True
        made.append((torch.randn(4, 6, 8), torch.zeros(4, 1, 6).masked_fill(~keep, value)))
    return made


def flow(model, quantizer, data, **options):
    prepared = quant2e.prepare_pt2e(quant2e.capture(model.eval(), data[0]), quantizer)
    quant2e.calibrate(prepared, data, **options)
    return quant2e.convert_pt2e(prepared)


def sqnr(model, converted, data):
    noise = signal = 0.0
    with torch.no_grad():
        for batch in data:
            exact = model(*batch)
            noise += float((converted(*batch) - exact).square().sum())
            signal += float(exact.square().sum())
    return sqnr_db(signal, noise)


def quantized_operands(gm, name):
    node = next(n for n in gm.graph.nodes if n.name == name)
    return [n.target in DEQUANTIZE for n in node.all_input_nodes]


@pytest.mark.parametrize(
    ("observer", "value"),
    [*(("histogram", value) for value in NEVER), *((name, -1e4) for name in (*OBSERVERS, *CHANNELS))],
)
def test_an_added_mask(observer, value):
    spec = {**OBSERVERS, **CHANNELS}[observer]
    targets = ADDED if observer in OBSERVERS else (aten.add.Tensor,)
    model, data = Attention(), masks(value)
    quantizer = every(spec, *targets)
    if observer in CHANNELS:
        quantizer = Annotate(lambda n: every(spec, *targets)._annotate(n) if n.target in targets else None)
    gm = flow(model, quantizer, data)
    report = quant2e.report_of(gm)
    assert report.of("add").kind == FLOAT
    assert "'mask' stays float" in report.of("add").reason
    assert '"never"' in report.of("add").reason
    assert any("'add' stays float" in note for note in report.notes)
    assert quantized_operands(gm, "softmax") == [False]
    assert not problems(gm)
    if observer in OBSERVERS:
        assert report.of("linear").kind == STATIC
        alone = flow(model, every(spec, aten.div.Tensor, aten.matmul.default), data)
        assert sqnr(model, gm, data) > sqnr(model, alone, data) - 0.5


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("observer", ["histogram", "min-max"])
def test_compiled_calibration_finds_the_same(observer):
    torch._dynamo.reset()
    model, data = Attention(), masks(-1e4)
    quantizer = every(OBSERVERS[observer], aten.add.Tensor)
    texts = [quant2e.graph_text(flow(model, quantizer, data, compiled=compiled)) for compiled in (False, True)]
    assert texts[0].count("quantize_per_tensor") == texts[1].count("quantize_per_tensor")
    assert quant2e.report_of(flow(model, quantizer, data, compiled=True)).of("add").kind == FLOAT


COMBINATIONS = {
    "chosen": (lambda scores, mask: torch.where(mask < 0, torch.full_like(scores, -1e9), scores), "where"),
    "filled": (lambda scores, mask: scores.masked_fill(mask < 0, -1e4), "masked_fill"),
    "subtracted": (lambda scores, mask: scores - mask * -1.0, "sub"),
    "twice": (lambda scores, mask: scores + mask + mask, "add_1"),
    "moved and cast": (lambda scores, mask: scores + mask.expand(4, 6, 6).double().contiguous().float(), "add"),
    "limited": (lambda scores, mask: torch.maximum(scores + mask, torch.tensor(-1e4)), "maximum"),
}


@pytest.mark.parametrize("observer", ["histogram", "min-max"])
@pytest.mark.parametrize("case", COMBINATIONS)
def test_ways_to_mask(case, observer):
    combine, name = COMBINATIONS[case]
    named = (aten.where.self, aten.masked_fill.Scalar, aten.sub.Tensor, aten.maximum.default, aten.mul.Tensor)
    model, data = Attention(combine), masks(-1e4)
    gm = flow(model, every(OBSERVERS[observer], *ADDED, *named), data)
    assert any(f"'{name}' stays float" in note for note in quant2e.report_of(gm).notes)
    assert not problems(gm)
    assert sqnr(model, gm, data) > 25


def test_a_mask_that_hid_nothing_is_not_believed():
    model = Attention()
    data = masks(-1e4, hidden=False)
    gm = flow(model, every(OBSERVERS["histogram"], *ADDED), data)
    assert "it was zero in all calibration data" in quant2e.report_of(gm).of("add").reason
    assert sqnr(model, gm, masks(-1e4)) > 20


def test_values_that_a_sum_hides_are_found_by_their_source():
    """-100, where scores reach 5: the mask tells, the sum alone would not."""
    model = Attention(lambda scores, mask: scores * 40.0 + mask)
    data = masks(-100.0)
    gm = flow(model, every(OBSERVERS["histogram"], *ADDED), data)
    assert "holds what stands for" in " ".join(n for n in quant2e.report_of(gm).notes if n.startswith("'add'"))
    assert quantized_operands(gm, "softmax") == [False]


@pytest.mark.parametrize("observer", ["histogram", "min-max", "moving average"])
def test_outliers_are_data(observer):
    """Sixty times larger than everything else, before a softmax, a maximum and a choice."""

    class Outliers(nn.Module):
        def forward(self, x, y):
            return (x + y).softmax(-1), (x + y).amax(-1), torch.where(x > 0, x + y, y)

    quiet = torch.linspace(-1, 1, 48).view(6, 8)
    loud = quiet.clone()
    loud[0, 0] = -60.0
    gm = flow(Outliers(), every(OBSERVERS[observer], aten.add.Tensor), [(loud, quiet)] * 3)
    report = quant2e.report_of(gm)
    assert all(report.of(name).kind == STATIC for name in ("add", "add_1", "add_2"))
    assert not any("stays float" in note for note in report.notes)


def test_far_values_where_nothing_is_chosen_are_data():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x).relu()

    x = torch.randn(4, 8)
    x[0, 0] = -1e4
    gm = flow(Plain(), every(OBSERVERS["histogram"]), [(x,)])
    assert quant2e.report_of(gm).of("linear").kind == STATIC


def test_everything_that_shares_the_range_stays_float_and_other_tensors_do_not():
    """A joined tensor has one range: the mask takes its neighbours with it, and the weight that reads them."""

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.other = nn.Linear(12, 4), nn.Linear(12, 4)

        def forward(self, x, mask):
            both = torch.cat([x, mask], -1)
            return both.softmax(-1), self.linear(both), self.other(x.repeat(1, 2))

    spec = OBSERVERS["min-max"]

    def note(node):
        if node.target is aten.cat.default:
            x, mask = node.args[0]
            first = SharedQuantizationSpec((x, node))
            return QuantizationAnnotation({x: spec, mask: first}, first)
        if node.target is aten.linear.default:
            return QuantizationAnnotation({node.args[0]: spec, node.args[1]: WEIGHT}, None)
        return None

    mask = torch.zeros(4, 6)
    mask[:, 3] = -1e9
    gm = flow(Joined(), Annotate(note), [(torch.randn(4, 6), mask)])
    report = quant2e.report_of(gm)
    assert [report.of(name).kind for name in ("cat", "linear", "linear_1")] == [FLOAT, FLOAT, STATIC]
    assert quantized_operands(gm, "linear") == [False, False, False]
    assert quantized_operands(gm, "linear_1")[:2] == [True, True]
    assert not problems(gm)


def test_statistics_of_a_file_know_it_too(tmp_path):
    model, data = Attention(), masks(-1e4)
    captured = quant2e.capture(model.eval(), data[0])
    quantizer = every(OBSERVERS["histogram"], *ADDED)
    first, second = (quant2e.prepare_pt2e(captured, quantizer) for _ in range(2))
    quant2e.save_statistics(quant2e.calibrate(first, data), tmp_path / "a.stats")
    quant2e.load_statistics(second, tmp_path / "a.stats")
    assert quant2e.graph_text(quant2e.convert_pt2e(second)) == quant2e.graph_text(quant2e.convert_pt2e(first))


class ForeignObserver(nn.Module):
    """Another library's: a smallest and a largest value, and nothing that tells masks from data."""

    def __init__(self, **options):
        super().__init__()
        self.dtype, self.qscheme = torch.int8, torch.per_tensor_affine
        self.quant_min, self.quant_max, self.is_dynamic = -128, 127, False
        self.register_buffer("min_val", torch.tensor(math.inf))
        self.register_buffer("max_val", torch.tensor(-math.inf))

    def forward(self, x):
        self.min_val.copy_(torch.minimum(self.min_val, x.detach().amin()))
        self.max_val.copy_(torch.maximum(self.max_val, x.detach().amax()))
        return x

    def calculate_qparams(self):
        low, high = self.min_val.clamp(max=0), self.max_val.clamp(min=0)
        scale = (high - low).clamp(min=1e-6) / 255
        return scale, (-128 - (low / scale).round()).to(torch.int64)


@pytest.mark.parametrize("value", [-1e4, -math.inf])
def test_the_range_of_another_librarys_observer(value):
    model, data = Attention(), masks(value)
    gm = flow(model, every(QuantizationSpec(torch.int8, ForeignObserver), *ADDED), data)
    assert "is that of values that stand for" in quant2e.report_of(gm).of("add").reason
    assert sqnr(model, gm, data) > 25


def test_training_hands_masks_on():
    """What convert will do, the model that is trained does: no fake quantization of a tensor with a mask."""
    data = masks(-1e9)
    captured = quant2e.capture(Attention(), data[0])
    spec = activations(FusedMovingAvgObsFakeQuantize)
    prepared = quant2e.prepare_qat_pt2e(captured, every(spec, aten.add.Tensor))
    for batch in data:
        prepared(*batch)
    masked = [m for m in prepared.modules() if getattr(m, "marks_never", False) and isinstance(m, FakeQuantize)]
    assert len(masked) == 2
    x = torch.tensor([0.3, -1e9])
    assert all(torch.equal(module(x), x) for module in masked)
    assert quant2e.report_of(quant2e.convert_pt2e(prepared.eval())).of("add").kind == FLOAT


# ---------------------------------------------------------------------------------------- switched-off fake-quantizers


def test_a_fake_quantizer_that_was_switched_off_stays_float():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    x = (torch.randn(4, 8),)
    prepared = quant2e.prepare_qat_pt2e(quant2e.capture(model, x), every(activations(FakeQuantize)))
    prepared(*x)
    next(module for module in prepared.modules() if isinstance(module, FakeQuantize)).disable_fake_quant()
    gm = quant2e.convert_pt2e(prepared.eval())
    report = quant2e.report_of(gm)
    assert report.of("linear").kind == FLOAT
    assert "its fake-quantizer was switched off" in report.of("linear").reason
    assert quantized_operands(gm, "linear") == [False, False, False]  # nor is the weight, which only it reads
    assert quantized_operands(gm, "linear_1")[:2] == [True, True]
    prepared.apply(quant2e.disable_fake_quant)
    assert quant2e.report_of(quant2e.convert_pt2e(prepared)).quantized_ops == 0
    assert torch.equal(quant2e.convert_pt2e(prepared)(*x), prepared(*x))
