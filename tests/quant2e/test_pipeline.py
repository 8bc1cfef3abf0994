"""The one call: kinds of data, what is held out, the numbers of the report, and what is refused."""

import math
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from quant2e.accuracy.output_error import output_sqnr
from quant2e.annotation.quantizer import Quantizer
from quant2e.annotation.specs import QuantizationSpec
from quant2e.calibration.calibrate import calibrate
from quant2e.convert.convert import convert_pt2e
from quant2e.errors import AccuracyError, CalibrationError, CaptureError, Quant2eError
from quant2e.graph.captured.calls import Call
from quant2e.graph.captured.capture import capture
from quant2e.observers.measuring import HistogramObserver
from quant2e.pipeline import quantize
from quant2e.prepare.prepare import prepare_pt2e
from quant2e.ranges.sqnr import sqnr_db
from quant2e.report.float_ops import list_float_ops
from quant2e.report.macs import count_macs
from quant2e.report.report import DYNAMIC as DYNAMIC_KIND
from quant2e.report.report import FLOAT, FOLDED, STATIC, WEIGHT_ONLY, Report
from tests.quant2e.annotators import ACT, DYNAMIC, NOTHING, WEIGHT, WEIGHT_PER_TENSOR, aten, on, products


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, y=None):
        out = self.linear(x)
        return out if y is None else out + self.linear(y)


def model():
    return Two().eval()


class Watching(Quantizer):
    """`products`, and everything that its activation observers see."""

    def __init__(self):
        self.seen = []

    def annotate(self, gm):
        return products(output=None).annotate(gm)

    def validate(self, gm):
        """Anything goes."""

    def prepare_obs_or_fq_callback(self, gm, observers):
        for key, observer in observers.items():
            if key[0].op == "placeholder":
                observer.register_forward_pre_hook(lambda _, args: self.seen.append(args[0][0, 0].item()))


def numbered(count):
    return [torch.full((2, 4), float(i)) + torch.linspace(0, 0.5, 8).view(2, 4) for i in range(count)]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(numbered(3))


SHAPES = {
    "tensors": lambda: numbered(3),
    "tuples": lambda: [(b,) for b in numbered(3)],
    "lists": lambda: [[b] for b in numbered(3)],
    "dicts": lambda: [{"x": b} for b in numbered(3)],
    "calls": lambda: [Call((b,), {}) for b in numbered(3)],
    "generator": lambda: (b for b in numbered(3)),
    "DataLoader of tuples": lambda: DataLoader(TensorDataset(torch.cat(numbered(3))), batch_size=2),
    "DataLoader of a stream": lambda: DataLoader(Stream(), batch_size=None),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_kinds_of_calibration_data(shape):
    watching, progress = Watching(), []
    result = quantize(model(), numbered(1)[0], watching, SHAPES[shape](), progress=lambda *done: progress.append(done))
    assert watching.seen == [0.0, 2.0]
    assert result.report.sqnr_source == "1 held-out batch"
    total = None if shape in ("generator", "DataLoader of a stream") else 2
    assert progress == [(1, total), (2, total)]


def test_keyword_and_several_inputs():
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    by_name = quantize(model(), (x,), products(), [{"x": x, "y": y}], kwargs={"y": y})
    assert by_name(x, y=y).shape == (2, 3)
    torch.manual_seed(0)
    by_place = quantize(model(), (x, y), products(), [(x, y)])
    assert by_place(x, y).shape == (2, 3)


@pytest.mark.parametrize(
    ("count", "held"), [(1, []), (2, [1]), (8, [1]), (9, [1]), (10, [1, 9]), (80, [1, 9, 17, 25, 33, 41, 49, 57])]
)
def test_held_out_batches_are_never_calibrated_on(count, held):
    watching = Watching()
    result = quantize(model(), numbered(1)[0], watching, numbered(count), min_sqnr_db=None)
    assert watching.seen == [float(i) for i in range(count) if i not in held]
    kind = f"{len(held)} held-out batch{'es' if len(held) > 1 else ''}" if held else "1 calibration batch"
    assert result.report.sqnr_source == kind


@pytest.mark.parametrize("data", [torch.randn(2, 4), {"x": torch.randn(2, 4)}, "data"])
def test_one_batch_that_is_not_in_a_list(data):
    with pytest.raises(Quant2eError, match=r"wrap a single batch in a list: \[batch\]"):
        quantize(model(), torch.randn(2, 4), products(), data)


def test_no_data():
    x = torch.randn(2, 4)
    with pytest.raises(CalibrationError, match="held no batch"):
        quantize(model(), x, products(), iter(()))
    with pytest.raises(CalibrationError, match="saw no data"):
        quantize(model(), x, products())
    for quantizer in (products(act=DYNAMIC, output=None), products(act=None, output=None)):
        assert quantize(model(), x, quantizer).report.sqnr_source == "the example inputs"


def test_zero_quantized_ops():
    with pytest.raises(Quant2eError, match=r"(?s)Annotate quantized none of the model's 1 float ops.*linear +float"):
        quantize(model(), torch.randn(2, 4), NOTHING)
    with pytest.raises(Quant2eError, match=r"1 float ops: .*Give it a configuration \(set_global, say\)"):
        quantize(model(), torch.randn(2, 4), NOTHING)
    result = quantize(model(), torch.randn(2, 4), NOTHING, allow_unquantized=True)
    assert result.report.quantized_ops == 0
    assert result.report.sqnr_db == math.inf


def test_training_mode():
    with pytest.raises(CaptureError, match="training mode"):
        quantize(nn.Sequential(nn.Linear(4, 4), nn.Dropout()), torch.randn(2, 4), products(), numbered(2))


def test_an_exported_program_and_a_captured_graph():
    x = torch.randn(2, 4)
    eager = model()
    results = [
        quantize(m, x, products(), numbered(3)) for m in (eager, torch.export.export(eager, (x,)), capture(eager, x))
    ]
    for other in results[1:]:
        assert torch.equal(other(x), results[0](x))
        assert other.encodings == results[0].encodings


def test_the_model_is_untouched():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.calls.add_(1)
            return self.linear(x.relu_())

    eager = Counts().eval()
    before, rng = {k: v.clone() for k, v in eager.state_dict().items()}, torch.get_rng_state()
    example, data = torch.randn(2, 4), numbered(3)
    kept = example.clone()
    torch.set_rng_state(rng)
    result = quantize(eager, example, products(), data)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(example, kept)
    assert all(torch.equal(v, before[k]) for k, v in eager.state_dict().items())
    assert result.module.get_buffer("calls").item() == 0
    result(example)
    assert eager.calls.item() == 0


# --------------------------------------------------------------------------------------------------- what has no signal


def three_layers():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def rows(count=10, **changed):
    data = [torch.randn(16, 8) for _ in range(count)]
    for at, value in changed.items():
        data[int(at.removeprefix("batch"))][0, 0] = value
    return data


def per_tensor():
    return products(weight=WEIGHT_PER_TENSOR)


def test_one_huge_value_in_the_data():
    spec = QuantizationSpec(torch.int8, HistogramObserver, -128, 127, torch.per_tensor_affine)
    data = rows(batch3=1e30)
    with pytest.raises(AccuracyError) as caught:
        quantize(three_layers(), data[0], products(act=spec, output=None), data)
    text = str(caught.value)
    assert re.search(r"SQNR \d\.\d dB on 2 held-out batches, and at least 10 dB were asked for", text)
    assert text.splitlines()[1].startswith("  'input_1' (input): 0.0 dB by itself (weights inf, activations 0.0)")
    assert "few values own its range: look at the data" in text.splitlines()[1]
    assert "a few values own its range" in text
    assert "min_sqnr_db=None" in text.splitlines()[-1]
    kept = quantize(three_layers(), data[0], products(act=spec, output=None), data, min_sqnr_db=None)
    assert kept.report.sqnr_db < 10.0


def test_one_huge_row_of_a_weight():
    """The row that owns the scale is read by a weight of zero: all that counts is lost."""
    model = three_layers()
    with torch.no_grad():
        model[2].weight[3] *= 1e6
        model[4].weight[:, 3] = 0.0
    data = rows()
    with pytest.raises(AccuracyError) as caught:
        quantize(model, data[0], per_tensor(), data)
    lines = str(caught.value).splitlines()
    assert "'linear_2' (aten.linear.default) in module '4'" in lines[1]
    assert any("7 of 8 channels (0, 1, 2, 4, 5, …) become all zero" in line for line in lines)


def test_the_least_sqnr_is_a_parameter():
    layers, data = three_layers(), rows()
    found = quantize(layers, data[0], products(), data).report.sqnr_db
    with pytest.raises(AccuracyError, match="at least 90 dB"):
        quantize(layers, data[0], products(), data, min_sqnr_db=90)
    assert quantize(layers, data[0], products(), data, min_sqnr_db=found - 0.1).report.sqnr_db == found
    with pytest.raises(Quant2eError, match="min_sqnr_db='high': a number of dB"):
        quantize(layers, data[0], products(), data, min_sqnr_db="high")


@pytest.mark.parametrize("place", [0, 1, 2, 8, 9])  # of which the second and the last are held out
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_data_that_is_not_finite(place, value):
    data = rows(**{f"batch{place}": value})
    with pytest.raises(CalibrationError, match=rf"calibration batch {place} holds (NaN|\+inf) in its input 'input'"):
        quantize(three_layers(), torch.zeros(16, 8), products(), data)


class Logs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x.log())


def test_a_model_that_makes_nan_of_held_out_data():
    """It reaches an observed tensor, where ranges are compared, or only the output."""
    spec = QuantizationSpec(torch.int8, HistogramObserver, -8, 7, torch.per_tensor_affine)
    data = [(batch**3).exp() for batch in rows()]
    data[1][0, 0] = -1.0
    with pytest.raises(CalibrationError, match="calibration batch 1 brings NaN or .* to the output of 'log'"):
        quantize(Logs().eval(), data[0], products(act=spec, output=None), data)
    with pytest.raises(CalibrationError, match="the float model returns NaN on batch 0 of 2 held-out batches"):
        quantize(Logs().eval(), data[0], products(output=None), data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration_data": 7}, "calibration_data is an iterable of batches .*, and this is a int"),
        ({"calibration_data": ["ab"]}, "calibration batch 0 is a str"),
        (
            {"calibration_data": [(torch.zeros(2, 5), None, torch.ones(1))]},
            "got 3 positional inputs.*transform=",
        ),
        ({"calibration_data": [torch.zeros(2, 4, dtype=torch.int64)]}, "'x' has dtype torch.int64, .*float32"),
        ({"calibration_data": numbered(2), "progress": 5}, "progress is a int"),
        ({"calibration_data": numbered(2), "kwargs": 5}, "kwargs is a int"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments, message):
    with pytest.raises(Quant2eError, match=message):
        quantize(model(), torch.randn(2, 4), products(), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_batches": 2.5}, r"num_batches=2\.5: a whole number"),
        ({"num_batches": True}, "num_batches=True: a whole number"),
        ({"num_batches": 0}, "num_batches=0: a whole number, at least one"),
        ({"seconds": "3"}, "seconds='3': a time budget"),
        ({"range_tolerance": "small"}, "range_tolerance='small': the part"),
        ({"checkpoint": 5}, "checkpoint is a int"),
    ],
)
def test_options_of_the_wrong_kind(options, message):
    prepared = prepare_pt2e(capture(model(), torch.randn(2, 4)), products())
    with pytest.raises(CalibrationError, match=message):
        calibrate(prepared, numbered(2), **options)


def test_what_was_not_prepared_is_not_calibrated():
    captured = capture(model(), torch.randn(2, 4))
    with pytest.raises(CalibrationError, match="was not prepared.*call prepare_pt2e"):
        calibrate(captured, numbered(2))
    converted = convert_pt2e(calibrate(prepare_pt2e(captured, products()), numbered(2)))
    with pytest.raises(CalibrationError, match="converted already"):
        calibrate(converted, numbered(2))
    assert calibrate(prepare_pt2e(captured, NOTHING), numbered(2)) is not None
    for wrong in (torch.float64, torch.int64):
        with pytest.raises(
            CaptureError, match=f"input 'x' has dtype {wrong}, and the model was captured with .*float32"
        ):
            converted(torch.ones(2, 4, dtype=wrong))


# ----------------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize(
    ("signal", "noise", "db"),
    [(1.0, 1.0, 0.0), (100.0, 1.0, 20.0), (1.0, 1000.0, -30.0), (1.0, 0.0, math.inf), (0.0, 0.0, math.inf)],
)
def test_sqnr(signal, noise, db):
    assert sqnr_db(signal, noise) == pytest.approx(db)


def test_sqnr_of_silence_with_noise():
    assert sqnr_db(0.0, 1.0) == -math.inf


def test_output_sqnr_adds_powers_over_batches_and_outputs():
    reference = lambda x: {"a": x, "ids": torch.tensor([7]), "b": (2 * x,)}
    candidate = lambda x: {"a": x + 1, "ids": torch.tensor([9]), "b": (2 * x,)}
    batches = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])]
    assert output_sqnr(reference, candidate, batches) == pytest.approx(10 * math.log10((25 + 100) * 2 / 4))


@pytest.mark.parametrize(("masked", "db"), [(-math.inf, math.inf), (0.0, -math.inf), (math.nan, -math.inf)])
def test_output_sqnr_of_masked_scores(masked, db):
    reference = lambda x: torch.stack([x, torch.full_like(x, -math.inf)])
    candidate = lambda x: torch.stack([x, torch.full_like(x, masked)])
    assert output_sqnr(reference, candidate, [torch.ones(2)]) == db


def test_output_sqnr_of_a_result_that_is_not_finite():
    for value in (math.nan, math.inf):
        assert output_sqnr(lambda x: x, lambda x: x * value, [torch.ones(2)]) == -math.inf


def test_a_model_that_writes_into_its_input_is_measured_on_equal_inputs():
    data = torch.ones(2)
    assert (
        output_sqnr(lambda x: x.mul_(2), lambda x: x.mul_(2), [data, (data,), {"x": data}, Call((data,), {})])
        == math.inf
    )
    assert torch.equal(data, torch.ones(2))


def test_the_sqnr_of_a_linear_by_hand():
    eager = nn.Linear(4, 3).eval()
    batches = [torch.randn(2, 4) for _ in range(3)]
    result = quantize(eager, batches[0], products(), batches)
    wanted, got = eager(batches[1]).detach().double(), result(batches[1]).detach().double()
    by_hand = 10 * math.log10(float(wanted.square().sum() / (wanted - got).square().sum()))
    assert result.report.sqnr_db == pytest.approx(by_hand)
    assert 10 < by_hand < 60


# ------------------------------------------------------------------------------------------------------------- report


class Mixed(nn.Module):
    """Every verdict once: static, float with a reason, folded."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x, ids):
        y = self.norm(self.conv(x)).relu()
        return self.head(y.mean((2, 3)) * (self.scale * 2.0)), ids + 1


def mixed(quantizer=None):
    inputs = (torch.randn(2, 3, 6, 6), torch.arange(2))
    return quantize(Mixed().eval(), inputs, quantizer or products(), [inputs] * 2)


def test_golden_report(golden):
    text = str(mixed().report)
    lines = [
        line if not line.startswith("SQNR") else "SQNR against float: … dB" + line.partition(" dB")[2]
        for line in text.splitlines()
    ]
    golden("reports/mixed", "\n".join(lines))


def test_verdicts():
    report = mixed().report
    kinds = {v.op.name: v.kind for v in report.verdicts}
    assert kinds == {
        "conv2d": STATIC,
        "batch_norm": FOLDED,
        "relu": FLOAT,
        "mean": FLOAT,
        "mul": FOLDED,
        "mul_1": FLOAT,
        "linear": STATIC,
    }
    assert report.of("batch_norm").reason == "into conv2d"
    assert report.of("mul").reason == "a constant, computed from parameters"
    assert report.of("relu").reason == "Annotate did not annotate aten.relu.default"
    assert {v.op.module for v in report.verdicts} == {"conv", "norm", "head", ""}
    with pytest.raises(KeyError):
        report.of("nothing")


@pytest.mark.parametrize(
    ("quantizer", "kind"),
    [
        (products(), STATIC),
        (products(act=DYNAMIC, output=None), DYNAMIC_KIND),
        (products(act=None, output=None), WEIGHT_ONLY),
    ],
)
def test_kinds(quantizer, kind):
    report = mixed(quantizer).report
    assert report.of("conv2d").kind == report.of("linear").kind == kind
    assert report.quantized_ops == 2
    assert report.int8_mac_share == (0.0 if kind == WEIGHT_ONLY else 1.0)


def test_the_share_of_multiply_accumulates():
    report = mixed(on(aten.conv2d.default, [ACT, WEIGHT], ACT)).report
    conv, head = 2 * 8 * 4 * 4 * 3 * 3 * 3, 2 * 2 * 8
    assert report.of("conv2d").op.macs == conv
    assert report.of("linear").op.macs == head
    assert report.int8_mac_share == conv / (conv + head)


def test_sizes():
    report = mixed().report
    float_bytes = 4 * (8 * 27 + 4 * 8 + 16 + 2 + 8) + 8
    weights, parameters, floats = 8 * 27 + 16, (8 + 2) * (4 + 8), 4 * (8 + 2 + 8)
    assert report.float_bytes == float_bytes
    assert report.quantized_bytes == weights + parameters + floats


def test_reports_survive_plain_data():
    report = mixed().report
    assert Report.from_dict(report.as_dict()) == report


def test_an_annotation_that_came_to_nothing_is_said():
    ids = QuantizationSpec(ACT.dtype, ACT.observer_or_fake_quant_ctr, -128, 127, ACT.qscheme)
    result = quantize(
        Mixed().eval(),
        (inputs := (torch.randn(2, 3, 6, 6), torch.arange(2))),
        on(aten.add.Tensor, [ids]),
        [inputs],
        allow_unquantized=True,
    )
    assert result.report.notes == ("annotation of (ids -> add) ignored: it is a int64 tensor, not a float one",)


# ----------------------------------------------------------------------------------------------- multiply-accumulates

MACS = {
    "linear": (lambda x: nn.functional.linear(x, torch.ones(5, 4)), (3, 4), 3 * 4 * 5),
    "linear of rank 4": (lambda x: nn.functional.linear(x, torch.ones(5, 4)), (2, 2, 3, 4), 2 * 2 * 3 * 4 * 5),
    "linear by keyword": (lambda x: nn.functional.linear(input=x, weight=torch.ones(5, 4)), (3, 4), 3 * 4 * 5),
    "matmul": (lambda x: x @ torch.ones(4, 5), (3, 4), 3 * 4 * 5),
    "matmul of vectors": (lambda x: x @ torch.ones(4), (4,), 4),
    "matrix and vector": (lambda x: x @ torch.ones(4), (3, 4), 12),
    "batched, broadcast": (lambda x: x @ torch.ones(7, 1, 4, 5), (2, 3, 4), 7 * 2 * 3 * 4 * 5),
    "bmm": (lambda x: torch.bmm(x, torch.ones(2, 4, 5)), (2, 3, 4), 2 * 3 * 4 * 5),
    "addmm": (lambda x: torch.addmm(torch.ones(5), x, torch.ones(4, 5)), (3, 4), 3 * 4 * 5),
    "einsum": (lambda x: torch.einsum("ij,jk->ik", x, torch.ones(4, 5)), (3, 4), 3 * 4 * 5),
    "einsum with an ellipsis": (
        lambda x: torch.einsum("...j,jk->...k", x, torch.ones(4, 5)), (2, 3, 4), 2 * 3 * 4 * 5,
    ),
    "einsum without a result": (lambda x: torch.einsum("ij,kj", x, torch.ones(5, 4)), (3, 4), 3 * 4 * 5),
    "einsum of one tensor": (lambda x: torch.einsum("ij,ij->i", x, x), (3, 4), 12),
    "transpose by einsum": (lambda x: torch.einsum("ij->ji", x), (3, 4), 0),
    "conv1d": (lambda x: nn.functional.conv1d(x, torch.ones(6, 4, 3)), (2, 4, 9), 2 * 6 * 7 * 4 * 3),
    "depthwise": (
        lambda x: nn.functional.conv2d(x, torch.ones(4, 1, 3, 3), groups=4), (2, 4, 8, 8), 2 * 4 * 6 * 6 * 9,
    ),
    "strided and padded": (
        lambda x: nn.functional.conv2d(x, torch.ones(6, 4, 3, 3), stride=2, padding=1),
        (1, 4, 8, 8),
        6 * 4 * 4 * 4 * 9,
    ),
    "transposed": (
        lambda x: nn.functional.conv_transpose2d(x, torch.ones(4, 6, 2, 2), stride=2), (1, 4, 5, 5), 4 * 25 * 6 * 4,
    ),
    "attention": (lambda x: nn.functional.scaled_dot_product_attention(x, x, x), (2, 3, 5, 8), 2 * (2 * 3 * 5 * 8 * 5)),
    "addition": (lambda x: x + x, (3, 4), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", MACS)
def test_multiply_accumulates(name):
    function, shape, wanted = MACS[name]

    class Wrapped(nn.Module):
        def forward(self, x):
            return function(x)

    assert sum(op.macs for op in list_float_ops(capture(Wrapped().eval(), torch.randn(shape)))) == wanted


def test_multiply_accumulates_of_dynamic_shapes_are_those_of_the_example():
    shapes = ({0: torch.export.Dim("n", min=2, max=64)},)
    gm = capture(nn.Linear(4, 5).eval(), torch.randn(3, 4), dynamic_shapes=shapes)
    assert max(count_macs(node) for node in gm.graph.nodes) == 3 * 4 * 5


class Index(nn.Module):
    """Returns no float."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 100))

    def forward(self, x):
        return self.layers(x).argmax(-1)


def test_an_output_that_is_no_float_is_measured_at_the_last_float():
    result = quantize(Index().eval(), rows()[0], products(), rows())
    assert 20.0 < result.report.sqnr_db < 60.0
    assert result.report.sqnr_source.endswith("at 'linear_1': no output of the model is a float")
    spec = QuantizationSpec(torch.int8, HistogramObserver, -128, 127, torch.per_tensor_affine)
    with pytest.raises(AccuracyError, match="at 'linear_1': no output of the model is a float"):
        quantize(Index().eval(), rows()[0], products(act=spec, output=None), rows(batch3=1e30))


def test_a_model_that_draws_numbers_draws_the_same_ones():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.second(self.first(x) + torch.randn_like(x))

    assert quantize(Noisy().eval(), rows()[0], products(), rows()).report.sqnr_db > 20.0


def test_data_is_left_alone_by_a_model_that_writes_to_its_input():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            x.add_(1.0)
            return self.layer(x)

    data = rows()
    before = [x.clone() for x in data]
    quantize(Writing().eval(), rows()[0], products(), data)
    assert all(map(torch.equal, data, before))


def test_a_model_without_any_float_is_returned_when_that_is_asked_for():
    class Count(nn.Module):
        def forward(self, ids):
            return ids + 1

    ids = torch.arange(4)
    result = quantize(Count().eval(), ids, products(), [ids] * 3, allow_unquantized=True)
    assert result.report.sqnr_db == math.inf
