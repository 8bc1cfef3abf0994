"""Losses: shares that become zero or are clipped, exactly, and what becomes of a tensor of which nothing is left."""

import math

import pytest
import torch
from torch import nn

import quant2e
from quant2e.annotation.specs import QuantizationSpec
from quant2e.convert.losses import activation_loss, constant_loss
from quant2e.errors import CalibrationError, QuantizationWarning
from quant2e.observers.encodings import PerChannelEncoding, PerGroupEncoding, PerTensorEncoding
from quant2e.observers.measuring import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from quant2e.report.report import FLOAT
from tests.quant2e.annotators import ACT, NOTHING, WEIGHT, WEIGHT_PER_TENSOR, products

INT8 = {"quant_min": -127, "quant_max": 127, "dtype": torch.int8}
X = torch.tensor([[0.0, 0.4, -1.0, 130.0], [0.2, -0.5, 0.1, 0.0], [3.0, 4.0, -5.0, 0.3], [0.0, 0.0, 0.0, 0.0]])


def test_one_scale_for_all():
    loss = constant_loss(X, PerTensorEncoding(scale=1.0, zero_point=0, **INT8))
    assert (loss.flushed, loss.clipped) == (5 / 16, 1 / 16)  # half a step is zero: ties go to even
    assert (loss.lost, loss.parts, loss.gone, loss.kind) == ((1,), 4, False, "tensor")  # the last row was zero before
    assert str(loss) == (
        "1 of 4 channels (1) becomes all zero, 31.2% of its values become zero, 6.2% of its values are clipped; "
        "a scale per channel keeps them (is_per_channel=True)"
    )


def test_a_scale_for_each_channel():
    scales = torch.tensor([1.0, 0.01, 8.0, 10.0])
    by_column = PerChannelEncoding(scale=scales, zero_point=torch.zeros(4, dtype=torch.int64), axis=1, **INT8)
    loss = constant_loss(X, by_column)
    # 0.2 in steps of 1; -1 and 0.1, not -5, in steps of 8; 0.3 in steps of 10
    assert (loss.flushed, loss.lost) == (4 / 16, ())
    loss = constant_loss(X, PerChannelEncoding(scale=scales * 4, zero_point=torch.zeros(4), axis=0, **INT8))
    assert (loss.flushed, loss.lost) == (0.0, ())  # with float zero points, zero is no integer
    assert "more bits" in str(
        constant_loss(X, PerChannelEncoding(scale=scales * 99, zero_point=by_column.zero_point, axis=0, **INT8))
    )


def test_a_scale_for_each_group():
    encoding = PerGroupEncoding(
        scale=torch.tensor([[1.0, 2.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]),
        zero_point=torch.zeros(4, 2, dtype=torch.int32),
        group_size=2,
        **INT8,
    )
    loss = constant_loss(X, encoding)
    assert (loss.lost, loss.parts) == ((0, 2, 3), 8)
    assert "3 of 8 groups (0, 2, 3) become all zero" in str(loss)


def test_counts_of_a_histogram():
    observer = HistogramObserver(dtype=torch.int8, qscheme=torch.per_tensor_affine)
    values = torch.cat([torch.linspace(-1, 1, 4001), torch.tensor([1000.0])])
    observer(values)
    wide = PerTensorEncoding(scale=1000 / 255, zero_point=-128, quant_min=-128, quant_max=127, dtype=torch.int8)
    loss = activation_loss(observer, wide)
    assert loss.flushed == pytest.approx(4001 / 4002, abs=1e-6)
    assert loss.worth_a_word
    narrow = PerTensorEncoding(scale=1 / 127, zero_point=0, **INT8)
    loss = activation_loss(observer, narrow)
    assert loss.clipped == pytest.approx(1 / 4002)
    assert not loss.worth_a_word


def test_zeros_behind_a_relu_are_no_loss():
    observer = HistogramObserver(dtype=torch.int8)
    observer(torch.randn(10_000).sub(1.0).relu())
    scale, zero = observer.calculate_qparams()
    encoding = PerTensorEncoding(
        scale=float(scale),
        zero_point=int(zero),
        quant_min=observer.quant_min,
        quant_max=observer.quant_max,
        dtype=torch.int8,
    )
    assert not activation_loss(observer, encoding).worth_a_word
    assert activation_loss(MinMaxObserver(dtype=torch.int8), encoding) is None


# ------------------------------------------------------------------------------------------- the flow, step by step


def spread(decades=6.0):
    model = nn.Linear(8, 16, bias=False).eval()
    with torch.no_grad():
        model.weight.mul_(torch.logspace(0, -decades, 16)[:, None])
    return model


def flow(model, quantizer, data=None):
    data = torch.randn(64, 8) if data is None else data
    prepared = quant2e.prepare_pt2e(quant2e.capture(model, data), quantizer)
    return quant2e.calibrate(prepared, [data])


def test_channels_that_become_zero_are_named_with_what_helps():
    prepared = flow(spread(), products(weight=WEIGHT_PER_TENSOR))
    with pytest.warns(
        QuantizationWarning, match="1 of 1 float ops quantized, 0 left float, 1 tensor losing values; print"
    ):
        gm = quant2e.convert_pt2e(prepared)
    report = quant2e.report_of(gm)
    (loss,) = report.losses
    assert "'weight', read by 'linear'" in loss
    assert "9 of 16 channels (7, 8, 9, 10, 11, …) become all zero" in loss
    assert "is_per_channel=True" in loss
    assert str(report).splitlines()[3].startswith("loss: 'weight'")
    assert quant2e.Report.from_dict(report.as_dict()) == report
    per_channel = quant2e.convert_pt2e(flow(spread(), products(weight=WEIGHT)))
    assert quant2e.report_of(per_channel).losses == ()


def test_the_worst_loss_comes_first():
    model = nn.Sequential(spread(4.0), nn.Linear(16, 8), nn.Linear(8, 16), spread(8.0)).eval()
    model[3] = nn.Linear(16, 16)
    with torch.no_grad():
        model[3].weight.mul_(torch.logspace(0, -8, 16)[:, None])
    gm = quant2e.convert_pt2e(flow(model, products(weight=WEIGHT_PER_TENSOR)))
    losses = quant2e.report_of(gm).losses
    assert ["'_3_weight'" in losses[0], "'_0_weight'" in losses[1]] == [True, True]


@pytest.mark.parametrize("observer", [MinMaxObserver, HistogramObserver])
def test_an_activation_of_which_nothing_is_left_is_an_error(observer):
    spec = QuantizationSpec(torch.int8, observer, -128, 127, torch.per_tensor_symmetric)
    prepared = flow(nn.Linear(8, 8).eval(), products(act=spec, output=None), torch.full((2, 8), 1e-12))
    with pytest.raises(
        CalibrationError, match=r"(?s)'input_1', read by 'linear'.*every value rounds to 0.*smaller eps"
    ):
        quant2e.convert_pt2e(prepared)


@pytest.mark.parametrize("spec", [WEIGHT, WEIGHT_PER_TENSOR])
def test_a_weight_of_which_nothing_is_left_is_an_error(spec):
    model = nn.Linear(8, 8).eval()
    with torch.no_grad():
        model.weight.mul_(1e-12)
    with pytest.raises(CalibrationError, match=r"(?s)'weight', read by 'linear'.*every value rounds to 0"):
        quant2e.convert_pt2e(flow(model, products(weight=spec)))
    with torch.no_grad():
        model.weight.zero_()
    assert (
        quant2e.convert_pt2e(flow(model, products(weight=spec, output=None))) is not None
    )  # zero before: nothing is lost


def test_one_warning_with_counts(recwarn):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x).softmax(-1) * 2.0

    converted = quant2e.convert_pt2e(flow(Mixed().eval(), products()))
    (warning,) = [w for w in recwarn if issubclass(w.category, QuantizationWarning)]
    assert str(warning.message) == (
        "convert_pt2e: 1 of 3 float ops quantized, 2 left float; "
        "print(quant2e.report_of(converted)) says which, and why"
    )
    assert warning.filename == __file__
    assert sum(verdict.kind == FLOAT for verdict in quant2e.report_of(converted).verdicts) == 2


def test_a_quantizer_without_a_configuration(recwarn):
    quant2e.convert_pt2e(flow(nn.Linear(8, 8).eval(), NOTHING))
    (warning,) = [w for w in recwarn if issubclass(w.category, QuantizationWarning)]
    assert "none of 1 float ops quantized, 1 left float (does the quantizer have a configuration?" in str(
        warning.message
    )


def test_nothing_to_say(recwarn):
    quant2e.convert_pt2e(flow(nn.Linear(8, 8).eval(), products()))
    quant2e.quantize(
        nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1)).eval(), torch.randn(64, 8), products(), [torch.randn(64, 8)]
    )
    assert [w for w in recwarn if issubclass(w.category, QuantizationWarning)] == []


@pytest.mark.parametrize(("samples", "noted"), [(5, True), (31, True), (32, False)])
def test_few_samples_are_noted(samples, noted):
    data = torch.randn(samples, 8)
    prepared = quant2e.prepare_pt2e(quant2e.capture(nn.Linear(8, 8).eval(), data[:1]), products())
    if samples == 5:
        prepared = quant2e.prepare_pt2e(quant2e.capture(nn.Linear(8, 8).eval(), data), products())
        quant2e.calibrate(prepared, [data])
    else:
        quant2e.calibrate(prepared, list(data.split(1)))
    notes = quant2e.report_of(quant2e.convert_pt2e(prepared)).notes
    assert any(f"calibrated on only {samples} samples" in note for note in notes) is noted


def test_an_unknown_number_of_samples_is_not_noted():
    """Statistics of a file, a loop of one's own, and weights alone."""
    x = torch.randn(2, 8)
    captured = quant2e.capture(nn.Linear(8, 8).eval(), x)
    prepared = quant2e.prepare_pt2e(captured, products())
    prepared(x)
    weights = quant2e.calibrate(quant2e.prepare_pt2e(captured, products(act=None, output=None)), [x])
    for ready in (prepared, weights):
        assert not any("samples" in note for note in quant2e.report_of(quant2e.convert_pt2e(ready)).notes)


# ---------------------------------------------------------------------------------------------------- errors that name


def test_nan_deep_in_a_network_names_its_origin_first():
    class Broken(nn.Module):
        def forward(self, x):
            return (x - 5.0).log()

    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)), Broken(), *(nn.Linear(8, 8) for _ in range(12))).eval()
    spec = QuantizationSpec(torch.int8, HistogramObserver, -128, 127, torch.per_tensor_affine)
    x = torch.randn(64, 8)
    prepared = quant2e.prepare_pt2e(quant2e.capture(model, x), products(act=spec, output=spec))
    quant2e.calibrate(prepared, [x])
    with pytest.raises(CalibrationError) as caught:
        quant2e.convert_pt2e(prepared)
    lines = str(caught.value).splitlines()
    assert lines[0] == "13 tensors cannot be quantized:"
    assert "the output of 'log'" in lines[1]
    assert lines[-1].strip() == "and 8 more, which may follow from the first"
    assert len(lines) == 7


def test_a_weight_that_is_nan_comes_before_what_follows_from_it():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(9))).eval()
    with torch.no_grad():
        model[4].weight[0, 0] = math.nan
    prepared = flow(
        model,
        products(
            act=ACT,
            output=ACT,
            weight=QuantizationSpec(
                torch.int8, PerChannelMinMaxObserver, -127, 127, torch.per_channel_symmetric, ch_axis=0
            ),
        ),
    )
    with pytest.raises(CalibrationError) as caught:
        quant2e.convert_pt2e(prepared)
    assert "'_4_weight', read by 'linear_4'" in str(caught.value).splitlines()[1]


def test_a_verdict_is_one_line():
    class Talks:
        def annotate(self, gm):
            return gm

        def validate(self, gm):
            """Anything goes."""

        def reason(self, node):
            return "because " + "of this\tand   that " * 200

    x = torch.randn(2, 8)
    prepared = quant2e.prepare_pt2e(quant2e.capture(nn.Linear(8, 8).eval(), x), Talks())
    (verdict,) = quant2e.report_of(prepared).verdicts
    assert verdict.reason.startswith("because of this and that of this")
    assert verdict.reason.endswith(" …")
    assert len(verdict.reason) <= 240
